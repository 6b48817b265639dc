//! The mail sink over real sockets: conversations written out by hand, and the page over HTTP.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mailrun_sink::{Action, Login, Options, Rule, Session, Sink, SinkError, Stage, Tls, serve_page};
use reqwest::{StatusCode, redirect};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::PrivatePkcs8KeyDer},
};
use tokio_util::sync::CancellationToken;

const MESSAGE: &str = "From: =?utf-8?q?Zo=C3=AB?= <zoe@a.example>\r\nTo: Ann <ann@b.example>\r\n\
    Subject: <b>Hello</b> & welcome\r\nMessage-ID: <1.1@a.example>\r\nMIME-Version: 1.0\r\n\
    Content-Type: multipart/alternative; boundary=x\r\n\r\n\
    --x\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n.hidden </pre> text\r\n\
    --x\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<p onclick=\"steal()\">Come & see</p>\r\n--x--\r\n";

/// However slow the machine is, this is not slowness any more.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client that says what it is told to.
struct Client<S>(BufReader<S>);

impl Client<TcpStream> {
    /// Connected, and not greeted yet.
    async fn connect(sink: &Sink) -> Self {
        Self(BufReader::new(TcpStream::connect(sink.address()).await.unwrap()))
    }

    async fn greeted(sink: &Sink) -> Self {
        let mut client = Self::connect(sink).await;
        assert!(client.hear().await.starts_with("220 "));
        client
    }

    /// Has said hello.
    async fn ready(sink: &Sink) -> Self {
        let mut client = Self::greeted(sink).await;
        assert!(client.say("EHLO client.example").await.starts_with("250"));
        client
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// The next reply, all of its lines; empty when the sink has closed the connection.
    async fn hear(&mut self) -> String {
        let mut reply = String::new();
        let whole = async {
            loop {
                let start = reply.len();
                // A connection that is cut counts as closed.
                if self.0.read_line(&mut reply).await.unwrap_or_default() == 0
                    || reply.as_bytes()[start..].get(3) == Some(&b' ')
                {
                    return;
                }
            }
        };
        timeout(PATIENCE, whole).await.expect("the sink says nothing");
        reply
    }

    async fn write(&mut self, bytes: &str) {
        // The sink may have gone; what is heard next tells.
        let _ = self.0.get_mut().write_all(bytes.as_bytes()).await;
    }

    async fn say(&mut self, line: &str) -> String {
        self.write(&format!("{line}\r\n")).await;
        self.hear().await
    }

    async fn expect(&mut self, line: &str, code: &str) {
        let reply = self.say(line).await;
        assert!(reply.starts_with(code), "{line:?}: expected {code}, heard {reply:?}");
    }

    /// Up to the data, and what is said to it.
    async fn send(&mut self, message: &str) -> String {
        self.expect("MAIL FROM:<zoe@a.example>", "250").await;
        self.expect("RCPT TO:<ann@b.example>", "250").await;
        self.expect("DATA", "354").await;
        self.write(&stuffed(message)).await;
        self.hear().await
    }
}

/// A message as it goes over the wire.
fn stuffed(message: &str) -> String {
    format!("{}.\r\n", message.replace("\r\n.", "\r\n.."))
}

async fn sink() -> Sink {
    Sink::start(Options::default()).await.unwrap()
}

/// A rule for one stage; at others, everything goes on.
fn at(wanted: &'static str, action: Action) -> Rule {
    Arc::new(move |stage: Stage<'_>, _: &Session| {
        let name = format!("{stage:?}");
        if name.split('(').next() == Some(wanted) { action.clone() } else { Action::GoOn }
    })
}

/// Brings a conversation to a stage; the answer there is not heard yet.
async fn reach(sink: &Sink, stage: &str) -> Client<TcpStream> {
    let mut client = Client::connect(sink).await;
    let steps = [
        ("Connect", String::new()),
        ("Hello", "EHLO client.example\r\n".into()),
        ("Auth", format!("AUTH PLAIN {}\r\n", STANDARD.encode("\0ann\0let me in"))),
        ("Mail", "MAIL FROM:<zoe@a.example>\r\n".into()),
        ("Rcpt", "RCPT TO:<ann@b.example>\r\n".into()),
        ("Data", "DATA\r\n".into()),
        ("Message", stuffed(MESSAGE)),
    ];
    for (name, text) in steps {
        client.write(&text).await;
        if name == stage {
            break;
        }
        let reply = client.hear().await;
        assert!(matches!(reply.as_bytes().first(), Some(b'2' | b'3')), "{name}: {reply:?}");
    }
    client
}

const STAGES: [&str; 7] = ["Connect", "Hello", "Auth", "Mail", "Rcpt", "Data", "Message"];

#[tokio::test]
async fn accepted_mail_is_recorded_and_kept_as_it_was() {
    let sink = sink().await;
    let mut client = Client::ready(&sink).await;
    assert!(client.send(MESSAGE).await.starts_with("250"));
    client.expect("QUIT", "221").await;
    assert_eq!(client.hear().await, "", "closed after QUIT");
    assert_eq!((sink.received(), sink.received_twice(), sink.most_connections()), (1, 0, 1));
    assert_eq!(sink.mailbox().times("ann@b.example", "1.1@a.example"), 1);
    let messages = sink.mailbox().newest(None, 10);
    assert_eq!(String::from_utf8_lossy(&messages[0].raw), MESSAGE, "the dots of the transport are gone");
    assert_eq!(
        (messages[0].from.as_str(), messages[0].to.as_slice()),
        ("zoe@a.example", &["ann@b.example".into()][..])
    );
}

#[tokio::test]
async fn one_message_to_two_is_two_deliveries_and_the_same_again_is_one_twice() {
    let sink = sink().await;
    let mut client = Client::ready(&sink).await;
    client.expect("MAIL FROM:<zoe@a.example>", "250").await;
    client.expect("RCPT TO:<ann@b.example>", "250").await;
    client.expect("RCPT TO:<bob@b.example>", "250").await;
    client.expect("DATA", "354").await;
    client.expect(&format!("{MESSAGE}."), "250").await;
    assert_eq!((sink.received(), sink.received_twice(), sink.rate()), (2, 0, None));
    assert!(client.send(MESSAGE).await.starts_with("250"));
    let figures = sink.mailbox().counts();
    assert_eq!((figures.deliveries, figures.received, figures.received_twice), (3, 2, 1));
    assert!(sink.rate().unwrap() > 0.0);
}

#[tokio::test]
async fn requests_in_one_packet_are_answered_in_order() {
    let sink = sink().await;
    let mut client = Client::greeted(&sink).await;
    client.write("EHLO c.example\r\nMAIL FROM:<>\r\nRCPT TO:<ann@b.example>\r\nDATA\r\n").await;
    let mut heard = Vec::new();
    for _ in 0..4 {
        heard.push(client.hear().await[..3].to_owned());
    }
    assert_eq!(heard, ["250", "250", "250", "354"]);
    // An empty message, and the next requests behind it.
    client.write(".\r\nRSET\r\nNOOP\r\n").await;
    for _ in 0..3 {
        assert!(client.hear().await.starts_with("250"));
    }
    assert_eq!(sink.mailbox().newest(None, 1)[0].raw, b"");
}

#[tokio::test]
async fn a_dot_is_found_wherever_the_packets_are_cut() {
    let sink = sink().await;
    let mut client = Client::ready(&sink).await;
    let message = "Subject: dots\r\n\r\n.\r\n..\r\n. x\r\n.\n.\r\n";
    client.expect("MAIL FROM:<zoe@a.example>", "250").await;
    client.expect("RCPT TO:<ann@b.example>", "250").await;
    client.expect("DATA", "354").await;
    client.0.get_mut().set_nodelay(true).unwrap();
    for byte in stuffed(message).chars() {
        client.write(&byte.to_string()).await;
        tokio::task::yield_now().await;
    }
    assert!(client.hear().await.starts_with("250"));
    assert_eq!(String::from_utf8_lossy(&sink.mailbox().newest(None, 1)[0].raw), message);
}

#[tokio::test]
async fn what_it_can_do_is_announced() {
    let sink = sink().await;
    let mut client = Client::greeted(&sink).await;
    let reply = client.say("EHLO c.example").await;
    for extension in
        ["PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE 26214400", "ENHANCEDSTATUSCODES", "AUTH PLAIN LOGIN XOAUTH2"]
    {
        assert!(reply.lines().any(|line| &line[4..] == extension), "{extension}: {reply}");
    }
    assert!(!reply.contains("STARTTLS"));
    client.expect("HELO c.example", "250 ").await;
}

#[tokio::test]
async fn mistakes_are_told() {
    let sink = Sink::start(Options { largest: 1000, ..Options::default() }).await.unwrap();
    let mut client = Client::greeted(&sink).await;
    for (line, code) in [
        ("MAIL FROM:<zoe@a.example>", "503"),
        ("AUTH PLAIN =", "503"),
        ("DATA", "503"),
        ("HOLA", "500"),
        ("EXPN staff", "502"),
        ("STARTTLS", "502"),
        ("EHLO c.example", "250"),
        ("AUTH GSSAPI", "504"),
        ("AUTH PLAIN !", "501"),
        ("RCPT TO:<ann@b.example>", "503"),
        ("MAIL FROM:zoe", "501"),
        ("MAIL FROM:<zoe@a.example> SIZE=1001", "552"),
        ("MAIL FROM:<zoë@a.example>", "553"),
        ("MAIL FROM:<zoë@a.example> SMTPUTF8 BODY=8BITMIME SIZE=1000", "250"),
        ("MAIL FROM:<zoe@a.example>", "503"),
        ("DATA", "503"),
        ("RCPT TO:<ann>", "501"),
        ("RCPT TO:<änn@b.example>", "250"),
        ("VRFY ann", "252"),
        ("RSET", "250"),
        ("DATA", "503"),
    ] {
        client.expect(line, code).await;
    }
    client.expect(&format!("NOOP {}", "x".repeat(20_000)), "500").await;
    let large = format!("Subject: large\r\n\r\n{}\r\n", "x".repeat(100_000));
    assert!(client.send(&large).await.starts_with("552"));
    assert!(client.send(MESSAGE).await.starts_with("250"), "the conversation goes on");
    assert_eq!(sink.received(), 1);
}

#[tokio::test]
async fn any_login_will_do_unless_one_is_wanted() {
    let open = sink().await;
    let login = Login { user: "ann".into(), secret: "let me in".into() };
    let strict = Sink::start(Options { login: Some(login), ..Options::default() }).await.unwrap();
    let plain = |secret: &str| format!("AUTH PLAIN {}", STANDARD.encode(format!("\0ann\0{secret}")));
    Client::ready(&open).await.expect(&plain("anything"), "235").await;

    let mut client = Client::ready(&strict).await;
    client.expect("MAIL FROM:<zoe@a.example>", "530").await;
    client.expect(&plain("anything"), "535").await;
    client.expect("AUTH LOGIN", "334 VXNlcm5hbWU6").await;
    client.expect("*", "501").await;
    client.expect("AUTH LOGIN", "334 VXNlcm5hbWU6").await;
    client.expect(&STANDARD.encode("ann"), "334 UGFzc3dvcmQ6").await;
    client.expect(&STANDARD.encode("let me in"), "235").await;
    client.expect(&plain("let me in"), "503").await;
    assert!(client.send(MESSAGE).await.starts_with("250"));
    for line in
        [plain("let me in"), format!("AUTH XOAUTH2 {}", STANDARD.encode("user=ann\x01auth=Bearer let me in\x01\x01"))]
    {
        Client::ready(&strict).await.expect(&line, "235").await;
    }
}

#[tokio::test]
async fn a_rule_may_refuse_at_each_stage() {
    for stage in STAGES {
        let sink = sink().await;
        sink.set_rule(at(stage, Action::Reply(450, "4.2.1 not now\n4.2.1 maybe later".into())));
        let mut client = reach(&sink, stage).await;
        assert_eq!(client.hear().await, "450-4.2.1 not now\r\n450 4.2.1 maybe later\r\n", "{stage}");
        assert_eq!(sink.received(), 0);
        if stage == "Connect" {
            assert_eq!(client.hear().await, "");
        } else {
            client.expect("NOOP", "250").await;
            // And without the rule, the same client is served.
            sink.set_rule(None);
            client.expect("EHLO client.example", "250").await;
            assert!(client.send(MESSAGE).await.starts_with("250"), "{stage}");
        }
    }
}

#[tokio::test]
async fn a_rule_may_cut_the_connection_at_each_stage() {
    for stage in STAGES {
        let sink = sink().await;
        sink.set_rule(at(stage, Action::Drop));
        let mut client = reach(&sink, stage).await;
        assert_eq!(client.hear().await, "", "{stage}");
        assert_eq!(sink.received(), 0);
        sink.set_rule(at(stage, Action::Reply(421, "4.3.2 closing".into())));
        let mut client = reach(&sink, stage).await;
        assert!(client.hear().await.starts_with("421"));
        assert_eq!(client.hear().await, "", "{stage}");
    }
}

#[tokio::test]
async fn a_rule_may_hang_at_each_stage_until_the_sink_stops() {
    for stage in STAGES {
        let sink = sink().await;
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let hang = at(stage, Action::Hang);
        sink.set_rule(Some(Arc::new(move |stage: Stage<'_>, session: &Session| {
            let action = hang(stage, session);
            if action == Action::Hang {
                tell.send(()).unwrap();
            }
            action
        }) as Rule));
        let mut client = reach(&sink, stage).await;
        timeout(PATIENCE, told.recv()).await.unwrap().unwrap();
        client.write("NOOP\r\n").await;
        assert_eq!(sink.connections(), 1);
        sink.stop().await;
        assert_eq!(client.hear().await, "", "{stage}: nothing was said");
        assert_eq!((sink.connections(), sink.received()), (0, 0));
    }
}

#[tokio::test]
async fn a_rule_may_accept_and_say_nothing() {
    let sink = sink().await;
    sink.set_rule(at("Message", Action::AcceptThenDrop));
    let mut client = reach(&sink, "Message").await;
    assert_eq!(client.hear().await, "");
    assert_eq!(sink.received(), 1);
    sink.set_rule(None);
    let mut again = Client::ready(&sink).await;
    assert!(again.send(MESSAGE).await.starts_with("250"));
    assert_eq!((sink.received(), sink.received_twice()), (1, 1));
}

#[tokio::test]
async fn a_rule_knows_the_session() {
    let sink = sink().await;
    sink.set_rule(Some(Arc::new(|stage: Stage<'_>, session: &Session| match stage {
        Stage::Rcpt(address) if address.starts_with("bob") => Action::Reply(550, "5.1.1 nobody".into()),
        Stage::Message if session.accepted == 1 => {
            assert_eq!((session.connection, session.recipients.len()), (1, 1));
            Action::Reply(421, "4.7.0 enough".into())
        }
        _ => Action::GoOn,
    }) as Rule));
    let mut client = Client::ready(&sink).await;
    client.expect("MAIL FROM:<zoe@a.example>", "250").await;
    client.expect("RCPT TO:<bob@b.example>", "550").await;
    client.expect("RSET", "250").await;
    assert!(client.send(MESSAGE).await.starts_with("250"));
    assert!(client.send(MESSAGE).await.starts_with("421"));
    assert_eq!((sink.received(), sink.received_twice()), (1, 0));
}

#[tokio::test]
async fn down_cuts_and_refuses_and_up_accepts_on_the_same_port() {
    let sink = sink().await;
    let mut client = Client::ready(&sink).await;
    assert!(client.send(MESSAGE).await.starts_with("250"));
    for _ in 0..2 {
        sink.set_down(true).await.unwrap();
    }
    assert_eq!(client.hear().await, "");
    assert_eq!(sink.connections(), 0);
    let refused = TcpStream::connect(sink.address()).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    for _ in 0..2 {
        sink.set_down(false).await.unwrap();
    }
    assert!(Client::ready(&sink).await.send(MESSAGE).await.starts_with("250"));
    assert_eq!(sink.received_twice(), 1);
    sink.stop().await;
    assert!(TcpStream::connect(sink.address()).await.is_err());
    assert_eq!(sink.received(), 1, "what has arrived stays");
}

#[tokio::test]
async fn slow_answers_are_waited_for_side_by_side() {
    let latency = Duration::from_millis(300);
    let sink = Arc::new(Sink::start(Options { latency, ..Options::default() }).await.unwrap());
    let begun = std::time::Instant::now();
    let clients = (0..50).map(|_| {
        let sink = Arc::clone(&sink);
        tokio::spawn(async move {
            let reply = Client::ready(&sink).await.send(MESSAGE).await;
            assert!(reply.starts_with("250"), "{reply:?}");
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    assert!(begun.elapsed() >= latency);
    assert!(begun.elapsed() < 25 * latency, "one after the other takes 50 times as long");
    assert_eq!((sink.received(), sink.mailbox().counts().deliveries), (1, 50));
}

/// A certificate for localhost, and a client that trusts it.
fn encryption() -> (Tls, TlsConnector) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (Tls::new(vec![certificate], key.into()).unwrap(), TlsConnector::from(Arc::new(client)))
}

#[tokio::test]
async fn a_client_may_encrypt_half_way() {
    let (tls, connector) = encryption();
    let sink = Sink::start(Options { tls: Some(tls), ..Options::default() }).await.unwrap();
    let mut client = Client::greeted(&sink).await;
    assert!(client.say("EHLO c.example").await.contains("STARTTLS"));
    // What is sent along unencrypted must not be taken for a part of what follows.
    let reply = client.say("STARTTLS\r\nMAIL FROM:<evil@a.example>").await;
    assert!(reply.starts_with("220"), "{reply:?}");
    let stream = connector.connect("localhost".try_into().unwrap(), client.0.into_inner()).await.unwrap();
    let mut client = Client(BufReader::new(stream));
    client.expect("MAIL FROM:<zoe@a.example>", "503").await;
    assert!(!client.say("EHLO c.example").await.contains("STARTTLS"));
    client.expect("STARTTLS", "503").await;
    assert!(client.send(MESSAGE).await.starts_with("250"));
    client.expect("QUIT", "221").await;
    assert_eq!(sink.mailbox().newest(None, 1)[0].from, "zoe@a.example");
}

#[tokio::test]
async fn a_client_may_encrypt_from_the_first_byte() {
    let (tls, connector) = encryption();
    let sink = Sink::start(Options { tls: Some(tls.implicit()), ..Options::default() }).await.unwrap();
    let stream = TcpStream::connect(sink.address()).await.unwrap();
    let mut client = Client(BufReader::new(connector.connect("localhost".try_into().unwrap(), stream).await.unwrap()));
    assert!(client.hear().await.starts_with("220"));
    client.expect("EHLO c.example", "250").await;
    assert!(client.send(MESSAGE).await.starts_with("250"));
    client.expect("QUIT", "221").await;
    let mut rest = Vec::new();
    client.0.read_to_end(&mut rest).await.expect("the end of the encryption is told");
}

#[tokio::test]
async fn only_this_machine_is_listened_to() {
    let refused = Sink::start(Options { listen: "0.0.0.0:0".parse().unwrap(), ..Options::default() }).await;
    assert!(matches!(refused, Err(SinkError::NotLoopback(_))));
    let one = sink().await;
    let taken = Sink::start(Options { listen: one.address(), ..Options::default() }).await;
    assert!(matches!(taken, Err(SinkError::Listen { .. })));
}

/// The page of a sink, and a client for it.
async fn page(sink: &Sink) -> (String, reqwest::Client) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(serve_page(listener, Arc::clone(sink.mailbox()), CancellationToken::new()));
    (url, reqwest::Client::builder().no_proxy().redirect(redirect::Policy::none()).build().unwrap())
}

#[tokio::test]
async fn the_page_shows_what_arrived() {
    let sink = sink().await;
    let (url, client) = page(&sink).await;
    let get = async |path: &str| {
        let answer = client.get(format!("{url}{path}")).send().await.unwrap();
        let policy = answer.headers()["content-security-policy"].to_str().unwrap().to_owned();
        assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
        (answer.status(), policy, answer.text().await.unwrap())
    };
    assert!(get("/").await.2.contains("Nothing yet"));
    assert!(Client::ready(&sink).await.send(MESSAGE).await.starts_with("250"));

    let (status, policy, list) = get("/").await;
    assert_eq!(status, StatusCode::OK);
    assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"));
    for text in
        ["1 received", "&#60;b&#62;Hello&#60;/b&#62; &#38; welcome", "Zoë &#60;zoe@a.example&#62;", "ann@b.example"]
    {
        assert!(list.contains(text), "{text}: {list}");
    }
    assert!(list.contains("href=\"/messages/1\""));

    let (_, _, shown) = get("/messages/1").await;
    for text in
        ["1.1@a.example", ".hidden &#60;/pre&#62; text", "sandbox", "src=\"/messages/1/html\"", "onclick=&#34;steal()"]
    {
        assert!(shown.contains(text), "{text}: {shown}");
    }
    assert!(!shown.contains("<b>Hello</b>") && !shown.contains("<p onclick"));

    let (_, policy, html) = get("/messages/1/html").await;
    assert!(policy.starts_with("sandbox;") && policy.contains("default-src 'none'"), "{policy}");
    assert_eq!(html.trim(), "<p onclick=\"steal()\">Come & see</p>");
    let (_, _, source) = get("/messages/1/source").await;
    assert_eq!(source, MESSAGE);
    for path in ["/messages/2", "/messages/x", "/messages/2/html", "/messages/2/source", "/nothing"] {
        assert_eq!(get(path).await.0, StatusCode::NOT_FOUND, "{path}");
    }
    for path in ["/static/style.css", "/static/mail.css", "/static/icon.svg", "/healthz", "/?before=x"] {
        assert_eq!(get(path).await.0, StatusCode::OK, "{path}");
    }

    let deleted = client.post(format!("{url}/delete")).send().await.unwrap();
    assert_eq!(deleted.status(), StatusCode::SEE_OTHER);
    assert_eq!(sink.received(), 0);
    assert_eq!(get("/messages/1").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn other_sites_can_not_use_the_page() {
    let sink = sink().await;
    assert!(Client::ready(&sink).await.send(MESSAGE).await.starts_with("250"));
    let (url, client) = page(&sink).await;
    let rebound = client.get(&url).header("host", "evil.example").send().await.unwrap();
    assert_eq!(rebound.status(), StatusCode::FORBIDDEN);
    for (name, value) in [("origin", "http://evil.example"), ("sec-fetch-site", "cross-site"), ("origin", "null")] {
        let forged = client.post(format!("{url}/delete")).header(name, value).send().await.unwrap();
        assert_eq!(forged.status(), StatusCode::FORBIDDEN);
    }
    assert_eq!(sink.received(), 1);
}

#[tokio::test]
async fn long_lists_have_pages() {
    let sink = sink().await;
    let mut smtp = Client::ready(&sink).await;
    for number in 1..=120 {
        let message = format!("Subject: mail {number}.\r\nMessage-ID: <{number}@x>\r\n\r\nHello\r\n");
        assert!(smtp.send(&message).await.starts_with("250"));
    }
    let (url, client) = page(&sink).await;
    let get = async |path: &str| client.get(format!("{url}{path}")).send().await.unwrap().text().await.unwrap();
    let first = get("/").await;
    assert!(first.contains("mail 120.") && first.contains("mail 71.") && !first.contains("mail 70."));
    assert!(first.contains("href=\"/?before=71\""));
    let last = get("/?before=21").await;
    assert!(last.contains("mail 20.") && last.contains("mail 1.") && !last.contains("rel=\"next\""));
}
