//! Common parts of settings: durations with the unit in the key, and the error for an invalid value.

use std::time::Duration;

/// One day: the unit of retention, and the longest timeout for a server's answer.
pub const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A setting that can be parsed but is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid setting {key}: {reason}")]
pub struct InvalidSetting {
    /// The key.
    pub key: &'static str,
    /// Why it is invalid, and what would be valid.
    pub reason: String,
}

impl InvalidSetting {
    /// `key` is invalid for this reason.
    #[must_use]
    pub fn new(key: &'static str, reason: impl Into<String>) -> Self {
        Self { key, reason: reason.into() }
    }
}

/// A duration in a key that ends in `_ms`.
pub mod ms {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer};

    /// Deserializes milliseconds.
    ///
    /// # Errors
    /// The value is not a whole number.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

/// A duration in a key that ends in `_s`.
pub mod s {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer};

    /// Deserializes seconds.
    ///
    /// # Errors
    /// The value is not a whole number.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_secs)
    }
}

/// An optional duration in a key that ends in `_ms`.
pub mod ms_if_any {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer};

    /// Deserializes milliseconds.
    ///
    /// # Errors
    /// There is a value, and it is not a whole number.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.map(Duration::from_millis))
    }
}
