//! Classifies what a mail server's refusal is about: the mailbox, the message, or us. Pure functions.
//!
//! A code alone proves nothing: RFC 5321 (4.2.3) uses 550 for policy as well as for mailboxes that do not exist. So a refusal is
//! classified by its code, by its enhanced status (RFC 3463) wherever the server puts it, and by its words. `phrases` contains the
//! words, `replies.tsv` replies with their expected class.

mod phrases;
mod report;
mod text;
mod wait;

use std::{fmt, time::Duration};

use phrases::matches;
use text::Words;

pub use report::classify_report;
pub use text::{Detail, normalized, statuses};

/// The stage that an SMTP session has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Connecting.
    Connect,
    /// The TLS handshake.
    Tls,
    /// The server's greeting.
    Greeting,
    /// EHLO or HELO.
    Hello,
    /// STARTTLS.
    StartTls,
    /// AUTH.
    Login,
    /// MAIL.
    Mail,
    /// RCPT.
    Rcpt,
    /// DATA, until the server's 354. Nothing of the message is sent yet.
    Data,
    /// The message, from its first byte to the server's reply.
    Content,
}

impl Stage {
    /// Whether no mail has been offered yet: an error then concerns the relay.
    #[must_use]
    pub fn is_before_mail(self) -> bool {
        !matches!(self, Self::Mail | Self::Rcpt | Self::Data | Self::Content)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "the connection",
            Self::Tls => "the encryption",
            Self::Greeting => "the greeting",
            Self::Hello => "EHLO",
            Self::StartTls => "STARTTLS",
            Self::Login => "the login",
            Self::Mail => "MAIL",
            Self::Rcpt => "RCPT",
            Self::Data => "DATA",
            Self::Content => "the message",
        })
    }
}

/// What a refusal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReplyClass {
    /// The recipient's mailbox or domain does not exist. The only class that suppresses.
    NoMailbox,
    /// The recipient's mailbox is full.
    MailboxFull,
    /// The server asks to try this recipient again later.
    Greylisted,
    /// This recipient receives too many messages.
    RecipientLimit,
    /// Another refusal of this recipient. It does not prove that the mailbox does not exist.
    Recipient,
    /// The recipient's server could not be reached, or there is a mail loop.
    Route,
    /// The relay does not relay for us.
    Relaying,
    /// The relay requires a login, other credentials, or encryption.
    Authentication,
    /// The relay does not accept our name in EHLO.
    Helo,
    /// The sender's address, domain or account is refused.
    Sender,
    /// Our IP address is on a block list or refused by policy.
    BlockList,
    /// We send too much, too fast, or more than a quota allows.
    Limit,
    /// The server is temporarily not accepting mail.
    Busy,
    /// The message: its size, format or content.
    Content,
    /// A policy that does not show whether we, the message or the recipient is at fault.
    Policy,
    /// Not recognised.
    Unknown,
}

/// The scope of a refusal. It decides who must act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Concern {
    /// Only this recipient.
    Recipient,
    /// This message, whatever the recipient.
    Message,
    /// Every message through this relay.
    Relay,
    /// One refusal is not enough to tell.
    Unknown,
}

impl ReplyClass {
    /// All classes.
    pub const ALL: [Self; 16] = [
        Self::NoMailbox,
        Self::MailboxFull,
        Self::Greylisted,
        Self::RecipientLimit,
        Self::Recipient,
        Self::Route,
        Self::Relaying,
        Self::Authentication,
        Self::Helo,
        Self::Sender,
        Self::BlockList,
        Self::Limit,
        Self::Busy,
        Self::Content,
        Self::Policy,
        Self::Unknown,
    ];

    /// What a refusal of this class affects.
    #[must_use]
    pub fn concern(self) -> Concern {
        match self {
            Self::NoMailbox
            | Self::MailboxFull
            | Self::Greylisted
            | Self::RecipientLimit
            | Self::Recipient
            | Self::Route => Concern::Recipient,
            Self::Relaying
            | Self::Authentication
            | Self::Helo
            | Self::Sender
            | Self::BlockList
            | Self::Limit
            | Self::Busy => Concern::Relay,
            Self::Content => Concern::Message,
            Self::Policy | Self::Unknown => Concern::Unknown,
        }
    }

    /// Its name in tables, logs and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NoMailbox => "no_mailbox",
            Self::MailboxFull => "mailbox_full",
            Self::Greylisted => "greylisted",
            Self::RecipientLimit => "recipient_limit",
            Self::Recipient => "recipient",
            Self::Route => "route",
            Self::Relaying => "relaying",
            Self::Authentication => "authentication",
            Self::Helo => "helo",
            Self::Sender => "sender",
            Self::BlockList => "block_list",
            Self::Limit => "limit",
            Self::Busy => "busy",
            Self::Content => "content",
            Self::Policy => "policy",
            Self::Unknown => "unknown",
        }
    }
}

/// A classified refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Classified {
    /// What it is about.
    pub class: ReplyClass,
    /// Whether the refusal is permanent (5xx).
    pub permanent: bool,
    /// How long the server asks to wait, if it says so.
    pub wait: Option<Duration>,
    /// The period of a limit, if the server names one. Waiting much longer gains nothing.
    pub period: Option<Duration>,
}

impl Classified {
    /// Whether it proves that the mailbox does not exist, so that the address is suppressed.
    #[must_use]
    pub fn suppresses(&self) -> bool {
        self.permanent && self.class == ReplyClass::NoMailbox
    }

    /// What the refusal affects.
    #[must_use]
    pub fn concern(&self) -> Concern {
        self.class.concern()
    }
}

/// Classifies a refusal: a reply with a code of 400 or more, and its lines in `text`.
#[must_use]
pub fn classify(stage: Stage, code: u16, text: &str) -> Classified {
    let words = Words::of(text);
    Classified {
        class: class(stage, Some(code), &statuses(text, Some(code / 100)), &words),
        permanent: code >= 500,
        wait: wait::suggested(text),
        period: wait::period(&words),
    }
}

/// Decides the class. `code` is None for a report that quotes no reply. `details` are the enhanced statuses that match the code.
fn class(stage: Stage, code: Option<u16>, details: &[Detail], words: &Words) -> ReplyClass {
    use ReplyClass::*;
    let before_content = !matches!(stage, Stage::Data | Stage::Content);
    if stage == Stage::Mail && !is_about_size(details, words) {
        // At MAIL no recipient is named yet, so the refusal can't be about one.
        return match sender_class(code, details, words, before_content) {
            Some(class) if class.concern() == Concern::Relay => class,
            _ if code.is_some_and(|code| code < 500) => Busy,
            _ => Sender,
        };
    }
    if matches(words, phrases::GREYLISTED) {
        return Greylisted;
    }
    if is_no_mailbox(code, details, words) {
        return NoMailbox;
    }
    if matches(words, phrases::RECIPIENT_LIMIT)
        || (details.iter().any(|detail| detail.0 == 2) && matches(words, phrases::RECIPIENT_LIMIT_IF_MAILBOX))
    {
        return RecipientLimit;
    }
    if matches(words, phrases::RECIPIENT_REFUSES) || details.iter().any(is_about_a_restricted_recipient) {
        return Recipient;
    }
    if let Some(class) = sender_class(code, details, words, before_content) {
        return class;
    }
    if matches(words, phrases::RECIPIENT) {
        return Recipient;
    }
    if details.iter().any(|detail| detail.0 == 4) || matches(words, phrases::ROUTE) {
        return Route;
    }
    if details.iter().any(|detail| matches!(detail.0, 1 | 2)) {
        return Recipient;
    }
    match code {
        Some(421 | 452 | 454) => Busy,
        Some(552) if before_content => MailboxFull,
        Some(552) => Content,
        _ if details.iter().any(|detail| detail.0 == 7) || matches(words, phrases::POLICY) => Policy,
        _ => Unknown,
    }
}

/// Whether it proves that the mailbox does not exist: an enhanced status says so or, without a status, the words do; and no word
/// is about anything else.
fn is_no_mailbox(code: Option<u16>, details: &[Detail], words: &Words) -> bool {
    // Codes about the login, and about commands that were not understood.
    if matches!(code, Some(500 | 502..=504 | 530 | 534 | 535 | 538 | 552)) || phrases::speaks_of_something_else(words) {
        return false;
    }
    let says_so = matches(words, phrases::NO_MAILBOX);
    let is_disabled = matches(words, phrases::DISABLED);
    let proves = |detail: &Detail| match *detail {
        (1, 1 | 2 | 3 | 6 | 10) => true,
        (2, 1) => is_disabled || says_so,
        // These statuses name no cause, so the words decide.
        (0..=2, 0) => says_so || matches(words, phrases::MAILBOX_DISABLED),
        _ => false,
    };
    match details {
        [] => says_so || matches(words, phrases::MAILBOX_DISABLED),
        // If several contradict each other, they prove nothing.
        details => details.iter().all(proves),
    }
}

/// Refusals that are about us or the message. None: it is about neither.
fn sender_class(code: Option<u16>, details: &[Detail], words: &Words, before_content: bool) -> Option<ReplyClass> {
    use ReplyClass::*;
    if matches!(code, Some(530 | 534 | 535 | 538)) {
        return Some(Authentication);
    }
    if matches(words, phrases::PERIOD_LIMIT) {
        return Some(Limit);
    }
    if details.contains(&(2, 2)) || matches(words, phrases::MAILBOX_FULL) {
        return Some(MailboxFull);
    }
    if matches(words, phrases::SENDER_DOMAIN) {
        return Some(Sender);
    }
    if let Some(class) = details.iter().find_map(class_of_status) {
        return Some(class);
    }
    if is_about_size(details, words) || (!before_content && matches(words, phrases::CERTAINLY_CONTENT)) {
        return Some(Content);
    }
    let groups = [
        (phrases::HELO, Helo),
        (phrases::LOOP, Route),
        (phrases::RELAYING, Relaying),
        (phrases::AUTHENTICATION, Authentication),
        (phrases::BLOCK_LIST, BlockList),
        (phrases::LIMIT, Limit),
        (phrases::SENDER, Sender),
        // Before any content was sent, these words are about the sender.
        (phrases::CONTENT, if before_content { BlockList } else { Content }),
        (phrases::BUSY, Busy),
    ];
    let class = groups.into_iter().find(|(group, _)| matches(words, group)).map(|(_, class)| class);
    class.or_else(|| details.iter().any(|detail| detail.0 == 6).then_some(Content))
}

/// The class of enhanced statuses that are unambiguous on their own.
fn class_of_status(detail: &Detail) -> Option<ReplyClass> {
    use ReplyClass::*;
    Some(match *detail {
        (1, 7 | 8 | 9 | 90) | (7, 20..=24 | 26 | 27 | 60 | 501..=503 | 509..=512) => Sender,
        (7, 3 | 8 | 9 | 11 | 13 | 14 | 57 | 139) => Authentication,
        (7, 54 | 64) => Relaying,
        (7, 25 | 606..=649 | 708) => BlockList,
        (4, 5) | (5, 3) | (7, 28 | 232 | 233 | 500 | 650..=699 | 705) => Limit,
        (3, 1 | 2) => Busy,
        (2, 3) | (3, 4) => Content,
        _ => return None,
    })
}

fn is_about_size(details: &[Detail], words: &Words) -> bool {
    details.contains(&(3, 4)) || matches(words, phrases::SIZE)
}

/// Statuses for recipients that accept mail only from some senders: those of a large provider, and mailing lists (RFC 3463, 3.8).
fn is_about_a_restricted_recipient(detail: &Detail) -> bool {
    matches!(detail, (7, 2 | 124 | 129..=136))
}

#[cfg(test)]
mod tests;
