//! The ledger that an operator's command uses.

use anyhow::{Result, bail};
use mailrun_app::config::Config;
use sqlx::PgPool;

/// The ledger of the configured installation.
pub struct Ledger {
    pub(crate) pool: PgPool,
}

impl Ledger {
    /// Opens the ledger. Fails if the servers are not configured.
    pub fn open(config: &Config) -> Result<Self> {
        let missing = match (config.named.database, config.named.broker) {
            (true, true) => return Ok(Self { pool: mailrun_ledger::open(&config.database, "mailrun operator")? }),
            (false, true) => "PostgreSQL: set DATABASE_URL, or database.url in mailrun.toml",
            (true, false) => "RabbitMQ: set AMQP_URL, or amqp.urls in mailrun.toml",
            (false, false) => {
                "the servers: set DATABASE_URL and AMQP_URL, or database.url and amqp.urls in mailrun.toml"
            }
        };
        bail!("this command requires {missing}")
    }
}
