//! Consumers whose connections are open and useless: a proxy forwards everything, including heartbeats and acks, except the broker's
//! deliveries or its replies to new consumers.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::support::{World, people, until};
use mailrun_lab::proxy::{Filter, Proxy};
use reqwest::Url;

const METHOD_FRAME: u8 = 1;
const BODY_FRAME: u8 = 3;
/// Type, channel and size.
const FRAME_HEADER: usize = 7;
const BASIC_DELIVER: [u8; 4] = [0, 60, 0, 60];
const BASIC_CONSUME_OK: [u8; 4] = [0, 60, 0, 21];

/// A proxy in front of the broker.
struct BrokerProxy {
    proxy: Proxy,
    deaf: Arc<Mutex<Vec<Arc<AtomicBool>>>>,
    mute: Arc<AtomicBool>,
}

impl BrokerProxy {
    async fn to(broker: u16) -> Self {
        let deaf: Arc<Mutex<Vec<Arc<AtomicBool>>>> = Arc::default();
        let mute: Arc<AtomicBool> = Arc::default();
        let (connections, muted) = (Arc::clone(&deaf), Arc::clone(&mute));
        let new_filter = move || {
            let deaf: Arc<AtomicBool> = Arc::default();
            connections.lock().unwrap().push(Arc::clone(&deaf));
            filter(deaf, Arc::clone(&muted))
        };
        let proxy = Proxy::filtered(([127, 0, 0, 1], broker).into(), new_filter).await.unwrap();
        Self { proxy, deaf, mute }
    }

    /// Whether the broker's replies to new consumers are dropped.
    fn drop_consume_replies(&self, mute: bool) {
        self.mute.store(mute, Ordering::Relaxed);
    }

    /// Drops all deliveries on the present connections from now on. Later connections work.
    fn drop_deliveries(&self) {
        for deaf in &*self.deaf.lock().unwrap() {
            deaf.store(true, Ordering::Relaxed);
        }
    }
}

/// Forwards the broker's frames, except deliveries while `deaf`, and replies to new consumers while `mute`.
fn filter(deaf: Arc<AtomicBool>, mute: Arc<AtomicBool>) -> Filter {
    let (mut received, mut swallowing) = (Vec::new(), HashSet::new());
    Box::new(move |bytes| {
        received.extend_from_slice(bytes);
        let mut passed = Vec::new();
        while received.len() >= FRAME_HEADER {
            let channel = u16::from_be_bytes([received[1], received[2]]);
            let size = u32::from_be_bytes([received[3], received[4], received[5], received[6]]);
            // One more byte ends the frame.
            let end = FRAME_HEADER + size as usize + 1;
            if received.len() < end {
                break;
            }
            let frame: Vec<u8> = received.drain(..end).collect();
            if frame[0] == METHOD_FRAME {
                swallowing.remove(&channel);
                if frame[FRAME_HEADER..].starts_with(&BASIC_DELIVER) && deaf.load(Ordering::Relaxed) {
                    swallowing.insert(channel);
                }
                if frame[FRAME_HEADER..].starts_with(&BASIC_CONSUME_OK) && mute.load(Ordering::Relaxed) {
                    continue;
                }
            }
            // A delivery's header and body follow it on its channel.
            if frame[0] > BODY_FRAME || !swallowing.contains(&channel) {
                passed.extend(frame);
            }
        }
        passed
    })
}

/// Workers that reach the broker through a proxy.
async fn world(settings: &[(&str, &str)]) -> (World, BrokerProxy) {
    let (mut world, proxy) = world_without_workers(settings).await;
    world.workers();
    until_consumed(&world).await;
    (world, proxy)
}

async fn world_without_workers(settings: &[(&str, &str)]) -> (World, BrokerProxy) {
    let mut world = World::new(settings).await;
    let mut url: Url = world.stack.amqp_url(&world.name).parse().unwrap();
    let way = BrokerProxy::to(url.port().unwrap()).await;
    url.set_port(Some(way.proxy.address().port())).unwrap();
    world.set("AMQP_URL", url.to_string());
    (world, way)
}

/// Waits until each consumed queue has its one consumer.
async fn until_consumed(world: &World) {
    for queue in ["mailrun.runs", "mailrun.items", "mailrun.results"] {
        let channel = world.channel().await;
        until("the queue has its consumer", async || {
            let options = lapin::options::QueueDeclareOptions { passive: true, ..Default::default() };
            channel.queue_declare(queue.into(), options, Default::default()).await.unwrap().consumer_count() == 1
        })
        .await;
    }
}

async fn rebuilds(world: &World) -> i64 {
    sqlx::query_scalar("SELECT sum(rebuilds)::bigint FROM workers").fetch_one(&world.pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuilds_a_starved_consumer() {
    let (mut world, proxy) = world(&[("MAILRUN_WATCHDOG__IDLE_AFTER_MS", "1000")]).await;
    proxy.drop_deliveries();
    let run = world.invite(&people(200)).await;
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "198 successful, 2 failed of 200");
    let rebuilt = "SELECT count(*) FROM workers WHERE rebuilds > 0";
    until("each of the three stages has rebuilt its consumer", async || {
        sqlx::query_scalar::<_, i64>(rebuilt).fetch_one(&world.pool).await.unwrap() == 3
    })
    .await;
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
    assert!(world.terminate(0) && world.terminate(1), "the web server and a worker stop cleanly");
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuilds_a_consumer_cut_off_from_a_full_queue() {
    let settings = [
        ("MAILRUN_WATCHDOG__IDLE_AFTER_MS", "1000"),
        // Few unacknowledged and many on the queue, as with a slow relay.
        ("MAILRUN_SEND__PREFETCH", "10"),
        ("MAILRUN_SEND__PERMITS", "5"),
        ("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "30"),
    ];
    let (world, proxy) = world(&settings).await;
    let run = world.invite(&people(400)).await;
    world.until_progress(&run, "in progress", |progress| progress["sent"].as_i64().unwrap() > 50).await;
    proxy.drop_deliveries();
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "396 successful, 4 failed of 400");
    assert!(world.log().contains("messages wait on the queue, and none is delivered"), "{}", world.log());
    until("it is counted", async || rebuilds(&world).await >= 1).await;
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}

/// Like a queue without a leader for a while: the broker registers the consumer after the client's timeout.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_registered_too_late_takes_no_messages() {
    let (mut world, proxy) = world_without_workers(&[("MAILRUN_AMQP__ANSWER_TIMEOUT_MS", "1000")]).await;
    proxy.drop_consume_replies(true);
    world.workers();
    for queue in ["mailrun.runs", "mailrun.items", "mailrun.results"] {
        let gave_up = format!("queue={queue} error=RabbitMQ did not answer in time");
        until("it times out", async || world.log().contains(&gave_up)).await;
    }
    proxy.drop_consume_replies(false);
    until_consumed(&world).await;
    let run = world.invite(&people(200)).await;
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "198 successful, 2 failed of 200");
    world.counters_equal_counts().await;
    world.assert_no_duplicates();
}
