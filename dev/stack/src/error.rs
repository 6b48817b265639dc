//! Errors of the local stack. Each text says what happened and what to do.

use std::{io, path::Path};

/// An error of the local stack.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// A file or folder of the stack could not be read or written.
    #[error("{what}: {source}. Check that this user can write there, or set MAILRUN_HOME to another folder.")]
    Io {
        /// The action that failed, with its path.
        what: String,
        /// The system's error.
        source: io::Error,
    },
    /// Programs are missing and cannot be installed from here.
    #[error("{0}")]
    Missing(String),
    /// The package manager failed.
    #[error(
        "Installing the packages failed:\n{output}\nAs root, run `{command}`, and start Mailrun again. Or set DATABASE_URL and AMQP_URL to existing servers."
    )]
    Install {
        /// The command to run manually.
        command: String,
        /// The last lines it printed.
        output: String,
    },
    /// The keeper, or a server it runs, did not start or failed.
    #[error("The local stack did not start. {0}")]
    NotStarted(String),
    /// An operation timed out.
    #[error("{what} took longer than {seconds} s. The logs are in {logs}; stop the stack and start it again.")]
    Timeout {
        /// The operation.
        what: &'static str,
        /// The time limit.
        seconds: u64,
        /// The folder of the logs.
        logs: String,
    },
    /// PostgreSQL refused a statement.
    #[error("PostgreSQL could not {what}: {source}")]
    Database {
        /// The requested action.
        what: String,
        /// Its error.
        source: sqlx::Error,
    },
    /// RabbitMQ's management API refused a request.
    #[error("RabbitMQ could not {what}: {answer}. Its log is in the `logs` folder of the stack.")]
    Management {
        /// The requested action.
        what: String,
        /// Its answer.
        answer: String,
    },
}

/// Names the action and the path in an I/O error.
pub(crate) fn io_error(action: &str, path: &Path) -> impl FnOnce(io::Error) -> StackError {
    let what = format!("{action} {} failed", path.display());
    move |source| StackError::Io { what, source }
}
