//! One measurement without Mailrun: a submission and the bare pipeline, timed.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{
    bare_pipeline::{BarePipeline, Sizes},
    cpu::Cpu,
    place::Place,
    writes::Writes,
};

/// The measurement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw {
    pub(super) items: usize,
    /// Until the run was committed.
    pub(super) submit: Duration,
    /// From then until the last item was counted.
    pub(super) drain: Duration,
    pub(super) cpu: Cpu,
    pub(super) writes: Writes,
}

impl Raw {
    /// From the beginning to the end.
    pub(super) fn items_per_second(&self) -> f64 {
        self.items as f64 / (self.submit + self.drain).as_secs_f64()
    }

    /// Without the submission.
    pub(super) fn drain_items_per_second(&self) -> f64 {
        self.items as f64 / self.drain.as_secs_f64()
    }
}

/// Inserts a run of `items` people; its items are inserted separately.
pub(super) async fn insert_run(conn: &mut PgConnection, run_id: Uuid, items: usize) -> Result<()> {
    let total = i32::try_from(items)?;
    sqlx::query("INSERT INTO runs (id, subject, body, total) VALUES ($1, 'You are invited!', 'Join us.', $2)")
        .bind(run_id)
        .bind(total)
        .execute(&mut *conn)
        .await?;
    sqlx::query("INSERT INTO run_progress (run_id, total, pending) VALUES ($1, $2, $2)")
        .bind(run_id)
        .bind(total)
        .execute(&mut *conn)
        .await?;
    Ok(())
}

/// Submits a run with `submit`, processes it with a bare pipeline of these `sizes`, and checks that all items were counted.
pub(super) async fn process(
    place: &Place<'_>,
    items: usize,
    sizes: Sizes,
    submit: impl AsyncFnOnce(&mut PgConnection, Uuid, usize) -> Result<()>,
) -> Result<Raw> {
    let mut conn = place.database().await?;
    let pipeline = BarePipeline::connect(place, sizes).await?;
    let run_id = Uuid::new_v4();
    place.quiet(&mut conn).await?;
    let (cpu, writes) = (Cpu::now(place.stack, None)?, Writes::now(&mut conn).await?);
    let started = Instant::now();
    submit(&mut conn, run_id, items).await?;
    let submitted = started.elapsed();
    pipeline.process(run_id, items).await?;
    let all = started.elapsed();
    let (cpu, writes) = (Cpu::now(place.stack, None)? - cpu, Writes::now(&mut conn).await? - writes);
    let counted: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM run_items i
         JOIN users u ON u.id = i.user_id AND u.emailed_at IS NOT NULL
         JOIN attempts a ON a.item_id = i.id
         JOIN run_progress p ON p.run_id = i.run_id AND p.pending = 0
         WHERE i.run_id = $1 AND i.state = 'sent'",
    )
    .bind(run_id)
    .fetch_one(&mut conn)
    .await?;
    ensure!(usize::try_from(counted)? == items, "the bare pipeline counted {counted} of {items} items");
    Ok(Raw { items, submit: submitted, drain: all - submitted, cpu, writes })
}
