//! Consumers whose connections live and are of no use: a proxy passes everything on, heartbeats and acknowledgements included,
//! but swallows what the broker delivers, or its word that a consumer is set up.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::support::{World, people, until};
use mailrun_lab::chaos::proxy::{Filter, Proxy};
use reqwest::Url;

const METHOD_FRAME: u8 = 1;
const BODY_FRAME: u8 = 3;
/// Type, channel and size.
const FRAME_HEADER: usize = 7;
const BASIC_DELIVER: [u8; 4] = [0, 60, 0, 60];
const BASIC_CONSUME_OK: [u8; 4] = [0, 60, 0, 21];

/// A way to the broker.
struct Way {
    proxy: Proxy,
    deaf: Arc<Mutex<Vec<Arc<AtomicBool>>>>,
    mute: Arc<AtomicBool>,
}

impl Way {
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

    /// Whether those who ask for messages are kept waiting for the answer, though the broker gives it.
    fn keep_waiting(&self, mute: bool) {
        self.mute.store(mute, Ordering::Relaxed);
    }

    /// From now on nothing is delivered over the connections that there are. Later ones are sound.
    fn deafen(&self) {
        for deaf in &*self.deaf.lock().unwrap() {
            deaf.store(true, Ordering::Relaxed);
        }
    }
}

/// Passes the broker's frames on; while it is deaf, all but deliveries, and while it is mute, all but consumers' beginnings.
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
async fn world(settings: &[(&str, &str)]) -> (World, Way) {
    let (mut world, proxy) = world_without_workers(settings).await;
    world.workers();
    until_consumed(&world).await;
    (world, proxy)
}

async fn world_without_workers(settings: &[(&str, &str)]) -> (World, Way) {
    let mut world = World::new(settings).await;
    let mut url: Url = world.stack.amqp_url(&world.name).parse().unwrap();
    let way = Way::to(url.port().unwrap()).await;
    url.set_port(Some(way.proxy.address().port())).unwrap();
    world.set("AMQP_URL", url.to_string());
    (world, way)
}

/// Until each queue that is worked on has the one consumer that it should have.
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
async fn whoever_is_connected_and_gets_nothing_connects_anew() {
    let (mut world, proxy) = world(&[("MAILRUN_WATCHDOG__IDLE_AFTER_MS", "1000")]).await;
    proxy.deafen();
    let run = world.invite(&people(200)).await;
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "198 successful, 2 failed of 200");
    until("it is counted for each of the three stages", async || rebuilds(&world).await >= 3).await;
    assert!(world.log().contains("a run stands still, and nothing is delivered"), "{}", world.log());
    world.counters_equal_counts().await;
    world.nobody_got_two();
    assert!(world.terminate(0) && world.terminate(1), "the pages and a worker end in good order");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_cut_off_from_a_full_queue_connects_anew() {
    let settings = [
        ("MAILRUN_WATCHDOG__IDLE_AFTER_MS", "1000"),
        // Little in hand and much on the queue, as with a slow mail server.
        ("MAILRUN_SEND__PREFETCH", "10"),
        ("MAILRUN_SEND__PERMITS", "5"),
        ("MAILRUN_MAILER__SIMULATED__LATENCY_MS", "30"),
    ];
    let (world, proxy) = world(&settings).await;
    let run = world.invite(&people(1000)).await;
    world.until_progress(&run, "under way", |progress| progress["sent"].as_i64().unwrap() > 50).await;
    proxy.deafen();
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "990 successful, 10 failed of 1,000");
    assert!(world.log().contains("messages wait on the queue, and none is delivered"), "{}", world.log());
    until("it is counted", async || rebuilds(&world).await >= 1).await;
    world.counters_equal_counts().await;
    world.nobody_got_two();
}

/// As when a queue has no leader for a while: the broker sets the consumer up after its patience has ended.
#[tokio::test(flavor = "multi_thread")]
async fn who_was_kept_waiting_too_long_takes_no_messages_from_the_others() {
    let (mut world, proxy) = world_without_workers(&[("MAILRUN_AMQP__ANSWER_TIMEOUT_MS", "1000")]).await;
    proxy.keep_waiting(true);
    world.workers();
    for queue in ["mailrun.runs", "mailrun.items", "mailrun.results"] {
        let gave_up = format!("queue={queue} error=RabbitMQ did not answer in time");
        until("its patience ends", async || world.log().contains(&gave_up)).await;
    }
    proxy.keep_waiting(false);
    until_consumed(&world).await;
    let run = world.invite(&people(200)).await;
    let end = world.until_over(&run).await;
    assert_eq!(end["text"], "198 successful, 2 failed of 200");
    world.counters_equal_counts().await;
    world.nobody_got_two();
}
