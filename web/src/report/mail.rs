//! Mails sent to the bounce address: reports of mail servers and providers, and other mail. A mail's claims count only after they
//! are compared with the message that it names: anyone can write to that address.

use std::borrow::Cow;

use mail_parser::{Message, MessageParser, MessagePart, MimeHeaders as _, PartType};

use super::{
    arf,
    claim::{Claim, ReportError},
    dsn, text,
};

/// Mails may nest. Each level has a Content-Type, and dropping nested parts recurses, so the depth is bounded. A bounce with its
/// original mail has a handful.
const MAX_PARTS: usize = 200;

#[derive(Debug, Default, PartialEq)]
pub(crate) struct Returned {
    /// Claims about addresses. Empty for a delay notice, an automatic reply, or another mail.
    pub(crate) claims: Vec<Claim>,
    /// All its text, decoded; it contains the id of the message that the mail is about.
    pub(crate) quoted: String,
}

pub(super) fn read(content_type: Option<&str>, body: &[u8]) -> Result<Returned, ReportError> {
    const FIELD: &[u8] = b"content-type";
    if body.windows(FIELD.len()).filter(|bytes| bytes.eq_ignore_ascii_case(FIELD)).nth(MAX_PARTS).is_some() {
        return Err(ReportError("it has more than 200 parts"));
    }
    let reunited = reunited(content_type, body);
    let body = reunited.as_deref().unwrap_or(body);
    let Some(mail) = MessageParser::default().parse(body) else { return Err(ReportError("it is empty")) };
    let claims = if let Some(report) = part_of(&mail, &["feedback-report"]) {
        arf::claims(&content(report), &mail)
    } else if let Some(status) = part_of(&mail, &["delivery-status", "global-delivery-status"]) {
        dsn::claims(&content(status))
    } else if let Ok(fields) = std::str::from_utf8(body)
        && dsn::is_status(fields)
    {
        // The machine-readable part, without a mail around it.
        dsn::claims(fields)
    } else if is_mail(&mail) {
        text::claims(&mail)
    } else {
        return Err(ReportError("it is neither JSON nor a mail message"));
    };
    Ok(Returned { claims, quoted: quoted(&mail, body) })
}

/// Restores a mail whose first header a program has moved into the request's header.
fn reunited(content_type: Option<&str>, body: &[u8]) -> Option<Vec<u8>> {
    let is_multipart =
        |kind: &str| kind.trim_start().get(..10).is_some_and(|start| start.eq_ignore_ascii_case("multipart/"));
    let kind = content_type.filter(|kind| is_multipart(kind) && body.trim_ascii_start().starts_with(b"--"))?;
    let mut mail = format!("Content-Type: {}\r\n\r\n", kind.replace(['\r', '\n'], " ")).into_bytes();
    mail.extend_from_slice(body);
    Some(mail)
}

/// Whether it has a header that every delivered mail has.
fn is_mail(mail: &Message<'_>) -> bool {
    ["From", "Return-Path", "Received", "Date"].into_iter().any(|name| mail.header_raw(name).is_some())
}

/// The `message/…` part of one of these subtypes.
fn part_of<'a, 'x>(mail: &'a Message<'x>, kinds: &[&str]) -> Option<&'a MessagePart<'x>> {
    mail.parts.iter().find(|part| {
        part.content_type().is_some_and(|kind| {
            kind.ctype().eq_ignore_ascii_case("message")
                && kind.subtype().is_some_and(|kind| kinds.iter().any(|known| kind.eq_ignore_ascii_case(known)))
        })
    })
}

fn content<'a>(part: &'a MessagePart<'_>) -> Cow<'a, str> {
    String::from_utf8_lossy(part.contents())
}

/// All text of a mail, raw and decoded.
fn quoted(mail: &Message<'_>, body: &[u8]) -> String {
    let mut text = String::from_utf8_lossy(body).into_owned();
    add_decoded(mail, &mut text);
    text
}

fn add_decoded(mail: &Message<'_>, text: &mut String) {
    for part in &mail.parts {
        match &part.body {
            PartType::Message(inner) => {
                text.push('\n');
                text.push_str(&String::from_utf8_lossy(inner.raw_message()));
                add_decoded(inner, text);
            }
            PartType::Multipart(_) => {}
            _ if part.encoding == mail_parser::Encoding::None => {}
            _ => {
                text.push('\n');
                text.push_str(&content(part));
            }
        }
    }
}
