//! What a process needs around its stages: settings, logs, metrics and health, an HTTP server with time limits, a shutdown by signal,
//! and the comparison of ledger and broker before anything is sent.

pub mod config;
pub mod lineage;
pub mod monitoring;
pub mod server;
pub mod shutdown;
pub mod telemetry;
