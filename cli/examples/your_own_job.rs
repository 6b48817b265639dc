//! All of Mailrun, with a job of its own: an HTTP call for each row.

use std::{process::ExitCode, time::Duration};

use mailrun::{
    Jobs,
    job::{Attempt, Granted, Items, Job, JobError, Outcome, from_data},
};
use reqwest::{Client, StatusCode, redirect::Policy};
use serde::Deserialize;
use sqlx::PgConnection;
use uuid::Uuid;

/// The data of an item.
#[derive(Deserialize)]
struct Call {
    url: String,
    body: String,
}

struct Calls(Client);

impl Job for Calls {
    const KIND: &'static str = "calls";
    type Run = ();
    type Item = Call;

    async fn run(&self, _: &mut PgConnection, _: Uuid) -> Result<(), JobError> {
        Ok(())
    }

    async fn items(&self, _: &mut PgConnection, granted: &[Granted]) -> sqlx::Result<Items<Call>> {
        Ok(from_data(granted))
    }

    async fn process(&self, attempt: &Attempt, (): &(), call: &Call) -> Outcome {
        let request = self.0.post(&call.url).body(call.body.clone());
        // The last check before the call may have an effect.
        if let Err(withdrawn) = attempt.may_proceed().await {
            return Outcome::Withdrawn(withdrawn);
        }
        match request.send().await {
            Ok(response) if response.status().is_success() => Outcome::Sent,
            Ok(response) => match response.status() {
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Outcome::Retry("busy".into()),
                status if status.is_server_error() => Outcome::Unknown(status.to_string()),
                status => Outcome::failed(status.to_string()),
            },
            Err(error) if error.is_connect() => Outcome::Retry("no connection".into()),
            Err(error) => Outcome::Unknown(error.to_string()),
        }
    }
}

fn main() -> ExitCode {
    let client = Client::builder().timeout(Duration::from_secs(30)).redirect(Policy::none()).build();
    match client {
        Ok(client) => mailrun::main(Jobs::new().with(Calls(client))),
        Err(_) => ExitCode::FAILURE,
    }
}
