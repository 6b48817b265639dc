//! Thousands of invalid requests to the real pages: none causes an internal error or passes the guards, and afterwards the ledger
//! contains exactly what was accepted.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use crate::support::{World, until};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use mailrun_lab::proxy::Proxy;
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use url::Url;
use uuid::Uuid;

/// Requests, once with RabbitMQ and once without it.
const REQUESTS: usize = 1_500;
/// Longer than any slow machine needs.
const TIMEOUT: Duration = Duration::from_secs(30);
const HOOK_KEY: &str = "0123456789abcdef";
/// Must never appear as a tag.
const SCRIPT: &str = "<script>alert(7)</script>";
/// The domain of addresses in incomplete lists: the ledger must not contain it.
const CUT: &str = "cut.example";
/// The domain of addresses that are suppressed.
const QUIET: &str = "quiet.example";

#[derive(Clone, Debug, Default)]
struct Ask {
    method: &'static str,
    path: String,
    query: String,
    headers: Vec<(&'static str, Vec<u8>)>,
    body: Vec<u8>,
    /// The `Content-Length`, if it is wrong.
    length: Option<String>,
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    /// None: the connection was closed without an answer.
    fn read(bytes: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.strip_prefix("HTTP/1.1 ").or(head.strip_prefix("HTTP/1.0 "))?.get(..3)?.parse().ok()?;
        Some(Self { status, head: head.to_ascii_lowercase(), body: body.to_owned() })
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// Whether it is the HTTP library's own answer, before routing.
    fn is_of_the_wire(&self) -> bool {
        matches!(self.status, 400 | 414 | 431) && self.body.is_empty() && self.header("content-type").is_none()
    }
}

impl Ask {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = format!("{} {}{} HTTP/1.1\r\n", self.method, self.path, self.query).into_bytes();
        for (name, value) in &self.headers {
            bytes.extend_from_slice(format!("{name}: ").as_bytes());
            bytes.extend_from_slice(value);
            bytes.extend_from_slice(b"\r\n");
        }
        let length = self.length.clone().unwrap_or_else(|| self.body.len().to_string());
        bytes.extend_from_slice(format!("Content-Length: {length}\r\nConnection: close\r\n\r\n").as_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }

    fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers.iter().find(|header| header.0 == name).map(|header| header.1.as_slice())
    }

    /// Whether it has a public route.
    fn is_public(&self) -> bool {
        let open = ["/u/", "/static/"].iter().any(|start| self.path.starts_with(start));
        open || ["/u", "/healthz", "/livez", "/readyz", "/hooks/bounces"].contains(&self.path.as_str())
    }

    /// Whether it has a JSON route.
    fn is_json(&self) -> bool {
        let run = self.path.strip_prefix("/runs/").and_then(|rest| rest.strip_suffix("/progress"));
        self.path == "/invites/count" || run.is_some_and(|id| !id.is_empty() && !id.contains('/'))
    }

    fn is_foreign(&self) -> bool {
        let reads = matches!(self.method, "GET" | "HEAD" | "OPTIONS");
        let site = self.header("Sec-Fetch-Site");
        let from_elsewhere = match site {
            Some(site) => site != b"same-origin" && site != b"none",
            None => self.header("Origin").is_some_and(|origin| origin != b"http://localhost"),
        };
        let named_otherwise = self.header("Host").is_none_or(|host| host != b"localhost");
        !self.is_public() && ((!reads && from_elsewhere) || named_otherwise)
    }
}

/// Sends it, and reads until the connection is closed.
async fn send(address: &str, bytes: &[u8], then_end: bool) -> Option<Answer> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // The answer may arrive before everything is sent.
        let _ = stream.write_all(bytes).await;
        if then_end {
            let _ = stream.shutdown().await;
        }
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    Answer::read(&timeout(TIMEOUT, exchange).await.expect("it answers or closes the connection"))
}

/// Generates requests.
struct Fuzz {
    random: StdRng,
    /// Accepted runs.
    runs: BTreeSet<String>,
    tests: Vec<String>,
    people: usize,
}

impl Fuzz {
    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of.choose(&mut self.random).unwrap()
    }

    fn often(&mut self) -> bool {
        self.random.random_bool(0.92)
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.random.random_range(0..most)];
        self.random.fill_bytes(&mut bytes);
        bytes
    }

    fn id(&mut self) -> String {
        let known: Vec<&String> = self.runs.iter().chain(&self.tests).collect();
        match known.choose(&mut self.random) {
            Some(known) if self.random.random_bool(0.6) => (*known).clone(),
            _ => match self.random.random_range(0..4) {
                0 => Uuid::from_u128(self.random.random()).to_string(),
                1 => escape(&self.bytes(12)),
                _ => self
                    .one(&[
                        "0",
                        "-1",
                        "9223372036854775807",
                        "99999999999999999999",
                        "%00",
                        "%FF",
                        "..%2f..",
                        "%3Cscript%3Ealert(7)%3C/script%3E",
                        "a%0d%0ab",
                        "%",
                        "{id}",
                        "",
                    ])
                    .to_owned(),
            },
        }
    }

    fn path(&mut self) -> String {
        let id = self.id();
        match self.random.random_range(0..14) {
            0 => "/".into(),
            1..=4 => "/invites".into(),
            5 => "/runs".into(),
            6 => format!("/runs/{id}"),
            7 => format!(
                "/runs/{id}/{}",
                self.one(&["progress", "actions", "troubles", "retry", "pause", "resume", "cancel", "x"])
            ),
            8 => self.one(&["/tests", "/invites/count"]).into(),
            9 => format!("/tests/{id}"),
            10 => self
                .one(&[
                    "/suppressions",
                    "/suppressions/1/remove",
                    "/suppressions/x/remove",
                    "/suppressions/9999999999999999999/remove",
                ])
                .into(),
            11 => format!("/u/{id}"),
            12 => "/hooks/bounces".into(),
            _ => {
                let other = self.one(&[
                    "/static/style.css",
                    "/static/page.js",
                    "/static/..%2fCargo.toml",
                    "/healthz",
                    "/livez",
                    "/nothing",
                    "//",
                    "/runs/",
                    "/RUNS",
                    "/invites/x",
                    "/u/",
                ]);
                if self.often() { other.into() } else { format!("/{}", escape(&self.bytes(40))) }
            }
        }
    }

    fn query(&mut self) -> String {
        if self.often() && self.often() {
            return String::new();
        }
        let key = self.one(&["before", "after", "asked", "confirm", "test", "done", "v", "x"]);
        let value = match self.random.random_range(0..3) {
            0 => self.id(),
            1 => escape(&self.bytes(20)),
            _ => self
                .one(&[
                    "-9999-01-01T00:00:00Z",
                    "%2B262142-12-31T23:59:59Z",
                    "2026-01-01T00:00:00Z",
                    "2147483648",
                    "-1",
                    "cancel",
                    "added",
                    "%00",
                    "1&after=2",
                    "&&=%",
                ])
                .to_owned(),
        };
        format!("?{key}={value}{}", if self.often() { String::new() } else { format!("&{key}={value}") })
    }

    fn list(&mut self) -> String {
        let mut list = String::new();
        for _ in 0..self.random.random_range(0..6) {
            self.people += 1;
            let number = self.people;
            let _ = match self.random.random_range(0..8) {
                0 => write!(list, "\"{SCRIPT}\" <p{number}@fuzz.example>"),
                1 => write!(list, "{SCRIPT}"),
                2 => write!(list, "q{}@{QUIET}", number % 5),
                3 => write!(list, "p{}@fuzz.example", number / 2),
                4 => list.write_str(self.one(&[
                    "\0@x.org",
                    "a@b",
                    "\"@x.org",
                    "<<>>",
                    "\\.",
                    "\\N\t\\N",
                    "İ@x.org",
                    "\u{202e}p@x.org",
                    ",;,",
                ])),
                _ => write!(list, "Nö. {number} <P{number}@FUZZ.example>"),
            };
            list.push_str(self.one(&["\n", ", ", ";", "\r\n", "\r", " "]));
        }
        list
    }

    fn form(&mut self) -> Vec<u8> {
        let bomb = [
            format!("{{{{ {}name }}}}", "-".repeat(60_000)),
            format!("{{{{ name{} }}}}", " or name".repeat(7_000)),
            format!("{{% if name %}}{}{{% endif %}}", "{% elif name %}".repeat(3_000)),
            "{{ 'x' * 99999999999 }}".to_owned(),
            "{{ name".to_owned(),
            "a\0b".to_owned(),
            ">".repeat(60_000),
            format!("|{}\n|{}\n{}", "a|".repeat(9_000), "-|".repeat(9_000), "x\n".repeat(9_000)),
            SCRIPT.to_owned(),
        ];
        let mut fields: Vec<(&str, String)> = Vec::new();
        let token = Uuid::from_u128(self.random.random()).to_string();
        let text = |fuzz: &mut Self, usual: &str| {
            if fuzz.often() { usual.to_owned() } else { bomb.choose(&mut fuzz.random).unwrap().clone() }
        };
        fields.push(("token", if self.often() { token } else { text(self, "x") }));
        fields.push(("emails", self.list()));
        if self.often() {
            fields.push(("subject", text(self, "Hello {{ name }}!")));
            fields.push(("body", text(self, "Come, {{ name or 'you' }}!\r\n")));
        }
        let rate = self.one(&["", "", "7", "0", "-1", "1e9", "99999999999999999999", "x"]);
        fields.push(("sends_per_second", rate.to_owned()));
        let number = self.random.random_range(0..9);
        fields.push(("test_email", self.one(&["me@fuzz.example", "", "nobody", SCRIPT, "a\0@x.org"]).to_owned()));
        fields.push(("email", if self.often() { format!("q{number}@{QUIET}") } else { SCRIPT.to_owned() }));
        fields.push(("states", self.one(&["failed", "unknown", "failed,unknown", "sent", "", "\0"]).to_owned()));
        if !self.often() {
            let taken = self.random.random_range(0..fields.len());
            fields.remove(taken);
        }
        let pairs: Vec<_> = fields.iter().map(|(name, value)| format!("{name}={}", escape(value.as_bytes()))).collect();
        let mut body = pairs.join("&").into_bytes();
        if !self.often() {
            for _ in 0..3 {
                let place = self.random.random_range(0..body.len());
                body[place] = self.random.random();
            }
        }
        body
    }

    fn report(&mut self) -> Vec<u8> {
        let code = self.one(&["550 no", "a\\u0000b", "\\ud800", "\\r\\nX: y", SCRIPT]);
        let email = self.one(&["bounced@fuzz-bounce.example", "a\\u0000@x.org", "", "nobody"]);
        let mut report = match self.random.random_range(0..3) {
            0 => format!(
                r#"{{"notificationType":"Bounce","bounce":{{"bounceType":"Permanent","bouncedRecipients":[{{"emailAddress":"{email}","diagnosticCode":"{code}"}}]}}}}"#
            ),
            1 => format!(r#"{{"RecordType":"Bounce","Type":"HardBounce","Email":"{email}","Details":"{code}"}}"#),
            _ => format!(
                "Final-Recipient: rfc822; {email}\nAction: failed\nStatus: 5.1.1\nDiagnostic-Code: smtp; \0{code}\n"
            ),
        };
        if !self.often() {
            report.truncate(self.random.random_range(0..report.len()) & !1);
        }
        report.into_bytes()
    }

    fn ask(&mut self) -> Ask {
        let path = self.path();
        let usual =
            if path == "/invites" || path == "/tests" || path.ends_with("/remove") || self.random.random_bool(0.3) {
                "POST"
            } else {
                "GET"
            };
        let method = if self.often() {
            usual
        } else {
            self.one(&["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"])
        };
        let mut ask = Ask { method, query: self.query(), ..Ask::default() };
        let host = if self.often() {
            "localhost"
        } else {
            self.one(&["evil.example", "", "localhost.evil.example", "localhost:x", "\u{e9}", "127.0.0.1.evil.example"])
        };
        if self.often() || self.often() {
            ask.headers.push(("Host", host.into()));
        }
        if !self.often() {
            ask.headers.push((
                "Origin",
                self.one(&["http://evil.example", "null", "http://localhost", "\u{e9}", "http://localhost:1", ""])
                    .into(),
            ));
        }
        if !self.often() {
            ask.headers
                .push(("Sec-Fetch-Site", self.one(&["cross-site", "same-site", "same-origin", "none", "?"]).into()));
        }
        if !self.often() {
            for name in ["Cookie", "Accept", "If-None-Match", "Range", "X-Forwarded-For", "Expect"] {
                let value = if self.often() { b"*/*; \"x\"".to_vec() } else { self.bytes(60) };
                ask.headers.push((name, value.into_iter().filter(|byte| !matches!(byte, b'\r' | b'\n' | 0)).collect()));
            }
        }
        if path == "/hooks/bounces" || !self.often() {
            let key = if self.often() { HOOK_KEY } else { "another" };
            let login = STANDARD.encode(format!(":{key}"));
            let value = match self.random.random_range(0..3) {
                0 => format!("Bearer {key}"),
                1 => format!("Basic {login}"),
                _ => self.one(&["Basic %%%", "Bearer", "", "Basic Og=="]).to_owned(),
            };
            ask.headers.push(("Authorization", value.into()));
        }
        if method != "GET" && method != "HEAD" {
            let kind = if self.often() {
                "application/x-www-form-urlencoded"
            } else {
                self.one(&["multipart/form-data; boundary=x", "application/json", "\u{e9}", ""])
            };
            ask.headers.push(("Content-Type", kind.into()));
            ask.body = match self.random.random_range(0..12) {
                0 => self.bytes(300),
                1 => b"--x\r\nContent-Disposition: form-data; name=\"emails\"\r\n\r\na@x.org\r\n--".to_vec(),
                2 => format!("token={}&emails={}", Uuid::from_u128(self.random.random()), "x".repeat(400_000))
                    .into_bytes(),
                _ if path == "/hooks/bounces" => self.report(),
                _ => self.form(),
            };
            if !self.often() {
                // Less data than announced, or an invalid length: nobody in it may be invited.
                ask.body = format!(
                    "token={}&emails=a@{CUT}%0Ab@{CUT}&subject=x&body=y",
                    Uuid::from_u128(self.random.random())
                )
                .into_bytes();
                let more = (ask.body.len() + 1 + self.random.random_range(0..9_000)).to_string();
                ask.length = Some(
                    self.one(&[&more, &more, "18446744073709551615", "18446744073709551616", "-1", "x", "1, 2"])
                        .to_owned(),
                );
            }
        }
        Ask { path, ..ask }
    }

    /// Invalid HTTP.
    fn garbage(&mut self) -> Vec<u8> {
        let form = "POST /invites HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n";
        let list = format!("token={}&emails=c@{CUT}", Uuid::from_u128(self.random.random()));
        match self.random.random_range(0..13) {
            0 => self.bytes(400),
            1 => b"GET / HT".to_vec(),
            2 => b"GET / HTTP/1.1\r\nHost: localhost\r\n".to_vec(),
            3 => format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "x".repeat(1_000_000)).into_bytes(),
            4 => format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "X: y\r\n".repeat(2_000)).into_bytes(),
            5 => format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "x".repeat(200_000)).into_bytes(),
            6 => format!("{form}Content-Length: 900\r\n\r\n{list}").into_bytes(),
            7 => format!("{form}Content-Length: 5\r\nContent-Length: 6\r\n\r\n{list}").into_bytes(),
            8 => {
                format!("{form}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{list}\r\nffffffffffffffffff\r\n", list.len())
                    .into_bytes()
            }
            9 => format!("{form}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{list}\r\n", list.len()).into_bytes(),
            10 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
            11 => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
            _ => self
                .one(&[
                    "GET / HTTP/9.9\r\n\r\n",
                    "GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
                    "CONNECT localhost:1 HTTP/1.1\r\n\r\n",
                    "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
                    "\r\n\r\n",
                    "GET  / HTTP/1.1\r\n\r\n",
                    "G\0T / HTTP/1.1\r\n\r\n",
                ])
                .into(),
        }
    }
}

fn escape(bytes: &[u8]) -> String {
    percent_encoding::percent_encode(bytes, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// The checks for each answer.
fn check(answer: &Answer, asked: &str) {
    assert!(answer.status < 500, "{asked}\n{answer:?}");
    if answer.is_of_the_wire() {
        return;
    }
    for header in ["content-security-policy", "x-content-type-options", "referrer-policy"] {
        assert!(answer.header(header).is_some(), "no {header} for {asked}\n{answer:?}");
    }
    let html = answer.header("content-type").is_some_and(|kind| kind.starts_with("text/html"));
    assert!(!html || !answer.body.contains(SCRIPT), "{asked}\n{answer:?}");
}

async fn storm(world: &World, fuzz: &mut Fuzz) {
    let address = world.web.strip_prefix("http://").unwrap();
    for _ in 0..REQUESTS {
        if !fuzz.often() {
            let garbage = fuzz.garbage();
            let then_end = fuzz.often();
            if then_end {
                if let Some(answer) = send(address, &garbage, true).await {
                    check(&answer, &String::from_utf8_lossy(&garbage[..garbage.len().min(200)]));
                }
            } else {
                // Closed before an answer.
                let mut stream = TcpStream::connect(address).await.unwrap();
                let _ = stream.write_all(&garbage).await;
            }
            continue;
        }
        let ask = fuzz.ask();
        let answer = send(address, &ask.bytes(), ask.length.is_some()).await;
        let Some(answer) = answer else {
            // A client that is still sending may not receive the refusal.
            assert!(ask.length.is_some() || ask.body.len() > 50_000, "no answer to {ask:?}");
            continue;
        };
        let asked = format!(
            "{} {}{} {:?} {}",
            ask.method,
            ask.path,
            ask.query,
            ask.headers,
            String::from_utf8_lossy(&ask.body[..ask.body.len().min(2_000)])
        );
        check(&answer, &asked);
        if ask.is_foreign() && !answer.is_of_the_wire() {
            assert_eq!(answer.status, 403, "{asked}\n{answer:?}");
        }
        if ask.is_json() && answer.status >= 400 && !answer.is_of_the_wire() {
            assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{asked}\n{answer:?}");
        }
        if let Some(location) = answer.header("location") {
            assert!(
                answer.status == 303 && location.starts_with('/') && !location.starts_with("//"),
                "{asked}\n{answer:?}"
            );
            if ask.method == "POST" && ask.path == "/invites" {
                fuzz.runs.insert(location.strip_prefix("/runs/").unwrap().to_owned());
            }
            if ask.method == "POST" && ask.path == "/tests" {
                fuzz.tests.push(location.strip_prefix("/tests/").unwrap().to_owned());
            }
        }
    }
}

/// Checks that the ledger contains exactly what was accepted.
async fn check_ledger(world: &World, fuzz: &Fuzz) {
    let runs: Vec<String> =
        sqlx::query_scalar("SELECT id::text FROM runs WHERE NOT hidden").fetch_all(&world.pool).await.unwrap();
    assert_eq!(runs.into_iter().collect::<BTreeSet<_>>(), fuzz.runs);
    let tests: Vec<String> =
        sqlx::query_scalar("SELECT id::text FROM runs WHERE hidden").fetch_all(&world.pool).await.unwrap();
    assert_eq!(tests.iter().collect::<BTreeSet<_>>(), fuzz.tests.iter().collect());
    for (what, query) in [
        (
            "runs whose items are not their total",
            "SELECT count(*) FROM runs r LEFT JOIN run_progress p ON p.run_id = r.id
             WHERE (r.total, r.total, r.total) IS DISTINCT FROM
                   (p.total, p.pending, (SELECT count(*)::integer FROM run_items i WHERE i.run_id = r.id)) OR r.total < 1",
        ),
        (
            "runs that are not started once",
            "SELECT count(*) FROM runs r WHERE 1 <> (SELECT count(*) FROM outbox o
             WHERE o.message->>'run_id' = r.id::text AND (o.message->'command' ? 'release' OR (r.hidden AND o.kind = 'mailrun.item.v2')))",
        ),
        (
            "runs that are cancelled without a message, or the other way round",
            "SELECT count(*) FROM runs r WHERE (r.wanted = 'cancelled') <> EXISTS (SELECT FROM outbox o
             WHERE o.message->>'run_id' = r.id::text AND o.message->'command' ? 'cancel')",
        ),
        (
            "messages of nothing",
            "SELECT count(*) FROM outbox o WHERE NOT EXISTS (SELECT FROM runs r WHERE r.id::text = o.message->>'run_id')",
        ),
        (
            "people of lists that were not accepted",
            "SELECT count(*) FROM users u WHERE email LIKE '%@cut.example' OR
             (email NOT LIKE '%@quiet.example' AND NOT EXISTS (SELECT FROM run_items i WHERE i.user_id = u.id))",
        ),
        (
            "invalid addresses",
            "SELECT count(*) FROM (SELECT email FROM users UNION ALL SELECT email FROM suppressions) x
             WHERE email ~ '[[:cntrl:][:space:]]' OR email <> lower(email) OR email !~ '.@.*[.]'",
        ),
    ] {
        let count: i64 = sqlx::query_scalar(query).fetch_one(&world.pool).await.unwrap();
        assert_eq!(count, 0, "{what}");
    }
    world.counters_equal_counts().await;
}

#[tokio::test]
async fn no_request_breaks_the_pages_or_leaves_partial_writes() {
    let settings = [
        ("MAILRUN_WEB__HOOK_KEY", HOOK_KEY),
        ("MAILRUN_WEB__MAX_BODY_BYTES", "300000"),
        ("MAILRUN_WEB__MAX_ADDRESSES", "4"),
    ];
    let mut world = World::new(&settings).await;
    // RabbitMQ seems to be down meanwhile; other tests need it.
    let mut url: Url = world.stack.amqp_url(&world.name).parse().unwrap();
    let broker = Proxy::start(([127, 0, 0, 1], url.port().unwrap()).into()).await.unwrap();
    url.set_port(Some(broker.address().port())).unwrap();
    world.kill(0);
    world.set("AMQP_URL", url.to_string());
    let web = world.start(&["web"]);
    until("the pages answer", async || world.client.get(&world.web).send().await.is_ok()).await;
    let mut fuzz = Fuzz { random: StdRng::seed_from_u64(7), runs: BTreeSet::new(), tests: Vec::new(), people: 0 };
    storm(&world, &mut fuzz).await;
    check_ledger(&world, &fuzz).await;
    assert!(fuzz.runs.len() > 20 && !fuzz.tests.is_empty(), "few requests were accepted: {}", fuzz.runs.len());

    assert!(!world.log().contains("ERROR"), "an internal error");

    broker.set_down(true);
    let before = fuzz.runs.len();
    storm(&world, &mut fuzz).await;
    check_ledger(&world, &fuzz).await;
    assert!(fuzz.runs.len() > before + 20);
    broker.set_down(false);
    until("what waited for RabbitMQ is published", async || {
        let left: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox WHERE published_at IS NULL")
            .fetch_one(&world.pool)
            .await
            .unwrap();
        left == 0
    })
    .await;

    assert!(world.is_running(web), "the web server has ended");
    assert!(!world.log().contains("panicked") && !world.log().contains("query failed"), "an internal error");
}
