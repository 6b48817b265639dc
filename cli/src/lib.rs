//! What the mailrun program is made of beside the pipeline itself: the local stack, the services it runs, and the commands.

pub mod backup;
pub mod bench;
pub mod bounce;
pub mod chaos;
pub mod dead_letters;
pub mod demo;
pub mod doctor;
pub mod erase;
pub mod ledger;
pub mod local;
pub mod mail_sink;
mod people;
pub mod prune;
pub mod relay;
pub mod restored;
pub mod setup;
pub mod sink;
pub mod stack;
pub mod supervise;
pub mod suppressions;
pub mod test_send;
pub mod unknown;
pub mod up;
mod visitor;
