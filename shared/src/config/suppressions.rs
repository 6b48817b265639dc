//! `[suppressions]`: when what a run suppresses is held for a person.

use serde::Deserialize;

/// `[suppressions]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SuppressionsConfig {
    /// A run that suppresses more than this share of its recipients gets a review; 100: none does.
    pub hold_percent: u32,
    /// But not before it suppresses so many.
    pub hold_at_least: u32,
}

impl Default for SuppressionsConfig {
    fn default() -> Self {
        Self { hold_percent: 10, hold_at_least: 20 }
    }
}

impl SuppressionsConfig {
    /// Whether `count` suppressions of a run with `total` recipients are held for review.
    #[must_use]
    pub fn holds(&self, count: i64, total: i64) -> bool {
        count >= i64::from(self.hold_at_least) && count * 100 > total * i64::from(self.hold_percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unusual_share_is_held() {
        let holds = |count, total| SuppressionsConfig::default().holds(count, total);
        assert!(!holds(19, 20) && holds(20, 20));
        assert!(!holds(20, 200) && holds(21, 200));
        assert!(!holds(100, 1_000) && holds(101, 1_000));
    }
}
