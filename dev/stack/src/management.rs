//! Calls of RabbitMQ's management API for the local stack.

use std::{collections::BTreeMap, pin::pin, time::Duration};

use reqwest::{Client, Method, Response};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use url::Url;

use super::{error::StackError, state::USER};

/// How often a virtual host being created is checked.
const POLL: Duration = Duration::from_millis(500);

/// A client of one private node's management API.
#[derive(Clone, Debug)]
pub(crate) struct Management {
    // `None` only if the HTTP client could not be built, which later appears as a refused request.
    client: Option<Client>,
    port: u16,
    password: String,
}

impl Management {
    /// A client with the stack's login.
    pub(crate) fn new(port: u16, password: &str) -> Self {
        // A proxy from the environment does not apply to loopback.
        let client = Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().ok();
        Self { client, port, password: password.to_owned() }
    }

    /// Whether the node has started and listens on a port.
    pub(crate) async fn listens(&self, port: u16) -> bool {
        self.send(Method::GET, &["health", "checks", "port-listener", &port.to_string()], None).await.is_ok()
    }

    pub(crate) async fn version(&self) -> Result<String, StackError> {
        #[derive(Deserialize)]
        struct Overview {
            rabbitmq_version: String,
        }
        let overview: Result<Overview, _> = self.get(&["overview"]).await;
        Ok(overview.map_err(refused("report its version".to_owned()))?.rabbitmq_version)
    }

    /// Creates a virtual host, with all permissions for the stack's user.
    pub(crate) async fn create_vhost(&self, name: &str) -> Result<(), StackError> {
        let what = || format!("create the virtual host {name}");
        let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
        let path = ["vhosts", name];
        let mut creation = pin!(self.send(Method::PUT, &path, Some(json!({}))));
        let created = loop {
            tokio::select! {
                created = &mut creation => break created,
                () = tokio::time::sleep(POLL) => self.start_vhost_where_stopped(name).await,
            }
        };
        created.map_err(refused(what()))?;
        self.send(Method::PUT, &["permissions", name, USER], Some(all)).await.map(drop).map_err(refused(what()))
    }

    /// Starts a virtual host on the nodes where it is stopped.
    ///
    /// RabbitMQ answers when a new virtual host runs on all running nodes, but starts it only on those that are ready. A node is running,
    /// and already listens, a little before it is ready: a virtual host created in between never starts there
    /// (`rabbit_vhost_sup_sup:start_on_all_nodes` of RabbitMQ 3.10).
    async fn start_vhost_where_stopped(&self, name: &str) {
        #[derive(Deserialize)]
        struct Vhost {
            cluster_state: BTreeMap<String, String>,
        }
        // An error here is retried at the next poll, or reported by the answer to its creation.
        let Ok(vhost) = self.get::<Vhost>(&["vhosts", name]).await else { return };
        let stopped = vhost.cluster_state.iter().filter(|(_, state)| *state == "stopped");
        for (node, _) in stopped {
            let _ = self.send(Method::POST, &["vhosts", name, "start", node], None).await;
        }
    }

    /// Deletes a virtual host with its contents, if it exists.
    pub(crate) async fn delete_vhost(&self, name: &str) -> Result<(), StackError> {
        match self.send(Method::DELETE, &["vhosts", name], None).await {
            Err(answer) if !answer.starts_with("404") => {
                Err(refused(format!("delete the virtual host {name}"))(answer))
            }
            _ => Ok(()),
        }
    }

    /// Whether one of the node's health checks without arguments passes.
    pub(crate) async fn holds(&self, check: &str) -> bool {
        self.send(Method::GET, &["health", "checks", check], None).await.is_ok()
    }

    /// Gets a resource.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &[&str]) -> Result<T, String> {
        let response = self.send(Method::GET, path, None).await?;
        response.json().await.map_err(|error| error.to_string())
    }

    async fn send(&self, method: Method, path: &[&str], body: Option<Value>) -> Result<Response, String> {
        let client = self.client.as_ref().ok_or("no HTTP client")?;
        let mut url = Url::parse(&format!("http://127.0.0.1:{}/api", self.port)).map_err(|error| error.to_string())?;
        url.path_segments_mut().map_err(|()| "no path".to_owned())?.extend(path);
        let mut request = client.request(method, url).basic_auth(USER, Some(&self.password));
        if let Some(body) = body {
            request = request.json(&body);
        }
        // With its causes: the error itself does not say whether the connection was refused or timed out.
        let response = request.send().await.map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        Err(format!("{status} {}", response.text().await.unwrap_or_default()))
    }
}

fn refused(what: String) -> impl FnOnce(String) -> StackError {
    move |answer| StackError::Management { what, answer }
}
