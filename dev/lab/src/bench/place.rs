//! A database and a virtual host for one measurement, empty and prepared, so that no measurement disturbs the next one.

use std::ffi::OsString;

use anyhow::{Context as _, Result};
use lapin::{Channel, Connection, ConnectionProperties, options::ConfirmSelectOptions};
use mailrun_app::config::Config;
use sqlx::{Connection as _, PgConnection};

use mailrun::setup;
use mailrun_stack::Stack;

/// Where one measurement works.
pub(super) struct Place<'a> {
    pub(super) stack: &'a Stack,
    name: String,
}

impl<'a> Place<'a> {
    /// Creates it, with Mailrun's tables and queues.
    ///
    /// # Errors
    /// What could not be created.
    pub(super) async fn create(stack: &'a Stack, purpose: &str) -> Result<Self> {
        let place = Self { stack, name: format!("bench-{}-{purpose}", std::process::id()) };
        stack.create_database(&place.name).await?;
        stack.create_vhost(&place.name).await?;
        let mut config = Config::default();
        config.database.url = place.database_url().into();
        config.amqp.urls = vec![stack.amqp_url(&place.name).into()];
        setup::run(&config, false).await?;
        // Without the library nothing is told of statements, and the rest is measured all the same.
        let statistics = "CREATE EXTENSION IF NOT EXISTS pg_stat_statements";
        let _ = sqlx::raw_sql(statistics).execute(&mut place.database().await?).await;
        Ok(place)
    }

    /// Drops it with all it holds.
    ///
    /// # Errors
    /// What could not be dropped.
    pub(super) async fn drop(self) -> Result<()> {
        Self::drop_named(self.stack, &self.name).await
    }

    /// Drops what an interrupted measurement has left.
    ///
    /// # Errors
    /// What could not be dropped.
    pub(super) async fn drop_leftover(stack: &Stack, purpose: &str) -> Result<()> {
        Self::drop_named(stack, &format!("bench-{}-{purpose}", std::process::id())).await
    }

    async fn drop_named(stack: &Stack, name: &str) -> Result<()> {
        stack.drop_vhost(name).await?;
        stack.drop_database(name).await?;
        Ok(())
    }

    /// What a service needs in its environment to work here.
    pub(super) fn environment(&self) -> Vec<(OsString, OsString)> {
        vec![
            ("DATABASE_URL".into(), self.database_url().into()),
            ("AMQP_URL".into(), self.stack.amqp_url(&self.name).into()),
        ]
    }

    /// Where the database is.
    pub(super) fn database_url(&self) -> String {
        self.stack.database_url(&self.name)
    }

    /// A session in the database.
    ///
    /// # Errors
    /// The database's.
    pub(super) async fn database(&self) -> Result<PgConnection> {
        PgConnection::connect(&self.database_url()).await.context("PostgreSQL can't be reached")
    }

    /// A connection of its own, with a channel.
    ///
    /// # Errors
    /// The broker's.
    pub(super) async fn channel(&self) -> Result<(Connection, Channel)> {
        let url = self.stack.amqp_url(&self.name);
        let properties = ConnectionProperties::default().with_connection_name("mailrun bench".into());
        let connection = Connection::connect(&url, properties).await.context("RabbitMQ can't be reached")?;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }

    /// The same, for publishing with confirms.
    ///
    /// # Errors
    /// The broker's.
    pub(super) async fn confirm_channel(&self) -> Result<(Connection, Channel)> {
        let (connection, channel) = self.channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok((connection, channel))
    }

    /// Begins with nothing left to do from what was before: a checkpoint in the middle of a measurement is part of it only
    /// if the measurement itself calls for one.
    ///
    /// # Errors
    /// The database's.
    pub(super) async fn quiet(&self, conn: &mut PgConnection) -> Result<()> {
        sqlx::raw_sql("CHECKPOINT").execute(conn).await?;
        Ok(())
    }
}
