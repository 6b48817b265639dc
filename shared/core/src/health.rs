//! What currently keeps a process from working, as text for `/livez` and `/readyz`.
//!
//! Anyone who reaches the endpoints can read these texts, so they name no host, user or server error. The log has those.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The key for problems of the process itself.
const PROCESS: &str = "this process";

/// Evaluated for each report. None: no problem.
type Question = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// The health of a process. Clones share it: each part reports its problems, and clears them when they are over.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Problems by their subject.
    troubles: BTreeMap<Cow<'static, str>, String>,
    questions: Vec<Question>,
    /// Why the process must be restarted.
    failure: Option<String>,
}

impl fmt::Debug for Health {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.troubles()).finish()
    }
}

impl Health {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports a problem with `what`. It lasts until [`Self::fine`]; a newer reason replaces an older one.
    pub fn trouble(&self, what: impl Into<Cow<'static, str>>, why: impl Into<String>) {
        self.state().troubles.insert(what.into(), why.into());
    }

    /// Clears the problem with `what`.
    pub fn fine(&self, what: &str) {
        self.state().troubles.remove(what);
    }

    /// The process can't work yet.
    pub fn starting(&self, waits_for: &str) {
        self.trouble(PROCESS, format!("is starting, waiting for {waits_for}"));
    }

    /// The process has started.
    pub fn started(&self) {
        self.fine(PROCESS);
    }

    /// The process finishes its work in progress and ends.
    pub fn stopping(&self) {
        self.trouble(PROCESS, "is stopping");
    }

    /// Records whether PostgreSQL answered the last request.
    pub fn database_answers(&self, answers: bool) {
        const POSTGRESQL: &str = "PostgreSQL";
        if answers { self.fine(POSTGRESQL) } else { self.trouble(POSTGRESQL, "does not answer") }
    }

    /// Adds a check that is evaluated for each report.
    pub fn ask(&self, question: impl Fn() -> Option<String> + Send + Sync + 'static) {
        self.state().questions.push(Box::new(question));
    }

    /// The process can't work any more and must be restarted.
    pub fn fail(&self, why: impl Into<String>) {
        self.state().failure = Some(why.into());
    }

    /// All problems. None: the process is ready.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        let state = self.state();
        let troubles = state.troubles.iter().map(|(what, why)| format!("{what}: {why}"));
        state.failure.iter().cloned().chain(troubles).chain(state.questions.iter().filter_map(|ask| ask())).collect()
    }

    /// Why the process must be restarted, if it must.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_reported_until_it_is_cleared() {
        let health = Health::default();
        health.database_answers(false);
        health.trouble("mailrun.items", "not consumed yet");
        health.trouble("mailrun.items", "its consumer is interrupted");
        let told = health.clone();
        assert_eq!(told.troubles(), ["PostgreSQL: does not answer", "mailrun.items: its consumer is interrupted"]);
        health.database_answers(true);
        health.fine("mailrun.items");
        assert!(told.troubles().is_empty() && told.failure().is_none());
    }

    #[test]
    fn a_failure_makes_the_process_not_ready_and_checks_run_for_each_report() {
        let health = Health::default();
        let rejections = Arc::new(Mutex::new(Some("full".to_owned())));
        let asked = Arc::clone(&rejections);
        health.ask(move || asked.lock().unwrap().clone());
        health.fail("declared dead");
        assert_eq!(health.troubles(), ["declared dead", "full"]);
        *rejections.lock().unwrap() = None;
        assert_eq!((health.troubles(), health.failure()), (vec!["declared dead".into()], Some("declared dead".into())));
    }
}
