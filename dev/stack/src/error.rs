//! What can go wrong with the local stack; each text says what happened and what to do about it.

use std::{io, path::Path};

/// An error of the local stack.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// A file or folder of the stack could not be read or written.
    #[error("{what}: {source}. Check that this user may write there, or name another folder in MAILRUN_HOME.")]
    Io {
        /// The action that failed, with its path.
        what: String,
        /// What the system answered.
        source: io::Error,
    },
    /// Programs are missing and can't be installed from here.
    #[error("{0}")]
    Missing(String),
    /// The package manager failed.
    #[error(
        "Installing the packages failed:\n{output}\nAs root, run `{command}`, and start Mailrun again. Or set DATABASE_URL and AMQP_URL to servers you already run."
    )]
    Install {
        /// What to run by hand.
        command: String,
        /// The last lines it printed.
        output: String,
    },
    /// The keeper, or a server it keeps, did not start or gave up.
    #[error("The local stack did not start. {0}")]
    NotStarted(String),
    /// Something didn't happen in time.
    #[error("{what} took longer than {seconds} s. The logs are in {logs}; stop the stack and start it again.")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        seconds: u64,
        /// The folder of the logs.
        logs: String,
    },
    /// PostgreSQL refused a statement.
    #[error("PostgreSQL could not {what}: {source}")]
    Database {
        /// What was asked of it.
        what: String,
        /// What it answered.
        source: sqlx::Error,
    },
    /// RabbitMQ's management API refused a request.
    #[error("RabbitMQ could not {what}: {answer}. Its log is in the `logs` folder of the stack.")]
    Management {
        /// What was asked of it.
        what: String,
        /// What it answered.
        answer: String,
    },
}

/// Names the action and the path in an I/O error.
pub(crate) fn io_error(action: &str, path: &Path) -> impl FnOnce(io::Error) -> StackError {
    let what = format!("{action} {} failed", path.display());
    move |source| StackError::Io { what, source }
}
