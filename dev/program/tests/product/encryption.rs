//! Connections to PostgreSQL and RabbitMQ on other machines: encrypted and verified, or refused.
//!
//! The test servers listen on this machine. They are reached at 0.0.0.0, which the system resolves to this machine, and which Mailrun
//! treats as another one.

use std::{
    fs,
    process::{Command, Stdio},
    sync::Arc,
};

use crate::support::{MAILRUN, World};
use mailrun_app::config::Config;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer},
};
use url::Url;

/// A private certificate authority in a file, and a TLS server with its certificate for `name`.
fn authority(name: &str) -> (tempfile::NamedTempFile, TlsAcceptor) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![name.into()]).unwrap().signed_by(&key, &authority).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, authority.pem()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
        .unwrap();
    (file, TlsAcceptor::from(Arc::new(config)))
}

/// Terminates TLS in front of a plain server, and returns its port. PostgreSQL's clients request TLS first.
async fn front(acceptor: TlsAcceptor, server: u16, asks_first: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if asks_first {
                    // SSLRequest and its acceptance.
                    client.read_exact(&mut [0; 8]).await?;
                    client.write_all(b"S").await?;
                }
                let mut client = acceptor.accept(client).await?;
                let mut server = TcpStream::connect(("127.0.0.1", server)).await?;
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    port
}

fn at(url: &str, scheme: &str, host: &str, port: u16) -> Url {
    let (_, rest) = url.split_once("://").unwrap();
    let mut url = Url::parse(&format!("{scheme}://{rest}")).unwrap();
    url.set_host(Some(host)).unwrap();
    url.set_port(Some(port)).unwrap();
    url
}

#[tokio::test]
async fn encrypts_and_verifies_remote_postgresql() {
    let world = World::new(&[]).await;
    let url = world.stack.database_url(&world.name);
    let server = Url::parse(&url).unwrap().port().unwrap();
    let (ours, acceptor) = authority("0.0.0.0");
    let (other, _) = authority("0.0.0.0");
    let (wrong_name, impostor) = authority("db.example");
    let (encrypted, impostor) = (front(acceptor, server, true).await, front(impostor, server, true).await);
    let connects = async |port, root: Option<&tempfile::NamedTempFile>, allow_plaintext| {
        let mut url = at(&url, "postgres", "0.0.0.0", port);
        if let Some(root) = root {
            url.query_pairs_mut().append_pair("sslrootcert", root.path().to_str().unwrap());
        }
        let mut config = Config::default().database;
        (config.url, config.allow_plaintext) = (url.to_string().into(), allow_plaintext);
        mailrun_ledger::open(&config, "test").unwrap().acquire().await.map(drop).map_err(|error| error.to_string())
    };
    connects(encrypted, Some(&ours), false).await.unwrap();
    connects(encrypted, Some(&other), false).await.expect_err("an unknown authority");
    connects(encrypted, None, false).await.expect_err("not one of the system's authorities");
    connects(impostor, Some(&wrong_name), false).await.expect_err("another server's certificate");
    connects(server, Some(&ours), false).await.expect_err("a server without encryption");
    connects(server, None, true).await.expect("a setting allows it");
}

#[tokio::test]
async fn verifies_rabbitmq() {
    let world = World::new(&[]).await;
    let url = world.stack.amqp_url(&world.name);
    let server = Url::parse(&url).unwrap().port().unwrap();
    let (ours, acceptor) = authority("localhost");
    let (other, _) = authority("localhost");
    let encrypted = front(acceptor, server, false).await;
    let connects = async |root: Option<&tempfile::NamedTempFile>| {
        let mut config = Config::default();
        config.amqp.urls = vec![at(&url, "amqps", "localhost", encrypted).to_string().into()];
        config.amqp.ca_file = root.map(|root| root.path().to_owned());
        config.broker("test").declare_topology().await.map_err(|error| error.to_string())
    };
    connects(Some(&ours)).await.unwrap();
    connects(Some(&other)).await.expect_err("an unknown authority");
    connects(None).await.expect_err("not one of the system's authorities");
}

#[test]
fn refuses_malformed_and_unprotected_urls_without_printing_passwords() {
    let database = |url| [("DATABASE_URL", url), ("AMQP_URL", "amqp://localhost")];
    let amqp = |url| [("DATABASE_URL", "postgres://localhost/d"), ("AMQP_URL", url)];
    for (settings, key) in [
        (database("postgres://u:hunter2@localhost:port/d"), "database.url"),
        (database("postgres://u:hunter2/x@localhost/d"), "database.url"),
        (database("hunter2"), "database.url"),
        (database("postgres://u:hunter2@db.example/d?sslmode=disable"), "database.url"),
        (database("postgres://u:hunter2@db.example/d?sslmode=require"), "database.url"),
        (amqp("amqp://u:hunter2@localhost:port"), "amqp.urls"),
        (amqp("amqp://localhost,u:hunter2@localhost"), "amqp.urls"),
        (amqp("amqp://u:hunter2@mq.example"), "amqp.urls"),
    ] {
        for args in [&["web"][..], &["worker"], &["setup"], &["doctor"]] {
            let mut command = Command::new(MAILRUN);
            command.args(args).env("MAILRUN_WEB__LISTEN", "127.0.0.1:0").envs(settings).stdin(Stdio::null());
            let output = command.output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(!output.status.success() && said.contains(key), "{args:?} {settings:?}: {said}");
            assert!(!said.contains("hunter2"), "{said}");
        }
    }
}
