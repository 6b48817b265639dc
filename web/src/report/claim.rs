//! What a report says about an address, and what that proves.

use mailrun_core::{
    address::{Address, mailbox},
    reply::{ReplyClass, classify_report},
};
use mailrun_ledger::suppressions::Reason;
use serde_json::Value;
use uuid::Uuid;

use super::fields::untyped;

/// The details of a report are cut beyond this.
pub(super) const MAX_DETAIL_CHARS: usize = 500;

/// An address that is not to be written to again.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    /// In the form in which addresses are compared.
    pub(crate) email: String,
    pub(crate) reason: Reason,
    /// In the reporter's words.
    pub(crate) detail: Option<String>,
    /// The run whose message it is about, if the report proves that.
    pub(crate) run_id: Option<Uuid>,
}

impl Verdict {
    /// About an address as it stands in a report, perhaps with a name. None: it is no address.
    pub(super) fn new(address: &str, reason: Reason, detail: Option<&str>) -> Option<Self> {
        let Address { email, .. } = address.parse().ok()?;
        let detail = detail.map(one_line).filter(|detail| !detail.is_empty());
        Some(Self { email, reason, detail, run_id: None })
    }
}

/// That an address is not to be written to again.
#[derive(Debug, PartialEq)]
pub(crate) struct Claim {
    /// The address, in all forms in which the report names it: as it was written to, as it was forwarded, decoded or not.
    pub(crate) addresses: Vec<String>,
    pub(crate) reason: Reason,
    /// In the reporter's words, on one line.
    pub(crate) detail: Option<String>,
}

impl Claim {
    /// That there is no such mailbox, if the evidence proves it.
    pub(super) fn bounced(addresses: Vec<String>, status: Option<&str>, diagnostic: Option<&str>) -> Option<Self> {
        let detail = diagnostic.filter(|text| !text.is_empty()).or(status);
        classify_report(status, diagnostic).suppresses().then(|| Self::new(addresses, Reason::Bounced, detail))
    }

    pub(super) fn new(addresses: Vec<String>, reason: Reason, detail: Option<&str>) -> Self {
        Self { addresses, reason, detail: detail.map(one_line).filter(|detail| !detail.is_empty()) }
    }

    /// Whether it is about this address, as the ledger knows it.
    pub(crate) fn is_about(&self, email: &str) -> bool {
        let Ok(ours) = mailbox(email) else { return false };
        self.addresses.iter().any(|address| mailbox(address).is_ok_and(|address| address == ours))
    }
}

/// A report that can't be read.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NotUnderstood(pub(super) &'static str);

/// Whether a bounce that a provider calls permanent is about the mailbox: what the mail server said may prove the contrary. Without
/// its words, or if they are not recognised, the provider's word counts.
pub(super) fn is_about_the_mailbox(status: Option<&str>, diagnostic: Option<&str>) -> bool {
    // A permanent failure of which nothing else is known.
    let classified = classify_report(status.or(Some("5.0.0")), diagnostic.map(untyped));
    let says_nothing =
        status.is_none_or(|status| status.trim().is_empty()) && diagnostic.is_none_or(|text| text.trim().is_empty());
    says_nothing || classified.suppresses() || (classified.permanent && classified.class == ReplyClass::Unknown)
}

pub(super) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ").chars().take(MAX_DETAIL_CHARS).collect()
}

/// The text at a path of keys.
pub(super) fn text<'a>(json: &'a Value, path: &[&str]) -> Option<&'a str> {
    path.iter().try_fold(json, |json, key| json.get(key))?.as_str()
}
