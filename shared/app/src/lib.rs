//! What every process needs besides its own work: settings, logs, metrics and health, an HTTP server with time limits, shutdown on
//! a signal, and the check that ledger and broker belong together before anything is sent.

pub mod config;
pub mod lineage;
pub mod monitoring;
pub mod server;
pub mod shutdown;
pub mod telemetry;
