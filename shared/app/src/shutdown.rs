//! Graceful shutdown: the first signal asks every part to finish, the second ends the process at once.

use std::{
    env,
    io::{self, Read as _},
    process,
};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Set for a child process that must stop when its standard input ends.
pub const STOP_ON_STDIN_EOF: &str = "MAILRUN_STOP_ON_STDIN_EOF";

/// The exit code after a second signal.
const EXIT_SECOND_SIGNAL: i32 = 130;

/// A token that the first SIGINT or SIGTERM cancels. The second one ends the process.
///
/// # Errors
/// The signal handlers can't be installed.
pub fn on_signal() -> io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping: finishing work in progress; a second signal ends the process at once");
        stop.cancel();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        warn!("second signal received, ending at once");
        process::exit(EXIT_SECOND_SIGNAL);
    });
    Ok(token)
}

/// The same, but the token is also cancelled when the parent process is gone.
///
/// # Errors
/// The signal handlers can't be installed.
pub fn on_signal_or_orphaned() -> io::Result<CancellationToken> {
    let stop = on_signal()?;
    let token = stop.clone();
    tokio::spawn(async move {
        parent_gone().await;
        token.cancel();
    });
    Ok(stop)
}

/// Returns when the parent process is gone, if [`STOP_ON_STDIN_EOF`] is set; otherwise never.
async fn parent_gone() {
    if env::var_os(STOP_ON_STDIN_EOF).is_none_or(|value| value != "1") {
        return std::future::pending().await;
    }
    let (tell, told) = oneshot::channel();
    // A thread instead of the runtime's blocking pool, whose pending read would block the runtime's shutdown.
    let watcher = std::thread::Builder::new().name("parent".to_owned()).spawn(move || {
        let mut input = io::stdin().lock();
        let mut buffer = [0; 64];
        while matches!(input.read(&mut buffer), Ok(1..)) {}
        let _ = tell.send(());
    });
    match watcher {
        Ok(_) => drop(told.await),
        Err(error) => {
            tracing::error!(%error, "can't watch the parent process");
            std::future::pending::<()>().await;
        }
    }
}
