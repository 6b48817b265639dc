//! Connections to PostgreSQL, and the end of every wait for it.
//!
//! A peer that is cut off without a word looks like one that thinks. Neither sqlx nor, for hours, the system ends such a wait:
//! so each piece of work has a limit ([`in_time`]), and what is known to be silent does not stay in the pool.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sqlx::{Connection as _, PgConnection, PgPool, Postgres, pool::PoolConnection, postgres::PgPoolOptions};
use tokio::time::{Instant, timeout};

use crate::settings::DatabaseConfig;

/// A connection that goes back to the pool shows within this time that its statement has ended.
const SETTLED: Duration = Duration::from_secs(5);

/// Opens the pool. It connects when first used, so PostgreSQL may still be starting.
///
/// Every statement here looks rows up by an index. PostgreSQL plans such a statement once a session then, and not by what it
/// believes to know of a table that has just grown by a million rows: so a step never reads the whole run. Nor does it compile
/// them (`jit`), which takes a tenth of a second where it believes that they are costly.
///
/// The server gives up as well: it ends a statement that nobody waits for any more, and a transaction whose client has gone
/// silent, which would hold its locks for ever.
///
/// # Errors
/// When `database.url` is no PostgreSQL address, which the settings are checked for.
pub fn open(config: &DatabaseConfig, name: &str) -> sqlx::Result<PgPool> {
    let options =
        config.options().map_err(|reason| sqlx::Error::Configuration(format!("database.url: {reason}").into()))?;
    let answer_ms = config.answer_timeout.as_millis().to_string();
    let abandoned_ms = (2 * config.answer_timeout.as_millis()).to_string();
    let options = options.application_name(name).options([
        ("plan_cache_mode", "force_generic_plan"),
        ("jit", "off"),
        // What is accepted is on disk, whatever the role or the database says otherwise.
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
        // A lost connection is an error like others, and everyone tries again after one: no need to ask before each use.
        .test_before_acquire(false)
        // The pool makes sure of that by itself, but would wait for ever, and so would the place of this connection.
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

/// A connection that a task with much to ask keeps for itself: the pool makes sure of each one that comes back, which costs
/// two round trips.
#[derive(Debug)]
pub struct Session {
    pool: PgPool,
    kept: Option<PoolConnection<Postgres>>,
}

impl Session {
    /// One of the pool's, from the first use on.
    #[must_use]
    pub fn new(pool: &PgPool) -> Self {
        Self { pool: pool.clone(), kept: None }
    }

    /// Carries `work` out, within `limit`. After an error the connection goes back to the pool, which finds out what it is
    /// still good for.
    ///
    /// # Errors
    /// The work's, or that there was no answer.
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

/// Ends `work`, which asks PostgreSQL, when that takes longer than `limit`. Whether it was done is not known then.
///
/// # Errors
/// The work's, or that there was no answer.
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

/// When a connection was last found silent. Those that have been idle since then are likely to be so as well: each would
/// cost somebody the whole wait.
#[derive(Clone, Debug, Default)]
struct Silence(Arc<Mutex<Option<Instant>>>);

impl Silence {
    fn begins(&self) -> sqlx::Error {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        no_answer(SETTLED)
    }

    /// Whether it is of later than the last use of a connection that has been idle for so long.
    fn may_affect(&self, idle_for: Duration) -> bool {
        let silent_at = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        silent_at.is_some_and(|silent_at| silent_at.elapsed() <= idle_for)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_has_an_end_which_is_an_error_that_may_pass() {
        let never = std::future::pending::<sqlx::Result<()>>();
        let error = in_time(Duration::ZERO, never).await.unwrap_err();
        assert!(super::super::may_pass(&error), "{error}");
        assert!(in_time(Duration::ZERO, async { Ok::<_, sqlx::Error>(()) }).await.is_ok());
    }

    #[test]
    fn connections_that_were_idle_when_one_fell_silent_are_not_used_again() {
        let silence = Silence::default();
        assert!(!silence.may_affect(Duration::from_secs(60)));
        let _ = silence.begins();
        assert!(silence.may_affect(Duration::from_secs(60)), "idle before that");
        assert!(!silence.may_affect(Duration::ZERO), "used since");
    }
}
