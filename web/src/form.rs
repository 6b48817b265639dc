//! `GET /` and `POST /invites`: the form, and taking its list into the ledger.

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
    submit::{
        Earlier, InvalidEntry, NotSubmitted, Refusal, SUBMISSION, Submission, Submitted, Tally, submit as take_in,
    },
    test_sends,
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

/// The newest runs, below the form.
const RECENT: i64 = 5;
/// The highest rate limit that makes a difference.
const MAX_PER_SECOND: i32 = 100_000;

#[derive(Template)]
#[template(path = "form.html")]
struct FormPage<'a> {
    typed: &'a Typed,
    problems: Problems,
    /// Whether mails have links to unsubscribe with.
    has_links: bool,
    recent: Vec<Row>,
}

/// What is in the form.
pub(crate) struct Typed {
    pub(crate) token: Uuid,
    pub(crate) emails: String,
    pub(crate) subject: String,
    pub(crate) body: String,
    pub(crate) test_email: String,
    pub(crate) sends_per_second: String,
}

impl Typed {
    /// An empty form, with the text that is configured.
    fn nothing(app: &App) -> Self {
        Self {
            token: Uuid::new_v4(),
            emails: String::new(),
            subject: app.config.subject.clone(),
            body: app.config.body.clone(),
            test_email: String::new(),
            sends_per_second: String::new(),
        }
    }

    /// What was sent. A field that is missing is as in an empty form.
    pub(crate) fn take(app: &App, fields: &mut Fields) -> Self {
        let nothing = Self::nothing(app);
        Self {
            token: fields.get("token").and_then(|token| token.parse().ok()).unwrap_or(nothing.token),
            emails: fields.take("emails").unwrap_or_default(),
            subject: fields.take("subject").unwrap_or(nothing.subject),
            body: fields.take("body").map_or(nothing.body, |body| with_plain_line_ends(&body)),
            test_email: fields.take("test_email").unwrap_or_default(),
            sends_per_second: fields.take("sends_per_second").unwrap_or_default(),
        }
    }
}

/// What is wrong with it, each beside its field.
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

/// Why a list was not taken, beside the field.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Problem {
    title: String,
    reasons: Vec<String>,
    /// Some of them can be retried in an earlier run.
    failed_earlier: Option<String>,
    /// The same list was sent before, as this run.
    earlier_run: Option<Uuid>,
    /// How many entries are no address.
    invalid_title: Option<String>,
    invalid: Vec<InvalidEntry>,
    /// Invalid entries beyond those that are shown.
    more_invalid: Option<String>,
}

/// What the address says.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Wish {
    /// The test whose text to go on with.
    test: Option<String>,
}

/// Submissions of which a click may have been accepted without an answer. A page that was left, or a connection that was lost, ends
/// the handler and not the commit.
pub(crate) type InDoubt = Cache<Uuid, ()>;

/// Submissions remembered at most.
const IN_DOUBT: u64 = 10_000;
/// And how long.
const DOUBT: Duration = Duration::from_secs(24 * 60 * 60);

/// None is.
pub(crate) fn nothing_in_doubt() -> InDoubt {
    Cache::builder().max_capacity(IN_DOUBT).time_to_live(DOUBT).build()
}

/// `GET /`
pub(crate) async fn show(State(app): Shared, Query(wish): Query<Wish>) -> Result<Response, ErrorPage> {
    let mut typed = Typed::nothing(&app);
    // An address that was tampered with shows the empty form.
    if let Some(test_id) = wish.test.and_then(|test| test.parse().ok())
        && let Some(test) = test_sends::read(&app.pool, test_id, app.dead_after).await?
    {
        (typed.subject, typed.body, typed.test_email) = (test.subject, test.body, test.email);
    }
    let recent = recent(&app).await?;
    let has_links = app.config.public_url.is_some();
    Ok(html(&FormPage { typed: &typed, problems: Problems::default(), has_links, recent }))
}

async fn recent(app: &App) -> sqlx::Result<Vec<Row>> {
    let newest = in_time(app.answer_timeout, runs::list(&app.pool, None, RECENT)).await?;
    Ok(newest.iter().map(Row::of).collect())
}

/// `GET /invites`: a page with an error stands under this address, and may be loaded again.
pub(crate) async fn back_to_form() -> Redirect {
    Redirect::to("/")
}

/// `POST /invites`
pub(crate) async fn submit(State(app): Shared, Form(mut fields, _room): Form) -> Result<Response, ErrorPage> {
    let incomplete =
        |what: &'static str| ErrorPage::new(StatusCode::UNPROCESSABLE_ENTITY, "The form is incomplete", what);
    if fields.get("token").is_none_or(|token| token.parse::<Uuid>().is_err()) {
        return Err(incomplete(
            "Its token is missing, so a second click could not be told from the first. \
             Open the form anew, paste the list, and send it.",
        ));
    }
    if fields.get("emails").is_none() {
        return Err(incomplete(
            "The list of addresses, the field \u{201c}emails\u{201d}, is missing. Open the form anew, and send it from there.",
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
    match take(&app, submission).await.map_err(|failed| ErrorPage::not_taken(&failed))? {
        Submitted::Accepted(run_id) => {
            app.outbox.notify_one();
            info!(%run_id, "a run is accepted");
            Ok(Redirect::to(&format!("/runs/{run_id}")).into_response())
        }
        Submitted::Before(Earlier { run_id, wanted: Wanted::Cancelled, .. }) => {
            let list = Some(Problem::cancelled(run_id));
            // A submission of its own, if it is sent once more.
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

/// Takes the list in. A submission of which an earlier click had no certain end is in doubt until it has one.
async fn take(app: &App, submission: Submission<'_>) -> Result<Submitted, NotSubmitted> {
    let run_id = submission.run_id();
    let in_doubt = app.in_doubt.contains_key(&run_id);
    app.in_doubt.insert(run_id, ());
    let taken = async {
        // A submission that loses its connection is tried again for a while; a database that is down is told at once.
        drop(app.pool.acquire().await.map_err(NotSubmitted::before_commit)?);
        in_time(SUBMISSION, take_in(&app.pool, submission)).await
    };
    match taken.await {
        Err(failed) if failed.nothing_kept && in_doubt => Err(NotSubmitted { nothing_kept: false, ..failed }),
        Err(failed) if !failed.nothing_kept => Err(failed),
        certain => {
            app.in_doubt.invalidate(&run_id);
            certain
        }
    }
}

/// The page of a run that was made before. It says so if another rate was wished for this time.
fn earlier_run(earlier: &Earlier, sends_per_second: Option<i32>) -> String {
    let run_id = earlier.run_id;
    if earlier.sends_per_second == sends_per_second {
        return format!("/runs/{run_id}");
    }
    format!("/runs/{run_id}?rate={}", sends_per_second.map_or("none".to_owned(), |limit| limit.to_string()))
}

/// The form again, with what was typed, and what is wrong with it.
pub(crate) async fn refused(app: &App, typed: &Typed, problems: Problems) -> Response {
    // What is wrong is more important than what else there is.
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
    /// The same form made a run that was cancelled since. Whether it is to be sent after all, only the person knows.
    fn cancelled(run_id: Uuid) -> Self {
        Self {
            title: "This list was sent before, and its run was cancelled.".to_owned(),
            reasons: vec![
                "Nothing was sent now. Send it again to start a new run with everyone who was not mailed.".to_owned(),
            ],
            earlier_run: Some(run_id),
            ..Self::default()
        }
    }

    fn of(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Empty => Self {
                title: "There is no address in the list.".to_owned(),
                reasons: vec!["Paste or type at least one.".to_owned()],
                ..Self::default()
            },
            Refusal::TooMany { limit } => Self {
                title: format!(
                    "The list has more than {} addresses.",
                    grouped(i64::try_from(limit).unwrap_or(i64::MAX))
                ),
                reasons: vec!["Split it and send the parts one after another: nobody is invited twice.".to_owned()],
                ..Self::default()
            },
            Refusal::NothingNew(tally) => Self::nothing_new(tally),
        }
    }

    fn nothing_new(tally: Tally) -> Self {
        let known = tally.already_invited + tally.already_failed;
        let title = match (known, tally.invalid) {
            (0, _) if tally.suppressed > 0 => "Nobody in the list can be invited.",
            (0, _) => "There is no valid address in the list.",
            (_, 0) if tally.already_failed == 0 => "Everyone in the list has been invited already.",
            _ => "Nobody in the list can be invited anew.",
        };
        let mut reasons = Vec::new();
        if tally.already_invited > 0 {
            let who = counted(tally.already_invited, "person was", "people were");
            reasons.push(format!("{who} invited before, or waiting in another run."));
        }
        if tally.suppressed > 0 {
            let who = counted(tally.suppressed, "address is", "addresses are");
            reasons.push(format!("{who} not to be written to: unsubscribed, or without a mailbox."));
        }
        if tally.repeated > 0 {
            let what = counted(tally.repeated, "address stands", "addresses stand");
            reasons.push(format!("{what} in the list more than once."));
        }
        let invalid_title = (tally.invalid > 0)
            .then(|| counted(tally.invalid, "entry is not an email address:", "entries are not email addresses:"));
        let failed_earlier = (tally.already_failed > 0).then(|| {
            counted(tally.already_failed, "invitation", "invitations")
                + " failed, or had an unclear end, in an earlier run."
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
    fn a_rate_limit_is_a_number_or_nothing() {
        assert_eq!(parse_rate(""), Ok(None));
        assert_eq!(parse_rate(" 25 "), Ok(Some(25)));
        for wrong in ["0", "-1", "1.5", "many", "100001", "99999999999"] {
            assert!(parse_rate(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_run_that_was_made_before_says_which_rate_applies() {
        let earlier = Earlier { run_id: Uuid::from_u128(7), wanted: Wanted::Running, sends_per_second: Some(10) };
        let run = format!("/runs/{}", earlier.run_id);
        assert_eq!(earlier_run(&earlier, Some(10)), run);
        assert_eq!(earlier_run(&earlier, Some(50)), format!("{run}?rate=50"));
        assert_eq!(earlier_run(&earlier, None), format!("{run}?rate=none"));
    }

    #[test]
    fn a_refusal_says_why() {
        let of = |tally| Problem::of(Refusal::NothingNew(tally));
        let all_known = of(Tally { already_invited: 2, repeated: 1, ..Tally::default() });
        assert_eq!(all_known.title, "Everyone in the list has been invited already.");
        assert_eq!(
            all_known.reasons,
            [
                "2 people were invited before, or waiting in another run.",
                "1 address stands in the list more than once."
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
