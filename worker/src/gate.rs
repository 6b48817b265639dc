//! Whether the remote side accepts work.

use std::time::Instant;

/// Whether the remote side accepts work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Yes, as much as there are permits for.
    Open,
    /// A single item is being tried, to find out.
    Trying,
    /// No.
    Closed {
        /// The reason, usually the mail server's reply.
        reason: String,
        /// When it is tried again.
        until: Instant,
    },
}
