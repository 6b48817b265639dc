//! Retries a query until PostgreSQL answers.

use mailrun_core::retry::Reconnect;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Repeats `query` until PostgreSQL answers. `problem` is logged with each failure. `None`: stopped before that.
pub(crate) async fn until_answered<T, F>(
    problem: &str,
    stop: &CancellationToken,
    mut query: impl FnMut() -> F,
) -> Option<T>
where
    F: Future<Output = sqlx::Result<T>>,
{
    let mut waits = Reconnect::default();
    loop {
        match stop.run_until_cancelled(query()).await? {
            Ok(answer) => return Some(answer),
            Err(error) => {
                let wait = waits.next_wait();
                warn!(%error, wait_ms = wait.as_millis(), "{problem}, trying again");
                stop.run_until_cancelled(sleep(wait)).await?;
            }
        }
    }
}
