//! What a report claims about an address, and what its evidence proves.

use mailrun_core::{
    address::{Address, mailbox},
    reply::{ReplyClass, classify_report},
};
use mailrun_ledger::suppressions::Reason;
use serde_json::Value;
use uuid::Uuid;

use super::fields::untyped;

/// Details are truncated to this length.
pub(super) const MAX_DETAIL_CHARS: usize = 500;

/// An address to suppress.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ReportedAddress {
    /// Normalised for comparison.
    pub(crate) email: String,
    pub(crate) reason: Reason,
    /// The reporter's text.
    pub(crate) detail: Option<String>,
    /// The run of the message, if the report proves it.
    pub(crate) run_id: Option<Uuid>,
}

impl ReportedAddress {
    /// Parses an address from a report, which may include a name. None: it is not an address.
    pub(super) fn new(address: &str, reason: Reason, detail: Option<&str>) -> Option<Self> {
        let Address { email, .. } = address.parse().ok()?;
        let detail = detail.map(one_line).filter(|detail| !detail.is_empty());
        Some(Self { email, reason, detail, run_id: None })
    }
}

/// A claim that an address must be suppressed.
#[derive(Debug, PartialEq)]
pub(crate) struct Claim {
    /// The address in all forms that the report contains: original, forwarded, encoded and decoded.
    pub(crate) addresses: Vec<String>,
    pub(crate) reason: Reason,
    /// The reporter's text, on one line.
    pub(crate) detail: Option<String>,
}

impl Claim {
    /// A nonexistent mailbox, if the evidence proves it.
    pub(super) fn bounced(addresses: Vec<String>, status: Option<&str>, diagnostic: Option<&str>) -> Option<Self> {
        let detail = diagnostic.filter(|text| !text.is_empty()).or(status);
        classify_report(status, diagnostic).suppresses().then(|| Self::new(addresses, Reason::Bounced, detail))
    }

    pub(super) fn new(addresses: Vec<String>, reason: Reason, detail: Option<&str>) -> Self {
        Self { addresses, reason, detail: detail.map(one_line).filter(|detail| !detail.is_empty()) }
    }

    /// Whether the claim is about this address of the ledger.
    pub(crate) fn is_about(&self, email: &str) -> bool {
        let Ok(ours) = mailbox(email) else { return false };
        self.addresses.iter().any(|address| mailbox(address).is_ok_and(|address| address == ours))
    }
}

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ReportError(pub(super) &'static str);

/// Whether a bounce that a provider calls permanent is about the mailbox: the mail server's reply may disprove it. Without a
/// reply, or with an unknown one, the provider's classification counts.
pub(super) fn is_about_the_mailbox(status: Option<&str>, diagnostic: Option<&str>) -> bool {
    // A permanent failure without a known cause.
    let classified = classify_report(status.or(Some("5.0.0")), diagnostic.map(untyped));
    let says_nothing =
        status.is_none_or(|status| status.trim().is_empty()) && diagnostic.is_none_or(|text| text.trim().is_empty());
    says_nothing || classified.suppresses() || (classified.permanent && classified.class == ReplyClass::Unknown)
}

pub(super) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ").chars().take(MAX_DETAIL_CHARS).collect()
}

/// The string at a path of keys.
pub(super) fn text<'a>(json: &'a Value, path: &[&str]) -> Option<&'a str> {
    path.iter().try_fold(json, |json, key| json.get(key))?.as_str()
}
