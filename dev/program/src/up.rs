//! `mailrun up`: everything on this machine, until Ctrl-C.

use std::path::Path;

use anyhow::{Context as _, Result};
use clap::Args;
use mailrun_app::{config::Config, shutdown};

use mailrun_lab::local::{Local, Mailing};
use mailrun_stack::{self, Nodes, Running, UpLock, UpLockRefused};

/// Options of `mailrun up`.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Options {
    /// Send to a mail server on this machine, which delivers nothing and shows what arrived
    #[arg(long)]
    mail: bool,
    /// Number of nodes of the private RabbitMQ
    #[arg(long, value_enum, default_value_t)]
    nodes: Nodes,
}

/// Starts everything with the settings in `file`, prints the URLs, and stops everything at the first signal. A second `up` in the same
/// checkout reports the first one.
pub async fn run(config: Config, file: Option<&Path>, options: Options) -> Result<()> {
    // Otherwise the web server would repeatedly fail to start.
    config.web.check_access()?;
    let home = mailrun_stack::home();
    let lock = match UpLock::acquire(&home).await {
        Ok(lock) => lock,
        Err(UpLockRefused::Running(Running { pid, web_url })) => {
            match web_url {
                Some(url) => println!("Mailrun is already running: {url} (process {pid})"),
                None => println!("Mailrun is already starting (process {pid})"),
            }
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let stop = shutdown::on_signal().context("cannot catch signals")?;
    let start = Local::start(
        &config,
        file,
        &home,
        options.nodes,
        if options.mail { Mailing::ToSink } else { Mailing::AsConfigured },
        |step| println!("{step}…"),
    );
    let Some(local) = stop.run_until_cancelled(start).await else {
        println!("Stopped during the start");
        return Ok(());
    };
    let local = local?;
    lock.publish_web_url(&local.services.web_url)?;
    println!();
    println!("  Mailrun     {}", local.services.web_url);
    if let Some(console) = local.servers().console() {
        println!("  RabbitMQ    {}  (user {}, password {})", console.url, console.user, console.password);
    }
    if let Some(url) = &local.services.mail_url {
        println!("  Mail        {url}");
    }
    println!("  Logs        {}", local.services.log.display());
    println!("  Metrics     one address per process: grep /metrics {}", local.services.log.display());
    println!();
    println!("Ctrl-C stops everything; the data is kept.");
    stop.cancelled().await;
    println!("Stopping: finishing work in progress…");
    local.stop().await?;
    println!("Stopped.");
    Ok(())
}
