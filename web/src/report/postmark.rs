//! Postmark: its webhooks for bounces, spam complaints and changes of a subscription.
//!
//! <https://postmarkapp.com/developer/webhooks/bounce-webhook>

use mailrun_ledger::suppressions::Reason;
use serde_json::Value;

use super::claim::{NotUnderstood, Verdict, is_about_the_mailbox, text};

/// Whether a report is one of Postmark's: these have a record type, and the oldest a numbered type.
pub(super) fn is_one(json: &Value) -> bool {
    json.get("RecordType").is_some() || json.get("TypeCode").is_some()
}

pub(super) fn read(json: &Value) -> Result<Vec<Verdict>, NotUnderstood> {
    let reason = match text(json, &["RecordType"]).unwrap_or("Bounce") {
        "Bounce" | "SpamComplaint" => match text(json, &["Type"]) {
            Some("HardBounce" | "BadEmailAddress") => Some(Reason::Bounced),
            Some("SpamComplaint") => Some(Reason::Complained),
            Some("Unsubscribe") => Some(Reason::Unsubscribed),
            // What may pass, is an answer by itself, or says more of the mail than of the address.
            Some(_) => None,
            None => return Err(NotUnderstood("the report of Postmark has no Type")),
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
    let verdict = Verdict::new(email.unwrap_or_default(), reason, detail);
    Ok(vec![verdict.ok_or(NotUnderstood("the report of Postmark has no address in Email"))?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{self, Report};

    fn verdicts(body: &str) -> Vec<Verdict> {
        match report::read(Some("application/json"), body.as_bytes()).unwrap() {
            Report::Provider(verdicts) => verdicts,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_hard_bounce_suppresses() {
        let verdicts = verdicts(include_str!("fixtures/postmark_bounce.json"));
        assert_eq!(verdicts.len(), 1);
        assert_eq!((verdicts[0].email.as_str(), verdicts[0].reason), ("john@example.com", Reason::Bounced));
        assert_eq!(
            verdicts[0].detail.as_deref(),
            Some("smtp;550 5.1.1 The email account that you tried to reach does not exist.")
        );
    }

    #[test]
    fn a_soft_bounce_does_not() {
        let bounce = include_str!("fixtures/postmark_bounce.json");
        for other in ["SoftBounce", "Transient", "AutoResponder", "Blocked", "DnsError"] {
            assert_eq!(verdicts(&bounce.replace("HardBounce", other)), [], "{other}");
        }
        let policy = bounce.replace(
            "550 5.1.1 The email account that you tried to reach does not exist.",
            "550 5.7.1 Rejected by policy",
        );
        assert_eq!(verdicts(&policy), [], "the server refused the mail, not the address");
        assert_eq!(verdicts(r#"{"RecordType":"Delivery","Recipient":"a@x.org"}"#), []);
    }

    #[test]
    fn a_complaint_and_an_unsubscription_suppress() {
        let complaint =
            r#"{"RecordType":"SpamComplaint","Type":"SpamComplaint","TypeCode":512,"Email":"Ann@Example.org"}"#;
        assert_eq!(verdicts(complaint)[0].reason, Reason::Complained);
        assert_eq!(verdicts(complaint)[0].email, "ann@example.org");
        let change = r#"{"RecordType":"SubscriptionChange","Recipient":"a@x.org","SuppressSending":true,"SuppressionReason":"ManualSuppression"}"#;
        assert_eq!(verdicts(change)[0].reason, Reason::Unsubscribed);
        assert_eq!(verdicts(&change.replace("true", "false")), []);
    }
}
