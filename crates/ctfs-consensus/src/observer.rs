//! Who is told when this server's replica moves.

use ctfs_meta::Change;
use ctfs_types::LogIndex;
use tokio::sync::watch;

/// The neighbour of the replica: kernel caches, cache tier and lock waiters behind one trait.
///
/// Implemented by the server program, and by tests.
pub trait Observer: Send + Sync + 'static {
    /// Entry `index` is applied and made `changes`, each with the client (one life of one server)
    /// whose command did it. Called in log order, outside the replica's
    /// lock, for every entry also when it changed nothing. Quick; never blocks.
    fn applied(&self, index: LogIndex, changes: Vec<(u64, Change)>);

    /// A command of this server made `changes` before it is in the log; [`Self::applied`] will tell
    /// them again. Quick; never blocks.
    fn happened(&self, changes: &[Change]);

    /// The whole state was replaced: everything cached from the replica is to be forgotten.
    fn installed_snapshot(&self);

    /// How far the neighbour has got with telling the kernel what [`Self::applied`] told it.
    fn invalidated(&self) -> watch::Receiver<LogIndex>;
}
