//! What settings have in common: durations, whose unit is in the key, and what is wrong with one.

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

/// A duration in a key that ends in `_ms`.
pub mod ms {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer};

    /// Reads milliseconds.
    ///
    /// # Errors
    /// Where there is no whole number.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

/// A duration in a key that ends in `_s`.
pub mod s {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer};

    /// Reads seconds.
    ///
    /// # Errors
    /// Where there is no whole number.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_secs)
    }
}

/// A duration in a key that ends in `_ms`, where there may be none.
pub mod ms_if_any {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer};

    /// Reads milliseconds.
    ///
    /// # Errors
    /// Where there is something else than a whole number.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.map(Duration::from_millis))
    }
}
