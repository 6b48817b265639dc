//! What keeps a process from doing its work at present, in words: for `/livez` and `/readyz`.
//!
//! The words are for everybody who may ask, so they name no host, user or error of a server: the log has those.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What is wrong with none of the servers.
const PROCESS: &str = "this process";

/// Asked whenever somebody wants to know; none: nothing is wrong.
type Question = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// The health of a process. Clones share it: each part reports what it meets, and takes it back when it has passed.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// What is wrong, by what it is wrong with.
    troubles: BTreeMap<Cow<'static, str>, String>,
    questions: Vec<Question>,
    /// Why only a new start helps.
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

    /// Something is wrong with `what`. It stays so until [`Self::fine`]; a newer reason takes the place of an older one.
    pub fn trouble(&self, what: impl Into<Cow<'static, str>>, why: impl Into<String>) {
        self.state().troubles.insert(what.into(), why.into());
    }

    /// Nothing is wrong with `what` any more.
    pub fn fine(&self, what: &str) {
        self.state().troubles.remove(what);
    }

    /// The process can't work yet.
    pub fn starting(&self, waits_for: &str) {
        self.trouble(PROCESS, format!("is starting, and waits for {waits_for}"));
    }

    /// The process has started.
    pub fn started(&self) {
        self.fine(PROCESS);
    }

    /// The process finishes what it has in hand, and ends.
    pub fn stopping(&self) {
        self.trouble(PROCESS, "is stopping");
    }

    /// Whether PostgreSQL has answered just now.
    pub fn database_answers(&self, answers: bool) {
        const POSTGRESQL: &str = "PostgreSQL";
        if answers { self.fine(POSTGRESQL) } else { self.trouble(POSTGRESQL, "does not answer") }
    }

    /// Asks this as well, each time that somebody wants to know.
    pub fn ask(&self, question: impl Fn() -> Option<String> + Send + Sync + 'static) {
        self.state().questions.push(Box::new(question));
    }

    /// The process is of no use any more, and has to be started again.
    pub fn fail(&self, why: impl Into<String>) {
        self.state().failure = Some(why.into());
    }

    /// Everything that is wrong; nothing: the process is ready.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        let state = self.state();
        let troubles = state.troubles.iter().map(|(what, why)| format!("{what}: {why}"));
        state.failure.iter().cloned().chain(troubles).chain(state.questions.iter().filter_map(|ask| ask())).collect()
    }

    /// Why only a new start helps; none: it would not.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_told_until_it_has_passed() {
        let health = Health::default();
        health.database_answers(false);
        health.trouble("mailrun.items", "not read yet");
        health.trouble("mailrun.items", "reading it is interrupted");
        let told = health.clone();
        assert_eq!(told.troubles(), ["PostgreSQL: does not answer", "mailrun.items: reading it is interrupted"]);
        health.database_answers(true);
        health.fine("mailrun.items");
        assert!(told.troubles().is_empty() && told.failure().is_none());
    }

    #[test]
    fn a_failure_is_no_readiness_either_and_questions_are_asked_each_time() {
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
