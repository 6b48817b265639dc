//! Postmark webhooks for bounces, spam complaints and subscription changes.
//!
//! <https://postmarkapp.com/developer/webhooks/bounce-webhook>

use mailrun_ledger::suppressions::Reason;
use serde_json::Value;

use super::claim::{ReportError, ReportedAddress, is_about_the_mailbox, text};

/// Whether a report is Postmark's: it has a record type, or in old versions a numeric type.
pub(super) fn is_one(json: &Value) -> bool {
    json.get("RecordType").is_some() || json.get("TypeCode").is_some()
}

pub(super) fn read(json: &Value) -> Result<Vec<ReportedAddress>, ReportError> {
    let reason = match text(json, &["RecordType"]).unwrap_or("Bounce") {
        "Bounce" | "SpamComplaint" => match text(json, &["Type"]) {
            Some("HardBounce" | "BadEmailAddress") => Some(Reason::Bounced),
            Some("SpamComplaint") => Some(Reason::Complained),
            Some("Unsubscribe") => Some(Reason::Unsubscribed),
            // Temporary, an automatic reply, or about the mail rather than the address.
            Some(_) => None,
            None => return Err(ReportError("the Postmark report has no Type")),
        },
        "SubscriptionChange" if json.get("SuppressSending") == Some(&Value::Bool(true)) => {
            match text(json, &["SuppressionReason"]) {
                Some("HardBounce") => Some(Reason::Bounced),
                Some("SpamComplaint") => Some(Reason::Complained),
                _ => Some(Reason::Unsubscribed),
            }
        }
        _ => None,
    };
    let Some(reason) = reason else { return Ok(Vec::new()) };
    let said = text(json, &["Details"]).filter(|details| !details.is_empty());
    if reason == Reason::Bounced && !is_about_the_mailbox(None, said) {
        return Ok(Vec::new());
    }
    let email = text(json, &["Email"]).or_else(|| text(json, &["Recipient"]));
    let detail = said.or_else(|| text(json, &["Description"]));
    let reported = ReportedAddress::new(email.unwrap_or_default(), reason, detail);
    Ok(vec![reported.ok_or(ReportError("the Postmark report has no address in Email"))?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{self, Report};

    fn reported(body: &str) -> Vec<ReportedAddress> {
        match report::read(Some("application/json"), body.as_bytes()).unwrap() {
            Report::Provider(reported) => reported,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_hard_bounce_suppresses() {
        let reported = reported(include_str!("fixtures/postmark_bounce.json"));
        assert_eq!(reported.len(), 1);
        assert_eq!((reported[0].email.as_str(), reported[0].reason), ("john@example.com", Reason::Bounced));
        assert_eq!(
            reported[0].detail.as_deref(),
            Some("smtp;550 5.1.1 The email account that you tried to reach does not exist.")
        );
    }

    #[test]
    fn a_soft_bounce_suppresses_nobody() {
        let bounce = include_str!("fixtures/postmark_bounce.json");
        for other in ["SoftBounce", "Transient", "AutoResponder", "Blocked", "DnsError"] {
            assert_eq!(reported(&bounce.replace("HardBounce", other)), [], "{other}");
        }
        let policy = bounce.replace(
            "550 5.1.1 The email account that you tried to reach does not exist.",
            "550 5.7.1 Rejected by policy",
        );
        assert_eq!(reported(&policy), [], "the server refused the mail, not the address");
        assert_eq!(reported(r#"{"RecordType":"Delivery","Recipient":"a@x.org"}"#), []);
    }

    #[test]
    fn a_complaint_and_an_unsubscription_suppress() {
        let complaint =
            r#"{"RecordType":"SpamComplaint","Type":"SpamComplaint","TypeCode":512,"Email":"Ann@Example.org"}"#;
        assert_eq!(reported(complaint)[0].reason, Reason::Complained);
        assert_eq!(reported(complaint)[0].email, "ann@example.org");
        let change = r#"{"RecordType":"SubscriptionChange","Recipient":"a@x.org","SuppressSending":true,"SuppressionReason":"ManualSuppression"}"#;
        assert_eq!(reported(change)[0].reason, Reason::Unsubscribed);
        assert_eq!(reported(&change.replace("true", "false")), []);
    }
}
