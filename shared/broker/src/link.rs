//! A connection that is always closed properly, even when its user fails or is dropped.

use std::{
    ops::Deref,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use lapin::{Channel, Connection};
use tokio::{runtime::Handle, time::timeout};
use tokio_util::task::TaskTracker;

/// How long to wait for the broker's reply to a close.
const CLOSE: Duration = Duration::from_secs(1);

/// A connection that closes in the background when it is dropped. [`Link::close`] closes it and waits.
///
/// A dropped lapin connection stays open while one of its channels still expects a reply. A consumer that the broker sets up
/// after our timeout would then receive messages and hold them until the broker's consumer timeout, half an hour later.
///
/// lapin closes a channel when its last owner is dropped. If that happens while the connection is closing, it fails and counts as
/// a connection error. So the link keeps every channel until the connection is closed.
#[derive(Debug)]
pub struct Link {
    connection: Arc<Connection>,
    channels: Mutex<Vec<Channel>>,
    /// Tracks connections that close in the background after a drop.
    tasks: TaskTracker,
}

impl Link {
    pub(super) fn new(connection: Connection, tasks: &TaskTracker) -> Self {
        Self { connection: Arc::new(connection), channels: Mutex::default(), tasks: tasks.clone() }
    }

    /// Opens a channel.
    pub async fn channel(&self) -> lapin::Result<Channel> {
        let channel = self.connection.create_channel().await?;
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|channel| channel.status().connected());
        channels.push(channel.clone());
        Ok(channel)
    }

    /// Closes the connection. Best effort, errors are ignored: the connection may be in any state, and whatever matters has been
    /// confirmed or acknowledged before.
    pub async fn close(&self) {
        close(&self.connection).await;
    }
}

async fn close(connection: &Connection) {
    let _ = timeout(CLOSE, connection.close(200, "done".into())).await;
}

impl Deref for Link {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.status().connected()
            && let Ok(runtime) = Handle::try_current()
        {
            let connection = Arc::clone(&self.connection);
            let channels = std::mem::take(self.channels.get_mut().unwrap_or_else(PoisonError::into_inner));
            let closing = async move {
                close(&connection).await;
                drop(channels);
            };
            self.tasks.spawn_on(closing, &runtime);
        }
    }
}
