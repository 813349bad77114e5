//! Takes back what the kernel keeps when another server changed it, and says how far it got.
//!
//! Telling the kernel can wait: expiring a name needs the directory's lock, which the kernel holds
//! while a local program's `mkdir` there waits for the cluster; dropping pages waits for reads
//! and writes of them. Were the change acknowledged only afterwards, two servers making names in
//! one directory would wait for each other. So nothing that holds a request up is ever called from
//! a request, and an acknowledgement waits for the kernel or for the end of every timeout given
//! before, whichever comes first. The rules are scenario 1 of the coherence page.
//!
//! - A name: [`Caches`] gives no timeout for names of the directory from the mark on. Once the
//!   longest earlier timeout has run out the kernel asks again anyway.
//! - Attributes: the same, and telling them waits for nobody.
//! - Pages: at once, if a request that holds pages of the file waits for the cluster; else after the
//!   same time the change is acknowledged although a read or write of those very
//!   pages is still under way; the drop follows it at once, and the next open starts without pages.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use ctfs_meta::Change;
use ctfs_types::{Ino, LogIndex};
use ctfs_vfs::{KernelCache, Vfs};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::{caches::Caches, notice::NoticeChannel};

/// The longest timeout a reply carries (one second, see `Vfs::cache_timeout`), and a margin for the
/// kernel's clock ticks.
const TIMEOUTS_RUN_OUT: Duration = Duration::from_millis(1050);
/// Changes waiting to be told; past it the kernel is told to forget everything instead.
const JOBS_MAX: usize = 65536;
/// Threads that tell; one blocked by a directory or a page must not hold up the others.
const NAME_THREADS: usize = 2;
const INODE_THREADS: usize = 3;

/// Tells one mount's kernel. Cheap to clone.
#[derive(Clone)]
pub struct Notifier {
    shared: Arc<Shared>,
}

struct Shared {
    caches: Arc<Caches>,
    vfs: Arc<Vfs>,
    channel: NoticeChannel,
    state: Mutex<State>,
    names_ready: Condvar,
    inodes_ready: Condvar,
    /// Something became outstanding, or the end.
    outstanding: Condvar,
    told: watch::Sender<LogIndex>,
}

#[derive(Default)]
struct State {
    applied: LogIndex,
    next_job: u64,
    names: VecDeque<Job>,
    inodes: VecDeque<Job>,
    /// Jobs that hold up an acknowledgement, by number.
    holding: BTreeMap<u64, Held>,
    stopping: bool,
}

/// An acknowledgement that waits for a job.
#[derive(Clone, Copy)]
struct Held {
    index: LogIndex,
    since: Instant,
    /// The file whose pages are dropped, if it is about pages.
    pages_of: Option<Ino>,
}

struct Job {
    number: u64,
    change: Forget,
}

enum Forget {
    Change(Change),
    Everything,
}

impl Notifier {
    pub(crate) fn start(vfs: Arc<Vfs>, caches: Arc<Caches>, channel: NoticeChannel) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            caches,
            vfs,
            channel,
            state: Mutex::default(),
            names_ready: Condvar::new(),
            inodes_ready: Condvar::new(),
            outstanding: Condvar::new(),
            told: watch::Sender::new(LogIndex(0)),
        });
        let spawn = |name: String, body: fn(&Shared)| {
            let shared = shared.clone();
            thread::Builder::new().name(name).spawn(move || body(&shared)).map(drop)
        };
        for thread in 0..NAME_THREADS {
            spawn(format!("ctfs-names-{thread}"), |shared| shared.tell(|state| &mut state.names, &shared.names_ready))?;
        }
        for thread in 0..INODE_THREADS {
            spawn(format!("ctfs-inodes-{thread}"), |shared| {
                shared.tell(|state| &mut state.inodes, &shared.inodes_ready);
            })?;
        }
        spawn("ctfs-timeouts".into(), Shared::let_timeouts_run_out)?;
        Ok(Self { shared })
    }

    /// Entry `index` is applied; `foreign` is what it changed without this kernel's knowing.
    /// Call in log order, also for entries that changed nothing. Never waits for the kernel.
    pub fn apply(&self, index: LogIndex, foreign: Vec<Change>) {
        self.shared.enqueue(Some(index), foreign);
    }

    /// The replica was replaced: nothing the kernel keeps can be trusted.
    pub fn forget_everything(&self) {
        let mut state = self.shared.state.lock();
        self.shared.forget_everything(&mut state);
    }

    /// Up to which entry nothing older can be seen through this kernel. Ends with the mount.
    pub fn invalidated(&self) -> watch::Receiver<LogIndex> {
        self.shared.told.subscribe()
    }

    /// Ends the threads; whatever was applied counts as told, for there is no kernel any more.
    pub(crate) fn stop(&self) {
        let mut state = self.shared.state.lock();
        state.stopping = true;
        state.names.clear();
        state.inodes.clear();
        state.holding.clear();
        self.shared.advance(&state);
        self.shared.names_ready.notify_all();
        self.shared.inodes_ready.notify_all();
        self.shared.outstanding.notify_all();
    }
}

impl KernelCache for Notifier {
    fn invalidate(&self, changes: Vec<Change>) {
        self.shared.enqueue(None, changes);
    }

    fn pages_wait(&self, ino: Ino) {
        let mut state = self.shared.state.lock();
        let before = state.holding.len();
        state.holding.retain(|_, held| held.pages_of != Some(ino));
        if state.holding.len() < before {
            self.shared.advance(&state);
        }
    }
}

impl Shared {
    fn enqueue(&self, index: Option<LogIndex>, changes: Vec<Change>) {
        // Marked before anything is told, and outside the lock of the queue.
        let changes: Vec<(Change, bool)> =
            changes.into_iter().filter_map(|change| self.mark(&change).map(|holds| (change, holds))).collect();

        let mut state = self.state.lock();
        if let Some(index) = index {
            state.applied = state.applied.max(index);
        }
        if state.stopping {
            self.advance(&state);
            return;
        }
        if state.names.len() + state.inodes.len() + changes.len() > JOBS_MAX {
            tracing::warn!("the kernel is told too slowly; telling it to forget everything");
            self.forget_everything(&mut state);
            return;
        }
        for (change, holds) in changes {
            // What no entry caused holds no entry up.
            let holds = holds && index.is_some();
            let is_name = matches!(change, Change::Entry { .. });
            self.push(&mut state, is_name, Forget::Change(change), holds);
        }
        self.advance(&state);
    }

    /// Notes what replies under way must not let the kernel keep. `None`: the kernel keeps nothing
    /// of it. Else whether the acknowledgement has to wait for it.
    fn mark(&self, change: &Change) -> Option<bool> {
        match change {
            Change::Entry { parent, .. } => {
                let since = self.caches.mark_directory(*parent);
                // No timeout given before the mark is still running: the kernel asks anyway.
                self.caches.is_known(*parent).then(|| since.elapsed() < TIMEOUTS_RUN_OUT)
            }
            Change::Attr { ino } | Change::Orphaned { ino } => {
                self.caches.mark_inode(*ino);
                self.caches.is_known(*ino).then_some(true)
            }
            Change::Data { ino, .. } => {
                self.caches.mark_inode(*ino);
                // A request that holds pages of this file and waits for the cluster may be waiting
                // for this very acknowledgement. Its pages are dropped right after its answer.
                self.caches.is_known(*ino).then(|| !self.vfs.pages_wait(*ino))
            }
            Change::Reaped { .. }
            | Change::LockGranted { .. }
            | Change::LockWaitEnded { .. }
            | Change::Usage { .. }
            | Change::ChunkWanted { .. }
            | Change::ChunkForgotten { .. }
            | Change::Members
            | Change::Fenced { .. } => None,
        }
    }

    fn forget_everything(&self, state: &mut State) {
        self.caches.mark_everything();
        state.names.clear();
        state.inodes.clear();
        // Each entry not acknowledged so far waits for the one job that replaces them all.
        let oldest = state.holding.values().next().copied();
        state.holding.clear();
        self.push(state, false, Forget::Everything, true);
        if let (Some(oldest), Some(held)) = (oldest, state.holding.values_mut().next()) {
            *held = Held { since: oldest.since.max(held.since), ..oldest };
        }
        self.advance(state);
    }

    fn push(&self, state: &mut State, is_name: bool, change: Forget, holds: bool) {
        let number = state.next_job;
        state.next_job += 1;
        if holds {
            let pages_of = match &change {
                Forget::Change(Change::Data { ino, .. }) => Some(*ino),
                _ => None,
            };
            let held = Held { index: state.applied, since: Instant::now(), pages_of };
            state.holding.insert(number, held);
            self.outstanding.notify_one();
        }
        let (queue, ready) =
            if is_name { (&mut state.names, &self.names_ready) } else { (&mut state.inodes, &self.inodes_ready) };
        queue.push_back(Job { number, change });
        ready.notify_one();
    }

    /// Reports the entry before the oldest one that still waits.
    fn advance(&self, state: &State) {
        let told = match state.holding.values().next() {
            Some(held) => LogIndex(held.index.0.saturating_sub(1)),
            None => state.applied,
        };
        self.told.send_if_modified(|last| {
            let newer = told > *last;
            if newer {
                *last = told;
            }
            newer
        });
    }

    /// One telling thread.
    fn tell(&self, queue: impl Fn(&mut State) -> &mut VecDeque<Job>, ready: &Condvar) {
        let mut state = self.state.lock();
        loop {
            if state.stopping {
                return;
            }
            let Some(job) = queue(&mut state).pop_front() else {
                ready.wait(&mut state);
                continue;
            };
            drop(state);
            self.tell_one(&job.change);
            state = self.state.lock();
            if state.holding.remove(&job.number).is_some() {
                self.advance(&state);
            }
        }
    }

    fn tell_one(&self, change: &Forget) {
        let told = match change {
            Forget::Change(Change::Entry { parent, name }) => {
                self.channel.forget_entry(*parent, name, self.vfs.is_name_gone(*parent, name))
            }
            Forget::Change(Change::Data { ino, offset, len }) => {
                self.channel.forget_pages(*ino, *offset, if *len == u64::MAX { 0 } else { *len })
            }
            Forget::Change(Change::Attr { ino } | Change::Orphaned { ino }) => self.channel.forget_attr(*ino),
            Forget::Change(_) => Ok(()),
            Forget::Everything => {
                self.caches.known().into_iter().try_for_each(|ino| self.channel.forget_pages(ino, 0, 0))
            }
        };
        if let Err(error) = told {
            // Its timeout runs out by itself; only pages could stay, and the next open drops them.
            tracing::warn!(%error, "the kernel did not take a notice");
        }
    }

    /// Lets acknowledgements go on when every timeout given before has run out.
    fn let_timeouts_run_out(&self) {
        let mut state = self.state.lock();
        while !state.stopping {
            let now = Instant::now();
            let mut expired = false;
            while let Some(oldest) = state.holding.first_entry() {
                if now.duration_since(oldest.get().since) < TIMEOUTS_RUN_OUT {
                    break;
                }
                oldest.remove();
                expired = true;
            }
            if expired {
                tracing::debug!("acknowledged after the kernel's timeouts ran out");
                self.vfs.distrust_pages();
                self.advance(&state);
            }
            let next = state.holding.values().next().map(|held| held.since + TIMEOUTS_RUN_OUT);
            match next {
                Some(at) => drop(self.outstanding.wait_until(&mut state, at)),
                None => self.outstanding.wait(&mut state),
            }
        }
    }
}
