//! Certificate trust and logins.

use std::{fs, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer},
};

use super::*;

/// A private certificate authority in a file, and a server with its certificate for `name`.
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

fn start_tls(acceptor: TlsAcceptor) -> Vec<Step> {
    let mut script = hello("250-hi\r\n250 STARTTLS");
    script.extend([Step::Expect("STARTTLS", "220 go"), Step::Encrypt(acceptor)]);
    script.extend(takes_mail().into_iter().skip(1));
    script
}

fn implicit(acceptor: TlsAcceptor) -> Vec<Step> {
    [Step::Encrypt(acceptor)].into_iter().chain(takes_mail()).collect()
}

/// Sends a mail to a server with a certificate of one authority, trusting the same authority or another one.
async fn send(scheme: &str, name: &str, trusted: bool) -> Outcome {
    let (file, acceptor) = authority(name);
    let (stranger, _) = authority(name);
    let script = if scheme == "smtps" { implicit(acceptor) } else { start_tls(acceptor) };
    let server = Server::start(vec![script]).await;
    let path = if trusted { file.path() } else { stranger.path() }.display().to_string();
    mailer(&config(&[format!("{scheme}://127.0.0.1:{}?ca_file={path}", server.port)]))
        .send(&ann(), &Attempt::unchecked())
        .await
}

#[tokio::test]
async fn a_private_authority_is_trusted_if_configured() {
    for scheme in ["smtp", "smtps"] {
        assert_eq!(send(scheme, "127.0.0.1", true).await, Outcome::Sent);
        let unknown = send(scheme, "127.0.0.1", false).await;
        assert!(later(&unknown).contains("invalid peer certificate"), "{unknown:?}");
        let misnamed = send(scheme, "other.example", true).await;
        assert!(later(&misnamed).contains("not valid for"), "{misnamed:?}");
    }
}

/// A full handshake costs a round trip more, and the server a signature.
#[tokio::test]
async fn a_new_connection_resumes_the_tls_session_of_an_earlier_one() {
    let (file, acceptor) = authority("127.0.0.1");
    for script in [start_tls(acceptor.clone()), implicit(acceptor)] {
        let scheme = if matches!(script[0], Step::Encrypt(_)) { "smtps" } else { "smtp" };
        let server = Server::start(vec![script]).await;
        let relay = format!("{scheme}://127.0.0.1:{}?ca_file={}", server.port, file.path().display());
        let mailer = mailer(&SmtpConfig { messages_per_connection: 1, ..config(&[relay]) });
        for _ in 0..3 {
            assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
        }
        assert_eq!((server.connections(), server.resumed()), (3, 2), "{scheme}");
    }
}

#[tokio::test]
async fn no_mail_and_no_password_is_sent_without_encryption() {
    let server = Server::start(vec![takes_mail()]).await;
    let outcome = mailer(&config(&[format!("smtp://ann:secret@127.0.0.1:{}", server.port)]))
        .send(&ann(), &Attempt::unchecked())
        .await;
    assert!(later(&outcome).contains("does not offer encryption"), "{outcome:?}");
    // Nor can a man in the middle inject capabilities before TLS.
    let (file, acceptor) = authority("127.0.0.1");
    let mut script = hello("250-hi\r\n250 STARTTLS");
    script.extend([Step::Expect("STARTTLS", "220 go\r\n250 AUTH PLAIN"), Step::Encrypt(acceptor)]);
    let ahead = Server::start(vec![script]).await;
    let url = format!("smtp://ann:secret@127.0.0.1:{}?ca_file={}", ahead.port, file.path().display());
    let outcome = mailer(&config(&[url])).send(&ann(), &Attempt::unchecked()).await;
    assert!(later(&outcome).contains("more than one reply"), "{outcome:?}");
    assert_eq!(server.count("AUTH") + server.count("MAIL") + ahead.count("AUTH"), 0);
}

/// Logs in to a server that offers `offer` and then follows `script`.
async fn log_in(offer: &'static str, setting: &str, script: Vec<Step>) -> (Server, Outcome) {
    let mut all = hello(offer);
    all.extend(script);
    all.extend(takes_mail().into_iter().skip(2));
    let server = Server::start(vec![all]).await;
    let url = format!("smtp://ann:s%40cret@127.0.0.1:{}?tls=none{setting}", server.port);
    let outcome = mailer(&config(&[url])).send(&ann(), &Attempt::unchecked()).await;
    (server, outcome)
}

#[tokio::test]
async fn each_login_mechanism_sends_its_credentials() {
    let encode = |text: &str| STANDARD.encode(text);
    let (server, outcome) =
        log_in("250-hi\r\n250 AUTH LOGIN PLAIN", "", vec![Step::Expect("AUTH", "235 welcome")]).await;
    assert_eq!(outcome, Outcome::Sent);
    assert_eq!(server.heard()[1], format!("AUTH PLAIN {}", encode("\0ann\0s@cret")));

    let asks = || {
        vec![
            Step::Expect("AUTH LOGIN", "334 VXNlcm5hbWU6"),
            Step::Expect("", "334 UGFzc3dvcmQ6"),
            Step::Expect("", "235 welcome"),
        ]
    };
    for (offer, setting) in [("250-hi\r\n250 AUTH LOGIN", ""), ("250-hi\r\n250 AUTH PLAIN LOGIN", "&auth=login")] {
        let (server, outcome) = log_in(offer, setting, asks()).await;
        assert_eq!(outcome, Outcome::Sent);
        assert_eq!(server.heard()[1..4], ["AUTH LOGIN".into(), encode("ann"), encode("s@cret")]);
    }

    let (server, outcome) =
        log_in("250-hi\r\n250 AUTH XOAUTH2", "&auth=xoauth2", vec![Step::Expect("AUTH", "235 welcome")]).await;
    assert_eq!(outcome, Outcome::Sent);
    assert_eq!(server.heard()[1], format!("AUTH XOAUTH2 {}", encode("user=ann\x01auth=Bearer s@cret\x01\x01")));
}

#[tokio::test]
async fn a_refused_login_makes_the_relay_unavailable() {
    let refused = vec![Step::Expect("AUTH", "535 5.7.8 bad password")];
    let (_, outcome) = log_in("250-hi\r\n250 AUTH PLAIN", "", refused).await;
    assert_eq!(later(&outcome), "the login was refused: 535 5.7.8 bad password");
    let token = vec![Step::Expect("AUTH", "334 eyJzdGF0dXMiOiI0MDAifQ=="), Step::Expect("", "535 5.7.8 expired")];
    let (_, outcome) = log_in("250-hi\r\n250 AUTH XOAUTH2", "&auth=xoauth2", token).await;
    assert_eq!(later(&outcome), "the login was refused: 535 5.7.8 expired");
    let (_, outcome) = log_in("250-hi\r\n250 AUTH CRAM-MD5", "", vec![]).await;
    assert!(later(&outcome).contains("PLAIN or LOGIN: it offers CRAM-MD5"), "{outcome:?}");
}

#[tokio::test]
async fn the_password_file_is_read_at_each_login() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut script = hello("250-hi\r\n250 AUTH PLAIN");
    script.push(Step::Expect("AUTH", "235 welcome"));
    script.extend(takes_mail().into_iter().skip(2));
    let server = Server::start(vec![script]).await;
    let url = format!("smtp://ann@127.0.0.1:{}?tls=none&password_file={}", server.port, file.path().display());
    let mailer = mailer(&SmtpConfig { messages_per_connection: 1, ..config(&[url]) });
    for password in ["one\n", "two\r\n"] {
        fs::write(&file, password).unwrap();
        assert_eq!(mailer.send(&ann(), &Attempt::unchecked()).await, Outcome::Sent);
    }
    let logins: Vec<_> = server.heard().into_iter().filter(|line| line.starts_with("AUTH")).collect();
    assert_eq!(logins, ["\0ann\0one", "\0ann\0two"].map(|text| format!("AUTH PLAIN {}", STANDARD.encode(text))));
    fs::remove_file(&file).unwrap();
    assert!(later(&mailer.send(&ann(), &Attempt::unchecked()).await).contains("password_file"));
}

#[tokio::test]
async fn a_silent_server_times_out_at_every_step_before_the_mail() {
    let starting = || [hello("250-hi\r\n250 STARTTLS"), vec![Step::Expect("STARTTLS", "220 go"), Step::Hang]].concat();
    let deaf = || [hello("250-hi\r\n250 STARTTLS"), vec![Step::Hang]].concat();
    let login = || [hello("250-hi\r\n250 AUTH PLAIN"), vec![Step::Hang]].concat();
    for (scheme, rest, script, stage) in [
        ("smtp", "", starting(), "the encryption"),
        ("smtp", "", deaf(), "STARTTLS"),
        ("smtps", "", vec![Step::Hang], "the encryption"),
        ("smtp", "?tls=none", login(), "the login"),
    ] {
        let server = Server::start(vec![script]).await;
        let url = format!("{scheme}://ann:secret@127.0.0.1:{}{rest}", server.port);
        let (file, _) = authority("127.0.0.1");
        let url = if rest.is_empty() { format!("{url}?ca_file={}", file.path().display()) } else { url };
        let outcome = mailer(&short(&[url])).send(&ann(), &Attempt::unchecked()).await;
        assert_eq!(later(&outcome), format!("no answer to {stage} within 150ms"));
    }
}

#[test]
fn a_missing_authority_is_reported_at_start() {
    let url = "smtp://127.0.0.1?ca_file=/nowhere/ca.pem".to_owned();
    let error = Smtp::new(&config(&[url])).err().unwrap().to_string();
    assert!(error.contains("/nowhere/ca.pem"), "{error}");
}
