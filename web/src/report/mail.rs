//! Mails that came to the bounce address: reports of mail servers and providers, and what only looks like one. What a mail
//! claims counts for nothing until it is compared with the message that it names: anybody can write to that address.

use std::borrow::Cow;

use mail_parser::{Message, MessageParser, MessagePart, MimeHeaders as _, PartType};

use super::{
    arf,
    claim::{Claim, NotUnderstood},
    dsn, text,
};

/// A mail may hold a mail, which may hold a mail: each level has a Content-Type, and is let go of by recursion. A bounce, with the mail
/// that it is about, has a handful.
const MAX_PARTS: usize = 200;

/// What came back.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Returned {
    /// What it claims about addresses; none: it is a notice of a delay, an automatic reply, or another mail.
    pub(crate) claims: Vec<Claim>,
    /// All its text, decoded: somewhere in it stands the id of the message that it is about.
    pub(crate) quoted: String,
}

pub(super) fn read(content_type: Option<&str>, body: &[u8]) -> Result<Returned, NotUnderstood> {
    const FIELD: &[u8] = b"content-type";
    if body.windows(FIELD.len()).filter(|bytes| bytes.eq_ignore_ascii_case(FIELD)).nth(MAX_PARTS).is_some() {
        return Err(NotUnderstood("it has more than 200 parts"));
    }
    let reunited = reunited(content_type, body);
    let body = reunited.as_deref().unwrap_or(body);
    let Some(mail) = MessageParser::default().parse(body) else { return Err(NotUnderstood("it is empty")) };
    let claims = if let Some(report) = part_of(&mail, &["feedback-report"]) {
        arf::claims(&content(report), &mail)
    } else if let Some(status) = part_of(&mail, &["delivery-status", "global-delivery-status"]) {
        dsn::claims(&content(status))
    } else if let Ok(fields) = std::str::from_utf8(body)
        && dsn::is_status(fields)
    {
        // The part that machines read, without a mail around it.
        dsn::claims(fields)
    } else if is_mail(&mail) {
        text::claims(&mail)
    } else {
        return Err(NotUnderstood("it is neither JSON nor a mail"));
    };
    Ok(Returned { claims, quoted: quoted(&mail, body) })
}

/// A mail that a program has taken apart: its first header went into the request's.
fn reunited(content_type: Option<&str>, body: &[u8]) -> Option<Vec<u8>> {
    let is_multipart =
        |kind: &str| kind.trim_start().get(..10).is_some_and(|start| start.eq_ignore_ascii_case("multipart/"));
    let kind = content_type.filter(|kind| is_multipart(kind) && body.trim_ascii_start().starts_with(b"--"))?;
    let mut mail = format!("Content-Type: {}\r\n\r\n", kind.replace(['\r', '\n'], " ")).into_bytes();
    mail.extend_from_slice(body);
    Some(mail)
}

/// Whether it has a header that every mail that was delivered has.
fn is_mail(mail: &Message<'_>) -> bool {
    ["From", "Return-Path", "Received", "Date"].into_iter().any(|name| mail.header_raw(name).is_some())
}

/// The part of this kind of `message/…`.
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

/// All text of a mail: as it came, and decoded where it was encoded.
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
