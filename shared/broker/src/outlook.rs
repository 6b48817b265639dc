//! Queries the length of queues over a connection that stays open, separate from those that carry messages.

use std::{sync::Arc, time::Duration};

use crate::{Broker, BrokerError, Link, depth};
use lapin::Channel;
use tokio::time::timeout;

/// A connection for querying queues.
#[derive(Debug)]
pub struct Outlook {
    broker: Arc<Broker>,
    open: Option<(Link, Channel)>,
}

impl Outlook {
    /// Connects at the first query.
    pub fn new(broker: Arc<Broker>) -> Self {
        Self { broker, open: None }
    }

    /// The number of ready messages on a queue; None if the queue does not exist. After an error the next query opens a new
    /// connection.
    pub async fn depth(&mut self, queue: &str) -> Result<Option<u32>, BrokerError> {
        let limit = self.broker.answer_timeout();
        let (link, channel) = match self.open.take() {
            Some(open) => open,
            None => in_time(limit, self.connect()).await?,
        };
        match in_time(limit, async { Ok(depth(&channel, queue).await?) }).await {
            Ok(messages) => {
                self.open = Some((link, channel));
                Ok(Some(messages))
            }
            Err(error) => {
                // The error has closed the channel.
                link.close().await;
                if error.is_not_found() { Ok(None) } else { Err(error) }
            }
        }
    }

    async fn connect(&self) -> Result<(Link, Channel), BrokerError> {
        let link = self.broker.connect("look").await?;
        let channel = link.channel().await?;
        Ok((link, channel))
    }

    /// Closes the connection, if it is open.
    pub async fn close(&mut self) {
        if let Some((link, _)) = self.open.take() {
            link.close().await;
        }
    }
}

async fn in_time<T>(limit: Duration, ask: impl Future<Output = Result<T, BrokerError>>) -> Result<T, BrokerError> {
    timeout(limit, ask).await.unwrap_or(Err(BrokerError::Timeout))
}
