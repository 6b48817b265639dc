//! Amazon SES: notifications and published events, through Amazon SNS or delivered raw.
//!
//! <https://docs.aws.amazon.com/ses/latest/dg/notification-contents.html>

use mailrun_ledger::suppressions::Reason;
use serde_json::Value;

use super::{
    arf,
    claim::{ReportError, ReportedAddress, is_about_the_mailbox, text},
};

/// Bounce subtypes with which Amazon states that the address does not exist, regardless of the server's reply.
const KNOWN: [&str; 3] = ["NoEmail", "Suppressed", "OnAccountSuppressionList"];

pub(super) fn read(event: &Value) -> Result<Vec<ReportedAddress>, ReportError> {
    let kind = text(event, &["notificationType"]).or_else(|| text(event, &["eventType"]));
    Ok(match kind.ok_or(ReportError("the JSON is neither an Amazon SES nor a Postmark report"))? {
        // Transient: the mailbox is full or the server unavailable. Undetermined: SES does not know the cause.
        "Bounce" if text(event, &["bounce", "bounceType"]) == Some("Permanent") => {
            let is_known = text(event, &["bounce", "bounceSubType"]).is_some_and(|kind| KNOWN.contains(&kind));
            recipients(event, "bounce", "bouncedRecipients")?
                .filter_map(|recipient| {
                    let (status, diagnostic) = (text(recipient, &["status"]), text(recipient, &["diagnosticCode"]));
                    let counts = is_known || is_about_the_mailbox(status, diagnostic);
                    let email = text(recipient, &["emailAddress"]).filter(|_| counts)?;
                    ReportedAddress::new(email, Reason::Bounced, diagnostic.or(status))
                })
                .collect()
        }
        "Complaint" => {
            let kind = text(event, &["complaint", "complaintFeedbackType"]);
            // Amazon sets no type if the mailbox provider set none.
            let reason = kind.filter(|kind| !kind.is_empty()).map_or(Some(Reason::Complained), arf::reason);
            recipients(event, "complaint", "complainedRecipients")?
                .filter_map(|recipient| ReportedAddress::new(text(recipient, &["emailAddress"])?, reason?, kind))
                .collect()
        }
        _ => Vec::new(),
    })
}

fn recipients<'a>(event: &'a Value, part: &str, list: &str) -> Result<impl Iterator<Item = &'a Value>, ReportError> {
    let list = event.get(part).and_then(|part| part.get(list)).and_then(Value::as_array);
    Ok(list.ok_or(ReportError("the Amazon SES report has no recipients"))?.iter())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Report, read};

    fn reported(body: &str) -> Vec<ReportedAddress> {
        match read(Some("text/plain; charset=UTF-8"), body.as_bytes()).unwrap() {
            Report::Provider(reported) => reported,
            Report::Sns(envelope) => envelope.reported().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_permanent_bounce_through_sns_suppresses() {
        let reported = reported(include_str!("fixtures/sns_bounce.json"));
        assert_eq!(reported.len(), 2);
        assert_eq!((reported[0].email.as_str(), reported[0].reason), ("jane@example.com", Reason::Bounced));
        assert_eq!(reported[0].detail.as_deref(), Some("smtp; 550 5.1.1 <jane@example.com>... User"));
        assert_eq!(reported[1].email, "richard@example.com");
    }

    #[test]
    fn a_raw_complaint_suppresses_and_a_not_spam_report_does_not() {
        let complaint = include_str!("fixtures/ses_complaint.json");
        let complained = reported(complaint);
        assert_eq!(complained.len(), 1);
        assert_eq!((complained[0].email.as_str(), complained[0].reason), ("richard@example.com", Reason::Complained));
        assert_eq!(complained[0].detail.as_deref(), Some("abuse"));
        for other in ["not-spam", "auth-failure", "virus"] {
            assert_eq!(reported(&complaint.replace("abuse", other)), [], "{other}");
        }
        assert_eq!(reported(&complaint.replace("\"abuse\"", "null")).len(), 1);
    }

    #[test]
    fn temporary_bounces_and_deliveries_suppress_nobody() {
        let bounce = include_str!("fixtures/sns_bounce.json");
        for other in ["Transient", "Undetermined"] {
            assert_eq!(reported(&bounce.replace("Permanent", other)), [], "{other}");
        }
        assert_eq!(reported(r#"{"eventType":"Delivery","delivery":{"recipients":["a@x.org"]}}"#), []);
    }

    #[test]
    fn the_server_reply_decides() {
        let bounce = include_str!("fixtures/sns_bounce.json");
        let policy = bounce.replace("550 5.1.1 <jane@example.com>... User", "550 5.7.1 Rejected by policy");
        let found = reported(&policy);
        assert!(found.len() == 1 && found[0].email == "richard@example.com", "{found:?}");
        assert_eq!(reported(&policy.replace("General", "Suppressed")).len(), 2);
    }
}
