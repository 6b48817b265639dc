//! What is wrong with a setting.

use std::time::Duration;

/// A day: what retention counts in, and the longest that a server may be given to answer.
pub const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A setting that can be read, but not used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the setting {key} is not usable: {reason}")]
pub struct InvalidSetting {
    /// The key.
    pub key: &'static str,
    /// Why not, and what would be.
    pub reason: String,
}

impl InvalidSetting {
    /// The setting `key` can't be used, for this reason.
    #[must_use]
    pub fn new(key: &'static str, reason: impl Into<String>) -> Self {
        Self { key, reason: reason.into() }
    }
}
