//! Real mail: what a relay and the round trips to it allow, and what Mailrun reaches.
//!
//! The relay is Postfix's `smtp-sink`, which discards what it receives, and the limit without round trips is what its counterpart
//! `smtp-source` sends there. It composes nothing and keeps no promise. Debian's package is unpacked, not installed. Where there is
//! none, this program's own mail sink and a bare client take their place.

use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mailrun_sink::{Options as SinkOptions, Sink};
use mailrun_stack::Stack;
use serde::Serialize;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    time::sleep,
};

use super::{
    Settings, mailrun,
    median::median,
    pipeline::{Relay, Setup},
};
use crate::proxy::Proxy;

/// The size of a message of `smtp-source` and of the bare client.
const MESSAGE_BYTES: usize = 2_000;
/// A measurement lasts about this long, if the round trips are the limit.
const SECONDS: f64 = 10.0;
/// How long `smtp-sink` may take to start.
const START: Duration = Duration::from_secs(10);

/// One measurement with a round-trip time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Smtp {
    rtt_ms: u64,
    connections: usize,
    recipients: usize,
    /// Without round trips: what `limited_by` sends. Otherwise also at most `connections` divided by the round-trip time.
    limit_items_per_second: f64,
    limited_by: &'static str,
    /// After the response to the POST; a median.
    items_per_second: f64,
    ratio: f64,
    /// Round trips per mail, if they are the limit; null without any.
    round_trips: Option<f64>,
    /// CPU microseconds per mail of all processes of the machine, the relay included.
    cpu_microseconds_per_item: f64,
}

impl Smtp {
    pub(super) fn line(&self) -> String {
        format!(
            "Real mail, {} ms round trip, {} connections: {:.0} items/s, {:.0} % of the limit of {:.0} ({})",
            self.rtt_ms,
            self.connections,
            self.items_per_second,
            self.ratio * 100.0,
            self.limit_items_per_second,
            self.limited_by
        )
    }
}

/// Measures with each round-trip time.
pub(super) async fn measure(
    stack: &Stack,
    settings: &Settings<'_>,
    rtts_ms: &[u64],
    connections: usize,
    most: usize,
    repeat: u32,
) -> Result<Vec<Smtp>> {
    let receiver = Receiver::start(settings.home).await?;
    let (mut limits, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..repeat {
        limits.push(receiver.limit(connections, most).await?);
    }
    let bare = median(limits);
    let mut all = Vec::new();
    for &rtt_ms in rtts_ms {
        let rtt = Duration::from_millis(rtt_ms);
        let by_round_trips = if rtt.is_zero() { f64::INFINITY } else { connections as f64 / rtt.as_secs_f64() };
        let limit = bare.min(by_round_trips);
        let recipients = (limit * SECONDS).clamp(1_000.0, most as f64) as usize;
        let proxy = Proxy::start(receiver.address).await?;
        proxy.delay(rtt / 2);
        let address = if rtt.is_zero() { receiver.address } else { proxy.address() };
        let setup = Setup { relay: Some(Relay { address, connections }), ..Setup::default() };
        let mut cpu = Vec::new();
        rates.clear();
        for _ in 0..repeat {
            let piped = mailrun(stack, settings, recipients, setup).await?;
            rates.push(piped.drain_items_per_second());
            cpu.push((piped.cpu.total() + piped.cpu.others) * 1e6 / recipients as f64);
        }
        proxy.stop().await;
        let rate = median(rates.clone());
        let measured = Smtp {
            rtt_ms,
            connections,
            recipients,
            limit_items_per_second: limit,
            limited_by: if by_round_trips < bare { "round trips" } else { receiver.source() },
            items_per_second: rate,
            ratio: rate / limit,
            round_trips: (!rtt.is_zero()).then(|| by_round_trips / rate),
            cpu_microseconds_per_item: median(cpu),
        };
        eprintln!("{}", measured.line());
        all.push(measured);
    }
    Ok(all)
}

/// A relay that discards mail.
struct Receiver {
    address: SocketAddr,
    postfix: Option<Postfix>,
    /// Stopped when dropped.
    _sink: Running,
}

enum Running {
    Postfix(#[expect(dead_code, reason = "killed when dropped")] Child),
    Own(#[expect(dead_code, reason = "stopped when dropped")] Sink),
}

impl Receiver {
    async fn start(home: &Path) -> Result<Self> {
        if let Some(postfix) = Postfix::find(home).await {
            let address = free_address().await?;
            let child = postfix.sink(address)?;
            let end = Instant::now() + START;
            while TcpStream::connect(address).await.is_err() {
                ensure!(Instant::now() < end, "smtp-sink does not answer");
                sleep(Duration::from_millis(50)).await;
            }
            return Ok(Self { address, postfix: Some(postfix), _sink: Running::Postfix(child) });
        }
        eprintln!("Postfix's smtp-source is not available, so the limit is what a bare client sends to the mail sink");
        let sink = Sink::start(SinkOptions { keep: 0, ..SinkOptions::default() }).await?;
        Ok(Self { address: sink.address(), postfix: None, _sink: Running::Own(sink) })
    }

    fn source(&self) -> &'static str {
        if self.postfix.is_some() { "smtp-source" } else { "bare client" }
    }

    /// Mails per second without Mailrun.
    async fn limit(&self, connections: usize, messages: usize) -> Result<f64> {
        let begun = Instant::now();
        match &self.postfix {
            Some(postfix) => postfix.send(self.address, connections, messages).await?,
            None => send_bare(self.address, connections, messages).await?,
        }
        Ok(messages as f64 / begun.elapsed().as_secs_f64())
    }
}

async fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?)
}

/// Postfix's test programs.
struct Postfix {
    programs: PathBuf,
    libraries: Option<PathBuf>,
}

impl Postfix {
    /// Installed, unpacked by an earlier bench, or from Debian's package.
    async fn find(home: &Path) -> Option<Self> {
        let path = env::var_os("PATH").unwrap_or_default();
        let mut installed = env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
        if let Some(programs) = installed.find(|folder| folder.join("smtp-source").is_file()) {
            return Some(Self { programs, libraries: None });
        }
        let unpacked = home.join("postfix");
        let found = Self { programs: unpacked.join("usr/sbin"), libraries: Some(unpacked.join("usr/lib/postfix")) };
        if !found.programs.join("smtp-source").is_file() {
            eprintln!("Unpacking Postfix's test programs…");
            unpack(&unpacked).await.inspect_err(|error| eprintln!("{error:#}")).ok()?;
        }
        Some(found)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.envs(self.libraries.iter().map(|libraries| ("LD_LIBRARY_PATH", libraries)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        command
    }

    fn sink(&self, address: SocketAddr) -> Result<Child> {
        let mut sink = self.command("smtp-sink");
        // It refuses to run with root's rights.
        if rustix::process::geteuid().is_root() {
            sink.args(["-u", "nobody"]);
        }
        sink.arg(address.to_string()).arg("1024").spawn().context("smtp-sink did not start")
    }

    async fn send(&self, address: SocketAddr, connections: usize, messages: usize) -> Result<()> {
        let mut source = self.command("smtp-source");
        source.args(["-d", "-s", &connections.to_string(), "-m", &messages.to_string()]);
        source.args(["-l", &MESSAGE_BYTES.to_string(), &address.to_string()]);
        let status = source.status().await.context("smtp-source did not start")?;
        ensure!(status.success(), "smtp-source ended with {status}");
        Ok(())
    }
}

/// Fetches Debian's package and unpacks it into `folder`.
async fn unpack(folder: &Path) -> Result<()> {
    let fetched = folder.join("fetched");
    fs::create_dir_all(&fetched)?;
    let quiet = |program: &str| {
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let status = quiet("apt-get").args(["download", "postfix"]).current_dir(&fetched).status().await;
    ensure!(status.is_ok_and(|status| status.success()), "apt-get can't fetch the package postfix");
    let package = fs::read_dir(&fetched)?.next().context("apt-get has fetched nothing")??.path();
    let status = quiet("dpkg-deb").arg("-x").args([&package, folder]).status().await;
    ensure!(status.is_ok_and(|status| status.success()), "dpkg-deb can't unpack {}", package.display());
    Ok(())
}

/// Sends messages one command at a time on each connection.
async fn send_bare(address: SocketAddr, connections: usize, messages: usize) -> Result<()> {
    let each = messages.div_ceil(connections);
    let sent = (0..connections).map(|_| async move {
        let mut stream = BufReader::new(TcpStream::connect(address).await?);
        let mut reply = String::new();
        let message = format!("Subject: a\r\n\r\n{}\r\n.\r\n", "a".repeat(MESSAGE_BYTES));
        // The greeting comes unasked.
        let mut commands = vec!["", "EHLO bench\r\n"];
        for _ in 0..each {
            commands.extend(["MAIL FROM:<a@localhost>\r\n", "RCPT TO:<b@localhost>\r\n", "DATA\r\n", &message]);
        }
        for command in commands {
            stream.get_mut().write_all(command.as_bytes()).await?;
            loop {
                reply.clear();
                stream.read_line(&mut reply).await?;
                if reply.as_bytes().get(3) != Some(&b'-') {
                    break;
                }
            }
            ensure!(reply.starts_with(['2', '3']), "the mail sink replied: {}", reply.trim_end());
        }
        Ok(())
    });
    futures::future::try_join_all(sent).await.map(drop)
}
