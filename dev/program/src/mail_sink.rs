//! `mailrun mail-sink`: a mail server that delivers nothing, and a page that shows the received mail, until it is stopped.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use mailrun_sink::{self, Sink};

/// Options of `mailrun mail-sink`.
#[derive(Args, Clone, Copy, Debug)]
pub struct Options {
    /// Address of the SMTP server, on this machine
    #[arg(long, default_value = "127.0.0.1:1025")]
    listen: SocketAddr,
    /// Address of the page, on this machine
    #[arg(long, default_value = "127.0.0.1:8025")]
    page: SocketAddr,
    /// Delay before each message is accepted
    #[arg(long, default_value_t = 0)]
    latency_ms: u64,
}

/// Accepts mail and shows it until `stop`. Both addresses must be loopback addresses.
pub async fn run(options: Options, stop: CancellationToken) -> Result<()> {
    if !options.page.ip().is_loopback() {
        bail!("{} is reachable from other machines, and the page has no login: use 127.0.0.1 or [::1]", options.page);
    }
    let page = TcpListener::bind(options.page)
        .await
        .with_context(|| format!("cannot listen on {}; choose another address with --page", options.page))?;
    let latency = Duration::from_millis(options.latency_ms);
    let sink =
        Sink::start(mailrun_sink::Options { listen: options.listen, latency, ..mailrun_sink::Options::default() })
            .await?;
    println!("Mail to smtp://{} is shown at http://{}", sink.address(), page.local_addr()?);
    let served = mailrun_sink::serve_page(page, sink.mailbox().clone(), stop).await;
    sink.stop().await;
    let counts = sink.mailbox().counts();
    println!("Received {}, {} of them more than once", counts.received, counts.received_twice);
    served.context("the page failed")
}
