//! `mailrun bounce`: hands a mail from standard input to the bounce hook, for the mail server that receives bounces.
//!
//! Its exit code tells that mail server what to do: 0, the mail is dealt with; 75 (EX_TEMPFAIL), try again later. It never asks
//! it to return the mail: a bounce must not be answered (RFC 3834, 2).

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use clap::Args;
use mailrun_app::config::{Config, ConfigError};
use reqwest::{Client, StatusCode, header::CONTENT_TYPE};
use secrecy::ExposeSecret as _;

/// `sysexits.h`: of the codes that a mail server's pipe returns, this one defers the mail.
pub const TEMPFAIL: i32 = 75;
/// What the hook accepts. What follows in a longer mail is the returned message, which is not needed.
const MAX_BYTES: u64 = 4 * 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(60);

/// Options of `mailrun bounce`.
#[derive(Args)]
pub struct Options {
    /// The address of the pages; without it, that of web.listen on this machine.
    #[arg(long)]
    url: Option<String>,
}

/// What became of the mail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Handed {
    /// The hook has accepted it.
    Accepted,
    /// It is no report, so there is nothing to do.
    NoReport,
    /// It can't be handed over now.
    Later(&'static str),
}

/// Hands the mail over, and returns the exit code.
pub async fn run(config: Result<Config, ConfigError>, options: &Options) -> i32 {
    let reason = match hand_over(config, options).await {
        Ok(Handed::Accepted) => return 0,
        Ok(Handed::NoReport) => {
            eprintln!("mailrun bounce: the mail is not a report; nothing to do");
            return 0;
        }
        Ok(Handed::Later(reason)) => reason.to_owned(),
        Err(error) => format!("{error:#}"),
    };
    eprintln!("mailrun bounce: {reason}; try again later");
    TEMPFAIL
}

async fn hand_over(config: Result<Config, ConfigError>, options: &Options) -> anyhow::Result<Handed> {
    let mail = read_mail()?;
    let config = config?;
    let Some(key) = &config.web.hook_key else { return Ok(Handed::Later("web.hook_key is not set")) };
    let pages = options.url.clone().unwrap_or_else(|| format!("http://{}", reachable(config.web.listen)));
    let client = Client::builder().no_proxy().connect_timeout(CONNECT_TIMEOUT).timeout(TIMEOUT).build()?;
    let answer = client
        .post(format!("{}/hooks/bounces", pages.trim_end_matches('/')))
        .bearer_auth(key.expose_secret())
        .header(CONTENT_TYPE, "message/rfc822")
        .body(mail)
        .send()
        .await?;
    Ok(handed(answer.status()))
}

/// All of it is read: a mail server takes a closed pipe for a failure.
fn read_mail() -> io::Result<Vec<u8>> {
    let mut input = io::stdin().lock();
    let mut mail = Vec::new();
    input.by_ref().take(MAX_BYTES).read_to_end(&mut mail)?;
    io::copy(&mut input, &mut io::sink())?;
    Ok(mail)
}

fn handed(status: StatusCode) -> Handed {
    match status {
        status if status.is_success() => Handed::Accepted,
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => Handed::NoReport,
        StatusCode::UNAUTHORIZED => Handed::Later("the pages have another web.hook_key"),
        StatusCode::NOT_FOUND => Handed::Later("the pages have no bounce hook: set web.hook_key there"),
        _ => Handed::Later("the pages do not accept it now"),
    }
}

/// Where a process on this machine reaches what listens there.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_change_is_tried_again() {
        let handed = |code| handed(StatusCode::from_u16(code).unwrap());
        assert_eq!(handed(200), Handed::Accepted);
        for code in [400, 413, 422] {
            assert_eq!(handed(code), Handed::NoReport, "{code}");
        }
        for code in [301, 401, 403, 404, 408, 429, 500, 502, 503] {
            assert!(matches!(handed(code), Handed::Later(_)), "{code}");
        }
    }

    #[test]
    fn an_address_that_is_none_is_this_machine() {
        let reachable = |listen: &str| reachable(listen.parse().unwrap()).to_string();
        assert_eq!(reachable("0.0.0.0:8080"), "127.0.0.1:8080");
        assert_eq!(reachable("[::]:8080"), "[::1]:8080");
        assert_eq!(reachable("192.0.2.1:80"), "192.0.2.1:80");
    }
}
