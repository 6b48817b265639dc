//! Static files, compiled in. Their address contains a hash of the content, so browsers cache them permanently.

use std::sync::LazyLock;

use axum::{
    extract::{Path, RawQuery},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use uuid::Uuid;

use crate::error::{ErrorPage, not_found};

pub(crate) struct Asset {
    name: &'static str,
    kind: &'static str,
    content: &'static str,
    /// A hash of `content`.
    version: LazyLock<String>,
}

macro_rules! asset {
    ($name:literal, $kind:literal) => {
        Asset {
            name: $name,
            kind: $kind,
            content: include_str!(concat!("../static/", $name)),
            version: LazyLock::new(|| hash(include_str!(concat!("../static/", $name)))),
        }
    };
}

pub(crate) static STYLE: Asset = asset!("style.css", "text/css; charset=utf-8");
pub(crate) static PAGE: Asset = asset!("page.js", "text/javascript; charset=utf-8");
pub(crate) static RESULTS: Asset = asset!("results.js", "text/javascript; charset=utf-8");
pub(crate) static TEST: Asset = asset!("test.js", "text/javascript; charset=utf-8");
pub(crate) static ICON: Asset = asset!("icon.svg", "image/svg+xml");

impl Asset {
    /// The versioned address used in the pages.
    pub(crate) fn url(&self) -> String {
        format!("/static/{}?v={}", self.name, *self.version)
    }
}

fn hash(content: &str) -> String {
    let mut hash = Uuid::new_v5(&Uuid::NAMESPACE_URL, content.as_bytes()).simple().to_string();
    hash.truncate(12);
    hash
}

/// `GET /static/{name}`
pub(crate) async fn show(
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ErrorPage> {
    let Some(asset) = [&STYLE, &PAGE, &RESULTS, &TEST, &ICON].into_iter().find(|asset| asset.name == name) else {
        return Err(not_found().await);
    };
    let current = query.is_some_and(|query| query.strip_prefix("v=") == Some(asset.version.as_str()));
    let caching = if current { "public, max-age=31536000, immutable" } else { "no-cache" };
    let etag = format!("\"{}\"", *asset.version);
    let unchanged = headers.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == etag.as_bytes());
    let mut response = if unchanged {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(header::CONTENT_TYPE, asset.kind)], asset.content).into_response()
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));
    if let Ok(etag) = etag.parse() {
        headers.insert(header::ETAG, etag);
    }
    Ok(response)
}
