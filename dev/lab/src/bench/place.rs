//! A prepared empty database and virtual host for one measurement, so that measurements do not affect each other.

use std::ffi::OsString;

use anyhow::{Context as _, Result};
use lapin::{Channel, Connection, ConnectionProperties, options::ConfirmSelectOptions};
use mailrun_app::config::Config;
use sqlx::{Connection as _, PgConnection};

use mailrun::setup;
use mailrun_stack::Stack;

/// The database and virtual host of one measurement.
pub(super) struct Place<'a> {
    pub(super) stack: &'a Stack,
    name: String,
}

impl<'a> Place<'a> {
    /// Creates it with Mailrun's tables and queues.
    pub(super) async fn create(stack: &'a Stack, purpose: &str) -> Result<Self> {
        let place = Self { stack, name: format!("bench-{}-{purpose}", std::process::id()) };
        stack.create_database(&place.name).await?;
        stack.create_vhost(&place.name).await?;
        let mut config = Config::default();
        config.database.url = place.database_url().into();
        config.amqp.urls = vec![stack.amqp_url(&place.name).into()];
        setup::run(&config, false).await?;
        // Without the library, statement statistics are missing and everything else is measured.
        let statistics = "CREATE EXTENSION IF NOT EXISTS pg_stat_statements";
        let _ = sqlx::raw_sql(statistics).execute(&mut place.database().await?).await;
        Ok(place)
    }

    /// Drops it with its contents.
    pub(super) async fn drop(self) -> Result<()> {
        Self::drop_named(self.stack, &self.name).await
    }

    /// Drops what an interrupted measurement left.
    pub(super) async fn drop_leftover(stack: &Stack, purpose: &str) -> Result<()> {
        Self::drop_named(stack, &format!("bench-{}-{purpose}", std::process::id())).await
    }

    async fn drop_named(stack: &Stack, name: &str) -> Result<()> {
        stack.drop_vhost(name).await?;
        stack.drop_database(name).await?;
        Ok(())
    }

    /// The environment of a service that uses it.
    pub(super) fn environment(&self) -> Vec<(OsString, OsString)> {
        vec![
            ("DATABASE_URL".into(), self.database_url().into()),
            ("AMQP_URL".into(), self.stack.amqp_url(&self.name).into()),
        ]
    }

    /// The URL of the database.
    pub(super) fn database_url(&self) -> String {
        self.stack.database_url(&self.name)
    }

    /// Connects to the database.
    pub(super) async fn database(&self) -> Result<PgConnection> {
        PgConnection::connect(&self.database_url()).await.context("cannot connect to PostgreSQL")
    }

    /// Opens a connection with a channel.
    pub(super) async fn channel(&self) -> Result<(Connection, Channel)> {
        let url = self.stack.amqp_url(&self.name);
        let properties = ConnectionProperties::default().with_connection_name("mailrun bench".into());
        let connection = Connection::connect(&url, properties).await.context("cannot connect to RabbitMQ")?;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }

    /// The same, with publisher confirms.
    pub(super) async fn confirm_channel(&self) -> Result<(Connection, Channel)> {
        let (connection, channel) = self.channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok((connection, channel))
    }

    /// Forces a checkpoint, so that a checkpoint during a measurement is caused by the measurement itself.
    pub(super) async fn quiet(&self, conn: &mut PgConnection) -> Result<()> {
        sqlx::raw_sql("CHECKPOINT").execute(conn).await?;
        Ok(())
    }
}
