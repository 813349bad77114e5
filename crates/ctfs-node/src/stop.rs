//! How tasks learn that the server is shutting down.

use tokio::sync::watch;

/// Resolves when `stop` turns true, or nobody is left who could turn it.
pub async fn requested(stop: &mut watch::Receiver<bool>) {
    // Dropped here: the guard inside must not live across an await of the caller.
    drop(stop.wait_for(|&stop| stop).await);
}
