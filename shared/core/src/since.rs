//! Parses a point in time as an operator writes it: a date, a time, or an age.

use chrono::{DateTime, Duration, NaiveDate, NaiveDateTime, Utc};

/// Parses `2026-11-28`, `2026-11-28T14:30` or `2026-11-28 14:30` (UTC), RFC 3339, or an age such as `90m`, `2h`, `3d` before `now`.
#[must_use]
pub fn parse(text: &str, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
    let text = text.trim();
    if let Ok(moment) = DateTime::parse_from_rfc3339(text) {
        return Some(moment.to_utc());
    }
    for format in ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M"] {
        if let Ok(moment) = NaiveDateTime::parse_from_str(text, format) {
            return Some(moment.and_utc());
        }
    }
    if let Ok(date) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        return Some(date.and_hms_opt(0, 0, 0)?.and_utc());
    }
    let unit = text.chars().last()?;
    let number: i64 = text.get(..text.len() - unit.len_utf8())?.parse().ok().filter(|number| *number >= 0)?;
    let ago = match unit {
        'm' => Duration::try_minutes(number),
        'h' => Duration::try_hours(number),
        'd' => Duration::try_days(number),
        _ => None,
    };
    now.checked_sub_signed(ago?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_parsed() {
        let now = DateTime::parse_from_rfc3339("2026-11-28T12:00:00Z").unwrap().to_utc();
        let read = |text: &str| parse(text, now).map(|moment| moment.format("%m-%d %H:%M").to_string());
        for (text, moment) in [
            ("2026-11-27", "11-27 00:00"),
            ("2026-11-27T14:30", "11-27 14:30"),
            ("2026-11-27 14:30:05", "11-27 14:30"),
            ("2026-11-27T14:30:00+02:00", "11-27 12:30"),
            (" 2h ", "11-28 10:00"),
            ("90m", "11-28 10:30"),
            ("3d", "11-25 12:00"),
        ] {
            assert_eq!(read(text).as_deref(), Some(moment), "{text}");
        }
        for text in ["", "h", "-2h", "yesterday", "2026-13-01", "99999999999999d", "2é"] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
