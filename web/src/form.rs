//! `GET /` and `POST /invites`: the form, and its submission to the ledger.

use std::time::Duration;

use askama::Template;
use axum::{
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Redirect, Response},
};
use mailrun_core::run::Wanted;
use mailrun_ledger::{
    in_time, runs,
    submit::{Earlier, InvalidEntry, NotSubmitted, Refusal, SUBMISSION, Submission, Submitted, Tally},
    test_mails,
};
use moka::sync::Cache;
use serde::Deserialize;
use tracing::info;
use uuid::Uuid;

use crate::{
    App, Shared,
    body::{Fields, Form},
    error::{ErrorPage, html},
    runs::Row,
    text::{self, TextProblems, with_plain_line_ends},
    view::{counted, grouped},
};

/// Recent runs below the form.
const RECENT: i64 = 5;
/// The highest rate limit that has an effect.
const MAX_PER_SECOND: i32 = 100_000;

#[derive(Template)]
#[template(path = "form.html")]
struct FormPage<'a> {
    typed: &'a Typed,
    problems: Problems,
    /// Whether mails have unsubscribe links.
    has_links: bool,
    recent: Vec<Row>,
}

/// The contents of the form.
pub(crate) struct Typed {
    pub(crate) token: Uuid,
    pub(crate) emails: String,
    pub(crate) subject: String,
    pub(crate) body: String,
    pub(crate) test_email: String,
    pub(crate) sends_per_second: String,
}

impl Typed {
    /// An empty form with the configured text.
    fn empty(app: &App) -> Self {
        Self {
            token: Uuid::new_v4(),
            emails: String::new(),
            subject: app.config.subject.clone(),
            body: app.config.body.clone(),
            test_email: String::new(),
            sends_per_second: String::new(),
        }
    }

    /// The submitted contents. A missing field has its value from the empty form.
    pub(crate) fn take(app: &App, fields: &mut Fields) -> Self {
        let empty = Self::empty(app);
        Self {
            token: fields.get("token").and_then(|token| token.parse().ok()).unwrap_or(empty.token),
            emails: fields.take("emails").unwrap_or_default(),
            subject: fields.take("subject").unwrap_or(empty.subject),
            body: fields.take("body").map_or(empty.body, |body| with_plain_line_ends(&body)),
            test_email: fields.take("test_email").unwrap_or_default(),
            sends_per_second: fields.take("sends_per_second").unwrap_or_default(),
        }
    }
}

/// The errors beside each field.
#[derive(Default)]
pub(crate) struct Problems {
    pub(crate) list: Option<Problem>,
    pub(crate) text: TextProblems,
    pub(crate) test: Option<String>,
    pub(crate) rate: Option<&'static str>,
}

impl Problems {
    fn is_empty(&self) -> bool {
        self.list.is_none() && self.text.is_empty() && self.test.is_none() && self.rate.is_none()
    }
}

/// Why a list was not accepted.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Problem {
    title: String,
    reasons: Vec<String>,
    /// Some items can be retried in an earlier run.
    failed_earlier: Option<String>,
    /// The run of the same list, submitted before.
    earlier_run: Option<Uuid>,
    /// How many entries are invalid.
    invalid_title: Option<String>,
    invalid: Vec<InvalidEntry>,
    /// Invalid entries that are not shown.
    more_invalid: Option<String>,
}

/// The query of `GET /`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct FormQuery {
    /// The test whose text to continue with.
    test: Option<String>,
}

/// Submissions that may have been accepted without a response. Leaving the page or losing the connection ends the handler and not
/// the commit.
pub(crate) type Unconfirmed = Cache<Uuid, ()>;

/// Capacity.
const MAX_UNCONFIRMED: u64 = 10_000;
/// Lifetime.
const UNCONFIRMED_FOR: Duration = Duration::from_secs(24 * 60 * 60);

pub(crate) fn new_unconfirmed() -> Unconfirmed {
    Cache::builder().max_capacity(MAX_UNCONFIRMED).time_to_live(UNCONFIRMED_FOR).build()
}

/// `GET /`
pub(crate) async fn show(State(app): Shared, Query(query): Query<FormQuery>) -> Result<Response, ErrorPage> {
    let mut typed = Typed::empty(&app);
    // A malformed id shows the empty form.
    if let Some(test_id) = query.test.and_then(|test| test.parse().ok())
        && let Some(test) = test_mails::read(&app.pool, test_id).await?
    {
        (typed.subject, typed.body, typed.test_email) = (test.subject, test.body, test.email.unwrap_or_default());
    }
    let recent = recent(&app).await?;
    let has_links = app.config.public_url.is_some();
    Ok(html(&FormPage { typed: &typed, problems: Problems::default(), has_links, recent }))
}

async fn recent(app: &App) -> sqlx::Result<Vec<Row>> {
    let newest = in_time(app.answer_timeout, runs::list(&app.pool, None, RECENT)).await?;
    Ok(newest.iter().map(Row::of).collect())
}

/// `GET /invites`: an error page has this address and may be reloaded.
pub(crate) async fn back_to_form() -> Redirect {
    Redirect::to("/")
}

/// `POST /invites`
pub(crate) async fn submit(State(app): Shared, Form(mut fields, _memory): Form) -> Result<Response, ErrorPage> {
    let incomplete = |what: &'static str| ErrorPage::new(StatusCode::UNPROCESSABLE_ENTITY, "Incomplete form", what);
    if fields.get("token").is_none_or(|token| token.parse::<Uuid>().is_err()) {
        return Err(incomplete(
            "The field \u{201c}token\u{201d} is missing or malformed, so a second click could not be recognised. \
            Open the form again, paste the list, and send it.",
        ));
    }
    if fields.get("emails").is_none() {
        return Err(incomplete(
            "The field \u{201c}emails\u{201d} is missing. Open the form again and send it from there.",
        ));
    }
    let typed = Typed::take(&app, &mut fields);
    let (rate, text) = (parse_rate(&typed.sends_per_second), text::check_aside(&typed.subject, &typed.body).await);
    let sends_per_second = match rate {
        Ok(limit) if text.is_empty() => limit,
        rate => return Ok(refused(&app, &typed, Problems { text, rate: rate.err(), ..Problems::default() }).await),
    };
    let submission = Submission {
        token: typed.token,
        text: &typed.emails,
        subject: &typed.subject,
        body: &typed.body,
        sends_per_second,
        max_addresses: app.config.max_addresses,
    };
    match submit_list(&app, submission).await.map_err(|failed| ErrorPage::not_submitted(&failed))? {
        Submitted::Accepted(run_id) => {
            app.outbox.notify_one();
            info!(%run_id, "run accepted");
            Ok(Redirect::to(&format!("/runs/{run_id}")).into_response())
        }
        Submitted::Before(Earlier { run_id, wanted: Wanted::Cancelled, .. }) => {
            let list = Some(Problem::cancelled(run_id));
            // A new submission, if it is sent again.
            let typed = Typed { token: Uuid::new_v4(), ..typed };
            Ok(refused(&app, &typed, Problems { list, ..Problems::default() }).await)
        }
        Submitted::Before(earlier) => Ok(Redirect::to(&earlier_run(&earlier, sends_per_second)).into_response()),
        Submitted::Refused(refusal) => {
            let list = Some(Problem::of(refusal));
            Ok(refused(&app, &typed, Problems { list, ..Problems::default() }).await)
        }
    }
}

/// Submits the list. A submission stays unconfirmed until the ledger has given a definite result.
async fn submit_list(app: &App, submission: Submission<'_>) -> Result<Submitted, NotSubmitted> {
    let run_id = submission.run_id();
    let unconfirmed = app.unconfirmed.contains_key(&run_id);
    app.unconfirmed.insert(run_id, ());
    let submitted = async {
        // A submission that loses its connection is retried for a while; an unavailable database is reported at once.
        drop(app.pool.acquire().await.map_err(NotSubmitted::before_commit)?);
        in_time(SUBMISSION, submission.submit(&app.pool)).await
    };
    match submitted.await {
        Err(failed) if failed.nothing_kept && unconfirmed => Err(NotSubmitted { nothing_kept: false, ..failed }),
        Err(failed) if !failed.nothing_kept => Err(failed),
        certain => {
            app.unconfirmed.invalidate(&run_id);
            certain
        }
    }
}

/// The address of an earlier run of the same form. It says so if another rate limit was requested this time.
fn earlier_run(earlier: &Earlier, sends_per_second: Option<i32>) -> String {
    let run_id = earlier.run_id;
    if earlier.sends_per_second == sends_per_second {
        return format!("/runs/{run_id}");
    }
    format!("/runs/{run_id}?rate={}", sends_per_second.map_or("none".to_owned(), |limit| limit.to_string()))
}

/// The form again, with its contents and its errors.
pub(crate) async fn refused(app: &App, typed: &Typed, problems: Problems) -> Response {
    // The errors matter more than the list of recent runs.
    let recent = recent(app).await.unwrap_or_default();
    let page = FormPage { typed, problems, has_links: app.config.public_url.is_some(), recent };
    (StatusCode::UNPROCESSABLE_ENTITY, html(&page)).into_response()
}

fn parse_rate(field: &str) -> Result<Option<i32>, &'static str> {
    match field.trim() {
        "" => Ok(None),
        text => match text.parse() {
            Ok(limit @ 1..=MAX_PER_SECOND) => Ok(Some(limit)),
            _ => Err("Enter a whole number from 1 to 100,000, or leave it empty for no limit."),
        },
    }
}

impl Problem {
    /// The same form created a run that was cancelled since. Only the person knows whether to send it after all.
    fn cancelled(run_id: Uuid) -> Self {
        Self {
            title: "This list was submitted before, and its run was cancelled.".to_owned(),
            reasons: vec![
                "Nothing was sent. Submit it again to start a new run with everyone who was not mailed.".to_owned(),
            ],
            earlier_run: Some(run_id),
            ..Self::default()
        }
    }

    fn of(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Empty => Self {
                title: "The list is empty.".to_owned(),
                reasons: vec!["Enter at least one address.".to_owned()],
                ..Self::default()
            },
            Refusal::TooMany { limit } => Self {
                title: format!(
                    "The list has more than {} addresses.",
                    grouped(i64::try_from(limit).unwrap_or(i64::MAX))
                ),
                reasons: vec!["Split the list and send the parts separately: nobody is invited twice.".to_owned()],
                ..Self::default()
            },
            Refusal::NothingNew(tally) => Self::nothing_new(tally),
        }
    }

    fn nothing_new(tally: Tally) -> Self {
        let known = tally.already_invited + tally.already_failed;
        let title = match (known, tally.invalid) {
            (0, _) if tally.suppressed == 0 => "There is no valid address in the list.",
            (1.., 0) if tally.already_failed == 0 => "Everyone in the list has been invited already.",
            _ => "Nobody in the list can be invited.",
        };
        let mut reasons = Vec::new();
        if tally.already_invited > 0 {
            let who = counted(tally.already_invited, "person was", "people were");
            reasons.push(format!("{who} invited before, or queued in another run."));
        }
        if tally.suppressed > 0 {
            let who = counted(tally.suppressed, "address is", "addresses are");
            reasons.push(format!("{who} on the suppression list: unsubscribed, reported spam, or nonexistent."));
        }
        if tally.repeated > 0 {
            let what = counted(tally.repeated, "address appears", "addresses appear");
            reasons.push(format!("{what} in the list more than once."));
        }
        let invalid_title = (tally.invalid > 0)
            .then(|| counted(tally.invalid, "entry is not an email address:", "entries are not email addresses:"));
        let failed_earlier = (tally.already_failed > 0).then(|| {
            counted(tally.already_failed, "invitation", "invitations")
                + " failed, or have an unknown result, in an earlier run."
        });
        let shown = i32::try_from(tally.invalid_entries.len()).unwrap_or(i32::MAX);
        let more_invalid = (tally.invalid > shown).then(|| grouped(tally.invalid - shown));
        Self {
            title: title.to_owned(),
            reasons,
            failed_earlier,
            earlier_run: None,
            invalid_title,
            invalid: tally.invalid_entries,
            more_invalid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_limit_is_a_number_or_empty() {
        assert_eq!(parse_rate(""), Ok(None));
        assert_eq!(parse_rate(" 25 "), Ok(Some(25)));
        for wrong in ["0", "-1", "1.5", "many", "100001", "99999999999"] {
            assert!(parse_rate(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_earlier_run_says_which_rate_applies() {
        let earlier = Earlier { run_id: Uuid::from_u128(7), wanted: Wanted::Running, sends_per_second: Some(10) };
        let run = format!("/runs/{}", earlier.run_id);
        assert_eq!(earlier_run(&earlier, Some(10)), run);
        assert_eq!(earlier_run(&earlier, Some(50)), format!("{run}?rate=50"));
        assert_eq!(earlier_run(&earlier, None), format!("{run}?rate=none"));
    }

    #[test]
    fn a_refusal_gives_its_reasons() {
        let of = |tally| Problem::of(Refusal::NothingNew(tally));
        let all_known = of(Tally { already_invited: 2, repeated: 1, ..Tally::default() });
        assert_eq!(all_known.title, "Everyone in the list has been invited already.");
        assert_eq!(
            all_known.reasons,
            [
                "2 people were invited before, or queued in another run.",
                "1 address appears in the list more than once."
            ]
        );
        let failed = of(Tally { already_failed: 1, ..Tally::default() });
        assert!(failed.failed_earlier.is_some_and(|text| text.starts_with("1 invitation failed")));
        let invalid = of(Tally { invalid: 3, ..Tally::default() });
        assert_eq!(invalid.title, "There is no valid address in the list.");
        assert_eq!(invalid.more_invalid.as_deref(), Some("3"));
    }

    proptest::proptest! {
        #[test]
        fn any_rate_is_a_limit_or_refused(text in "\\PC{0,12}|[+-]?[0-9]{0,25}") {
            if let Ok(Some(limit)) = parse_rate(&text) {
                proptest::prop_assert!((1..=MAX_PER_SECOND).contains(&limit));
            }
        }
    }
}
