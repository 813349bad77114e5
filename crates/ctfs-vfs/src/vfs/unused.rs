//! Gives up directories that nobody here uses any more.

use std::{
    collections::HashSet,
    sync::Weak,
    time::Duration,
};

use ctfs_types::Ino;
use tracing::debug;

use super::Vfs;
use crate::FsError;

/// How often it is looked which directories nobody uses.
const TICK: Duration = Duration::from_secs(1);

/// Runs until the file system is dropped.
pub(super) async fn give_up(vfs: Weak<Vfs>) {
    loop {
        let Some(every) = vfs.upgrade().map(|vfs| TICK.min(vfs.settings.delegations.unused)) else { return };
        tokio::time::sleep(every).await;
        let Some(vfs) = vfs.upgrade() else { return };
        match vfs.delegations.give_up_unused(|| vfs.busy_directories()).await {
            Ok(0) => {}
            // What it held with them it holds by themselves now.
            Ok(_) => vfs.content.give_up_soon(),
            Err(error) => debug!(%error, "directories that nobody uses stay held"),
        }
    }
}

impl Vfs {
    /// Directories in which a program here has a file open for writing or locked, or wrote what the
    /// metadata lack: it will go on, and its locks would be in the log from then on.
    fn busy_directories(&self) -> Result<HashSet<Ino>, FsError> {
        let mut inos = self.handles.in_use();
        inos.extend(self.content.pending());
        let ns = self.meta.replica().read();
        let mut busy = HashSet::new();
        for ino in inos {
            busy.extend(ns.cover(ino)?.map(|(dir, _)| dir));
        }
        Ok(busy)
    }
}
