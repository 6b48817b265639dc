//! Tests of the ledger's SQL on a real PostgreSQL: `DATABASE_URL`'s, else the private stack's.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod attempts;
mod audit;
mod held_suppressions;
mod installation;
mod mailboxes;
mod outbox;
mod pacing;
mod passes;
mod people;
mod progress;
mod prune;
mod receipts;
mod relay_stops;
mod restore;
mod runs;
mod schema;
mod server;
mod settle;
mod submit;
mod support;
mod suppressions;
mod sweep;
mod test_mails;
mod workers;
