//! A connection that is closed in good order, whatever becomes of what it was for.

use std::{
    ops::Deref,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use lapin::{Channel, Connection};
use tokio::{runtime::Handle, time::timeout};
use tokio_util::task::TaskTracker;

/// A broker that does not answer to the end of a connection is not waited for.
const CLOSE: Duration = Duration::from_secs(1);

/// A connection that is closed when it is dropped. [`Link::close`] waits for that.
///
/// lapin's own outlives all its owners if an answer is due on one of its channels: a consumer that the broker sets up after
/// our wait has ended would be given messages, and hold them until the broker's own time limit, half an hour later.
///
/// lapin closes a channel whose last owner is gone. While its connection is being closed, that fails, and counts as an error of
/// the connection; so the link owns every channel until the connection is closed.
#[derive(Debug)]
pub struct Link {
    connection: Arc<Connection>,
    channels: Mutex<Vec<Channel>>,
    /// Closing goes on in here when nobody waits for it.
    tasks: TaskTracker,
}

impl Link {
    pub(super) fn new(connection: Connection, tasks: &TaskTracker) -> Self {
        Self { connection: Arc::new(connection), channels: Mutex::default(), tasks: tasks.clone() }
    }

    /// Opens a channel.
    ///
    /// # Errors
    /// The broker's.
    pub async fn channel(&self) -> lapin::Result<Channel> {
        let channel = self.connection.create_channel().await?;
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|channel| channel.status().connected());
        channels.push(channel.clone());
        Ok(channel)
    }

    /// Closes the connection. It may be in any state by now, and whatever matters is confirmed or acknowledged before: so this
    /// is best effort, and errors are ignored.
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
