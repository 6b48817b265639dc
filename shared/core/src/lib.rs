//! Decisions without I/O: how a state changes, what follows an outcome, when an item is sent, what a message contains. The model
//! checker runs these same functions.

pub mod address;
pub mod agreement;
pub mod claim;
pub mod epoch;
pub mod health;
pub mod item;
pub mod message;
pub mod message_id;
pub mod metric;
#[cfg(test)]
mod model;
pub mod observer;
pub mod outcome;
pub mod pacing;
pub mod public_url;
pub mod queue;
pub mod reply;
pub mod retry;
pub mod run;
pub mod setting;
pub mod signed_id;
pub mod since;
pub mod template;
pub mod unsubscribe;
