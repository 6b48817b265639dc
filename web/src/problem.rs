//! Errors of JSON routes, as problem details (RFC 9457).

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::Next,
    response::Response,
};
use serde::Serialize;

use crate::error::ErrorPage;

const MEDIA_TYPE: &str = "application/problem+json";
/// No type beyond the status; `detail` is for people.
const NO_TYPE: &str = "about:blank";

#[derive(Serialize)]
struct Problem<'a> {
    r#type: &'static str,
    /// The reason phrase, as RFC 9457 requires with `about:blank`.
    title: &'a str,
    status: u16,
    detail: &'a str,
}

/// Writes every error as problem details.
pub(crate) async fn always(request: Request, next: Next) -> Response {
    as_problem(next.run(request).await)
}

/// Writes errors as problem details for a client that accepts JSON and no HTML; other clients get pages.
pub(crate) async fn where_accepted(request: Request, next: Next) -> Response {
    let as_json = accepts_json_only(request.headers());
    let response = next.run(request).await;
    if as_json { as_problem(response) } else { response }
}

/// Keeps status and headers: some say what to do next (`WWW-Authenticate`, `Retry-After`, `Allow`).
fn as_problem(mut response: Response) -> Response {
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return response;
    }
    let page = response.extensions_mut().remove::<ErrorPage>();
    let detail = page.as_ref().map_or(without_page(status), ErrorPage::message);
    let title = status.canonical_reason().unwrap_or("Error");
    let problem = Problem { r#type: NO_TYPE, title, status: status.as_u16(), detail };
    let Ok(body) = serde_json::to_vec(&problem) else { return response };
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    response.headers_mut().remove(header::CONTENT_LENGTH);
    *response.body_mut() = Body::from(body);
    response
}

/// The detail of an error from axum: its extractors refused a path or a query.
fn without_page(status: StatusCode) -> &'static str {
    if status.is_client_error() {
        "The request is malformed. Check its path and its query."
    } else {
        "Internal error. Details are in the log."
    }
}

fn accepts_json_only(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let (mut json, mut html) = (false, false);
    for range in accepted.flat_map(|value| value.split(',')) {
        let essence = range.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        json |= essence == "application/json" || essence.ends_with("+json");
        html |= essence == "text/html";
    }
    json && !html
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse as _;
    use http_body_util::BodyExt as _;
    use serde_json::{Value, json};

    use super::*;

    async fn read(response: Response) -> Value {
        serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
    }

    #[tokio::test]
    async fn an_error_page_becomes_a_problem_with_the_same_status_and_headers() {
        let mut page = ErrorPage::no_such_run().into_response();
        page.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("7"));
        let problem = as_problem(page);
        assert_eq!(problem.status(), StatusCode::NOT_FOUND);
        assert_eq!(problem.headers()[header::CONTENT_TYPE], MEDIA_TYPE);
        assert_eq!(problem.headers()[header::RETRY_AFTER], "7");
        let expected = json!({
            "type": "about:blank",
            "title": "Not Found",
            "status": 404,
            "detail": "There is no run at this address. Check it for typing errors, or choose a run from the list of runs.",
        });
        assert_eq!(read(problem).await, expected);
    }

    #[tokio::test]
    async fn an_axum_error_becomes_a_problem() {
        let problem = as_problem((StatusCode::BAD_REQUEST, "Failed to deserialize query string").into_response());
        assert_eq!(problem.headers()[header::CONTENT_TYPE], MEDIA_TYPE);
        assert_eq!(read(problem).await["status"], 400);
    }

    #[tokio::test]
    async fn leaves_successful_responses_unchanged() {
        let answer = as_problem("ok".into_response());
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "ok");
    }

    #[test]
    fn a_browser_gets_a_page_and_a_program_a_problem() {
        let accepts = |value: &'static str| {
            accepts_json_only(&HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(value))]))
        };
        assert!(accepts("application/json"));
        assert!(accepts("application/problem+json;q=0.9, Application/JSON, */*;q=0.1"));
        assert!(!accepts("text/html,application/xhtml+xml,application/json;q=0.8"));
        assert!(!accepts("*/*"));
        assert!(!accepts_json_only(&HeaderMap::new()));
    }
}
