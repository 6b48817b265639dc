//! `mailrun bounce`: passes a mail from standard input to the bounce hook, for the mail server that receives bounces.
//!
//! Its exit code tells that mail server what to do: 0, the mail has been handled; 75 (EX_TEMPFAIL), try again later. No exit code
//! asks for a bounce: a bounce must not be answered (RFC 3834, 2).

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use clap::Args;
use mailrun_app::config::{Config, ConfigError};
use reqwest::{Client, StatusCode, header::CONTENT_TYPE};
use secrecy::ExposeSecret as _;

/// Of the `sysexits.h` codes that a pipe may return to a mail server, this one defers the mail.
pub const TEMPFAIL: i32 = 75;
/// The hook's limit. The rest of a longer mail is the returned message, which is not needed.
const MAX_BYTES: u64 = 4 * 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(60);

/// Options of `mailrun bounce`.
#[derive(Args)]
pub struct Options {
    /// URL of the web server [default: web.listen on this machine]
    #[arg(long)]
    url: Option<String>,
}

/// The result of passing the mail on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HandOver {
    /// The hook accepted it.
    Accepted,
    /// It is not a report, so there is nothing to do.
    NotAReport,
    /// It must be deferred.
    Deferred(&'static str),
}

/// Passes the mail on and returns the exit code.
pub async fn run(config: Result<Config, ConfigError>, options: &Options) -> i32 {
    let reason = match hand_over(config, options).await {
        Ok(HandOver::Accepted) => return 0,
        Ok(HandOver::NotAReport) => {
            eprintln!("mailrun bounce: the mail is not a report, nothing to do");
            return 0;
        }
        Ok(HandOver::Deferred(reason)) => reason.to_owned(),
        Err(error) => format!("{error:#}"),
    };
    eprintln!("mailrun bounce: {reason}; try again later");
    TEMPFAIL
}

async fn hand_over(config: Result<Config, ConfigError>, options: &Options) -> anyhow::Result<HandOver> {
    let mail = read_mail()?;
    let config = config?;
    let Some(key) = &config.web.hook_key else { return Ok(HandOver::Deferred("web.hook_key is not set")) };
    let pages = options.url.clone().unwrap_or_else(|| format!("http://{}", reachable(config.web.listen)));
    let client = Client::builder().no_proxy().connect_timeout(CONNECT_TIMEOUT).timeout(TIMEOUT).build()?;
    let answer = client
        .post(format!("{}/hooks/bounces", pages.trim_end_matches('/')))
        .bearer_auth(key.expose_secret())
        .header(CONTENT_TYPE, "message/rfc822")
        .body(mail)
        .send()
        .await?;
    Ok(result_of(answer.status()))
}

/// Reads all input: a mail server treats a closed pipe as a failure.
fn read_mail() -> io::Result<Vec<u8>> {
    let mut input = io::stdin().lock();
    let mut mail = Vec::new();
    input.by_ref().take(MAX_BYTES).read_to_end(&mut mail)?;
    io::copy(&mut input, &mut io::sink())?;
    Ok(mail)
}

fn result_of(status: StatusCode) -> HandOver {
    match status {
        status if status.is_success() => HandOver::Accepted,
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
            HandOver::NotAReport
        }
        StatusCode::UNAUTHORIZED => HandOver::Deferred("the web server has a different web.hook_key"),
        StatusCode::NOT_FOUND => HandOver::Deferred("the web server has no bounce hook: set web.hook_key there"),
        _ => HandOver::Deferred("the web server does not accept it now"),
    }
}

/// The address at which a process on this machine reaches the listener.
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
    fn only_temporary_failures_are_retried() {
        let result_of = |code| result_of(StatusCode::from_u16(code).unwrap());
        assert_eq!(result_of(200), HandOver::Accepted);
        for code in [400, 413, 422] {
            assert_eq!(result_of(code), HandOver::NotAReport, "{code}");
        }
        for code in [301, 401, 403, 404, 408, 429, 500, 502, 503] {
            assert!(matches!(result_of(code), HandOver::Deferred(_)), "{code}");
        }
    }

    #[test]
    fn an_unspecified_address_is_this_machine() {
        let reachable = |listen: &str| reachable(listen.parse().unwrap()).to_string();
        assert_eq!(reachable("0.0.0.0:8080"), "127.0.0.1:8080");
        assert_eq!(reachable("[::]:8080"), "[::1]:8080");
        assert_eq!(reachable("192.0.2.1:80"), "192.0.2.1:80");
    }
}
