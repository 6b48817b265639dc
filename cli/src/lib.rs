//! The program `mailrun` as a library, so that another program can add commands to its own.

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

pub use self::{command::Command, postgres::postgres_program};
