//! Waits for a PostgreSQL that does not answer yet.

use mailrun_core::retry::Reconnect;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Asks PostgreSQL until it answers; `trouble` says what can't be done meanwhile. None: told to stop before that.
pub(crate) async fn until_answered<T, F>(
    trouble: &str,
    stop: &CancellationToken,
    mut ask: impl FnMut() -> F,
) -> Option<T>
where
    F: Future<Output = sqlx::Result<T>>,
{
    let mut waits = Reconnect::default();
    loop {
        match stop.run_until_cancelled(ask()).await? {
            Ok(answer) => return Some(answer),
            Err(error) => {
                let wait = waits.next_wait();
                warn!(%error, wait_ms = wait.as_millis(), "{trouble}; trying again");
                stop.run_until_cancelled(sleep(wait)).await?;
            }
        }
    }
}
