//! Mailrun on this machine: private servers unless others are configured, and the services as children of this process.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use mailrun_app::config::{Config, DatabaseConfig, MetricsConfig, Named};
use secrecy::{ExposeSecret, SecretString};
use sqlx::PgPool;
use tokio::process::Command;

use crate::children::{Service, Supervisor};
use mailrun_stack::{self, Console, Nodes, Stack, StackError, supervise::Event};

/// The database and virtual host of `up` and `demo`.
const NAME: &str = "mailrun";
/// The web server's port, or the next free one.
const WEB_PORT: u16 = 8080;
/// The mail sink's ports, or the next free ones.
const SMTP_PORT: u16 = 1025;
const MAIL_PAGE_PORT: u16 = 8025;
const PORTS_TRIED: u16 = 100;
/// Time limit for each service to finish its work in progress.
const DRAIN: Duration = Duration::from_secs(35);
/// The web server answers within this time, or something is wrong.
const START: Duration = Duration::from_secs(60);
const WEB: &str = "web";
/// In the order of the data, so that nothing is left between two of them. `send` is followed by a number.
const STOP_ORDER: [&str; 4] = [WEB, "fan-out", "send", "progress"];
/// Stops last, so that it is available as long as anything sends.
const MAIL_SINK: &str = "mail-sink";
/// Sending processes by default.
pub const SENDERS: usize = 2;

/// The configured or private servers.
pub struct Servers {
    stack: Option<Stack>,
    /// PostgreSQL's URL.
    pub database_url: SecretString,
    /// The URLs of RabbitMQ's nodes.
    pub amqp_urls: Vec<SecretString>,
}

impl Servers {
    /// Finds or starts the servers. Configured servers take precedence over private ones, which get this number of RabbitMQ nodes.
    pub async fn start(config: &Config, home: &Path, nodes: Nodes, report: impl Fn(&str)) -> Result<Self> {
        let named = config.named;
        if named.database && named.broker {
            let (database_url, amqp_urls) = (config.database.url.clone(), config.amqp.urls.clone());
            return Ok(Self { stack: None, database_url, amqp_urls });
        }
        let stack = Stack::start_nodes(home, &own_program()?, Duration::ZERO, nodes, report).await?;
        stack.create_database(NAME).await?;
        stack.create_vhost(NAME).await?;
        let database_url = if named.database { config.database.url.clone() } else { stack.database_url(NAME).into() };
        let private = || stack.amqp_urls(NAME).into_iter().map(SecretString::from).collect();
        let amqp_urls = if named.broker { config.amqp.urls.clone() } else { private() };
        Ok(Self { stack: Some(stack), database_url, amqp_urls })
    }

    /// The management console of the private RabbitMQ.
    #[must_use]
    pub fn console(&self) -> Option<&Console> {
        self.stack.as_ref().map(Stack::console)
    }

    /// The environment with which a child finds them.
    #[must_use]
    pub fn environment(&self) -> Vec<(OsString, OsString)> {
        let amqp_urls: Vec<&str> = self.amqp_urls.iter().map(ExposeSecret::expose_secret).collect();
        vec![
            ("DATABASE_URL".into(), self.database_url.expose_secret().into()),
            ("AMQP_URL".into(), amqp_urls.join(",").into()),
        ]
    }

    /// The settings with these servers' URLs.
    #[must_use]
    pub fn name_in(&self, mut config: Config) -> Config {
        config.database.url = self.database_url.clone();
        config.amqp.urls = self.amqp_urls.clone();
        config.named = Named { database: true, broker: true };
        config
    }

    /// Opens the ledger under this application name.
    pub fn open_ledger(&self, config: &Config, name: &str) -> sqlx::Result<PgPool> {
        mailrun_ledger::open(&DatabaseConfig { url: self.database_url.clone(), ..config.database.clone() }, name)
    }

    /// Stops the private ones, unless other processes use them.
    pub async fn stop(self) -> Result<(), StackError> {
        match self.stack {
            Some(stack) => stack.stop().await.map(drop),
            None => Ok(()),
        }
    }
}

/// A complete running Mailrun.
pub struct Local {
    servers: Servers,
    /// The web server and the workers.
    pub services: Services,
}

impl Local {
    /// Starts the servers and the services with the settings in `file`, and returns when the web server answers.
    pub async fn start(
        config: &Config,
        file: Option<&Path>,
        home: &Path,
        nodes: Nodes,
        mailing: Mailing,
        report: impl Fn(&str),
    ) -> Result<Self> {
        let servers = Servers::start(config, home, nodes, &report).await?;
        let mut environment = servers.environment();
        environment.extend(file.map(|file| ("MAILRUN_CONFIG".into(), file.into())));
        let listen = config.metrics.listen.or(Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))));
        let config = &Config { metrics: MetricsConfig { listen }, ..config.clone() };
        let log = home.join("logs").join("services.log");
        let started = async {
            let sink = match mailing {
                Mailing::AsConfigured => None,
                Mailing::ToSink => Some(SinkAddresses::free()?),
                Mailing::With(settings) => {
                    environment.extend(settings);
                    None
                }
            };
            Services::start(own_program()?, config, environment, SENDERS, sink, log, &report).await
        };
        match started.await {
            Ok(services) => Ok(Self { servers, services }),
            Err(error) => {
                // The first error is reported.
                let _ = servers.stop().await;
                Err(error)
            }
        }
    }

    /// The servers it uses.
    #[must_use]
    pub fn servers(&self) -> &Servers {
        &self.servers
    }

    /// Stops the services in the order of the data, then the private servers.
    pub async fn stop(self) -> Result<()> {
        self.services.stop().await;
        Ok(self.servers.stop().await?)
    }
}

/// Where the workers send mail.
#[derive(Clone, Debug)]
pub enum Mailing {
    /// As configured.
    AsConfigured,
    /// To a mail sink, which is one of the services.
    ToSink,
    /// With these settings, which override the others.
    With(Vec<(OsString, OsString)>),
}

/// Settings that make a worker send to the mail sink at this address.
#[must_use]
pub fn to_sink(smtp: SocketAddr) -> Vec<(OsString, OsString)> {
    vec![
        ("MAILRUN_MAILER__KIND".into(), "smtp".into()),
        ("MAILRUN_MAILER__SMTP__RELAYS".into(), format!("smtp://{smtp}?tls=none").into()),
    ]
}

/// The addresses of a mail sink.
#[derive(Clone, Copy, Debug)]
pub struct SinkAddresses {
    /// Its SMTP server.
    pub smtp: SocketAddr,
    /// Its page.
    pub page: SocketAddr,
}

impl SinkAddresses {
    /// The next free addresses.
    pub fn free() -> Result<Self> {
        let free = |port| free_address(port).with_context(|| format!("no free port from {port} on for the mail sink"));
        Ok(Self { smtp: free(SMTP_PORT)?, page: free(MAIL_PAGE_PORT)? })
    }

    fn service(self) -> Service {
        let args = [MAIL_SINK.into(), "--listen".into(), self.smtp.to_string().into(), "--page".into()];
        let args = args.into_iter().chain([self.page.to_string().into()]).collect();
        Service { name: MAIL_SINK.to_owned(), args, env: Vec::new() }
    }
}

/// The web server and the workers, as children of this process.
pub struct Services {
    supervisor: Supervisor,
    /// The URL of the pages.
    pub web_url: String,
    /// The URL of the mail sink's page, if there is one.
    pub mail_url: Option<String>,
    /// The file with their output.
    pub log: PathBuf,
}

impl Services {
    /// Prepares the database and queues in `environment`, starts the services of `program` with this number of senders, and returns when
    /// the web server answers. With a `sink`, starts it and lets the senders use it. Errors say where the log is.
    pub async fn start(
        program: PathBuf,
        config: &Config,
        mut environment: Vec<(OsString, OsString)>,
        senders: usize,
        sink: Option<SinkAddresses>,
        log: PathBuf,
        report: impl Fn(&str),
    ) -> Result<Self> {
        report("Preparing the database and the queues");
        set_up(&program, &environment).await?;
        let listen = web_address(config)?;
        let mut supervisor = Supervisor::new(program, &log, tell).context("cannot write the services' log")?;
        environment.push(("MAILRUN_WEB__LISTEN".into(), listen.to_string().into()));
        if let Some(metrics) = config.metrics.listen {
            // Several processes cannot share one address: each uses a free port, and logs it.
            let metrics = SocketAddr::new(metrics.ip(), 0);
            environment.push(("MAILRUN_METRICS__LISTEN".into(), metrics.to_string().into()));
        }
        report("Starting the web server and the workers");
        let web_url = format!("http://{listen}");
        if config.web.public_url.is_none() && listen.ip().is_loopback() {
            // This mail is only read on this machine, where its links work.
            environment.push(("MAILRUN_WEB__PUBLIC_URL".into(), web_url.clone().into()));
        }
        let mail_url = sink.map(|sink| format!("http://{}", sink.page));
        if let Some(sink) = sink {
            environment.extend(to_sink(sink.smtp));
            supervisor.start(sink.service())?;
        }
        for (name, role) in roster(senders) {
            let args = if role == WEB { vec![WEB] } else { vec!["worker", "--roles", role] };
            let args = args.into_iter().map(OsString::from).collect();
            supervisor.start(Service { name, args, env: environment.clone() })?;
        }
        for url in [Some(&web_url), mail_url.as_ref()].into_iter().flatten() {
            if let Err(error) = wait_for_pages(url).await {
                stop(supervisor).await;
                return Err(error.context(format!("the web server at {url} does not respond; see {}", log.display())));
            }
        }
        Ok(Self { supervisor, web_url, mail_url, log })
    }

    /// The services' names and process ids.
    pub fn pids(&self) -> impl Iterator<Item = (&str, u32)> {
        self.supervisor.pids()
    }

    /// Ends a service cleanly and starts it with another program in the same environment. Fails if it had to be killed, does not start, or is a
    /// web server that does not answer.
    pub async fn replace(&self, name: &str, program: &Path) -> Result<()> {
        let ended = self.supervisor.replace(name, program, DRAIN).await;
        if !ended.with_context(|| format!("cannot start {name} from {}", program.display()))? {
            bail!("{name} did not end within {DRAIN:?}");
        }
        if name == WEB {
            wait_for_pages(&self.web_url).await.context("the web server does not respond")?;
        }
        Ok(())
    }

    /// How often services ended unexpectedly.
    #[must_use]
    pub fn deaths(&self) -> u32 {
        self.supervisor.deaths()
    }

    /// Stops them in the order of the data.
    pub async fn stop(self) {
        stop(self.supervisor).await;
    }
}

/// The path of this program.
pub fn own_program() -> Result<PathBuf> {
    std::env::current_exe().context("the path of this program is unknown")
}

/// The services' names and roles, in the order of the data.
fn roster(senders: usize) -> Vec<(String, &'static str)> {
    let named = |role| match role {
        "send" => (1..=senders).map(|number| (format!("send-{number}"), role)).collect(),
        _ => vec![(role.to_owned(), role)],
    };
    STOP_ORDER.into_iter().flat_map(named).collect()
}

/// They were started in the order in which they stop, except for the mail sink, which is not named here and therefore stops last.
async fn stop(supervisor: Supervisor) {
    let names: Vec<String> =
        supervisor.pids().map(|(name, _)| name.to_owned()).filter(|name| name != MAIL_SINK).collect();
    let order: Vec<&str> = names.iter().map(String::as_str).collect();
    supervisor.stop(&order, DRAIN).await;
}

/// Runs a command with a new database in `DATABASE_URL`, empty or `migrated`, and drops it afterwards.
pub async fn with_database(migrated: bool, command: &[OsString]) -> Result<()> {
    let [program, args @ ..] = command else { bail!("no command given") };
    let stack =
        Stack::start(&mailrun_stack::home(), &own_program()?, Duration::from_secs(20), |step| eprintln!("{step}…"))
            .await?;
    let name = format!("scratch-{}", std::process::id());
    stack.create_database(&name).await?;
    let url = stack.database_url(&name);
    if migrated {
        let pool = PgPool::connect(&url).await?;
        mailrun_ledger::migrate(&pool).await?;
        pool.close().await;
    }
    let status = Command::new(program).args(args).env("DATABASE_URL", url).status().await;
    stack.drop_database(&name).await?;
    if !status.with_context(|| format!("cannot start {}", program.display()))?.success() {
        bail!("the command failed");
    }
    Ok(())
}

async fn set_up(program: &Path, environment: &[(OsString, OsString)]) -> Result<()> {
    let output = Command::new(program)
        .arg("setup")
        .envs(environment.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::null())
        .output()
        .await
        .context("cannot start `mailrun setup`")?;
    if !output.status.success() {
        bail!("preparing the database and queues failed:\n{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The configured address, if any; else the first free port from 8080 on.
fn web_address(config: &Config) -> Result<SocketAddr> {
    if std::env::var_os("MAILRUN_WEB__LISTEN").is_some() || config.web.listen.port() != WEB_PORT {
        return Ok(config.web.listen);
    }
    free_address(WEB_PORT).with_context(|| format!("no free port from {WEB_PORT} on: set MAILRUN_WEB__LISTEN"))
}

/// The first free loopback address from this port on.
fn free_address(port: u16) -> Option<SocketAddr> {
    (port..port + PORTS_TRIED)
        .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
        .find(|address| TcpListener::bind(address).is_ok())
}

async fn wait_for_pages(web_url: &str) -> Result<()> {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
    let deadline = tokio::time::Instant::now() + START;
    loop {
        let answer = client.get(format!("{web_url}/healthz")).send().await;
        match answer.and_then(reqwest::Response::error_for_status) {
            Ok(_) => return Ok(()),
            Err(error) if tokio::time::Instant::now() >= deadline => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

fn tell(name: &str, event: Event) {
    match event {
        Event::Died { how, pause, .. } => eprintln!("{name} {how}; restarting in {pause:?}"),
        Event::Stopped(Ok(false)) => eprintln!("{name} did not stop in time and was killed"),
        Event::Started { .. } | Event::Stopped(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_in_data_order() {
        let names = |senders| roster(senders).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(2), ["web", "fan-out", "send-1", "send-2", "progress"]);
        assert_eq!(names(1), ["web", "fan-out", "send-1", "progress"]);
    }
}
