//! Whether the far side accepts work at present.

use std::time::Instant;

/// Whether the far side accepts work at present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gate {
    /// As much as there are permits for.
    Open,
    /// One mail, to see whether the mail server takes it.
    Trying,
    /// Nothing.
    Closed {
        /// Why, in the mail server's words.
        reason: String,
        /// When it is tried again.
        until: Instant,
    },
}
