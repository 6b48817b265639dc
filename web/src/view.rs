//! Formats counts, times and progress. Pure functions.

use std::{borrow::Cow, iter};

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use mailrun_core::{
    item::ItemState,
    run::{Counters, Phase},
};
use mailrun_ledger::{invitations, runs::Progress};

/// The minimum width of a segment that is not empty, in percent, so that one failure among a million is visible.
const LEAST_PERCENT: f64 = 2.0;

/// `1,000`
#[must_use]
pub fn grouped(number: impl Into<i64>) -> String {
    let number: i64 = number.into();
    let digits = number.unsigned_abs().to_string();
    let mut text = String::from(if number < 0 { "-" } else { "" });
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What the items of a run are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Noun {
    pub(crate) one: &'static str,
    pub(crate) many: &'static str,
    /// The heading of what identifies one of them.
    pub(crate) heading: &'static str,
}

impl Noun {
    /// For runs of this kind.
    pub(crate) fn of(kind: &str) -> Self {
        if kind == invitations::KIND {
            Self { one: "invitation", many: "invitations", heading: "Address" }
        } else {
            Self { one: "item", many: "items", heading: "Data" }
        }
    }

    /// `1 invitation`, `2,000 invitations`
    pub(crate) fn counted(self, number: i32) -> String {
        counted(number, self.one, self.many)
    }

    /// `1 failed invitation`, `2,000 failed invitations`
    pub(crate) fn failed(self, number: i32) -> String {
        format!("{} failed {}", grouped(number), if number == 1 { self.one } else { self.many })
    }
}

/// `1 address`, `2,000 addresses`
pub(crate) fn counted(number: i32, one: &str, many: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{} {many}", grouped(number)) }
}

/// The states in the order in which pages show them.
pub(crate) const SHOWN: [ItemState; ItemState::ALL.len()] = [
    ItemState::Sent,
    ItemState::Retrying,
    ItemState::Failed,
    ItemState::Unknown,
    ItemState::Cancelled,
    ItemState::Skipped,
    ItemState::Pending,
];
/// The segments of the bar, from the left. What is in none of them is still to be done.
const SEGMENTS: [&[ItemState]; 5] = [
    &[ItemState::Sent],
    &[ItemState::Retrying],
    &[ItemState::Failed],
    &[ItemState::Unknown],
    &[ItemState::Cancelled, ItemState::Skipped],
];

/// What pages call a state.
pub(crate) fn word(state: ItemState) -> &'static str {
    match state {
        ItemState::Sent => "successful",
        ItemState::Pending => "to go",
        other => other.name(),
    }
}

/// `990 successful, 10 failed of 1,000`
pub(crate) fn progress_text(counters: &Counters) -> String {
    let mut text = format!("{} {}", grouped(counters.of(ItemState::Sent)), word(ItemState::Sent));
    let others =
        SHOWN.into_iter().filter(|state| ![ItemState::Sent, ItemState::Failed, ItemState::Pending].contains(state));
    for state in iter::once(ItemState::Failed).chain(others) {
        let number = counters.of(state);
        if number > 0 {
            text.push_str(&format!(", {} {}", grouped(number), word(state)));
        }
    }
    text.push_str(&format!(" of {}", grouped(counters.total)));
    text
}

/// Settled items in whole percent, rounded down: 100 only if all are settled.
pub(crate) fn percent(counters: &Counters) -> i64 {
    if counters.total == 0 { 100 } else { i64::from(counters.settled()) * 100 / i64::from(counters.total) }
}

/// The right edges of the bar's segments, in percent: sent, retrying, failed, unknown, and not to be sent (cancelled or skipped).
/// The rest is pending.
pub(crate) fn edges(counters: &Counters) -> [f64; 5] {
    let segments = SEGMENTS.map(|states| states.iter().map(|state| counters.of(*state)).sum::<i32>());
    let [sent, retrying, failed, unknown, withheld] = segments;
    let counts = [sent, retrying, failed, unknown, withheld, counters.total - segments.iter().sum::<i32>()];
    let total = f64::from(counters.total.max(1));
    let mut shares = counts.map(|count| f64::from(count) * 100.0 / total);
    let mut borrowed = 0.0;
    for share in &mut shares {
        if *share > 0.0 && *share < LEAST_PERCENT {
            borrowed += LEAST_PERCENT - *share;
            *share = LEAST_PERCENT;
        }
    }
    // Six shares sum to 100, so the largest has more than the other five can borrow.
    if let Some(largest) = shares.iter_mut().max_by(|a, b| a.total_cmp(b)) {
        *largest -= borrowed;
    }
    let mut edge = 0.0;
    [0, 1, 2, 3, 4].map(|index| {
        edge += shares[index];
        // Two digits are a twentieth of a pixel.
        (edge * 100.0).round() / 100.0
    })
}

/// `3.4 s`, `42 s`, `3 min 05 s`, `2 h 03 min`, `4 days 2 h`
pub(crate) fn duration(time: TimeDelta) -> String {
    let ms = time.num_milliseconds().max(0);
    let s = ms / 1000;
    match s {
        0..10 => format!("{}.{} s", s, ms % 1000 / 100),
        10..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
        _ => format!("{} {} h", plural(s / 86_400, "day"), s % 86_400 / 3600),
    }
}

/// `412 a second`, `2.5 a second`, `6 a minute`
#[must_use]
pub fn rate(per_second: f64) -> String {
    if per_second >= 10.0 {
        format!("{} a second", grouped(per_second.round() as i64))
    } else if per_second >= 1.0 {
        format!("{per_second:.1} a second")
    } else {
        format!("{} a minute", (per_second * 60.0).round().max(1.0))
    }
}

/// A rough estimate for `open` items at this rate. None: no progress.
pub(crate) fn time_left(open: i32, per_second: f64) -> Option<String> {
    if open <= 0 || per_second <= 0.0 {
        return None;
    }
    let s = (f64::from(open) / per_second).ceil().min(1e9) as i64;
    Some(match s {
        0..5 => "a few seconds".to_owned(),
        5..55 => format!("about {} seconds", (s + 4) / 5 * 5),
        55..3300 => format!("about {}", plural((s + 59) / 60, "minute")),
        3300..86_400 => format!("about {}", plural((s + 1800) / 3600, "hour")),
        _ => format!("about {}", plural((s + 43_200) / 86_400, "day")),
    })
}

/// `just now`, `5 minutes ago`
pub(crate) fn ago(then: DateTime<Utc>, now: DateTime<Utc>) -> String {
    let s = (now - then).num_seconds();
    match s {
        ..45 => "just now".to_owned(),
        45..3600 => format!("{} ago", plural((s / 60).max(1), "minute")),
        3600..86_400 => format!("{} ago", plural(s / 3600, "hour")),
        _ => format!("{} ago", plural(s / 86_400, "day")),
    }
}

fn plural(number: i64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// A time, for people and for `<time datetime>`.
pub(crate) struct Moment {
    pub(crate) iso: String,
    pub(crate) text: String,
    /// Relative to now.
    pub(crate) ago: String,
}

impl Moment {
    pub(crate) fn new(then: DateTime<Utc>, now: DateTime<Utc>) -> Self {
        Self {
            iso: then.to_rfc3339_opts(SecondsFormat::Millis, true),
            text: then.format("%-d %b %Y, %H:%M UTC").to_string(),
            ago: ago(then, now),
        }
    }
}

/// The phase's name, or a wanted state of a later version.
pub(crate) fn state(progress: &Progress) -> Cow<'static, str> {
    progress.later.clone().map_or_else(|| phase(progress.phase()).into(), Cow::Owned)
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Queued => "Queued",
        Phase::Running => "Running",
        Phase::Paused => "Paused",
        Phase::Cancelling => "Cancelling",
        Phase::Cancelled => "Cancelled",
        Phase::Finished => "Finished",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(sent: i32, retrying: i32, failed: i32, unknown: i32, cancelled: i32, pending: i32) -> Counters {
        Counters::of_items(&[
            (ItemState::Sent, sent),
            (ItemState::Retrying, retrying),
            (ItemState::Failed, failed),
            (ItemState::Unknown, unknown),
            (ItemState::Cancelled, cancelled),
            (ItemState::Pending, pending),
        ])
    }

    #[test]
    fn groups_digits() {
        let texts = [0, 7, 999, 1_000, 12_345, 1_000_000, -1_234].map(|number: i64| grouped(number));
        assert_eq!(texts, ["0", "7", "999", "1,000", "12,345", "1,000,000", "-1,234"]);
        assert_eq!(
            (counted(1, "line", "lines"), counted(2_000, "line", "lines")),
            ("1 line".into(), "2,000 lines".into())
        );
        let invitations = Noun::of(invitations::KIND);
        assert_eq!(
            (invitations.failed(1), invitations.failed(2_000)),
            ("1 failed invitation".into(), "2,000 failed invitations".into())
        );
    }

    #[test]
    fn formats_progress() {
        assert_eq!(progress_text(&counters(990, 0, 10, 0, 0, 0)), "990 successful, 10 failed of 1,000");
        assert_eq!(progress_text(&counters(1_000, 0, 0, 0, 0, 0)), "1,000 successful of 1,000");
        assert_eq!(progress_text(&counters(0, 0, 0, 0, 0, 5)), "0 successful of 5");
        assert_eq!(
            progress_text(&counters(80, 3, 10, 2, 5, 900)),
            "80 successful, 10 failed, 3 retrying, 2 unknown, 5 cancelled of 1,000"
        );
        let skipped = Counters::of_items(&[(ItemState::Sent, 990), (ItemState::Skipped, 3)]);
        assert_eq!(progress_text(&skipped), "990 successful, 3 skipped of 993");
    }

    #[test]
    fn a_hundred_percent_means_all_settled() {
        assert_eq!(percent(&counters(999_999, 0, 0, 0, 0, 1)), 99);
        assert_eq!(percent(&counters(990, 0, 10, 0, 0, 0)), 100);
        assert_eq!(percent(&counters(0, 0, 0, 0, 0, 0)), 100);
    }

    #[test]
    fn the_segments_fill_the_bar() {
        assert_eq!(edges(&counters(50, 0, 25, 0, 0, 25)), [50.0, 50.0, 75.0, 75.0, 75.0]);
        assert_eq!(edges(&counters(0, 0, 0, 0, 0, 9)), [0.0; 5]);
        assert_eq!(edges(&counters(9, 0, 0, 0, 0, 0)), [100.0; 5]);
    }

    #[test]
    fn one_among_a_million_is_visible() {
        assert_eq!(edges(&counters(999_999, 0, 1, 0, 0, 0)), [98.0, 98.0, 100.0, 100.0, 100.0]);
        let all = edges(&counters(1, 1, 1, 1, 1, 1_000_000));
        assert_eq!(all, [2.0, 4.0, 6.0, 8.0, 10.0]);
        // One pending item keeps the bar from looking full.
        assert_eq!(edges(&counters(999_999, 0, 0, 0, 0, 1)), [98.0; 5]);
    }

    #[test]
    fn short_durations_are_more_exact() {
        let texts = [0, 3_456, 9_999, 42_000, 185_000, 7_380_000, 100 * 3_600_000]
            .map(|ms| duration(TimeDelta::milliseconds(ms)));
        assert_eq!(texts, ["0.0 s", "3.4 s", "9.9 s", "42 s", "3 min 05 s", "2 h 03 min", "4 days 4 h"]);
    }

    #[test]
    fn rates_are_readable() {
        assert_eq!(
            [1234.4, 10.0, 2.53, 0.1, 0.001].map(rate),
            ["1,234 a second", "10 a second", "2.5 a second", "6 a minute", "1 a minute"]
        );
    }

    #[test]
    fn the_time_left_is_rough() {
        let left = |open, rate| time_left(open, rate).unwrap_or_default();
        assert_eq!(left(100, 50.0), "a few seconds");
        assert_eq!(left(100, 8.0), "about 15 seconds");
        assert_eq!(left(100, 1.0), "about 2 minutes");
        assert_eq!(left(100_000, 10.0), "about 3 hours");
        assert_eq!(left(i32::MAX, 0.001), "about 11574 days");
        assert_eq!(time_left(100, 0.0), None);
        assert_eq!(time_left(0, 10.0), None);
    }

    #[test]
    fn formats_times_relative_to_now() {
        let now = Utc::now();
        let texts = [-3, 10, 50, 3_599, 7_200, 86_400].map(|s| ago(now - TimeDelta::seconds(s), now));
        assert_eq!(texts, ["just now", "just now", "1 minute ago", "59 minutes ago", "2 hours ago", "1 day ago"]);
    }
}
