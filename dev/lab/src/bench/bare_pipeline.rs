//! The bare pipeline: raw lapin and raw SQL that durably write what Mailrun writes for an item, and nothing else.
//!
//! For each item, one message is published, confirmed, consumed and acknowledged; a claim is inserted; a result goes through a second
//! queue; item, person and counter are updated. It makes no decisions: no fence, no permits, no heartbeat, no mail, no crash recovery.
//! It therefore shows what the servers allow in Mailrun's order of work. With batches of one, it is the code that processes one item
//! at a time.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use futures::{
    FutureExt as _, StreamExt as _,
    future::{join_all, try_join_all},
};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, Consumer,
    message::Delivery,
    options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions},
    types::FieldTable,
};
use mailrun_broker::Outgoing;
use mailrun_core::message::{ItemMessage, Message as _};
use mailrun_core::queue::{EXCHANGE, ITEMS, RESULTS};
use sqlx::{Connection as _, PgConnection};
use tokio::{sync::Semaphore, task::JoinSet, time::timeout};
use uuid::Uuid;

use super::place::Place;

/// Items whose ids are read at once.
const CHUNK: usize = 1_000;
/// Publishes polled together, so that one system call writes many frames.
const POLLED_TOGETHER: usize = 64;
/// How long to wait for a batch to fill.
const GATHER: Duration = Duration::from_millis(10);
const PREFETCH: u16 = 400;

/// The batch sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Messages published before their confirms are awaited.
    pub(super) burst: usize,
    /// Items in a claim, a result message and a transaction of the counters.
    pub(super) batch: usize,
    /// Channels that publish item messages.
    pub(super) publishers: usize,
    /// Senders, each with its own session and channels.
    pub(super) senders: usize,
    /// Items published and not yet counted.
    pub(super) window: usize,
}

/// A connected pipeline that has not started.
pub(super) struct BarePipeline {
    publishers: Vec<Publisher>,
    senders: Vec<Sender>,
    progress: Progress,
}

impl BarePipeline {
    /// Connects everything, so that connecting is not measured.
    pub(super) async fn connect(place: &Place<'_>, sizes: Sizes) -> Result<Self> {
        let window = Arc::new(Semaphore::new(sizes.window));
        let mut publishers = Vec::new();
        for _ in 0..sizes.publishers {
            let (database, out) = (place.database().await?, Out::connect(place, ITEMS).await?);
            publishers.push(Publisher { database, out, window: Arc::clone(&window), burst: sizes.burst });
        }
        let mut senders = Vec::new();
        for id in 1..=sizes.senders {
            senders.push(Sender {
                id: i64::try_from(id)?,
                database: place.database().await?,
                items: In::connect(place, ITEMS).await?,
                out: Out::connect(place, RESULTS).await?,
                batch: sizes.batch,
            });
        }
        let progress =
            Progress { database: place.database().await?, results: In::connect(place, RESULTS).await?, window };
        Ok(Self { publishers, senders, progress })
    }

    /// Processes all items of a run, and returns when the last one is counted. Any error ends it.
    pub(super) async fn process(self, run_id: Uuid, items: usize) -> Result<()> {
        let mut parts: JoinSet<Result<bool>> = JoinSet::new();
        let lanes = self.publishers.len();
        for (lane, publisher) in self.publishers.into_iter().enumerate() {
            parts.spawn(async move { publisher.publish(run_id, items, lane, lanes).await.map(|()| false) });
        }
        for sender in self.senders {
            parts.spawn(async move { sender.send().await.map(|()| false) });
        }
        parts.spawn(async move { self.progress.count(run_id, items).await.map(|()| true) });
        while let Some(ended) = parts.join_next().await {
            if ended?? {
                // Dropping the set stops the others.
                return Ok(());
            }
        }
        bail!("the bare pipeline ended before all items were counted")
    }
}

/// A publisher to one queue.
struct Out {
    queue: &'static str,
    channel: Channel,
    _connection: Connection,
}

impl Out {
    async fn connect(place: &Place<'_>, queue: &'static str) -> Result<Self> {
        let (connection, channel) = place.confirm_channel().await?;
        Ok(Self { queue, channel, _connection: connection })
    }

    /// The properties of Mailrun's item messages, so that the same bytes are written.
    fn properties(&self) -> BasicProperties {
        Outgoing::raw(self.queue, ItemMessage::TYPE, Vec::new()).in_epoch(1).properties()
    }

    /// Publishes persistent messages and awaits all their confirms.
    async fn publish(&self, bodies: &[Vec<u8>]) -> Result<()> {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let mut confirms = Vec::with_capacity(bodies.len());
        for together in bodies.chunks(POLLED_TOGETHER) {
            let publish =
                |body| self.channel.basic_publish(EXCHANGE.into(), self.queue.into(), options, body, self.properties());
            confirms.extend(try_join_all(together.iter().map(|body| publish(body.as_slice()))).await?);
        }
        for confirm in join_all(confirms).await {
            ensure!(confirm? == Confirmation::Ack(None), "RabbitMQ did not accept a message");
        }
        Ok(())
    }
}

/// A consumer of one queue.
struct In {
    deliveries: Consumer,
    channel: Channel,
    _connection: Connection,
}

impl In {
    async fn connect(place: &Place<'_>, queue: &'static str) -> Result<Self> {
        let (connection, channel) = place.channel().await?;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        let deliveries = channel.basic_consume(queue.into(), "bench".into(), options, FieldTable::default()).await?;
        Ok(Self { deliveries, channel, _connection: connection })
    }

    async fn next(&mut self) -> Result<Delivery> {
        Ok(self.deliveries.next().await.context("the consumer was cancelled")??)
    }

    /// Up to `max` deliveries; fewer if no more come for [`GATHER`].
    async fn gather(&mut self, most: usize) -> Result<Vec<Delivery>> {
        let mut batch = vec![self.next().await?];
        while batch.len() < most {
            let next = match self.next().now_or_never() {
                Some(next) => next,
                None => match timeout(GATHER, self.next()).await {
                    Ok(next) => next,
                    Err(_) => break,
                },
            };
            batch.push(next?);
        }
        Ok(batch)
    }

    /// Acknowledges all deliveries up to the last of `batch`.
    async fn ack(&self, batch: &[Delivery]) -> Result<()> {
        let Some(last) = batch.last() else { return Ok(()) };
        let options = BasicAckOptions { multiple: batch.len() > 1 };
        Ok(self.channel.basic_ack(last.delivery_tag, options).await?)
    }
}

/// Publishes the item messages.
struct Publisher {
    database: PgConnection,
    out: Out,
    window: Arc<Semaphore>,
    burst: usize,
}

impl Publisher {
    /// Publishes every `lanes`-th chunk, starting with the `lane`-th.
    async fn publish(mut self, run_id: Uuid, items: usize, lane: usize, lanes: usize) -> Result<()> {
        for after in (0..items).step_by(CHUNK).skip(lane).step_by(lanes) {
            let ids: Vec<i64> = sqlx::query_scalar(
                "SELECT id FROM run_items WHERE run_id = $1 AND position > $2 AND position <= $3 ORDER BY position",
            )
            .bind(run_id)
            .bind(i32::try_from(after)?)
            .bind(i32::try_from(after + CHUNK)?)
            .fetch_all(&mut self.database)
            .await?;
            for ids in ids.chunks(self.burst) {
                self.window.acquire_many(u32::try_from(ids.len())?).await?.forget();
                let bodies: Vec<_> = ids.iter().map(|id| item_body(run_id, *id)).collect();
                self.out.publish(&bodies).await?;
            }
        }
        Ok(())
    }
}

/// Claims items and reports them without sending.
struct Sender {
    id: i64,
    database: PgConnection,
    items: In,
    out: Out,
    batch: usize,
}

impl Sender {
    async fn send(mut self) -> Result<()> {
        loop {
            let batch = self.items.gather(self.batch).await?;
            let ids = batch.iter().map(|delivery| item_id(&delivery.data)).collect::<Option<Vec<i64>>>();
            let ids = ids.context("a message without an id")?;
            sqlx::query(
                "INSERT INTO attempts (item_id, number, worker_id) SELECT id, 1, $1 FROM unnest($2::bigint[]) id",
            )
            .bind(self.id)
            .bind(&ids)
            .execute(&mut self.database)
            .await?;
            self.out.publish(&[results_body(&ids)]).await?;
            self.items.ack(&batch).await?;
        }
    }
}

/// Applies the results.
struct Progress {
    database: PgConnection,
    results: In,
    window: Arc<Semaphore>,
}

impl Progress {
    async fn count(mut self, run_id: Uuid, items: usize) -> Result<()> {
        let mut counted = 0;
        while counted < items {
            let delivery = self.results.next().await?;
            let ids = result_ids(&delivery.data).context("a result without ids")?;
            let mut tx = self.database.begin().await?;
            let people: Vec<i64> = sqlx::query_scalar(
                "UPDATE run_items SET state = 'sent', finished_at = now() WHERE id = ANY($1) RETURNING user_id",
            )
            .bind(&ids)
            .fetch_all(&mut *tx)
            .await?;
            sqlx::query("UPDATE users SET emailed_at = now() WHERE id = ANY($1)")
                .bind(&people)
                .execute(&mut *tx)
                .await?;
            sqlx::query("UPDATE run_progress SET pending = pending - $2, sent = sent + $2 WHERE run_id = $1")
                .bind(run_id)
                .bind(i32::try_from(people.len())?)
                .execute(&mut *tx)
                .await?;
            tx.commit().await?;
            self.results.ack(&[delivery]).await?;
            self.window.add_permits(people.len());
            counted += people.len();
        }
        Ok(())
    }
}

/// As long as Mailrun's own message.
fn item_body(run_id: Uuid, item_id: i64) -> Vec<u8> {
    format!(r#"{{"run_id":"{run_id}","item_id":{item_id},"attempt":1,"tries":1,"replays":0}}"#).into_bytes()
}

/// Finds the id in an item's message without parsing JSON.
fn item_id(body: &[u8]) -> Option<i64> {
    let (_, rest) = std::str::from_utf8(body).ok()?.split_once(r#""item_id":"#)?;
    rest.split_once(',')?.0.parse().ok()
}

/// A message of ids only.
fn results_body(ids: &[i64]) -> Vec<u8> {
    let ids: Vec<String> = ids.iter().map(i64::to_string).collect();
    ids.join(",").into_bytes()
}

fn result_ids(body: &[u8]) -> Option<Vec<i64>> {
    std::str::from_utf8(body).ok()?.split(',').map(|id| id.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use mailrun_core::message::{ItemMessage, decode, encode};

    use super::*;

    #[test]
    fn ids_survive_encoding() {
        let run_id = Uuid::from_u128(7);
        assert_eq!(item_id(&item_body(run_id, 4711)), Some(4711));
        assert_eq!(item_id(b"{}"), None);
        assert_eq!(result_ids(&results_body(&[1, 22, 333])), Some(vec![1, 22, 333]));
        assert_eq!(result_ids(b"1,x"), None);
    }

    #[test]
    fn item_messages_equal_mailruns() {
        let message = ItemMessage {
            run_id: Uuid::from_u128(7),
            item_id: 4711,
            attempt: 1,
            tries: 1,
            replays: 0,
            impersonal: false,
        };
        assert_eq!(item_body(message.run_id, message.item_id), encode(&message));
        assert_eq!(decode::<ItemMessage>(None, &item_body(message.run_id, 4711)).unwrap(), message);
    }
}
