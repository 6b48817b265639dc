//! A visitor of the pages, as the demo and the bench are: opens the form, sends it, and polls the results page's numbers.

use std::time::Duration;

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use mailrun_app::config::Config;
use reqwest::{
    Client, Request, StatusCode,
    header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION},
    redirect,
};
use secrecy::ExposeSecret as _;
use serde::Deserialize;
use uuid::Uuid;

/// A button is pressed again when nothing has happened for so long.
const PRESS: Duration = Duration::from_secs(5);

/// A browser, as far as a program needs one.
pub struct Visitor {
    client: Client,
    web_url: String,
}

/// The pages have answered, and not accepted the form.
#[derive(Debug, thiserror::Error)]
#[error("the form was not accepted: {0}")]
pub struct NotAccepted(StatusCode);

/// A form that is filled in.
pub struct Form(Request);

/// A run's progress, as the page polls it.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Progress {
    /// Items of the run.
    pub total: u64,
    /// Items pending.
    pub pending: u64,
    /// Items waiting for a retry.
    pub retrying: u64,
    /// Items sent.
    pub sent: u64,
    /// Items failed.
    pub failed: u64,
    /// Items with an unknown outcome.
    pub unknown: u64,
    /// Whether nothing changes without a person.
    pub over: bool,
}

impl Form {
    /// The same form once more, as a browser sends it again when a page is reloaded: same token, same run.
    ///
    /// # Errors
    /// Never, as it is not streamed.
    pub fn again(&self) -> Result<Self> {
        self.0.try_clone().map(Self).context("the form can't be sent twice")
    }
}

impl Progress {
    /// Items that have come to an end, if only for now.
    pub fn settled(&self) -> u64 {
        self.total - self.pending - self.retrying
    }
}

impl Visitor {
    /// A visitor of the pages at `web_url`, logged in where they ask for it.
    ///
    /// # Errors
    /// When the password can't be sent.
    pub fn new(config: &Config, web_url: &str) -> Result<Self> {
        let mut headers = HeaderMap::new();
        if let Some(login) = login(config) {
            let mut login: HeaderValue = login.parse()?;
            login.set_sensitive(true);
            headers.insert(AUTHORIZATION, login);
        }
        let client =
            Client::builder().no_proxy().redirect(redirect::Policy::none()).default_headers(headers).build()?;
        Ok(Self { client, web_url: web_url.to_owned() })
    }

    /// Opens the form, and fills it in.
    ///
    /// # Errors
    /// When the page is not the form.
    pub async fn fill_in(&self, emails: &str) -> Result<Form> {
        self.fill_in_limited(emails, None).await
    }

    /// The same, with a rate limit.
    ///
    /// # Errors
    /// When the page is not the form.
    pub async fn fill_in_limited(&self, emails: &str, sends_per_second: Option<u32>) -> Result<Form> {
        let token = self.token(&self.web_url).await.context("the form has no token")?;
        let rate = sends_per_second.map(|rate| rate.to_string()).unwrap_or_default();
        let form = [("token", token.as_str()), ("emails", emails), ("sends_per_second", &rate)];
        Ok(Form(self.client.post(format!("{}/invites", self.web_url)).form(&form).build()?))
    }

    /// Presses *Send Invites*, and returns the address of the results page.
    ///
    /// # Errors
    /// When the form is not accepted.
    pub async fn send(&self, form: Form) -> Result<String> {
        let answer = self.client.execute(form.0).await?;
        let location = answer.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let location = location.ok_or_else(|| NotAccepted(answer.status()))?;
        Ok(format!("{}{location}", self.web_url))
    }

    /// Opens a page, and says how it answers. `path` begins with a slash.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn status(&self, path: &str) -> Result<StatusCode> {
        Ok(self.client.get(format!("{}{path}", self.web_url)).timeout(PRESS).send().await?.status())
    }

    /// Opens a page, whatever is on it.
    ///
    /// # Errors
    /// When the page does not answer.
    pub async fn open(&self, page: &str) -> Result<String> {
        Ok(self.client.get(page).send().await?.error_for_status()?.text().await?)
    }

    /// Asks once how a run is getting on.
    ///
    /// # Errors
    /// When the page does not answer.
    pub async fn progress(&self, run: &str) -> Result<Progress> {
        Ok(self.client.get(format!("{run}/progress")).send().await?.error_for_status()?.json().await?)
    }

    /// Presses *Retry*.
    ///
    /// # Errors
    /// When there is no *Retry*, or it is refused.
    pub async fn retry(&self, run: &str) -> Result<()> {
        let token = self.token(run).await.context("the results page has no Retry")?;
        let form = [("token", token.as_str()), ("states", "failed")];
        self.client.post(format!("{run}/retry")).form(&form).send().await?.error_for_status()?;
        Ok(())
    }

    /// Presses a button of a run's page: `pause`, `resume` or `cancel`.
    ///
    /// # Errors
    /// When the page does not answer, or refuses.
    pub async fn press(&self, run_id: Uuid, button: &str) -> Result<()> {
        let url = format!("{}/runs/{run_id}/{button}", self.web_url);
        self.client.post(url).timeout(PRESS).send().await?.error_for_status()?;
        Ok(())
    }

    /// The hidden field of the form on a page, which tells a second click from a second wish.
    async fn token(&self, page: &str) -> Result<String> {
        let page = self.open(page).await?;
        let (_, rest) = page.split_once("name=\"token\" value=\"").context("there is no form on the page")?;
        let (token, _) = rest.split_once('"').context("the page is cut off")?;
        Ok(token.to_owned())
    }
}

/// What logs a visitor in, where the pages ask for it.
pub fn login(config: &Config) -> Option<String> {
    let password = config.web.password.as_ref()?;
    Some(format!("Basic {}", STANDARD.encode(format!(":{}", password.expose_secret()))))
}
