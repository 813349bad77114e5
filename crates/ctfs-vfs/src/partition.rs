//! What reads do while this server cannot ask the others, as the policy of the directory says.
//!
//! That it cannot is found out by a read that needed to ask. From then on nobody waits for that again: reads are
//! answered at once from what this server knows, or refused, until one of the questions that go on being asked
//! beside them is answered or a lease is granted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use ctfs_meta::OnPartition;
use ctfs_types::Ino;
use tokio::{runtime::Handle, time::Instant};

use crate::{FsError, Metadata};

/// Between two questions to the others.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// How long a read waits where the policy is to wait. Programs can be killed meanwhile.
const BLOCKED_MAX: Duration = Duration::from_secs(60);

pub(crate) struct Partition {
    meta: Arc<dyn Metadata>,
    runtime: Handle,
    /// When it was last tried, nobody answered.
    is_cut_off: AtomicBool,
    is_asking: AtomicBool,
    /// Reads answered with what may be of the past.
    stale: AtomicU64,
}

/// What a read may look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sight {
    Present,
    /// What this server knew last; nothing of it may be kept.
    Past,
}

/// One read.
pub(crate) struct Reading<'a> {
    partition: &'a Arc<Partition>,
    began: Instant,
}

impl Partition {
    pub fn new(meta: Arc<dyn Metadata>, runtime: Handle) -> Arc<Self> {
        let (is_cut_off, is_asking) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { meta, runtime, is_cut_off, is_asking, stale: AtomicU64::new(0) })
    }

    pub fn begin(self: &Arc<Self>) -> Reading<'_> {
        Reading { partition: self, began: Instant::now() }
    }

    pub fn is_cut_off(&self) -> bool {
        if self.is_cut_off.load(Relaxed) && self.meta.leased() {
            self.is_cut_off.store(false, Relaxed);
        }
        self.is_cut_off.load(Relaxed)
    }

    /// Reads so far that were answered with what may be of the past.
    pub fn stale_reads(&self) -> u64 {
        self.stale.load(Relaxed)
    }

    /// Returns when the others have answered, or have not for a while.
    async fn ask(&self) {
        match self.meta.barrier().await {
            Ok(()) => self.is_cut_off.store(false, Relaxed),
            Err(error) => {
                self.failed(&error);
                // At once, maybe.
                tokio::time::sleep(ASK_AGAIN).await;
            }
        }
    }

    /// Notes that nobody can be asked, if that is why a look at the present failed.
    fn failed(&self, error: &FsError) -> bool {
        let is_cut_off = matches!(error, FsError::NoQuorum { .. }) && !self.meta.leased();
        if is_cut_off && !self.is_cut_off.swap(true, Relaxed) {
            tracing::warn!("no majority of servers answers; reads go by on-partition from here on");
        }
        is_cut_off
    }

    /// Asks on, once at a time.
    pub fn ask_beside(self: &Arc<Self>) {
        if !self.is_asking.swap(true, Relaxed) {
            let partition = self.clone();
            self.runtime.spawn(async move {
                partition.ask().await;
                partition.is_asking.store(false, Relaxed);
            });
        }
    }

    fn policy(&self, ino: Ino) -> Result<OnPartition, FsError> {
        Ok(self.meta.replica().read().effective_policy(ino)?.on_partition)
    }
}

impl Reading<'_> {
    /// What may be looked at of `ino`.
    ///
    /// # Errors
    /// [`FsError::NoQuorum`] where the policy is to refuse, or to wait and it has.
    pub async fn sight(&self, ino: Ino) -> Result<Sight, FsError> {
        let partition = self.partition;
        while partition.is_cut_off() {
            let waited = self.began.elapsed();
            match partition.policy(ino)? {
                OnPartition::Stale => {
                    partition.ask_beside();
                    partition.stale.fetch_add(1, Relaxed);
                    return Ok(Sight::Past);
                }
                OnPartition::Block if waited < BLOCKED_MAX => partition.ask().await,
                OnPartition::Block => return Err(FsError::NoQuorum { waited }),
                OnPartition::Error => {
                    partition.ask_beside();
                    return Err(FsError::NoQuorum { waited });
                }
            }
        }
        Ok(Sight::Present)
    }

    /// Whether a look at the present failed because nobody can be asked: then ask for [`Self::sight`] again.
    pub fn is_cut_off_by(&self, error: &FsError) -> bool {
        self.partition.failed(error)
    }
}
