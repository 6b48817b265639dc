//! The ledger, for an operator's commands: the one that is configured, or that of the `up` running here.

use anyhow::{Result, bail};
use mailrun_shared::config::Config;
use sqlx::PgPool;

use crate::{
    local::Servers,
    stack::{self, Nodes, running},
};

/// The ledger, and the private servers if it lives there.
pub struct Ledger {
    pub(crate) pool: PgPool,
    servers: Servers,
}

impl Ledger {
    /// Reaches it.
    ///
    /// # Errors
    /// When none is configured, and Mailrun does not run here.
    pub async fn reach(config: &Config) -> Result<Self> {
        let home = stack::home();
        if !config.named.database && running(&home).is_none() {
            bail!("Mailrun does not run here: start it with `mailrun up`, or set DATABASE_URL and AMQP_URL");
        }
        let servers = Servers::start(config, &home, Nodes::One, |step| eprintln!("{step} …")).await?;
        Ok(Self { pool: servers.open_ledger(config, "mailrun operator")?, servers })
    }

    /// The settings, with the addresses of the servers that were reached.
    #[must_use]
    pub fn settings(&self, config: &Config) -> Config {
        let mut config = config.clone();
        config.database.url = self.servers.database_url.clone();
        config.amqp.urls = self.servers.amqp_urls.clone();
        config
    }
}
