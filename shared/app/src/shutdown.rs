//! Ending in good order: the first signal asks every part to finish, the second one ends the process at once.

use std::{
    env,
    io::{self, Read as _},
    process,
};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Set for a child that shall stop when its standard input ends.
pub const STOP_ON_STDIN_EOF: &str = "MAILRUN_STOP_ON_STDIN_EOF";

/// The exit code of a process that was told twice.
const EXIT_IMPATIENT: i32 = 130;

/// A token that is cancelled by the first SIGINT or SIGTERM. A second one ends the process.
///
/// # Errors
/// When the signals can't be caught.
pub fn on_signal() -> io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping: finishing what is in flight; a second signal ends it at once");
        stop.cancel();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        warn!("told to stop a second time: ending at once");
        process::exit(EXIT_IMPATIENT);
    });
    Ok(token)
}

/// The same, and also cancelled when the parent that watches over this process has gone.
///
/// # Errors
/// When the signals can't be caught.
pub fn on_signal_or_orphaned() -> io::Result<CancellationToken> {
    let stop = on_signal()?;
    let token = stop.clone();
    tokio::spawn(async move {
        parent_gone().await;
        token.cancel();
    });
    Ok(stop)
}

/// Returns when the parent has gone, if that is what it was started to watch for; otherwise never.
async fn parent_gone() {
    if env::var_os(STOP_ON_STDIN_EOF).is_none_or(|value| value != "1") {
        return std::future::pending().await;
    }
    let (tell, told) = oneshot::channel();
    // A thread, not the runtime's blocking pool: a read that never returns would hold up the runtime's end.
    let watcher = std::thread::Builder::new().name("parent".to_owned()).spawn(move || {
        let mut input = io::stdin().lock();
        let mut buffer = [0; 64];
        while matches!(input.read(&mut buffer), Ok(1..)) {}
        let _ = tell.send(());
    });
    match watcher {
        Ok(_) => drop(told.await),
        Err(error) => {
            tracing::error!(%error, "The parent can't be watched");
            std::future::pending::<()>().await;
        }
    }
}
