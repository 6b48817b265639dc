//! Sample bounces with their expected result: `samples/dsn.txt` and `samples/text.txt`.

use std::{fs, path::Path};

use mailrun_core::{
    message_id::MessageIds,
    signed_id::{Named, SigningKey},
};
use mailrun_ledger::suppressions::Reason;
use uuid::Uuid;

use super::{Report, Returned, read};

const NAMED: Named = Named { run_id: Uuid::from_u128(7), item_id: 42 };

struct Sample {
    name: String,
    kind: String,
    expected: Option<Reason>,
    text: String,
}

fn samples(file: &str) -> Vec<Sample> {
    let entries = file.split("\n=== ").skip(1);
    let read = |entry: &str| {
        let (head, text) = entry.split_once('\n').unwrap();
        let [name, kind, expected] = head.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let expected = match expected {
            "-" => None,
            "bounced" => Some(Reason::Bounced),
            "complained" => Some(Reason::Complained),
            "unsubscribed" => Some(Reason::Unsubscribed),
            other => panic!("{other}"),
        };
        Sample { name: name.to_owned(), kind: kind.to_owned(), expected, text: text.trim_end().to_owned() }
    };
    entries.map(read).collect()
}

fn all() -> Vec<Sample> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/report/samples");
    ["dsn.txt", "text.txt"].iter().flat_map(|file| samples(&fs::read_to_string(folder.join(file)).unwrap())).collect()
}

impl Sample {
    /// The complete mail.
    fn mail(&self, message_id: &str) -> String {
        let text = self.text.replace("MESSAGE-ID", message_id);
        let (part, original) = match self.kind.as_str() {
            "status" => ("delivery-status", "text/rfc822-headers"),
            "global" => ("global-delivery-status", "message/global-headers"),
            "report" => ("feedback-report", "message/rfc822"),
            _ => {
                let from = if text.starts_with("From:") || text.contains("\nFrom:") {
                    ""
                } else {
                    "From: MAILER-DAEMON@mx.example.net\n"
                };
                return format!("Date: Tue, 24 Nov 2026 17:05:00 +0000\nTo: bounces@millers.example\n{from}{text}\n");
            }
        };
        let kind = if part == "feedback-report" { "feedback-report" } else { "delivery-status" };
        format!(
            "From: MAILER-DAEMON@mx.example.net\nTo: bounces@millers.example\nSubject: Undelivered mail\nMIME-Version: 1.0\n\
             Content-Type: multipart/report; report-type={kind}; boundary=b0\n\n\
             --b0\nContent-Type: text/plain; charset=utf-8\n\nThis is for people: ann@example.com\n\n\
             --b0\nContent-Type: message/{part}\n\nReporting-MTA: dns; mx.example.net\n{blank}{text}\n\n\
             --b0\nContent-Type: {original}\n\nMessage-ID: <{message_id}>\nFrom: invites@millers.example\n\
             To: ann@example.com\nSubject: You are invited\n\n--b0--\n",
            blank = if part == "feedback-report" { "" } else { "\n" },
        )
    }
}

#[test]
fn each_sample_suppresses_as_its_evidence_allows() {
    let samples = all();
    assert!(samples.len() >= 100, "{}", samples.len());
    let ids = MessageIds::new(&SigningKey::new(b"key".to_vec(), Uuid::nil()));
    let mut wrong = Vec::new();
    for sample in &samples {
        for ends in ["\n", "\r\n"] {
            let mail = sample.mail(&ids.write(NAMED, "millers.example")).replace('\n', ends);
            let Ok(Report::Mail(Returned { claims, quoted })) = read(None, mail.as_bytes()) else {
                panic!("{} is not parsed", sample.name)
            };
            let found = claims.iter().find(|claim| claim.is_about("ann@example.com")).map(|claim| claim.reason);
            if found != sample.expected {
                wrong.push(format!("{}: {found:?} instead of {:?}", sample.name, sample.expected));
            }
            assert_eq!(ids.find(&quoted), [NAMED], "{} names our message", sample.name);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn finds_our_message_in_encoded_parts() {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let ids = MessageIds::new(&SigningKey::new(b"key".to_vec(), Uuid::nil()));
    let original = format!("Message-ID: <{}>\nTo: ann@example.com\n\nHello\n", ids.write(NAMED, "millers.example"));
    let quoted_printable = original.replace('@', "=\n@");
    let (first, second) = quoted_printable.split_at(40);
    for (encoding, text) in
        [("base64", STANDARD.encode(&original)), ("quoted-printable", format!("{first}=\n{second}"))]
    {
        for kind in ["text/rfc822-headers", "text/plain", "message/rfc822"] {
            let mail = format!(
                "From: MAILER-DAEMON@mx.example.net\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b0\n\n\
                 --b0\nContent-Type: text/plain\n\nHello\n\n\
                 --b0\nContent-Type: {kind}\nContent-Transfer-Encoding: {encoding}\n\n{text}\n\n--b0--\n"
            );
            let Ok(Report::Mail(Returned { quoted, .. })) = read(None, mail.as_bytes()) else { panic!("{mail}") };
            assert_eq!(ids.find(&quoted), [NAMED], "{kind} {encoding}");
        }
    }
}
