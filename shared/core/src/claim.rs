//! What the ledger knows of a claim: who holds it, and what became of that worker.

use crate::{
    item::{Key, Standing},
    run::Wanted,
};

/// Why no worker will ever make an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withheld {
    /// The run was cancelled.
    Cancelled,
    /// The person was erased, or the person, the run or the item's data was deleted from the ledger.
    Deleted,
    /// The job withheld it. The code is the job's: for invitations, a suppressed address or a person who is already invited.
    ByJob(u8),
}

/// What is known of an attempt whose claim was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// What was asked for.
    pub key: Key,
    /// Where the item stands; none: in a state of a later version.
    pub standing: Option<Standing>,
    /// What a person wants of the run; none: it was deleted.
    pub wanted: Option<Wanted>,
    /// Who claimed the attempt.
    pub owner: Option<Owner>,
}

/// The holder of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// No worker will ever make the attempt.
    Nobody(Withheld),
    /// A worker has begun to.
    Worker {
        /// Its id.
        id: i64,
        /// What is known of it.
        fate: Fate,
    },
}

/// What is known of the worker that holds a claim, and of the attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The worker has not ended, and was not declared dead: it will report.
    Alive,
    /// It has ended or died, but there is a receipt: the mail server had accepted the mail.
    Accepted,
    /// It has ended or died, and left nothing but the claim.
    Dead,
}
