//! The private servers, the mail sink, the benchmark and the fault bench: what this program has in addition to the installed one.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod bench;
mod chaos;
mod cluster;
mod sink;
mod stack;
