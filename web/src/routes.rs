//! The routes: one table for each router, with the layers that its routes share. A route is closed unless it is in a public
//! table.

use std::sync::Arc;

use axum::{
    Router,
    routing::{MethodRouter, any, get, post},
};

use crate::{
    App, actions, assets, count, error, form, health, hooks,
    layers::{Access, Errors, Layers, Limits, LoggedPath, around_all},
    people, progress, relay_stops, results, runs, suppressions, test_sends, unsubscribe,
};

type Routes = Vec<(&'static str, MethodRouter<Arc<App>>)>;

struct Table {
    layers: Layers,
    routes: Routes,
}

/// All tables. A request without a route passes the layers of a closed route and gets *Page not found*.
fn tables() -> [Table; 7] {
    [public(), public_hooks(), pages(), slow_pages(), uploads(), json(), json_uploads()]
}

/// Open to anyone: health checks, static files, and the links in mails, whose path is a secret.
fn public() -> Table {
    Table {
        layers: Layers { access: Access::Public, ..Layers::CLOSED },
        routes: vec![
            ("/healthz", get(health::show)),
            ("/livez", get(health::live)),
            ("/readyz", get(health::ready)),
            ("/static/{name}", get(assets::show)),
            // Including characters that a mail program mistook for part of the link.
            ("/u/{*token}", get(unsubscribe::show).post(unsubscribe::unsubscribe)),
            // A truncated link. Its recipient has no password.
            ("/u", any(error::not_found)),
            ("/u/", any(error::not_found)),
        ],
    }
}

/// Open to anyone; the handler checks the key, and limits time and size.
fn public_hooks() -> Table {
    Table {
        layers: Layers { access: Access::Public, limits: Limits::Slow, ..Layers::CLOSED },
        // All methods, because without a key every method is Not Found.
        routes: vec![("/hooks/bounces", any(hooks::bounces))],
    }
}

fn pages() -> Table {
    Table {
        layers: Layers { logged: LoggedPath::Whole, ..Layers::CLOSED },
        routes: vec![
            ("/", get(form::show)),
            ("/runs", get(runs::show)),
            ("/runs/{id}", get(results::show)),
            ("/runs/{id}/actions", get(results::actions)),
            ("/runs/{id}/troubles", get(results::failures)),
            ("/runs/{id}/retry", post(actions::retry).get(actions::back_to_run)),
            ("/runs/{id}/pause", post(actions::pause).get(actions::back_to_run)),
            ("/runs/{id}/resume", post(actions::resume).get(actions::back_to_run)),
            ("/runs/{id}/cancel", post(actions::cancel).get(actions::back_to_run)),
            ("/tests/{id}", get(test_sends::show)),
            ("/suppressions", get(suppressions::show).post(suppressions::add)),
            ("/suppressions/remove", post(suppressions::remove_since).get(suppressions::back_to_list)),
            ("/suppressions/{number}/remove", post(suppressions::remove).get(suppressions::back_to_list)),
            ("/suppressions/held/{run_id}", post(suppressions::decide).get(suppressions::back_to_list)),
            ("/relay", get(relay_stops::show)),
            ("/relay/{number}", post(relay_stops::answer).get(relay_stops::back)),
        ],
    }
}

/// Pages whose work takes longer than a page's time limit.
fn slow_pages() -> Table {
    Table {
        layers: Layers { limits: Limits::Slow, ..Layers::CLOSED },
        routes: vec![("/people/erase", post(people::erase).get(suppressions::back_to_list))],
    }
}

/// Forms with a list or a text, which may take long to arrive.
fn uploads() -> Table {
    Table {
        layers: Layers { limits: Limits::Upload, ..Layers::CLOSED },
        routes: vec![
            ("/invites", post(form::submit).get(form::back_to_form)),
            ("/tests", post(test_sends::ask).get(form::back_to_form)),
        ],
    }
}

fn json() -> Table {
    Table {
        layers: Layers { errors: Errors::Problem, logged: LoggedPath::Whole, ..Layers::CLOSED },
        routes: vec![("/runs/{id}/progress", get(progress::show))],
    }
}

fn json_uploads() -> Table {
    Table {
        layers: Layers { errors: Errors::Problem, limits: Limits::Upload, ..Layers::CLOSED },
        routes: vec![("/invites/count", post(count::count).get(form::back_to_form))],
    }
}

impl Table {
    fn router(self, app: &Arc<App>) -> Router<Arc<App>> {
        let router = self.routes.into_iter().fold(Router::new(), |router, (path, methods)| router.route(path, methods));
        self.layers.around(router.method_not_allowed_fallback(error::method_not_allowed), app)
    }
}

/// The complete router. Only tables add routes: a route added here would have no layers.
pub(crate) fn router(app: Arc<App>) -> Router {
    let unmatched = Layers { errors: Errors::AsAccepted, ..Layers::CLOSED };
    let unmatched = unmatched.around(Router::new().fallback(error::not_found), &app);
    let all = tables().into_iter().map(|table| table.router(&app)).fold(unmatched, Router::merge);
    around_all(all).with_state(app)
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Mutex, PoisonError},
        time::Duration,
    };

    use axum::{
        body::Body,
        http::{Method, Request, StatusCode, header},
        response::Response,
    };
    use http_body_util::BodyExt as _;
    use mailrun_app::config::Config;
    use mailrun_core::health::Health;
    use serde_json::Value;
    use tokio::sync::Notify;
    use tower::ServiceExt as _;
    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    const PASSWORD: &str = "correct horse";
    const SECRET: &str = "s3cr3ttoken";
    /// An id without a run.
    const ID: &str = "00000000-0000-4000-8000-000000000007";

    /// The routes, with an unreachable database.
    fn pages_with(password: Option<&str>) -> Router {
        let mut config = Config::default();
        config.web.password = password.map(Into::into);
        config.web.hook_key = Some("0123456789abcdef".into());
        config.web.max_body_bytes = 100;
        config.database.url = "postgres://mailrun@127.0.0.1:1/mailrun".into();
        // The pool connects repeatedly until then.
        config.database.acquire_timeout = Duration::from_millis(1);
        let pool = mailrun_ledger::open(&config.database, "test").unwrap();
        router(Arc::new(App::new(config, pool.clone(), pool, Health::default(), Arc::new(Notify::new()), None)))
    }

    fn request(method: &Method, path: &str) -> axum::http::request::Builder {
        Request::builder().method(method).uri(path).header(header::HOST, "localhost")
    }

    fn logged_in(method: &Method, path: &str) -> axum::http::request::Builder {
        // `:correct horse`
        request(method, path).header(header::AUTHORIZATION, "Basic OmNvcnJlY3QgaG9yc2U=")
    }

    async fn answer(pages: &Router, request: Request<Body>) -> Response {
        pages.clone().oneshot(request).await.unwrap()
    }

    /// A path that matches this route, with `value` for each parameter.
    fn filled(route: &str, value: &str) -> String {
        let part = |part| if str::starts_with(part, '{') { value } else { part };
        route.split('/').map(part).collect::<Vec<_>>().join("/")
    }

    fn closed() -> impl Iterator<Item = Table> {
        tables().into_iter().filter(|table| table.layers.access == Access::Closed)
    }

    fn methods() -> [Method; 7] {
        [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE, Method::PATCH, Method::OPTIONS]
    }

    #[tokio::test]
    async fn every_route_that_is_not_public_refuses_an_anonymous_caller() {
        let with_password = pages_with(Some(PASSWORD));
        let without = pages_with(None);
        let paths = closed().flat_map(|table| table.routes).map(|(route, _)| filled(route, ID));
        // The last ones have no route.
        let paths: Vec<_> = paths.chain(["/nothing", "/static/", "/u2", "//u/x"].map(Into::into)).collect();
        assert!(paths.len() > 20);
        for (path, method) in paths.iter().flat_map(|path| methods().map(|method| (path, method))) {
            let anonymous = request(&method, path).body(Body::empty()).unwrap();
            let refused = answer(&with_password, anonymous).await;
            assert_eq!(refused.status(), StatusCode::UNAUTHORIZED, "{method} {path}");
            assert!(refused.headers().contains_key(header::WWW_AUTHENTICATE), "{method} {path}");

            let mut elsewhere = request(&method, path).body(Body::empty()).unwrap();
            elsewhere.headers_mut().insert(header::HOST, "evil.example".parse().unwrap());
            assert_eq!(answer(&without, elsewhere).await.status(), StatusCode::FORBIDDEN, "{method} {path}");
        }
    }

    #[tokio::test]
    async fn public_routes_are_links_hooks_files_and_health_checks() {
        let public = tables().into_iter().filter(|table| table.layers.access == Access::Public);
        let paths: Vec<_> = public.flat_map(|table| table.routes).map(|(route, _)| route).collect();
        let expected =
            ["/healthz", "/livez", "/readyz", "/static/{name}", "/u/{*token}", "/u", "/u/", "/hooks/bounces"];
        assert_eq!(paths, expected);
        let pages = pages_with(Some(PASSWORD));
        for (path, status) in
            [("/livez", 200), ("/static/style.css", 200), ("/static/x", 404), ("/u", 404), ("/u/", 404)]
        {
            let response = answer(&pages, request(&Method::GET, path).body(Body::empty()).unwrap()).await;
            assert_eq!(response.status(), status, "{path}");
        }
    }

    #[tokio::test]
    async fn every_response_has_the_security_headers() {
        let pages = pages_with(Some(PASSWORD));
        let paths = tables().into_iter().flat_map(|table| table.routes).map(|(route, _)| filled(route, ID));
        for path in paths.chain(["/nothing".to_owned()]) {
            let response = answer(&pages, request(&Method::GET, &path).body(Body::empty()).unwrap()).await;
            for name in ["content-security-policy", "x-content-type-options", "referrer-policy"] {
                assert!(response.headers().contains_key(name), "{name} {path}");
            }
        }
    }

    async fn problem(response: Response) -> Value {
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
        let status = response.status().as_u16();
        let problem: Value = serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
        assert_eq!(problem["status"], status);
        assert_eq!(problem["type"], "about:blank");
        assert!(problem["title"].is_string() && problem["detail"].is_string(), "{problem}");
        problem
    }

    fn json_paths() -> Vec<String> {
        let json = tables().into_iter().filter(|table| table.layers.errors == Errors::Problem);
        json.flat_map(|table| table.routes).map(|(route, _)| filled(route, ID)).collect()
    }

    #[tokio::test]
    async fn json_routes_answer_every_error_as_problem_details() {
        let pages = pages_with(Some(PASSWORD));
        for path in json_paths() {
            let refused = answer(&pages, request(&Method::GET, &path).body(Body::empty()).unwrap()).await;
            assert_eq!(problem(refused).await["status"], 401, "{path}");
            let not_allowed = answer(&pages, logged_in(&Method::DELETE, &path).body(Body::empty()).unwrap()).await;
            assert!(not_allowed.headers().contains_key(header::ALLOW), "{path}");
            assert_eq!(problem(not_allowed).await["status"], 405, "{path}");
            let elsewhere = logged_in(&Method::POST, &path).header("sec-fetch-site", "cross-site");
            let elsewhere = answer(&pages, elsewhere.body(Body::empty()).unwrap()).await;
            assert_eq!(problem(elsewhere).await["status"], 403, "{path}");
        }

        let get = async |path: &str| answer(&pages, logged_in(&Method::GET, path).body(Body::empty()).unwrap()).await;
        let no_run = problem(get("/runs/x/progress").await).await;
        assert_eq!((&no_run["status"], &no_run["title"]), (&404.into(), &"Not Found".into()));
        assert_eq!(problem(get("/runs/x/progress?asked=1&asked=2").await).await["status"], 400);
        assert_eq!(problem(get(&format!("/runs/{ID}/progress")).await).await["status"], 503, "no database");

        let count = |kind, body: String| {
            logged_in(&Method::POST, "/invites/count").header(header::CONTENT_TYPE, kind).body(body.into()).unwrap()
        };
        let form = "application/x-www-form-urlencoded";
        let too_large = answer(&pages, count(form, format!("emails={}", "x".repeat(200)))).await;
        assert_eq!(problem(too_large).await["status"], 413);
        assert_eq!(problem(answer(&pages, count("text/plain", "x".into())).await).await["status"], 415);
        assert_eq!(answer(&pages, count(form, "emails=ann@example.org".into())).await.status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn a_missing_route_answers_in_the_accepted_format() {
        let pages = pages_with(Some(PASSWORD));
        for path in ["/nothing", "/runs/x/progress/"] {
            let ask = |request: axum::http::request::Builder, accept| {
                answer(&pages, request.header(header::ACCEPT, accept).body(Body::empty()).unwrap())
            };
            let missing = ask(logged_in(&Method::GET, path), "application/json").await;
            assert_eq!(problem(missing).await["status"], 404);
            let refused = ask(request(&Method::GET, path), "application/json").await;
            assert_eq!(problem(refused).await["status"], 401);
            let page = ask(logged_in(&Method::GET, path), "text/html,*/*;q=0.8").await;
            assert_eq!(page.status(), StatusCode::NOT_FOUND);
            assert_eq!(page.headers()[header::CONTENT_TYPE], "text/html; charset=utf-8");
        }
    }

    #[tokio::test]
    async fn only_uploads_may_exceed_the_short_form_limit() {
        let pages = pages_with(Some(PASSWORD));
        for table in closed() {
            let larger = table.layers.limits == Limits::Upload;
            for (route, _) in table.routes {
                let path = filled(route, ID);
                let form = logged_in(&Method::POST, &path)
                    .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body("x".repeat(20_000).into())
                    .unwrap();
                let response = answer(&pages, form).await;
                if response.status() == StatusCode::PAYLOAD_TOO_LARGE {
                    let page = response.into_body().collect().await.unwrap().to_bytes();
                    let limit = if larger { "At most 1 KB" } else { "At most 16 KB" };
                    assert!(String::from_utf8_lossy(&page).contains(limit), "{path}");
                } else {
                    assert!(!larger, "{path} {}", response.status());
                }
            }
        }
    }

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Log {
        fn text(&self) -> String {
            String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
        }
    }

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Log {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    #[tokio::test]
    async fn secrets_in_a_path_are_not_logged() {
        let log = Log::default();
        let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(log.clone());
        let _guard = tracing::subscriber::set_default(subscriber.with_ansi(false).finish());
        let pages = pages_with(Some(PASSWORD));
        let redacted = tables().into_iter().filter(|table| table.layers.logged == LoggedPath::Route);
        let paths = redacted.flat_map(|table| table.routes).map(|(route, _)| filled(route, SECRET));
        // Links as mail programs and people mistype them.
        let mistyped = ["//u/", "/U/", "/%75/", "/u/x/", "/x/u/", "/u/?"].map(|start| format!("{start}{SECRET}"));
        for (path, method) in paths.chain(mistyped).flat_map(|path| methods().map(|method| (path.clone(), method))) {
            let path = format!("{path}{}key={SECRET}", if path.contains('?') { "&" } else { "?" });
            let mut request = request(&method, &path);
            // On other routes, a wrong password delays the answer.
            if path.starts_with("/hooks/") {
                request = request.header(header::AUTHORIZATION, format!("Bearer {SECRET}"));
            }
            answer(&pages, request.body(Body::empty()).unwrap()).await;
        }
        let id = answer(&pages, logged_in(&Method::GET, &format!("/runs/{ID}")).body(Body::empty()).unwrap()).await;
        assert_eq!(id.status(), StatusCode::SERVICE_UNAVAILABLE);

        let log = log.text();
        assert!(!log.contains(SECRET), "{log}");
        for shown in ["path=\"/u/{*token}\"", "path=\"none\"", &format!("path=\"/runs/{ID}\"")] {
            assert!(log.contains(shown), "{shown}: {log}");
        }
    }

    #[test]
    fn only_ids_are_logged_with_the_path() {
        let whole = tables().into_iter().filter(|table| table.layers.logged == LoggedPath::Whole);
        for (route, _) in whole.flat_map(|table| table.routes) {
            let parameters = route.split('/').filter(|part| part.starts_with('{'));
            for parameter in parameters {
                assert!(["{id}", "{run_id}", "{number}"].contains(&parameter), "{route}");
            }
        }
    }
}
