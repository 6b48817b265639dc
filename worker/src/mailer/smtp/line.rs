//! Mails that wait for a connection. One of them may be given the connection of another mail while that one's message is on its
//! way: its envelope is sent right behind, which saves a round trip (RFC 2920).

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::FutureExt as _;
use mailrun_core::outcome::Withdrawn;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{super::message::ComposedMail, session::Session};
use crate::attempt::Attempt;

/// A connection on which the receiver's envelope was sent.
pub struct Given {
    /// The relay's index.
    pub relay: usize,
    pub session: Session,
    pub permit: OwnedSemaphorePermit,
}

/// What becomes of a waiting mail, instead of a connection of its own.
pub enum News {
    /// It gets this connection.
    Given(Box<Given>),
    /// Its attempt may not continue.
    Withdrawn(Withdrawn),
}

struct Waiting {
    number: u64,
    relay: usize,
    mail: Arc<ComposedMail>,
    attempt: Attempt,
    news: oneshot::Sender<News>,
}

/// A mail that gets the connection of the mail before it. Dropping it sends the mail back to the line.
pub struct Following {
    /// The mail, whose envelope is sent.
    pub mail: Arc<ComposedMail>,
    news: oneshot::Sender<News>,
}

impl Following {
    /// Gives it the connection.
    pub fn give(self, given: Given) {
        // If the mail is gone, the connection is closed: replies to its envelope are outstanding.
        let _ = self.news.send(News::Given(Box::new(given)));
    }
}

/// The mails of a process that wait for a connection, in the order of their arrival.
#[derive(Default)]
pub struct Line {
    waiting: Mutex<VecDeque<Waiting>>,
    last: AtomicU64,
}

/// A place in the line, given up when dropped.
pub struct Place<'a> {
    line: &'a Line,
    number: u64,
    /// Ends with an error if the mail was chosen and its connection then failed: nothing was handed over.
    pub news: oneshot::Receiver<News>,
}

impl Place<'_> {
    /// Leaves the line. False: the mail was chosen, and news will follow.
    pub fn leave(&self) -> bool {
        let mut waiting = self.line.waiting();
        let at = waiting.iter().position(|waiting| waiting.number == self.number);
        at.and_then(|at| waiting.remove(at)).is_some()
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Line {
    /// Waits for a connection to this relay.
    pub fn join(&self, relay: usize, mail: Arc<ComposedMail>, attempt: Attempt) -> Place<'_> {
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        let (news, receiver) = oneshot::channel();
        self.waiting().push_back(Waiting { number, relay, mail, attempt, news });
        Place { line: self, number, news: receiver }
    }

    /// Chooses the next mail for this relay that `takes` accepts and that may proceed at once.
    pub fn next(&self, relay: usize, takes: impl Fn(&ComposedMail) -> bool) -> Option<Following> {
        loop {
            let Waiting { mail, attempt, news, .. } = {
                let mut waiting = self.waiting();
                // A mail with a send time of its own waits for it on its own connection.
                let fits =
                    |waiting: &Waiting| waiting.relay == relay && !waiting.attempt.is_limited() && takes(&waiting.mail);
                let at = waiting.iter().position(fits)?;
                waiting.remove(at)?
            };
            match attempt.may_proceed().now_or_never() {
                Some(Ok(())) => return Some(Following { mail, news }),
                Some(Err(withdrawn)) => {
                    let _ = news.send(News::Withdrawn(withdrawn));
                }
                // It cannot be told at once: it joins the line again.
                None => return None,
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
