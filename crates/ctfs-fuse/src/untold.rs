//! Names that changed elsewhere and that the kernel still has where they were.
//!
//! The kernel has a directory in one place. When it is found in another, it is taken out of the old one, for which
//! the kernel tries that place's lock and does not wait: if a program is busy there, or the notice of the move waits
//! for the lock itself, the walk ends with ESTALE. So an answer that would move a directory comes after its notice.

use std::{collections::BTreeMap, time::Duration};

use ctfs_types::Ino;
use parking_lot::Mutex;
use tokio::{sync::Notify, time};

/// Two answers can wait for each other's directory; then the walks that got them may fail.
const WAIT_MAX: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub struct Untold {
    /// By number of the notice.
    directories: Mutex<BTreeMap<u64, Ino>>,
    told: Notify,
}

impl Untold {
    /// Numbers grow.
    pub fn add(&self, number: u64, dir: Ino) {
        self.directories.lock().insert(number, dir);
    }

    pub fn told(&self, number: u64) {
        if self.directories.lock().remove(&number).is_some() {
            self.told.notify_waiters();
        }
    }

    /// Waits for the notices so far of names that are not in `dir`. Of that one the kernel holds the lock as long as
    /// a lookup there waits, and needs none to move what is in it.
    pub async fn all_told_but_in(&self, dir: Ino) {
        let Some(last) = self.directories.lock().last_key_value().map(|(number, _)| *number) else { return };
        let all_told = async {
            loop {
                let mut told = std::pin::pin!(self.told.notified());
                // From here on no notice is missed.
                told.as_mut().enable();
                if self.directories.lock().range(..=last).all(|(_, untold)| *untold == dir) {
                    return;
                }
                told.await;
            }
        };
        if time::timeout(WAIT_MAX, all_told).await.is_err() {
            tracing::warn!(dir = dir.0, "the kernel takes long to let a moved directory go");
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn waits_for_earlier_notices_of_other_directories() {
        let untold = Untold::default();
        untold.add(1, Ino(5));
        assert!(untold.all_told_but_in(Ino(5)).now_or_never().is_some());
        let mut waits = Box::pin(untold.all_told_but_in(Ino(6)));
        assert!(waits.as_mut().now_or_never().is_none());
        untold.add(2, Ino(7));
        assert!(waits.as_mut().now_or_never().is_none());
        untold.told(1);
        assert!(waits.as_mut().now_or_never().is_some(), "what came later is not waited for");
        assert!(untold.all_told_but_in(Ino(5)).now_or_never().is_none());
    }
}
