//! The program `mailrun` as a library: another program has all of its commands, with jobs of its own. See `docs/your-own-job.md`.

pub mod backup;
pub mod bounce;
mod command;
mod dead_letters;
pub mod doctor;
mod erase;
mod ledger;
mod postgres;
pub mod program;
mod prune;
mod relay;
mod restored;
pub mod setup;
mod suppressions;
mod test_send;
mod unknown;

pub use self::{command::Command, postgres::postgres_program, program::main};
pub use mailrun_ledger::submit;
pub use mailrun_worker::{Jobs, job};
