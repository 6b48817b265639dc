//! Connections to PostgreSQL, with a time limit on every wait.
//!
//! A half-open TCP connection looks like a slow server. sqlx never ends such a wait, and the operating system only after hours.
//! So each operation has a time limit ([`in_time`]), and connections known to be silent do not stay in the pool.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sqlx::{Connection as _, PgConnection, PgPool, Postgres, pool::PoolConnection, postgres::PgPoolOptions};
use tokio::time::{Instant, timeout};

use crate::settings::DatabaseConfig;

/// A connection returned to the pool must finish its statement within this time.
const SETTLED: Duration = Duration::from_secs(5);

/// Opens the pool. It connects on first use, so PostgreSQL may still be starting.
///
/// All statements here look up rows by an index. The session settings make PostgreSQL plan each statement once per session, and not
/// from outdated statistics of a table that has just grown by a million rows: no step ever reads a whole run. They also disable
/// compilation (`jit`), which costs 100 ms for plans that PostgreSQL considers expensive.
///
/// The server has time limits as well: it ends a statement that no client waits for, and a transaction whose client has gone
/// silent, which would otherwise hold its locks forever. If `database.url` is not a PostgreSQL URL. The configuration check
/// rules this out.
pub fn open(config: &DatabaseConfig, name: &str) -> sqlx::Result<PgPool> {
    let options =
        config.options().map_err(|reason| sqlx::Error::Configuration(format!("database.url: {reason}").into()))?;
    let answer_ms = config.answer_timeout.as_millis().to_string();
    let abandoned_ms = (2 * config.answer_timeout.as_millis()).to_string();
    let options = options.application_name(name).options([
        ("plan_cache_mode", "force_generic_plan"),
        ("jit", "off"),
        // A commit is on disk, whatever the role or the database has configured.
        ("synchronous_commit", "on"),
        ("statement_timeout", &answer_ms),
        ("idle_in_transaction_session_timeout", &abandoned_ms),
        ("tcp_keepalives_idle", "30"),
        ("tcp_keepalives_interval", "10"),
        ("tcp_keepalives_count", "3"),
    ]);
    let silence = Silence::default();
    let heard = silence.clone();
    Ok(PgPoolOptions::new()
        .max_connections(config.max_connections)
        .acquire_timeout(config.acquire_timeout)
        // A lost connection is an error like others, and callers retry: no check before each use.
        .test_before_acquire(false)
        // The pool checks this by itself, but without a time limit, and would block the connection's place in the pool.
        .after_release(move |connection, _| {
            let silence = silence.clone();
            Box::pin(async move {
                let settled = timeout(SETTLED, connection.ping()).await;
                settled.unwrap_or_else(|_| Err(silence.begins())).map(|()| true)
            })
        })
        .before_acquire(move |_, state| {
            let usable = !heard.may_affect(state.idle_for);
            Box::pin(async move { Ok(usable) })
        })
        .connect_lazy_with(options))
}

/// A pinned connection for a task with many queries: the pool checks every returned connection, which costs two round trips.
#[derive(Debug)]
pub struct Session {
    pool: PgPool,
    kept: Option<PoolConnection<Postgres>>,
}

impl Session {
    /// Takes a connection from the pool on first use.
    #[must_use]
    pub fn new(pool: &PgPool) -> Self {
        Self { pool: pool.clone(), kept: None }
    }

    /// Runs `work` within `limit`. After an error the connection returns to the pool, which checks whether it is still usable.
    ///
    /// # Errors
    /// The error of `work`, or a timeout.
    pub async fn run<T>(
        &mut self,
        limit: Duration,
        work: impl AsyncFnOnce(&mut PgConnection) -> sqlx::Result<T>,
    ) -> sqlx::Result<T> {
        let kept = self.kept.take();
        let done = in_time(limit, async {
            let mut conn = match kept {
                Some(conn) => conn,
                None => self.pool.acquire().await?,
            };
            Ok::<_, sqlx::Error>((work(&mut conn).await?, conn))
        });
        let (done, conn) = done.await?;
        self.kept = Some(conn);
        Ok(done)
    }
}

/// Ends `work` after `limit`. It is then unknown whether PostgreSQL carried it out.
///
/// # Errors
/// The error of `work`, or a timeout.
pub async fn in_time<T, E: From<sqlx::Error>>(
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    timeout(limit, Box::pin(work)).await.unwrap_or_else(|_| Err(no_answer(limit).into()))
}

fn no_answer(limit: Duration) -> sqlx::Error {
    let text = format!("PostgreSQL did not answer within {} s", limit.as_secs_f32());
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, text))
}

/// When a connection was last found silent. Connections that have been idle since then are probably silent too, and each would cost
/// a whole time limit.
#[derive(Clone, Debug, Default)]
struct Silence(Arc<Mutex<Option<Instant>>>);

impl Silence {
    fn begins(&self) -> sqlx::Error {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        no_answer(SETTLED)
    }

    /// Whether the silence began after the last use of a connection with this idle time.
    fn may_affect(&self, idle_for: Duration) -> bool {
        let silent_at = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        silent_at.is_some_and(|silent_at| silent_at.elapsed() <= idle_for)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_ends_with_a_retryable_error() {
        let never = std::future::pending::<sqlx::Result<()>>();
        let error = in_time(Duration::ZERO, never).await.unwrap_err();
        assert!(super::super::may_pass(&error), "{error}");
        assert!(in_time(Duration::ZERO, async { Ok::<_, sqlx::Error>(()) }).await.is_ok());
    }

    #[test]
    fn connections_idle_during_a_silence_are_not_reused() {
        let silence = Silence::default();
        assert!(!silence.may_affect(Duration::from_secs(60)));
        let _ = silence.begins();
        assert!(silence.may_affect(Duration::from_secs(60)), "idle since before");
        assert!(!silence.may_affect(Duration::ZERO), "used since");
    }
}
