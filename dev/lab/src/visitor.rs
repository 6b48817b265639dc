//! A client of the pages for the demo and the benches: opens the form, submits it, and polls the run's progress.

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

/// A button is pressed again after this time without a response.
const PRESS: Duration = Duration::from_secs(5);

/// A minimal browser.
pub struct Visitor {
    client: Client,
    web_url: String,
}

/// The web server answered and did not accept the form.
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
    /// The same form once more, like a browser that reloads the page: same token, same run.
    pub fn again(&self) -> Result<Self> {
        self.0.try_clone().map(Self).context("the form cannot be submitted twice")
    }
}

impl Progress {
    /// Settled items.
    pub fn settled(&self) -> u64 {
        self.total - self.pending - self.retrying
    }
}

impl Visitor {
    /// A client of the pages at `web_url`, with their login if they have one.
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

    /// Opens the form and fills it in.
    pub async fn fill_in(&self, emails: &str) -> Result<Form> {
        self.fill_in_limited(emails, None).await
    }

    /// The same with a rate limit.
    pub async fn fill_in_limited(&self, emails: &str, sends_per_second: Option<u32>) -> Result<Form> {
        let token = self.token(&self.web_url).await.context("the form has no token")?;
        let rate = sends_per_second.map(|rate| rate.to_string()).unwrap_or_default();
        let form = [("token", token.as_str()), ("emails", emails), ("sends_per_second", &rate)];
        Ok(Form(self.client.post(format!("{}/invites", self.web_url)).form(&form).build()?))
    }

    /// The same with a text of one's own.
    pub async fn fill_in_text(&self, emails: &str, subject: &str, body: &str) -> Result<Form> {
        let token = self.token(&self.web_url).await.context("the form has no token")?;
        let form = [("token", token.as_str()), ("emails", emails), ("subject", subject), ("body", body)];
        Ok(Form(self.client.post(format!("{}/invites", self.web_url)).form(&form).build()?))
    }

    /// Submits the form, and returns the URL of the results page.
    pub async fn send(&self, form: Form) -> Result<String> {
        let answer = self.client.execute(form.0).await?;
        let location = answer.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let location = location.ok_or_else(|| NotAccepted(answer.status()))?;
        Ok(format!("{}{location}", self.web_url))
    }

    /// Opens a page and returns its status. `path` begins with a slash.
    pub async fn status(&self, path: &str) -> Result<StatusCode> {
        Ok(self.client.get(format!("{}{path}", self.web_url)).timeout(PRESS).send().await?.status())
    }

    /// Opens a page and returns its contents.
    pub async fn open(&self, page: &str) -> Result<String> {
        Ok(self.client.get(page).send().await?.error_for_status()?.text().await?)
    }

    /// Gets a run's progress.
    pub async fn progress(&self, run: &str) -> Result<Progress> {
        Ok(self.client.get(format!("{run}/progress")).send().await?.error_for_status()?.json().await?)
    }

    /// Presses *Retry*. Fails if there is no such button, or the replay is refused.
    pub async fn retry(&self, run: &str) -> Result<()> {
        let token = self.token(run).await.context("the results page has no Retry")?;
        let form = [("token", token.as_str()), ("states", "failed")];
        self.client.post(format!("{run}/retry")).form(&form).send().await?.error_for_status()?;
        Ok(())
    }

    /// Presses a button of a run's page: `pause`, `resume` or `cancel`.
    pub async fn press(&self, run_id: Uuid, button: &str) -> Result<()> {
        let url = format!("{}/runs/{run_id}/{button}", self.web_url);
        self.client.post(url).timeout(PRESS).send().await?.error_for_status()?;
        Ok(())
    }

    /// The form's token, which distinguishes a second click from a second submission.
    async fn token(&self, page: &str) -> Result<String> {
        let page = self.open(page).await?;
        let (_, rest) = page.split_once("name=\"token\" value=\"").context("the page has no form")?;
        let (token, _) = rest.split_once('"').context("the page is truncated")?;
        Ok(token.to_owned())
    }
}

/// The login of the pages, if any.
pub fn login(config: &Config) -> Option<String> {
    let password = config.web.password.as_ref()?;
    Some(format!("Basic {}", STANDARD.encode(format!(":{}", password.expose_secret()))))
}
