//! Checks the classification of the replies in `replies.tsv`.

use std::{collections::BTreeMap, fmt::Write as _};

use super::*;

const REPLIES: &str = include_str!("replies.tsv");

struct Known {
    line: usize,
    source: &'static str,
    stage: Stage,
    code: u16,
    class: ReplyClass,
    text: String,
}

fn known() -> Vec<Known> {
    let lines = REPLIES.lines().enumerate().filter(|(_, line)| !line.starts_with('#') && !line.is_empty());
    let read = |(index, line): (usize, &'static str)| {
        let fields: Vec<&str> = line.split('\t').collect();
        let [source, stage, code, class, text] = fields[..] else { panic!("line {}", index + 1) };
        let stage = match stage {
            "greeting" => Stage::Greeting,
            "login" => Stage::Login,
            "mail" => Stage::Mail,
            "rcpt" => Stage::Rcpt,
            "data" => Stage::Data,
            "content" => Stage::Content,
            other => panic!("line {}: {other}", index + 1),
        };
        let class = ReplyClass::ALL.into_iter().find(|known| known.name() == class);
        Known {
            line: index + 1,
            source,
            stage,
            code: code.parse().unwrap(),
            class: class.unwrap_or_else(|| panic!("line {}: no such class", index + 1)),
            text: text.replace("\\n", "\n"),
        }
    };
    lines.map(read).collect()
}

/// Rows: the expected class; columns: the actual one.
fn confusion(replies: &[Known]) -> String {
    let mut counts: BTreeMap<(ReplyClass, ReplyClass), u32> = BTreeMap::new();
    for reply in replies {
        *counts.entry((reply.class, classify(reply.stage, reply.code, &reply.text).class)).or_default() += 1;
    }
    let mut table = format!("{:16}", "");
    for column in ReplyClass::ALL {
        let _ = write!(table, "{:>7}", column.name().get(..6).unwrap_or(column.name()));
    }
    for row in ReplyClass::ALL {
        let _ = write!(table, "\n{:16}", row.name());
        for column in ReplyClass::ALL {
            let count = counts.get(&(row, column)).map_or(".".to_owned(), u32::to_string);
            let _ = write!(table, "{count:>7}");
        }
    }
    table
}

#[test]
fn every_known_reply_is_classified_as_expected() {
    let replies = known();
    println!("{} replies\n{}", replies.len(), confusion(&replies));
    assert!(replies.len() >= 200, "{}", replies.len());
    let wrong: Vec<String> = replies
        .iter()
        .filter_map(|reply| {
            let found = classify(reply.stage, reply.code, &reply.text).class;
            (found != reply.class).then(|| {
                format!("line {} ({}): {} {}: {}", reply.line, reply.source, reply.code, reply.text, found.name())
            })
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_proof_of_a_missing_mailbox_suppresses() {
    for reply in known() {
        let found = classify(reply.stage, reply.code, &reply.text);
        let proves = reply.class == ReplyClass::NoMailbox && reply.code >= 500;
        assert_eq!(found.suppresses(), proves, "line {}: {} {}", reply.line, reply.code, reply.text);
    }
}

/// A reply that proves a mailbox missing proves nothing any more once words about us are added.
#[test]
fn words_that_cast_doubt_prevent_a_suppression() {
    let doubts = [
        "relaying denied",
        "authentication required",
        "sender rejected",
        "rejected by policy",
        "your server is on a block list",
        "rate limit reached",
        "too many recipients this hour",
        "over quota",
        "spam content",
        "Helo command rejected",
        "SPF check failed",
        "please try again later",
    ];
    for reply in known().iter().filter(|reply| reply.class == ReplyClass::NoMailbox) {
        for doubt in doubts {
            let text = format!("{}; {doubt}", reply.text);
            assert!(!classify(reply.stage, reply.code, &text).suppresses(), "{} {text}", reply.code);
        }
    }
}

/// The name of a mailbox or a host is not part of what a server says.
#[test]
fn names_do_not_affect_the_class() {
    for name in ["limit", "spam", "sender", "relay", "policy", "quota", "user-unknown", "auth"] {
        let text = format!("5.1.1 <{name}@{name}.example>: Recipient address rejected: User unknown");
        assert!(classify(Stage::Rcpt, 550, &text).suppresses(), "{text}");
        let text = format!("<{name}@no-such-user.example>: see https://example.org/user-unknown/{name}");
        assert!(!classify(Stage::Rcpt, 550, &text).suppresses(), "{text}");
    }
}

#[test]
fn a_refusal_at_mail_is_never_about_a_recipient() {
    for reply in known() {
        let found = classify(Stage::Mail, reply.code, &reply.text);
        assert!(
            matches!(found.concern(), Concern::Relay | Concern::Message),
            "{} {}: {}",
            reply.code,
            reply.text,
            found.class.name()
        );
    }
}

proptest::proptest! {
    #[test]
    fn no_text_without_evidence_suppresses(code in 400u16..600, text in "[a-z #.0-9()]{0,60}") {
        let found = classify(Stage::Rcpt, code, &text);
        let words = Words::of(&text);
        let evidence = matches(&words, phrases::NO_MAILBOX)
            || matches(&words, phrases::MAILBOX_DISABLED)
            || !statuses(&text, Some(code / 100)).is_empty();
        proptest::prop_assert!(evidence || !found.suppresses(), "{} {}", code, text);
    }
}
