//! Faults of queues: reordered messages, deleted queues and bindings, channels closed by the broker, foreign messages.

use std::{future::pending, time::Duration};

use anyhow::Result;
use futures::{StreamExt as _, future::try_join_all, stream::select_all};
use lapin::{
    Channel, Confirmation,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueBindOptions, QueueDeleteOptions,
    },
    types::FieldTable,
};
use mailrun_broker::Outgoing;
use mailrun_core::queue::{DEAD, EXCHANGE, RUNS_PAUSED, RUNS_WAIT};
use mailrun_core::{
    item::ItemState,
    message::{ItemMessage, ResultsMessage},
};
use rand::{RngExt as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use super::{
    super::site::{Site, queues, retry_queues},
    Fault, Needs, Reach,
    mail::HANGING,
    some_seconds,
};

/// How many messages of each queue are taken at a time, …
const TAKEN: u16 = 200;
/// … and held for this long.
const KEPT: Duration = Duration::from_millis(300);
/// Between two deletions.
const BETWEEN_MS: std::ops::Range<u64> = 0..300;
/// Between two removals of bindings.
const BETWEEN_UNBINDINGS: Duration = Duration::from_millis(20);
/// A delivery timeout shorter than the delay of a relay that hangs.
const SHORT_TIMEOUT: &str = "application:set_env(rabbit, consumer_timeout, 1000), \
                             application:set_env(rabbit, channel_tick_interval, 200)";
/// RabbitMQ's default.
const DEFAULT_TIMEOUT: &str = "application:set_env(rabbit, consumer_timeout, 1800000), \
                             application:set_env(rabbit, channel_tick_interval, 60000)";
/// Channels keep the timeout with which they were opened, so connections are closed.
const NEW_CHANNELS: &str =
    "[rabbit_networking:close_connection(Pid, \"mailrun chaos\") || Pid <- rabbit_networking:connections()]";

/// The faults of this file.
pub(super) const FAULTS: &[Fault] = &[
    Fault::new("delete-queue", "Delete all queues, one after another", |site, rng, _| {
        Box::pin(delete_queues(site, rng))
    }),
    Fault::new(
        "missing-queues",
        "Unbind the wait queues, retry queues and dead-letter queue repeatedly for some seconds",
        |site, rng, _| Box::pin(missing_queues(site, some_seconds(rng))),
    ),
    Fault::new(
        "consumer-timeout",
        "RabbitMQ closes each channel with a delivery unacknowledged for a second (406), for some seconds",
        |site, rng, _| Box::pin(time_out(site, some_seconds(rng), HANGING)),
    )
    .affects(Reach::Servers),
    Fault::new("reorder-messages", "Reorder the messages of all queues for some seconds", |site, rng, _| {
        Box::pin(async move {
            let time = some_seconds(rng);
            reorder(site, time, rng).await
        })
    }),
    Fault::new(
        "foreign-messages",
        "Publish messages and results of another installation, with the same item numbers",
        |site, rng, _| {
            Box::pin(async move {
                let time = some_seconds(rng);
                foreign(site, time, rng).await
            })
        },
    ),
    Fault::new("duplicate-messages", "Publish each message twice", |_, _, _| Box::pin(pending()))
        .whole()
        .needs(Needs::Duplicates),
];

/// Takes messages off all queues, competing with their consumers, and publishes them again in another order, unchanged including their
/// headers.
async fn reorder(site: &Site<'_>, time: Duration, rng: &mut StdRng) -> Result<()> {
    let (connection, channel) = site.channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    channel.basic_qos(TAKEN, BasicQosOptions::default()).await?;
    let mut consumers = Vec::new();
    for queue in queues() {
        let name = queue.as_str();
        let consumer = channel
            .basic_consume(name.into(), name.into(), BasicConsumeOptions::default(), FieldTable::default())
            .await?;
        consumers.push(consumer.map(move |delivery| delivery.map(|delivery| (queue.clone(), delivery))));
    }
    let mut deliveries = select_all(consumers);
    let end = Instant::now() + time;
    let mut reordered = 0;
    while Instant::now() < end {
        let mut taken = Vec::new();
        let until = Instant::now() + KEPT;
        loop {
            tokio::select! {
                () = sleep_until(until) => break,
                Some(delivery) = deliveries.next() => taken.push(delivery?),
            }
        }
        taken.shuffle(rng);
        try_join_all(taken.iter().map(|(queue, delivery)| republish(&channel, queue, delivery))).await?;
        reordered += taken.len();
    }
    eprintln!("  {reordered} messages reordered");
    // Later deliveries return when the connection closes.
    Ok(connection.close(200, "done".into()).await?)
}

/// Publishes a message unchanged, and acknowledges it once the broker has confirmed it.
async fn republish(channel: &Channel, queue: &str, delivery: &Delivery) -> Result<()> {
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let properties = delivery.properties.clone();
    let confirm = channel.basic_publish("".into(), queue.into(), options, &delivery.data, properties).await?;
    if let Confirmation::Ack(None) = confirm.await? {
        delivery.ack(BasicAckOptions::default()).await?;
    }
    Ok(())
}

/// Deletes all queues, one after another.
async fn delete_queues(site: &Site<'_>, rng: &mut StdRng) -> Result<()> {
    let (connection, channel) = site.channel().await?;
    let mut queues = queues();
    queues.push(DEAD.to_owned());
    queues.shuffle(rng);
    for queue in queues {
        channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await?;
        sleep(Duration::from_millis(rng.random_range(BETWEEN_MS))).await;
    }
    Ok(connection.close(200, "done".into()).await?)
}

/// Repeatedly removes the bindings of all optional queues: a process that misses one declares it again.
async fn missing_queues(site: &Site<'_>, time: Duration) -> Result<()> {
    let (connection, channel) = site.channel().await?;
    let queues = [RUNS_WAIT, RUNS_PAUSED, DEAD].map(str::to_owned).into_iter().chain(retry_queues());
    let queues: Vec<String> = queues.collect();
    let end = Instant::now() + time;
    while Instant::now() < end {
        for queue in &queues {
            let name = queue.as_str();
            channel.queue_unbind(name.into(), EXCHANGE.into(), name.into(), FieldTable::default()).await?;
        }
        sleep(BETWEEN_UNBINDINGS).await;
    }
    // Restores them, as an operator would afterwards.
    for queue in &queues {
        let (name, options) = (queue.as_str(), QueueBindOptions::default());
        channel.queue_bind(name.into(), EXCHANGE.into(), name.into(), options, FieldTable::default()).await?;
    }
    Ok(connection.close(200, "done".into()).await?)
}

/// For some time, the broker closes each channel with an unacknowledged delivery (406), while some mails take longer.
async fn time_out(site: &Site<'_>, time: Duration, hanging: u32) -> Result<()> {
    site.stack.control_rabbitmq(&["eval", &format!("{SHORT_TIMEOUT}, {NEW_CHANNELS}.")]).await?;
    site.smtp_faults.hang(hanging);
    sleep(time).await;
    Ok(site.stack.control_rabbitmq(&["eval", &format!("{DEFAULT_TIMEOUT}, {NEW_CHANNELS}.")]).await?)
}

/// Publishes messages and results of another installation: of its own runs, with items that have the same numbers as ours.
async fn foreign(site: &Site<'_>, time: Duration, rng: &mut StdRng) -> Result<()> {
    let (connection, channel) = site.channel().await?;
    let items: Vec<i64> = sqlx::query_scalar("SELECT id FROM run_items").fetch_all(&site.pool).await?;
    let run_id = Uuid::from_u128(rng.random());
    let end = Instant::now() + time;
    while Instant::now() < end && !items.is_empty() {
        let item = ItemMessage {
            run_id,
            item_id: items[rng.random_range(0..items.len())],
            attempt: rng.random_range(1..4),
            tries: 1,
            replays: 0,
            impersonal: false,
        };
        let results = ResultsMessage { run_id: Some(run_id), results: vec![item.result(ItemState::Sent, None)] };
        for message in [Outgoing::new(&item), Outgoing::new(&results)] {
            channel
                .basic_publish(
                    EXCHANGE.into(),
                    message.queue().into(),
                    BasicPublishOptions::default(),
                    message.body(),
                    message.properties(),
                )
                .await?;
        }
        sleep(Duration::from_millis(rng.random_range(0..50))).await;
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
