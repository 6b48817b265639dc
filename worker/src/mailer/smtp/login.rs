//! SMTP AUTH.

use std::{io, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mailrun_app::config::{Login, Mechanism, Password};
use secrecy::{ExposeSecret, SecretString};
use smtp_proto::{AUTH_LOGIN, AUTH_PLAIN, AUTH_XOAUTH2, response::generate::BitToString};

use super::{
    dialogue::Dialogue,
    verdict::{Cause, Failure, Stage},
};

/// Logs in. `offered`: the mechanisms that the server offers.
///
/// # Errors
/// If the login does not succeed, for whatever reason.
pub async fn log_in(dialogue: &mut Dialogue, login: &Login, offered: u64, limit: Duration) -> Result<(), Failure> {
    let unable = |why: String| Failure { stage: Stage::Login, cause: Cause::Unsupported(why) };
    let offers = |mechanism: Mechanism| offered & bit(mechanism) != 0;
    let mechanism = match login.mechanism {
        Some(mechanism) => Some(mechanism).filter(|mechanism| offers(*mechanism)),
        None => [Mechanism::Plain, Mechanism::Login].into_iter().find(|mechanism| offers(*mechanism)),
    };
    let Some(mechanism) = mechanism else {
        let wanted = login.mechanism.map_or("PLAIN or LOGIN", name);
        let offered: Vec<_> = (0..u64::BITS).map(|bit| offered & (1 << bit)).filter(|bit| *bit != 0).collect();
        let offered = offered.iter().map(BitToString::to_mechanism).collect::<Vec<_>>().join(", ");
        return Err(unable(format!("the mail server offers no login with {wanted}: it offers {offered}")));
    };
    let secret = password(&login.password)
        .await
        .map_err(|error| unable(format!("the password_file of the mail server can't be read: {error}")))?;
    let secret = secret.expose_secret();
    let (first, then) = match mechanism {
        Mechanism::Plain => (Some(format!("\0{}\0{secret}", login.user)), vec![]),
        Mechanism::Login => (None, vec![login.user.clone(), secret.to_owned()]),
        // If the server rejects the token, it sends the reason as a challenge and refuses after an empty response.
        Mechanism::XOAuth2 => {
            (Some(format!("user={}\x01auth=Bearer {secret}\x01\x01", login.user)), vec![String::new()])
        }
    };
    let first = first.map(|first| format!(" {}", STANDARD.encode(first))).unwrap_or_default();
    let mut reply = dialogue.command(Stage::Login, &format!("AUTH {}{first}", name(mechanism)), limit).await?;
    for answer in then {
        if reply.code != 334 {
            break;
        }
        reply = dialogue.command(Stage::Login, &STANDARD.encode(answer), limit).await?;
    }
    let cause = match reply.code {
        200..300 => return Ok(()),
        300..400 => Cause::BadReply(reply.to_string()),
        _ => Cause::Refused(reply),
    };
    Err(Failure { stage: Stage::Login, cause })
}

fn bit(mechanism: Mechanism) -> u64 {
    match mechanism {
        Mechanism::Plain => AUTH_PLAIN,
        Mechanism::Login => AUTH_LOGIN,
        Mechanism::XOAuth2 => AUTH_XOAUTH2,
    }
}

fn name(mechanism: Mechanism) -> &'static str {
    match mechanism {
        Mechanism::Plain => "PLAIN",
        Mechanism::Login => "LOGIN",
        Mechanism::XOAuth2 => "XOAUTH2",
    }
}

/// The current password. A token in a file may have changed since the last login.
async fn password(password: &Password) -> io::Result<SecretString> {
    match password {
        Password::Here(password) => Ok(password.clone()),
        Password::File(path) => {
            let mut text = tokio::fs::read_to_string(path).await?;
            text.truncate(text.trim_end_matches(['\r', '\n']).len());
            Ok(text.into())
        }
    }
}
