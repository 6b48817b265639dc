//! Amazon SES: notifications and published events, through Amazon SNS or delivered raw.
//!
//! <https://docs.aws.amazon.com/ses/latest/dg/notification-contents.html>

use mailrun_shared::store::suppressions::Reason;
use serde_json::Value;

use super::{NotUnderstood, Report, Verdict, text};

pub(super) fn read(json: &Value) -> Result<Report, NotUnderstood> {
    match text(json, &["Type"]) {
        Some("SubscriptionConfirmation") => {
            let url = text(json, &["SubscribeURL"]).ok_or(NotUnderstood("the confirmation has no SubscribeURL"))?;
            Ok(Report::Confirm(url.to_owned()))
        }
        Some("UnsubscribeConfirmation") => Ok(Report::Suppress(Vec::new())),
        Some("Notification") => {
            let message = text(json, &["Message"]).ok_or(NotUnderstood("the notification has no Message"))?;
            let event = serde_json::from_str(message)
                .map_err(|_| NotUnderstood("the notification's Message is not the JSON of Amazon SES"))?;
            read_event(&event)
        }
        _ => read_event(json),
    }
}

fn read_event(event: &Value) -> Result<Report, NotUnderstood> {
    let kind = text(event, &["notificationType"]).or_else(|| text(event, &["eventType"]));
    let verdicts = match kind.ok_or(NotUnderstood("the JSON is neither of Amazon SES nor of Postmark"))? {
        // Transient: the mailbox is full, or the server away. Undetermined: SES does not know either.
        "Bounce" if text(event, &["bounce", "bounceType"]) == Some("Permanent") => {
            recipients(event, "bounce", "bouncedRecipients")?
                .filter_map(|recipient| {
                    let detail = text(recipient, &["diagnosticCode"]).or_else(|| text(recipient, &["status"]));
                    Verdict::new(text(recipient, &["emailAddress"])?, Reason::Bounced, detail)
                })
                .collect()
        }
        // "This is not spam" is a complaint of its own kind.
        "Complaint" if text(event, &["complaint", "complaintFeedbackType"]) != Some("not-spam") => {
            let detail = text(event, &["complaint", "complaintFeedbackType"]);
            recipients(event, "complaint", "complainedRecipients")?
                .filter_map(|recipient| Verdict::new(text(recipient, &["emailAddress"])?, Reason::Complained, detail))
                .collect()
        }
        _ => Vec::new(),
    };
    Ok(Report::Suppress(verdicts))
}

fn recipients<'a>(event: &'a Value, part: &str, list: &str) -> Result<impl Iterator<Item = &'a Value>, NotUnderstood> {
    let list = event.get(part).and_then(|part| part.get(list)).and_then(Value::as_array);
    Ok(list.ok_or(NotUnderstood("the report of Amazon SES names no recipients"))?.iter())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::read;

    fn verdicts(body: &str) -> Vec<Verdict> {
        match read(Some("text/plain; charset=UTF-8"), body.as_bytes()).unwrap() {
            Report::Suppress(verdicts) => verdicts,
            Report::Confirm(url) => panic!("a confirmation: {url}"),
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
        assert_eq!(verdicts(&complaint.replace("\"abuse\"", "\"not-spam\"")), []);
    }

    #[test]
    fn what_may_pass_and_what_is_good_news_suppresses_nobody() {
        let bounce = include_str!("fixtures/sns_bounce.json");
        for other in ["Transient", "Undetermined"] {
            assert_eq!(verdicts(&bounce.replace("Permanent", other)), [], "{other}");
        }
        assert_eq!(verdicts(r#"{"eventType":"Delivery","delivery":{"recipients":["a@x.org"]}}"#), []);
        let hello = r#"{"Type":"Notification","Message":"{\"notificationType\":\"AmazonSnsSubscriptionSucceeded\"}"}"#;
        assert_eq!(verdicts(hello), []);
    }

    #[test]
    fn a_confirmation_is_passed_on() {
        let body = r#"{"Type":"SubscriptionConfirmation","Token":"x","SubscribeURL":"https://sns.eu-west-1.amazonaws.com/?x"}"#;
        let confirm = Report::Confirm("https://sns.eu-west-1.amazonaws.com/?x".into());
        assert_eq!(read(None, body.as_bytes()), Ok(confirm));
    }
}
