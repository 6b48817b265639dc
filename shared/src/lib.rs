//! What web and workers have in common: the messages and tables through which they meet, and the ways to reach both servers.
//!
//! `item`, `run`, `message`, `pacing`, `address`, `template`, `signed_id`, `message_id`, `unsubscribe`, `reply` and `retry` are
//! pure; `topology`, `broker` and `marker` speak to RabbitMQ, `store` to PostgreSQL, and the two don't know each other.
//! `lineage` alone compares the two. `server` serves HTTP, and `monitoring` what a monitoring system asks for: `metric` and `health`.

pub mod address;
pub mod broker;
pub mod config;
pub mod epoch;
pub mod health;
pub mod item;
pub mod lineage;
pub mod marker;
pub mod message;
pub mod message_id;
pub mod metric;
pub mod monitoring;
pub mod pacing;
pub mod public_url;
pub mod reply;
pub mod retry;
pub mod run;
mod scram;
pub mod server;
pub mod shutdown;
pub mod signed_id;
pub mod since;
pub mod store;
pub mod telemetry;
pub mod template;
pub mod topology;
pub mod unsubscribe;
