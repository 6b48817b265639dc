//! The meters of rate limits. A claim locks them and reserves send times.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use mailrun_core::pacing::{Meter, Meters, Rate};

/// The run id of the installation's meter. It sorts before every run, so it is locked first.
const INSTALLATION: Uuid = Uuid::nil();

/// The rate limits of these runs, in sends per second. `None`: no limit. Runs that do not exist are missing.
pub async fn rates(conn: &mut PgConnection, run_ids: &[Uuid]) -> sqlx::Result<HashMap<Uuid, Option<Rate>>> {
    let rows =
        sqlx::query!("SELECT id, sends_per_second FROM runs WHERE id = ANY($1)", run_ids).fetch_all(conn).await?;
    Ok(rows.into_iter().map(|row| (row.id, row.sends_per_second.map(Rate::new))).collect())
}

/// Meters, locked until the caller's transaction ends.
#[derive(Clone, Debug)]
pub struct Locked {
    /// The database's clock.
    pub now: DateTime<Utc>,
    /// For runs without a limit, only the last slot matters.
    runs: BTreeMap<Uuid, (Option<Rate>, Meter)>,
    installation: Option<(Rate, Meter)>,
}

impl Locked {
    /// The send time of a run's next attempt. `None`: it is not limited.
    #[must_use]
    pub fn next_slot(&self, run_id: Uuid) -> Option<DateTime<Utc>> {
        self.of(run_id).next_slot()
    }

    /// Takes the next slot for an attempt of a run. `None`: it is not limited.
    pub fn take(&mut self, run_id: Uuid) -> Option<DateTime<Utc>> {
        let mut meters = self.of(run_id);
        let slot = meters.take()?;
        if let Some((_, meter)) = self.runs.get_mut(&run_id) {
            *meter = meters.run.map_or(Meter::new(slot), |(_, meter)| meter);
        }
        self.installation = meters.installation;
        Some(slot)
    }

    /// Returns slots that attempts of a run were granted and did not use.
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

/// Locks the meters of these runs, and the installation's meter if it has a limit, until the caller's transaction ends. All
/// processes lock in the same order. The meter of a run that is locked for the first time starts now.
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
    // Read the clock only after the locks are held: the previous holders used an earlier time.
    let now = sqlx::query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(conn).await?;
    let meter = |id: &Uuid| rows.get(id).copied().unwrap_or(Meter::new(now));
    // Capacity that the installation did not use before these runs began is not made up for.
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

/// Saves the meters.
pub async fn save(conn: &mut PgConnection, locked: &Locked) -> sqlx::Result<()> {
    let installation = locked.installation.map(|(_, meter)| (INSTALLATION, meter));
    let runs = locked.runs.iter().map(|(id, (_, meter))| (*id, *meter));
    let (mut ids, mut next_at, mut owed_us) = (Vec::new(), Vec::new(), Vec::new());
    for (id, meter) in installation.into_iter().chain(runs) {
        ids.push(id);
        // The ledger stores microseconds. Rounding down would exceed the limit a little with each claim.
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
