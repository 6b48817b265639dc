//! Amazon SES: notifications and published events, through Amazon SNS or delivered raw.
//!
//! <https://docs.aws.amazon.com/ses/latest/dg/notification-contents.html>

use mailrun_ledger::suppressions::Reason;
use serde_json::Value;

use super::{
    arf,
    claim::{NotUnderstood, Verdict, is_about_the_mailbox, text},
};

/// Bounces by which Amazon says that it knows the address not to exist, whatever the server said this time.
const KNOWN: [&str; 3] = ["NoEmail", "Suppressed", "OnAccountSuppressionList"];

pub(super) fn read(event: &Value) -> Result<Vec<Verdict>, NotUnderstood> {
    let kind = text(event, &["notificationType"]).or_else(|| text(event, &["eventType"]));
    Ok(match kind.ok_or(NotUnderstood("the JSON is neither of Amazon SES nor of Postmark"))? {
        // Transient: the mailbox is full, or the server away. Undetermined: SES does not know either.
        "Bounce" if text(event, &["bounce", "bounceType"]) == Some("Permanent") => {
            let is_known = text(event, &["bounce", "bounceSubType"]).is_some_and(|kind| KNOWN.contains(&kind));
            recipients(event, "bounce", "bouncedRecipients")?
                .filter_map(|recipient| {
                    let (status, diagnostic) = (text(recipient, &["status"]), text(recipient, &["diagnosticCode"]));
                    let counts = is_known || is_about_the_mailbox(status, diagnostic);
                    let email = text(recipient, &["emailAddress"]).filter(|_| counts)?;
                    Verdict::new(email, Reason::Bounced, diagnostic.or(status))
                })
                .collect()
        }
        "Complaint" => {
            let kind = text(event, &["complaint", "complaintFeedbackType"]);
            // Amazon names no type if the mailbox provider named none.
            let reason = kind.filter(|kind| !kind.is_empty()).map_or(Some(Reason::Complained), arf::reason);
            recipients(event, "complaint", "complainedRecipients")?
                .filter_map(|recipient| Verdict::new(text(recipient, &["emailAddress"])?, reason?, kind))
                .collect()
        }
        _ => Vec::new(),
    })
}

fn recipients<'a>(event: &'a Value, part: &str, list: &str) -> Result<impl Iterator<Item = &'a Value>, NotUnderstood> {
    let list = event.get(part).and_then(|part| part.get(list)).and_then(Value::as_array);
    Ok(list.ok_or(NotUnderstood("the report of Amazon SES names no recipients"))?.iter())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Report, read};

    fn verdicts(body: &str) -> Vec<Verdict> {
        match read(Some("text/plain; charset=UTF-8"), body.as_bytes()).unwrap() {
            Report::Provider(verdicts) => verdicts,
            Report::Sns(envelope) => envelope.verdicts().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_permanent_bounce_through_sns_suppresses() {
        let verdicts = verdicts(include_str!("fixtures/sns_bounce.json"));
        assert_eq!(verdicts.len(), 2);
        assert_eq!((verdicts[0].email.as_str(), verdicts[0].reason), ("jane@example.com", Reason::Bounced));
        assert_eq!(verdicts[0].detail.as_deref(), Some("smtp; 550 5.1.1 <jane@example.com>... User"));
        assert_eq!(verdicts[1].email, "richard@example.com");
    }

    #[test]
    fn a_raw_complaint_suppresses_and_its_contrary_does_not() {
        let complaint = include_str!("fixtures/ses_complaint.json");
        let verdicts_of = verdicts(complaint);
        assert_eq!(verdicts_of.len(), 1);
        assert_eq!((verdicts_of[0].email.as_str(), verdicts_of[0].reason), ("richard@example.com", Reason::Complained));
        assert_eq!(verdicts_of[0].detail.as_deref(), Some("abuse"));
        for other in ["not-spam", "auth-failure", "virus"] {
            assert_eq!(verdicts(&complaint.replace("abuse", other)), [], "{other}");
        }
        assert_eq!(verdicts(&complaint.replace("\"abuse\"", "null")).len(), 1);
    }

    #[test]
    fn what_may_pass_and_what_is_good_news_suppresses_nobody() {
        let bounce = include_str!("fixtures/sns_bounce.json");
        for other in ["Transient", "Undetermined"] {
            assert_eq!(verdicts(&bounce.replace("Permanent", other)), [], "{other}");
        }
        assert_eq!(verdicts(r#"{"eventType":"Delivery","delivery":{"recipients":["a@x.org"]}}"#), []);
    }

    #[test]
    fn what_the_server_said_decides() {
        let bounce = include_str!("fixtures/sns_bounce.json");
        let policy = bounce.replace("550 5.1.1 <jane@example.com>... User", "550 5.7.1 Rejected by policy");
        let found = verdicts(&policy);
        assert!(found.len() == 1 && found[0].email == "richard@example.com", "{found:?}");
        assert_eq!(verdicts(&policy.replace("General", "Suppressed")).len(), 2);
    }
}
