//! Reads a submitted form within a bounded amount of memory, and decodes it strictly.

use std::{
    borrow::Cow,
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::FromRequest,
    http::{HeaderMap, Request, StatusCode, header},
};
use http_body_util::BodyExt as _;
use percent_encoding::percent_decode;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::error::ErrorPage;

/// How many forms of the largest size fit into the memory at once.
const LARGEST_AT_ONCE: usize = 2;
/// This much of each form is not counted, so that a typical form never waits. The connection limit bounds the total.
const UNCOUNTED_BYTES: usize = 64 * 1024;
/// Memory is reserved in steps of at least this size as a form arrives, not by its announced length, so a slow sender holds
/// only what it has sent.
const STEP_BYTES: usize = 64 * 1024;
/// How long a form may wait for memory.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a sender may send nothing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Minimum average speed of a form, after the first [`IDLE_TIMEOUT`].
const MIN_BYTES_PER_S: u64 = 4 * 1024;
/// A form that is too large is read and discarded up to this multiple of the limit, because a browser shows the response only
/// after it has sent its request.
const DISCARDED_PER_LIMIT: usize = 8;
/// The limit for routes that allow no larger forms: a few short fields.
const SHORT_FORM_BYTES: usize = 16 * 1024;
/// Memory is counted in units of this size.
const UNIT_BYTES: usize = 1024;

/// The memory that all forms share.
pub(crate) struct FormMemory {
    /// For all forms.
    shared: Arc<Semaphore>,
    /// For one form of any size. At least one form can therefore always be read to its end, and forms that hold all shared memory
    /// cannot deadlock.
    reserve: Arc<Semaphore>,
    limit: usize,
}

/// The memory that a form has reserved, until it is dropped.
pub(crate) struct Reserved {
    bytes: usize,
    shared: Option<OwnedSemaphorePermit>,
    reserve: Option<OwnedSemaphorePermit>,
}

impl FormMemory {
    pub(crate) fn new(limit: usize) -> Self {
        let shared = Arc::new(Semaphore::new(LARGEST_AT_ONCE * units(limit) as usize));
        Self { shared, reserve: Arc::new(Semaphore::new(1)), limit }
    }

    fn reservation(&self) -> Reserved {
        Reserved { bytes: UNCOUNTED_BYTES, shared: None, reserve: None }
    }

    /// Reserves what a form of this size needs beyond its present reservation.
    async fn grow(&self, reserved: &mut Reserved, bytes: usize) -> Result<(), ErrorPage> {
        if bytes <= reserved.bytes || reserved.reserve.is_some() {
            return Ok(());
        }
        let step = (bytes - reserved.bytes).max(STEP_BYTES);
        let (shared, reserve) = (Arc::clone(&self.shared), Arc::clone(&self.reserve));
        let more = timeout(MEMORY_TIMEOUT, async {
            tokio::select! {
                biased;
                Ok(permit) = shared.acquire_many_owned(units(step)) => Some((Some(permit), None)),
                Ok(permit) = reserve.acquire_owned() => Some((None, Some(permit))),
                else => None,
            }
        });
        match more.await {
            Ok(Some((Some(permit), _))) => {
                reserved.bytes += step;
                match &mut reserved.shared {
                    Some(shared) => shared.merge(permit),
                    none => *none = Some(permit),
                }
                Ok(())
            }
            Ok(Some((None, reserve))) => {
                reserved.reserve = reserve;
                Ok(())
            }
            Ok(None) | Err(_) => Err(ErrorPage::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "Too many uploads",
                "Other large lists are being uploaded. Your list was not accepted: go back and send it again in a minute.",
            )),
        }
    }

    /// Reads the whole form. The caller keeps the reservation as long as the form. The error describes the invalid request.
    pub(crate) async fn read(&self, request: Request<Body>) -> Result<(Fields, Reserved), ErrorPage> {
        let (parts, mut body) = request.into_parts();
        check_content_type(&parts.headers)?;
        if content_length(&parts.headers).is_some_and(|length| length > self.limit) {
            discard(&mut body, self.limit * DISCARDED_PER_LIMIT).await;
            return Err(self.too_large());
        }
        let (begun, mut reserved, mut bytes) = (Instant::now(), self.reservation(), Vec::new());
        while let Some(piece) = next_piece(&mut body).await? {
            let length = bytes.len() + piece.len();
            if length > self.limit {
                drop(bytes);
                discard(&mut body, self.limit * DISCARDED_PER_LIMIT).await;
                return Err(self.too_large());
            }
            if is_too_slow(length, begun.elapsed()) {
                return Err(did_not_arrive("The upload was too slow and was not accepted. Go back and send it again."));
            }
            self.grow(&mut reserved, length).await?;
            bytes.extend_from_slice(&piece);
        }
        Ok((Fields::decode(&bytes)?, reserved))
    }

    fn too_large(&self) -> ErrorPage {
        let limit = megabytes(self.limit);
        ErrorPage::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "List too large",
            format!(
                "At most {limit} can be sent at once, and nothing was accepted. Go back, split the list, and send the parts \
                separately: nobody is invited twice."
            ),
        )
    }
}

/// Whether a form is slower than [`MIN_BYTES_PER_S`].
fn is_too_slow(bytes: usize, elapsed: Duration) -> bool {
    (bytes as u64) < elapsed.saturating_sub(IDLE_TIMEOUT).as_secs() * MIN_BYTES_PER_S
}

fn did_not_arrive(message: &'static str) -> ErrorPage {
    ErrorPage::new(StatusCode::REQUEST_TIMEOUT, "Upload timed out", message)
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES).max(1)).unwrap_or(u32::MAX >> 4)
}

fn megabytes(bytes: usize) -> String {
    const MB: usize = 1024 * 1024;
    if bytes >= MB { format!("{} MB", bytes / MB) } else { format!("{} KB", bytes.div_ceil(1024)) }
}

async fn next_piece(body: &mut Body) -> Result<Option<axum::body::Bytes>, ErrorPage> {
    loop {
        match timeout(IDLE_TIMEOUT, body.frame()).await {
            Ok(None) => return Ok(None),
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Ok(Some(Err(_))) => {
                return Err(bad_request("The upload was incomplete. Go back and send it again."));
            }
            Err(_) => {
                return Err(did_not_arrive(
                    "The upload stalled for 30 seconds and was not accepted. Go back and send it again.",
                ));
            }
        }
    }
}

async fn discard(body: &mut Body, most: usize) {
    let mut read = 0;
    while read < most
        && let Ok(Some(piece)) = next_piece(body).await
    {
        read += piece.len();
    }
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ErrorPage> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = given.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
        return Ok(());
    }
    Err(ErrorPage::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "Not a form",
        "This address accepts only forms (application/x-www-form-urlencoded).",
    ))
}

fn bad_request(message: &'static str) -> ErrorPage {
    ErrorPage::new(StatusCode::BAD_REQUEST, "Malformed form", message)
}

/// A submitted form, and the memory that it holds until it is dropped. The router sets the maximum size: the limit of the
/// [`FormMemory`] in the request's extensions, or without one [`SHORT_FORM_BYTES`].
pub(crate) struct Form(pub(crate) Fields, pub(crate) Reserved);

impl<S: Sync> FromRequest<S> for Form {
    type Rejection = ErrorPage;

    async fn from_request(request: Request<Body>, _: &S) -> Result<Self, ErrorPage> {
        let memory = request.extensions().get::<Arc<FormMemory>>().cloned();
        let memory = memory.unwrap_or_else(|| Arc::new(FormMemory::new(SHORT_FORM_BYTES)));
        let (fields, reserved) = memory.read(request).await?;
        Ok(Self(fields, reserved))
    }
}

/// The fields of a form, in their order.
#[derive(Debug)]
pub(crate) struct Fields(Vec<(String, String)>);

impl Fields {
    /// Decodes strictly: invalid UTF-8 is refused, because a replacement could turn it into another person's address.
    fn decode(body: &[u8]) -> Result<Self, ErrorPage> {
        let decode = |text: &[u8]| {
            unescape(text)
                .ok_or_else(|| bad_request("The text is not UTF-8. Save the list as UTF-8 and send it again."))
        };
        let fields = body.split(|byte| *byte == b'&').filter(|field| !field.is_empty()).map(|field| {
            let (name, value) = match field.iter().position(|byte| *byte == b'=') {
                Some(end) => (&field[..end], &field[end + 1..]),
                None => (field, &field[..0]),
            };
            Ok((decode(name)?, decode(value)?))
        });
        fields.collect::<Result<_, _>>().map(Self)
    }

    /// The first field of this name.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|field| field.0 == name).map(|field| field.1.as_str())
    }

    /// The same, leaving an empty field.
    pub(crate) fn take(&mut self, name: &str) -> Option<String> {
        self.0.iter_mut().find(|field| field.0 == name).map(|field| mem::take(&mut field.1))
    }
}

/// Decodes `+` and `%XX`. A stray percent sign stands for itself. None: the result is not UTF-8, which `form_urlencoded` would
/// replace instead.
fn unescape(text: &[u8]) -> Option<String> {
    let text: Vec<u8> = text.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
    percent_decode(&text).decode_utf8().map(Cow::into_owned).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(body: &str) -> Fields {
        Fields::decode(body.as_bytes()).unwrap()
    }

    #[test]
    fn decodes_a_form() {
        let mut fields = decode("emails=a%40x.org%0D%0Ab%2Bc@x.org&&empty&name=J%C3%BCrgen+%3CX%3E&odd=50%&odd=2");
        assert_eq!(fields.get("emails"), Some("a@x.org\r\nb+c@x.org"));
        assert_eq!(fields.get("empty"), Some(""));
        assert_eq!(fields.get("odd"), Some("50%"));
        assert_eq!(fields.get("none"), None);
        assert_eq!(fields.take("name").as_deref(), Some("Jürgen <X>"));
    }

    #[test]
    fn refuses_invalid_utf8() {
        assert_eq!(Fields::decode(b"emails=%FF").unwrap_err().status(), StatusCode::BAD_REQUEST);
        assert_eq!(Fields::decode(b"emails=\xE4@x.org").unwrap_err().status(), StatusCode::BAD_REQUEST);
    }

    /// A form of `bytes` bytes. Its last byte arrives when `rest` completes.
    fn form(bytes: usize, rest: impl Future<Output = ()> + Send + 'static) -> Request<Body> {
        let most = vec![b'x'; bytes - 1];
        let pieces = most.chunks(100_000).map(|piece| Ok(piece.to_vec())).collect::<Vec<_>>();
        let last = futures::stream::once(async {
            rest.await;
            Ok::<_, std::io::Error>(vec![b'x'])
        });
        let body = futures::StreamExt::chain(futures::stream::iter(pieces), last);
        let request = Request::post("/").header("content-type", "application/x-www-form-urlencoded");
        request.header("content-length", bytes).body(Body::from_stream(body)).unwrap()
    }

    #[tokio::test]
    async fn slow_uploads_do_not_block_other_forms() {
        const LIMIT: usize = 1_000_000;
        let memory = Arc::new(FormMemory::new(LIMIT));
        let stalled: Vec<_> = (0..2)
            .map(|_| {
                let memory = Arc::clone(&memory);
                tokio::spawn(async move { memory.read(form(LIMIT, std::future::pending())).await.map(drop) })
            })
            .collect();
        while memory.shared.available_permits() > 2 * UNCOUNTED_BYTES / UNIT_BYTES {
            tokio::task::yield_now().await;
        }
        // Largest forms one after another, small forms at any time.
        for bytes in [LIMIT, 100, LIMIT, 50_000] {
            let read = timeout(MEMORY_TIMEOUT, memory.read(form(bytes, async {}))).await;
            assert!(read.is_ok_and(|read| read.is_ok()), "{bytes}");
        }
        stalled.into_iter().for_each(|stalled| stalled.abort());
    }

    #[tokio::test]
    async fn forms_that_hold_all_memory_do_not_deadlock() {
        const LIMIT: usize = 1_000_000;
        let memory = Arc::new(FormMemory::new(LIMIT));
        let read = |_| {
            let memory = Arc::clone(&memory);
            async move { memory.read(form(LIMIT, tokio::task::yield_now())).await.map(drop) }
        };
        let all = timeout(MEMORY_TIMEOUT, futures::future::join_all((0..12).map(read))).await;
        assert!(all.is_ok_and(|all| all.iter().all(Result::is_ok)));
        assert_eq!(memory.shared.available_permits(), LARGEST_AT_ONCE * units(LIMIT) as usize);
    }

    #[test]
    fn a_sender_must_keep_the_minimum_speed() {
        assert!(!is_too_slow(0, IDLE_TIMEOUT));
        assert!(!is_too_slow(50_000, IDLE_TIMEOUT + Duration::from_secs(12)));
        assert!(is_too_slow(49_000, IDLE_TIMEOUT + Duration::from_secs(12)));
        assert!(!is_too_slow(64 * 1024 * 1024, Duration::from_secs(4 * 3_600)));
    }

    #[tokio::test]
    async fn refuses_a_form_over_the_limit_with_and_without_content_length() {
        let memory = FormMemory::new(16);
        let form = |length: Option<&str>| {
            let mut request = Request::post("/").header("content-type", "application/x-www-form-urlencoded");
            if let Some(length) = length {
                request = request.header("content-length", length);
            }
            request.body(Body::from("emails=ann@example.org")).unwrap()
        };
        for request in [form(None), form(Some("22"))] {
            let refused = memory.read(request).await.err().map(|page| page.status());
            assert_eq!(refused, Some(StatusCode::PAYLOAD_TOO_LARGE));
        }
    }

    /// Encodes like a browser.
    fn escape(text: &str) -> String {
        url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(
            body in prop_oneof![prop::collection::vec(any::<u8>(), 0..200), "([a-z&=+%]|%[0-9A-F]{2}|é){0,60}".prop_map(String::into_bytes)]
        ) {
            match Fields::decode(&body) {
                Ok(fields) => prop_assert!(fields.0.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() <= body.len()),
                Err(page) => prop_assert_eq!(page.status(), StatusCode::BAD_REQUEST),
            }
        }

        #[test]
        fn decoding_reverses_encoding(fields in prop::collection::vec(("[\\s\\S]{1,9}", "[\\s\\S]{0,40}"), 0..5)) {
            let pairs: Vec<_> = fields.iter().map(|(name, value)| format!("{}={}", escape(name), escape(value))).collect();
            prop_assert_eq!(decode(&pairs.join("&")).0, fields);
        }

        #[test]
        fn any_request_is_read_or_refused(
            kind in prop::option::of(prop_oneof![
                Just("application/x-www-form-urlencoded".to_owned()), Just("Application/X-WWW-Form-Urlencoded; charset=x".to_owned()),
                Just("multipart/form-data; boundary=x".to_owned()), "[ -~]{0,30}",
            ]),
            length in prop::option::of("[0-9]{1,22}|-1|[ -~]{0,9}"),
            pieces in prop::collection::vec(prop_oneof![
                4 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Ok), 1 => Just(Err(std::io::ErrorKind::ConnectionReset)),
            ], 0..6),
        ) {
            let mut request = Request::post("/");
            for (name, value) in [("content-type", &kind), ("content-length", &length)] {
                if let Some(value) = value {
                    request = request.header(name, value);
                }
            }
            let sent: usize = pieces.iter().flatten().map(Vec::len).sum();
            let complete = pieces.iter().all(Result::is_ok);
            let body = Body::from_stream(futures::stream::iter(pieces.into_iter().map(|piece| piece.map_err(std::io::Error::from))));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            match runtime.block_on(FormMemory::new(64).read(request.body(body).unwrap())) {
                Ok(_) => prop_assert!(complete && sent <= 64),
                Err(page) => prop_assert!(page.status().is_client_error(), "{page:?}"),
            }
        }
    }
}
