//! The meters of rate limits: locked by a claim, which reserves send times in them.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use mailrun_core::pacing::{Meter, Meters, Rate};

/// Stands in place of a run for the meter of the installation. It sorts before every run, so it is locked first.
const INSTALLATION: Uuid = Uuid::nil();

/// The rate limits of these runs, in sends a second; none: no limit. Runs that do not exist are left out.
///
/// # Errors
/// The database's.
pub async fn rates(conn: &mut PgConnection, run_ids: &[Uuid]) -> sqlx::Result<HashMap<Uuid, Option<Rate>>> {
    let rows =
        sqlx::query!("SELECT id, sends_per_second FROM runs WHERE id = ANY($1)", run_ids).fetch_all(conn).await?;
    Ok(rows.into_iter().map(|row| (row.id, row.sends_per_second.map(Rate::new))).collect())
}

/// Meters that are locked until the caller's transaction ends.
#[derive(Clone, Debug)]
pub struct Locked {
    /// The database's clock.
    pub now: DateTime<Utc>,
    /// Of runs without a limit, only their last slot counts.
    runs: BTreeMap<Uuid, (Option<Rate>, Meter)>,
    installation: Option<(Rate, Meter)>,
}

impl Locked {
    /// When the next attempt of a run may be sent; none: nothing limits it.
    #[must_use]
    pub fn next_slot(&self, run_id: Uuid) -> Option<DateTime<Utc>> {
        self.of(run_id).next_slot()
    }

    /// Takes the next slot for an attempt of a run; none: nothing limits it.
    pub fn take(&mut self, run_id: Uuid) -> Option<DateTime<Utc>> {
        let mut meters = self.of(run_id);
        let slot = meters.take()?;
        if let Some((_, meter)) = self.runs.get_mut(&run_id) {
            *meter = meters.run.map_or(Meter::new(slot), |(_, meter)| meter);
        }
        self.installation = meters.installation;
        Some(slot)
    }

    /// Gives back slots that attempts of a run were granted and did not use.
    pub fn unused(&mut self, run_id: Uuid, slots: i32) {
        if let Some((Some(rate), meter)) = self.runs.get_mut(&run_id) {
            *meter = meter.unused(slots, *rate);
        }
        if let Some((rate, meter)) = &mut self.installation {
            *meter = meter.unused(slots, *rate);
        }
    }

    fn of(&self, run_id: Uuid) -> Meters {
        let run = self.runs.get(&run_id).and_then(|(rate, meter)| Some(((*rate)?, *meter)));
        Meters { run, installation: self.installation }
    }
}

/// Locks the meters of these runs, and of the installation if it has a limit, until the caller's transaction ends. They are
/// locked in one order by everybody. A run that is locked for the first time begins now.
///
/// # Errors
/// The database's.
pub async fn lock(
    conn: &mut PgConnection,
    runs: &BTreeMap<Uuid, Option<Rate>>,
    installation: Option<Rate>,
) -> sqlx::Result<Locked> {
    let mut ids: Vec<Uuid> = installation.map(|_| INSTALLATION).into_iter().chain(runs.keys().copied()).collect();
    ids.sort_unstable();
    let mut rows = locked(conn, &ids).await?;
    if rows.len() < ids.len() {
        sqlx::query!(
            "INSERT INTO pacing (run_id, next_at) SELECT id, clock_timestamp() FROM unnest($1::uuid[]) AS new (id)
             ORDER BY id ON CONFLICT DO NOTHING",
            &ids,
        )
        .execute(&mut *conn)
        .await?;
        rows = locked(conn, &ids).await?;
    }
    // After the locks are held: whoever held them before has reserved by an earlier clock.
    let now = sqlx::query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(conn).await?;
    let meter = |id: &Uuid| rows.get(id).copied().unwrap_or(Meter::new(now));
    // What the installation did not use before these runs began to send is nothing to make up for.
    let busy_since = runs.keys().map(|id| meter(id).next_at).min().unwrap_or(now);
    let of_installation = |meter: Meter| Meter { next_at: meter.next_at.max(busy_since.min(now)), ..meter }.at(now);
    Ok(Locked {
        now,
        runs: runs.iter().map(|(id, rate)| (*id, (*rate, rate.map_or(meter(id), |_| meter(id).at(now))))).collect(),
        installation: installation.map(|rate| (rate, of_installation(meter(&INSTALLATION)))),
    })
}

async fn locked(conn: &mut PgConnection, ids: &[Uuid]) -> sqlx::Result<HashMap<Uuid, Meter>> {
    let rows = sqlx::query!(
        "SELECT run_id, next_at, owed_us FROM pacing WHERE run_id = ANY($1) ORDER BY run_id FOR UPDATE",
        ids
    )
    .fetch_all(conn)
    .await?;
    let meter = |next_at, owed_us| Meter { next_at, owed: TimeDelta::microseconds(owed_us) };
    Ok(rows.into_iter().map(|row| (row.run_id, meter(row.next_at, row.owed_us))).collect())
}

/// Writes the meters down as they are now.
///
/// # Errors
/// The database's.
pub async fn save(conn: &mut PgConnection, locked: &Locked) -> sqlx::Result<()> {
    let installation = locked.installation.map(|(_, meter)| (INSTALLATION, meter));
    let runs = locked.runs.iter().map(|(id, (_, meter))| (*id, *meter));
    let (mut ids, mut next_at, mut owed_us) = (Vec::new(), Vec::new(), Vec::new());
    for (id, meter) in installation.into_iter().chain(runs) {
        ids.push(id);
        // The ledger keeps microseconds. Rounded down, a limit would be exceeded by one for each claim.
        next_at.push(meter.next_at + TimeDelta::nanoseconds(999));
        owed_us.push(meter.owed.num_microseconds().unwrap_or_default());
    }
    sqlx::query!(
        "UPDATE pacing p SET next_at = n.next_at, owed_us = n.owed_us
         FROM unnest($1::uuid[], $2::timestamptz[], $3::bigint[]) AS n (run_id, next_at, owed_us)
         WHERE p.run_id = n.run_id",
        &ids,
        &next_at,
        &owed_us,
    )
    .execute(conn)
    .await?;
    Ok(())
}
