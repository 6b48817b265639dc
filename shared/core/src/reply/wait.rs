//! Extracts how long a server asks to wait.

use std::time::Duration;

use super::text::Words;

/// The cap for a wait, since longer ones are implausible.
const LONGEST: Duration = Duration::from_secs(24 * 3_600);

/// The wait named after *try again in*, *wait*, *for* and similar words: `in 300 seconds`, `after 5 min`, `in 01:30:00`.
pub fn suggested(text: &str) -> Option<Duration> {
    let text = text.to_lowercase();
    let asks = ["again", "retry", "wait", "back in", "resume", "later", "delay", "deferred for", "listed for", "until"];
    if !asks.iter().any(|word| text.contains(word)) {
        return None;
    }
    let tokens: Vec<&str> = text
        .split(|c: char| c.is_whitespace() || matches!(c, ',' | ';' | '(' | ')' | '=' | '[' | ']' | '<' | '>'))
        .map(|token| token.trim_end_matches(['.', '!', '\'', '"']).trim_start_matches(['\'', '"', '~']))
        .filter(|token| !token.is_empty())
        .collect();
    for (index, token) in tokens.iter().enumerate() {
        let before = index.checked_sub(1).map_or("", |before| tokens[before].trim_end_matches(':'));
        let is_asked = matches!(
            before,
            "in" | "after"
                | "for"
                | "wait"
                | "another"
                | "least"
                | "about"
                | "within"
                | "delay"
                | "retry-after"
                | "retry"
        );
        if !is_asked {
            continue;
        }
        let seconds = clock(token).or_else(|| {
            let digits = token.find(|c: char| !c.is_ascii_digit()).unwrap_or(token.len());
            let number: u64 = match *token {
                "a" | "an" | "one" => 1,
                _ => token[..digits].parse().ok()?,
            };
            let unit = match token.get(digits..).filter(|rest| !rest.is_empty() && digits > 0) {
                Some(unit) => unit.trim_start_matches('-'),
                None => tokens.get(index + 1).copied().unwrap_or(""),
            };
            match unit_seconds(unit) {
                Some(unit) => number.checked_mul(unit),
                // `Retry-After: 120`
                None => (before == "retry-after").then_some(number),
            }
        });
        if let Some(seconds) = seconds.filter(|seconds| *seconds > 0) {
            return Some(Duration::from_secs(seconds).min(LONGEST));
        }
    }
    None
}

/// Parses `01:30:00` or `04:59`.
fn clock(token: &str) -> Option<u64> {
    let parts: Vec<&str> = token.split(':').collect();
    let is_clock =
        (2..=3).contains(&parts.len()) && parts.iter().all(|part| part.len() == 2 && part.parse::<u64>().is_ok());
    is_clock.then(|| parts.iter().fold(0, |seconds, part| seconds * 60 + part.parse::<u64>().unwrap_or(0)))
}

fn unit_seconds(unit: &str) -> Option<u64> {
    match unit {
        "s" | "sec" | "secs" | "second" | "seconds" => Some(1),
        "m" | "min" | "mins" | "minute" | "minutes" => Some(60),
        "h" | "hr" | "hrs" | "hour" | "hours" => Some(3_600),
        "d" | "day" | "days" => Some(24 * 3_600),
        _ => None,
    }
}

/// The period of the limit that the text is about, if it names one.
pub fn period(words: &Words) -> Option<Duration> {
    const DAY: [&str; 8] = ["daily", "day", "days", "24 hour*", "24 hr*", "24h", "24hrs", "tomorrow"];
    const HOUR: [&str; 3] = ["hourly", "hour", "hours"];
    const MINUTE: [&str; 2] = ["minute", "minutes"];
    let names = |phrases: &[&str]| phrases.iter().any(|phrase| words.contain(phrase));
    let seconds = if names(&DAY) {
        24 * 3_600
    } else if names(&HOUR) {
        3_600
    } else if names(&MINUTE) {
        60
    } else {
        return None;
    };
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_extracted_in_the_forms_that_servers_use() {
        for (text, seconds) in [
            ("Greylisted, please try again in 300 seconds", 300),
            ("try again in 5 minutes.", 300),
            ("Retry after 2 hours", 7_200),
            ("please wait 90s before you retry", 90),
            ("deferred; retry in 00:04:59", 299),
            ("limit reached, wait for at least one hour", 3_600),
            ("Retry-After: 120", 120),
            ("throttled, try again in an hour", 3_600),
            ("come back in 9 days, try again", 86_400),
        ] {
            assert_eq!(suggested(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for text in
            ["try again later", "450 4.7.1 try again", "sent 300 messages in 60 seconds", "in 0 seconds, retry", ""]
        {
            assert_eq!(suggested(text), None, "{text}");
        }
    }

    #[test]
    fn the_period_of_a_limit_is_extracted() {
        let period = |text| period(&Words::of(text)).map(|period| period.as_secs());
        assert_eq!(period("Daily user sending limit exceeded"), Some(86_400));
        assert_eq!(period("exceeded its 24-hour sending limit"), Some(86_400));
        assert_eq!(period("too many recipients this hour"), Some(3_600));
        assert_eq!(period("30 messages per minute"), Some(60));
        assert_eq!(period("too much mail"), None);
    }
}
