//! The envelope in which Amazon SNS delivers a report, and the text that it signs.
//!
//! <https://docs.aws.amazon.com/sns/latest/dg/sns-verify-signature-of-message.html>

use serde::Deserialize;
use serde_json::Value;

use super::{
    claim::{ReportError, ReportedAddress, text},
    ses,
};

/// A message of Amazon SNS. Nothing in it is trusted before its signature is verified.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Envelope {
    #[serde(rename = "Type")]
    pub(crate) kind: Kind,
    pub(crate) topic_arn: String,
    pub(crate) signature_version: String,
    /// Base64.
    pub(crate) signature: String,
    #[serde(rename = "SigningCertURL")]
    pub(crate) signing_cert_url: String,
    /// Opening this URL confirms a subscription.
    #[serde(rename = "SubscribeURL")]
    pub(crate) subscribe_url: Option<String>,
    pub(crate) message: String,
    pub(crate) message_id: String,
    pub(crate) timestamp: String,
    pub(crate) subject: Option<String>,
    pub(crate) token: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum Kind {
    /// Delivers a message.
    Notification,
    /// Asks to confirm a subscription.
    SubscriptionConfirmation,
    /// A subscription ended.
    UnsubscribeConfirmation,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Notification => "Notification",
            Self::SubscriptionConfirmation => "SubscriptionConfirmation",
            Self::UnsubscribeConfirmation => "UnsubscribeConfirmation",
        }
    }
}

/// Whether JSON is a message of Amazon SNS. Reports of SES without SNS have no `Type`.
pub(super) fn is_one(json: &Value) -> bool {
    text(json, &["Type"]).is_some_and(|kind| {
        [Kind::Notification, Kind::SubscriptionConfirmation, Kind::UnsubscribeConfirmation]
            .iter()
            .any(|k| k.name() == kind)
    })
}

pub(super) fn read(json: Value) -> Result<Envelope, ReportError> {
    serde_json::from_value(json).map_err(|_| ReportError("the Amazon SNS message is incomplete"))
}

impl Envelope {
    /// The signed text: the fields in this order, each name and each value on a line.
    pub(crate) fn signed_text(&self) -> String {
        let kind = self.kind.name();
        let about = match self.kind {
            Kind::Notification => ("Subject", self.subject.as_deref()),
            _ => ("SubscribeURL", self.subscribe_url.as_deref()),
        };
        let fields = [
            ("Message", Some(self.message.as_str())),
            ("MessageId", Some(self.message_id.as_str())),
            about,
            ("Timestamp", Some(self.timestamp.as_str())),
            ("Token", self.token.as_deref().filter(|_| self.kind != Kind::Notification)),
            ("TopicArn", Some(self.topic_arn.as_str())),
            ("Type", Some(kind)),
        ];
        let fields = fields.into_iter().filter_map(|(name, value)| Some((name, value?)));
        fields.map(|(name, value)| format!("{name}\n{value}\n")).collect()
    }

    /// The report of Amazon SES in the message. Empty if it is not JSON: SES sends such a message when it is set up.
    pub(crate) fn reported(&self) -> Result<Vec<ReportedAddress>, ReportError> {
        match self.kind {
            Kind::Notification if self.message.trim_start().starts_with('{') => {
                let event = serde_json::from_str(&self.message)
                    .map_err(|_| ReportError("the notification's Message is not Amazon SES JSON"))?;
                ses::read(&event)
            }
            _ => Ok(Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signed_fields_are_ordered() {
        let notification: Envelope = serde_json::from_str(include_str!("fixtures/sns_bounce.json")).unwrap();
        let signed = notification.signed_text();
        assert!(
            signed.starts_with("Message\n{\"notificationType\":\"Bounce\"")
                && signed.ends_with("\nType\nNotification\n")
        );
        let names: Vec<_> = signed.lines().step_by(2).collect();
        assert_eq!(names, ["Message", "MessageId", "Timestamp", "TopicArn", "Type"]);
        let with_subject = Envelope { subject: Some("Hello".into()), ..notification.clone() };
        assert!(with_subject.signed_text().contains("\nSubject\nHello\nTimestamp\n"));
        let confirmation = Envelope {
            kind: Kind::SubscriptionConfirmation,
            subscribe_url: Some("https://sns.eu-west-1.amazonaws.com/?x".into()),
            token: Some("t".into()),
            ..notification
        };
        let names: Vec<_> = confirmation.signed_text().lines().step_by(2).map(str::to_owned).collect();
        assert_eq!(names, ["Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"]);
    }

    #[test]
    fn a_message_that_is_not_json_reports_nothing() {
        let notification: Envelope = serde_json::from_str(include_str!("fixtures/sns_bounce.json")).unwrap();
        assert_eq!(notification.reported().unwrap().len(), 2);
        let hello = Envelope { message: "Successfully validated".into(), ..notification.clone() };
        assert_eq!(hello.reported(), Ok(Vec::new()));
        let deep = Envelope { message: "{\"a\":".repeat(200_000), ..notification };
        assert!(deep.reported().is_err());
    }
}
