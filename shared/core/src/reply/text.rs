//! Normalises the text of a refusal: its words, its enhanced statuses, and a form that does not depend on the recipient.

/// The second and third number of an enhanced status (RFC 3463): `1` and `1` in `5.1.1`. The first number is the class of the
/// reply code.
pub type Detail = (u16, u16);

/// The text without anything in brackets, since that is often an identifier.
fn without_brackets(text: &str) -> String {
    let mut depth = 0u32;
    let mut kept = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '[' | '(' | '<' => depth += 1,
            ']' | ')' | '>' => {
                depth = depth.saturating_sub(1);
                kept.push(' ');
            }
            _ if depth == 0 => kept.push(letter),
            _ => {}
        }
    }
    kept
}

/// The maximum number of words of a normalised text.
const LONGEST_WORDS: usize = 40;

/// The lower-case words of a text, without addresses, host names and links, since parts of these could be mistaken for words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    /// Separated by single spaces, with one at each end.
    pub joined: String,
    /// The whole text in lower case, for identifiers such as `RESOLVER.ADR.RecipientNotFound`.
    pub raw: String,
}

impl Words {
    /// The words of `text`.
    pub fn of(text: &str) -> Self {
        let raw = text.to_lowercase().replace(['\u{2019}', '\u{2018}', '`'], "'");
        let mut joined = String::from(" ");
        let mut is_first = true;
        for token in raw.split_whitespace() {
            if is_name(token) || (is_first && token.ends_with("...") && !is_number(token)) {
                is_first = false;
                continue;
            }
            is_first &= is_number(token);
            let mut word = String::new();
            for letter in token.chars() {
                match letter {
                    '\'' => {}
                    _ if letter.is_alphanumeric() => word.push(letter),
                    _ if !word.is_empty() && !word.ends_with(' ') => word.push(' '),
                    _ => {}
                }
            }
            for word in word.split_whitespace() {
                joined.push_str(word);
                joined.push(' ');
            }
        }
        Self { joined, raw }
    }

    /// Whether `phrase` occurs as whole words; with a `*` at its end, the last word may continue.
    pub fn contain(&self, phrase: &str) -> bool {
        match phrase.strip_suffix('*') {
            Some(beginning) => self.joined.contains(&format!(" {beginning}")),
            None => self.joined.contains(&format!(" {phrase} ")),
        }
    }
}

/// Codes, statuses and similar tokens.
fn is_number(token: &str) -> bool {
    !token.contains(char::is_alphabetic)
}

/// Addresses, host names and links.
fn is_name(token: &str) -> bool {
    if token.contains('@') || token.contains("://") || token.starts_with("www.") {
        return true;
    }
    let token = token.trim_start_matches(|c: char| !c.is_alphanumeric());
    let end = token.find(|c: char| !c.is_alphanumeric() && c != '.' && c != '-').unwrap_or(token.len());
    let name = token[..end].trim_end_matches('.');
    let labels: Vec<&str> = name.split('.').collect();
    let [.., last] = labels.as_slice() else { return false };
    let is_top = last.chars().all(|c| c.is_ascii_alphabetic() || c == '-')
        && ((2..=3).contains(&last.len())
            || matches!(
                *last,
                "info" | "example" | "test" | "local" | "invalid" | "localhost" | "localdomain" | "name"
            )
            || last.starts_with("xn--"));
    // `unknown.Please` is the end of a sentence and the start of the next.
    labels.len() > 1 && !labels.contains(&"") && (is_top || (labels.len() > 2 && last.contains(char::is_alphabetic)))
}

/// The enhanced statuses in `text`, in any place: `5.1.1 …`, `#5.7.1`, `(#5.7.1)`, on later lines. `class`: only those that start
/// with this number.
#[must_use]
pub fn statuses(text: &str, class: Option<u16>) -> Vec<Detail> {
    let mut found = Vec::new();
    // IP addresses contain dots and digits too, so a status must be a token of its own.
    let words = text.split(|c: char| !(c.is_ascii_digit() || c == '.' || c.is_alphabetic() || c == '@'));
    for word in words {
        let mut numbers = word.trim_end_matches('.').split('.');
        let mut number = |longest: usize| {
            let digits = numbers.next()?;
            let fits = (1..=longest).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
            fits.then(|| digits.parse::<u16>().ok()).flatten()
        };
        let (Some(first), Some(subject), Some(detail)) = (number(1), number(3), number(3)) else { continue };
        let wanted = class.map_or(matches!(first, 2 | 4 | 5), |class| class == first);
        if numbers.next().is_none() && wanted && !found.contains(&(subject, detail)) {
            found.push((subject, detail));
        }
    }
    found
}

/// The text without what differs between recipients: addresses, host names, links, numbers and identifiers. Two refusals for the
/// same reason give the same text.
#[must_use]
pub fn normalized(code: u16, text: &str) -> String {
    let mut shown = code.to_string();
    for (subject, detail) in statuses(text, Some(code / 100)) {
        shown.push_str(&format!(" {}.{subject}.{detail}", code / 100));
    }
    let words = Words::of(&without_brackets(text));
    let is_common = |word: &&str| !word.contains(|c: char| c.is_ascii_digit());
    for word in words.joined.split_whitespace().filter(is_common).take(LONGEST_WORDS) {
        shown.push(' ');
        shown.push_str(word);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_found_anywhere() {
        for (text, found) in [
            ("5.1.1 no", vec![(1, 1)]),
            ("sorry (#5.7.1)", vec![(7, 1)]),
            ("#5.7.1 rejected", vec![(7, 1)]),
            ("[5.2.1]: off", vec![(2, 1)]),
            ("no\n5.7.606 banned", vec![(7, 606)]),
            ("550-5.1.1 The account\n550 5.1.1 is gone.", vec![(1, 1)]),
            ("5.1.1. no; 5.7.1, really", vec![(1, 1), (7, 1)]),
            ("from 5.1.1.9 and 15.1.1 and 5.1 and a5.1.1 and 4.2.2", vec![]),
        ] {
            assert_eq!(statuses(text, Some(5)), found, "{text}");
        }
        assert_eq!(statuses("4.2.2 full", None), [(2, 2)]);
    }

    #[test]
    fn names_are_not_words() {
        let words = |text| Words::of(text).joined.trim().to_owned();
        assert_eq!(words("550 5.1.1 <relay@spam.example>: User unknown"), "550 5 1 1 user unknown");
        assert_eq!(words("limit... User unknown"), "user unknown");
        assert_eq!(words("host mail.relay.example[192.0.2.1] said: No such user."), "host said no such user");
        assert_eq!(words("Unknown.Please check https://policy.example/a"), "unknown please check");
        assert_eq!(words("This user doesn\u{2019}t exist"), "this user doesnt exist");
    }

    #[test]
    fn the_same_refusal_of_two_recipients_gives_the_same_text() {
        let one = normalized(550, "5.7.1 <ann@example.org>: Nope, ref 8842-AB12 (mx1.example.net)");
        let other = normalized(550, "5.7.1 <bob@example.com>: Nope, ref 9-CD34 (mx2.example.net) [qXyz]");
        assert_eq!(one, other);
        assert_ne!(one, normalized(550, "5.7.1 <bob@example.com>: Never"));
    }

    proptest::proptest! {
        #[test]
        fn any_text_has_words(text in "\\PC{0,80}|([a-z.@<>:/ #0-9'-]{0,60})") {
            let words = Words::of(&text);
            proptest::prop_assert!(words.joined.starts_with(' ') && words.joined.ends_with(' '));
            let _ = (statuses(&text, None), normalized(550, &text));
        }
    }
}
