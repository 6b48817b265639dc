//! The web page of a mail sink: the received mail, newest first, and each message. Mail is untrusted: its text is escaped, and its
//! HTML is shown in a frame without any rights.

use std::{io, sync::Arc};

use askama::Template;
use axum::{
    Router,
    extract::{Path, Query, Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{Html, IntoResponse, Redirect, Response},
    routing::{get, post},
};
use chrono::SecondsFormat;
use mail_parser::{Address, MessageParser, PartType};
use mailrun_web::{ICON, STYLE_SHEET, grouped, is_local, is_same_origin, rate};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_http::set_header::SetResponseHeaderLayer;

use super::{Mailbox, Message};

const PER_PAGE: usize = 50;
/// A longer source is only shown behind its link.
const SHOWN_SOURCE: usize = 100_000;
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; style-src 'self'; img-src 'self'; frame-src 'self'; \
     form-action 'self'; frame-ancestors 'none'; base-uri 'none'";
/// For a received HTML part: no scripts, and nothing loaded from the network.
const MAIL_SECURITY_POLICY: &str = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
     form-action 'none'; frame-ancestors 'self'; base-uri 'none'";
/// Headers shown on a message's page beside the envelope, in this order.
const SHOWN_HEADERS: [&str; 9] = [
    "Reply-To",
    "Date",
    "Message-ID",
    "List-Unsubscribe",
    "List-Unsubscribe-Post",
    "Precedence",
    "Auto-Submitted",
    "Content-Type",
    "DKIM-Signature",
];

/// Serves the page until `stop`. It has no login, so the listener must be on a loopback address.
///
/// # Errors
/// The listening socket fails.
pub async fn serve(listener: TcpListener, mailbox: Arc<Mailbox>, stop: CancellationToken) -> io::Result<()> {
    let serving = axum::serve(listener, router(mailbox)).with_graceful_shutdown(stop.clone().cancelled_owned());
    tokio::select! {
        served = async { serving.await } => served,
        // A browser may keep its connection open; closing it loses nothing.
        () = stop.cancelled() => Ok(()),
    }
}

fn router(mailbox: Arc<Mailbox>) -> Router {
    let always = |name, value| SetResponseHeaderLayer::if_not_present(name, HeaderValue::from_static(value));
    Router::new()
        .route("/", get(list))
        .route("/messages/{number}", get(show))
        .route("/messages/{number}/html", get(html))
        .route("/messages/{number}/source", get(source))
        .route("/delete", post(delete))
        .route("/static/style.css", get(async || typed("text/css; charset=utf-8", STYLE_SHEET)))
        .route("/static/mail.css", get(async || typed("text/css; charset=utf-8", include_str!("../static/mail.css"))))
        .route("/static/icon.svg", get(async || typed("image/svg+xml", ICON)))
        .route("/healthz", get(async || "ok"))
        .fallback(async || Missing)
        .layer(middleware::from_fn(guard))
        .layer(always(header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY))
        .layer(always(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .layer(always(header::REFERRER_POLICY, "same-origin"))
        .layer(always(header::CACHE_CONTROL, "no-store"))
        .with_state(mailbox)
}

/// Refuses cross-site requests, and other host names that point at this machine (DNS rebinding).
async fn guard(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or("unreadable"));
    let host = request.uri().authority().map(axum::http::uri::Authority::as_str).or_else(|| text("host"));
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if !host.is_some_and(is_local) || !reads && !is_same_origin(text("sec-fetch-site"), text("origin"), host) {
        return (StatusCode::FORBIDDEN, "This page is only available as localhost, and accepts only its own requests.")
            .into_response();
    }
    next.run(request).await
}

fn typed(kind: &'static str, content: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, kind)], content)
}

#[derive(Template)]
#[template(path = "list.html")]
struct List {
    summary: String,
    rows: Vec<Row>,
    /// Whether this is not the first page.
    older: bool,
    /// The start of the next page.
    before: Option<u64>,
}

struct Row {
    number: u64,
    time: Time,
    from: String,
    to: String,
    subject: String,
}

/// A time, for `<time datetime>` and for people.
struct Time {
    iso: String,
    text: String,
}

#[derive(Template)]
#[template(path = "message.html")]
struct Shown {
    number: u64,
    time: Time,
    subject: String,
    fields: Vec<(&'static str, String)>,
    has_html: bool,
    text: Option<String>,
    attachments: Vec<String>,
    source: String,
    /// Whether the source is longer than shown.
    cut: bool,
}

#[derive(Template)]
#[template(path = "missing.html")]
struct MissingPage;

struct Missing;

impl IntoResponse for Missing {
    fn into_response(self) -> Response {
        (StatusCode::NOT_FOUND, page(&MissingPage)).into_response()
    }
}

fn page(template: &impl Template) -> Response {
    match template.render() {
        Ok(html) => Html(html).into_response(),
        Err(error) => {
            tracing::error!(%error, "rendering failed");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[derive(Deserialize)]
struct Before {
    before: Option<u64>,
}

/// `GET /`
async fn list(
    State(mailbox): State<Arc<Mailbox>>,
    query: Result<Query<Before>, axum::extract::rejection::QueryRejection>,
) -> Response {
    let before = query.ok().and_then(|query| query.before);
    // One more than is shown, to know whether there are older messages.
    let mut messages = mailbox.newest(before, PER_PAGE + 1);
    let more = messages.len() > PER_PAGE;
    messages.truncate(PER_PAGE);
    let next = more.then(|| messages.last().map(|message| message.number)).flatten();
    let rows = messages.iter().map(|message| Row::new(message)).collect();
    page(&List { summary: summary(&mailbox), rows, older: before.is_some(), before: next })
}

/// `1,002 received, 2 of them more than once · 512 a second`, or `Nothing yet`
fn summary(mailbox: &Mailbox) -> String {
    let counts = mailbox.counts();
    if counts.received == 0 {
        return "Nothing yet".to_owned();
    }
    let number = |number: u64| grouped(i64::try_from(number).unwrap_or(i64::MAX));
    let mut summary = format!("{} received", number(counts.received));
    if counts.received_twice > 0 {
        summary.push_str(&format!(", {} of them more than once", number(counts.received_twice)));
    }
    if let Some(per_second) = counts.rate.filter(|per_second| *per_second >= 1.0) {
        summary.push_str(&format!(" · {}", rate(per_second)));
    }
    summary
}

impl Row {
    fn new(message: &Message) -> Self {
        let parsed = parse_headers(message);
        Self {
            number: message.number,
            time: Time::of(message),
            from: parsed.as_ref().and_then(|parsed| parsed.from()).map_or_else(|| message.from.clone(), in_words),
            to: recipients(message),
            subject: subject(parsed.as_ref()),
        }
    }
}

impl Time {
    fn of(message: &Message) -> Self {
        Self {
            iso: message.at.to_rfc3339_opts(SecondsFormat::Millis, true),
            text: message.at.format("%-d %b %Y, %H:%M:%S UTC").to_string(),
        }
    }
}

fn parse_headers(message: &Message) -> Option<mail_parser::Message<'_>> {
    MessageParser::default().parse_headers(&message.raw)
}

fn subject(parsed: Option<&mail_parser::Message<'_>>) -> String {
    let subject = parsed.and_then(mail_parser::Message::subject).filter(|subject| !subject.trim().is_empty());
    subject.unwrap_or("(no subject)").to_owned()
}

/// The envelope recipients, who actually received it.
fn recipients(message: &Message) -> String {
    match message.to.as_slice() {
        [first, second, third, rest @ ..] if !rest.is_empty() => {
            format!("{first}, {second}, {third} and {} more", rest.len())
        }
        few => few.join(", "),
    }
}

/// `Ann Lee <ann@example.org>, …`
fn in_words(addresses: &Address<'_>) -> String {
    let one = |address: &mail_parser::Addr<'_>| match (address.name(), address.address()) {
        (Some(name), Some(address)) => format!("{name} <{address}>"),
        (name, address) => name.or(address).unwrap_or_default().to_owned(),
    };
    addresses.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// `GET /messages/{number}`
async fn show(State(mailbox): State<Arc<Mailbox>>, Path(number): Path<String>) -> Response {
    let Some(message) = find(&mailbox, &number) else { return Missing.into_response() };
    page(&Shown::new(&message))
}

impl Shown {
    fn new(message: &Message) -> Self {
        let parsed = MessageParser::default().parse(&message.raw);
        let parsed = parsed.as_ref();
        let sender = if message.from.is_empty() { "<>".to_owned() } else { message.from.clone() };
        let mut fields = Vec::new();
        for (name, addresses) in
            [("From", parsed.and_then(mail_parser::Message::from)), ("To", parsed.and_then(mail_parser::Message::to))]
        {
            fields.extend(addresses.map(|addresses| (name, in_words(addresses))));
        }
        fields.push(("Envelope from", sender));
        fields.push(("Envelope to", recipients(message)));
        for name in SHOWN_HEADERS {
            fields.extend(parsed.and_then(|parsed| parsed.header_raw(name)).map(|raw| (name, unfolded(raw))));
        }
        let cut = message.raw.len() > SHOWN_SOURCE;
        Self {
            number: message.number,
            time: Time::of(message),
            subject: subject(parsed),
            fields,
            has_html: parsed.is_some_and(|parsed| html_part(parsed).is_some()),
            text: parsed.and_then(text_part).map(str::to_owned),
            attachments: parsed.map(attachments).unwrap_or_default(),
            source: String::from_utf8_lossy(&message.raw[..message.raw.len().min(SHOWN_SOURCE)]).into_owned(),
            cut,
        }
    }
}

/// A header's value on one line.
fn unfolded(raw: &str) -> String {
    raw.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn html_part<'a>(parsed: &'a mail_parser::Message<'_>) -> Option<&'a str> {
    parsed.html_bodies().find_map(|part| match &part.body {
        PartType::Html(html) => Some(html.as_ref()),
        _ => None,
    })
}

fn text_part<'a>(parsed: &'a mail_parser::Message<'_>) -> Option<&'a str> {
    parsed.text_bodies().find_map(|part| match &part.body {
        PartType::Text(text) => Some(text.as_ref()),
        _ => None,
    })
}

fn attachments(parsed: &mail_parser::Message<'_>) -> Vec<String> {
    use mail_parser::MimeHeaders as _;
    parsed.attachments().map(|part| part.attachment_name().unwrap_or("unnamed").to_owned()).collect()
}

/// `GET /messages/{number}/html`: the content of the frame.
async fn html(State(mailbox): State<Arc<Mailbox>>, Path(number): Path<String>) -> Response {
    let message = find(&mailbox, &number);
    let parsed = message.as_ref().and_then(|message| MessageParser::default().parse(&message.raw));
    match parsed.as_ref().and_then(html_part) {
        Some(html) => {
            ([(header::CONTENT_SECURITY_POLICY, MAIL_SECURITY_POLICY)], Html(html.to_owned())).into_response()
        }
        None => Missing.into_response(),
    }
}

/// `GET /messages/{number}/source`
async fn source(State(mailbox): State<Arc<Mailbox>>, Path(number): Path<String>) -> Response {
    match find(&mailbox, &number) {
        Some(message) => ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], message.raw.clone()).into_response(),
        None => Missing.into_response(),
    }
}

fn find(mailbox: &Mailbox, number: &str) -> Option<Arc<Message>> {
    mailbox.message(number.parse().ok()?)
}

/// `POST /delete`
async fn delete(State(mailbox): State<Arc<Mailbox>>) -> Redirect {
    mailbox.clear();
    Redirect::to("/")
}
