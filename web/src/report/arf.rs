//! Abuse reports (RFC 5965): a provider reports that a recipient marked a mail as spam.

use mail_parser::{Address as Addresses, Message, MessageParser, PartType};
use mailrun_ledger::suppressions::Reason;

use super::{
    claim::Claim,
    fields::{field, fields},
};

/// The recipients who complained. A report without a recipient, or of another type, claims nothing.
pub(super) fn claims(report: &str, mail: &Message<'_>) -> Vec<Claim> {
    let fields = fields(&mut report.lines());
    let kind = field(&fields, "Feedback-Type").unwrap_or_default();
    let Some(reason) = reason(kind) else { return Vec::new() };
    let mut addresses: Vec<String> = fields
        .iter()
        .filter(|(name, _)| {
            ["Original-Rcpt-To", "Removal-Recipient"].iter().any(|known| name.eq_ignore_ascii_case(known))
        })
        .map(|(_, address)| address.trim_matches(['<', '>']).to_owned())
        .collect();
    // Many providers omit the recipient and return the mail with its header.
    if addresses.is_empty() {
        addresses = original_recipients(mail);
    }
    if addresses.is_empty() { Vec::new() } else { vec![Claim::new(addresses, reason, Some(kind))] }
}

/// None: the type is about authentication or malware, or says that the mail is not spam.
pub(super) fn reason(feedback_type: &str) -> Option<Reason> {
    let kind = feedback_type.split(['(', ';', ' ']).next().unwrap_or_default().to_ascii_lowercase();
    match kind.as_str() {
        "abuse" | "fraud" | "other" => Some(Reason::Complained),
        "opt-out" | "opt-out-list" => Some(Reason::Unsubscribed),
        _ => None,
    }
}

/// The recipients of the returned mail.
fn original_recipients(mail: &Message<'_>) -> Vec<String> {
    let to = |header: Option<&Addresses<'_>>| -> Vec<String> {
        let addresses = header.into_iter().flat_map(Addresses::iter);
        addresses.filter_map(|address| address.address.as_deref().map(str::to_owned)).collect()
    };
    mail.parts
        .iter()
        .map(|part| match &part.body {
            PartType::Message(original) => to(original.to()),
            // `text/rfc822-headers`
            PartType::Text(text) if text.to_ascii_lowercase().contains("message-id:") => {
                to(MessageParser::default().parse_headers(text.as_bytes()).as_ref().and_then(Message::to))
            }
            _ => Vec::new(),
        })
        .find(|recipients| !recipients.is_empty())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_feedback_types_suppress_nobody() {
        for kind in ["abuse", "Abuse", "fraud", "other", "abuse (spam)"] {
            assert_eq!(reason(kind), Some(Reason::Complained), "{kind}");
        }
        assert_eq!(reason("opt-out"), Some(Reason::Unsubscribed));
        for kind in ["auth-failure", "virus", "not-spam", "dkim", "miscategorized", "", "made up"] {
            assert_eq!(reason(kind), None, "{kind}");
        }
    }
}
