//! Takes back what the kernel keeps when another server changed it, and says how far it got.
//!
//! Telling the kernel can wait: expiring a name needs the directory's lock, which the kernel holds
//! while a local program's `mkdir` or lookup there waits for the cluster; dropping pages waits for
//! reads and writes of them. Were the change acknowledged only afterwards, two servers making names
//! in one directory would wait for each other. So nothing that holds a request up is ever called
//! from a request, and an acknowledgement does not wait for whoever waits for it. The rules are
//! scenario 1 of the coherence page.
//!
//! - A name: [`Caches`] gives no timeout for names of the directory from the mark on. If the
//!   directory's lock is not to be had in a moment, the kernel is made to throw out every name
//!   ([`NoticeChannel::forget_names`]), which takes no lock; the expiry follows when the lock is free.
//! - Attributes: telling them waits for nobody.
//! - Pages: at once, if a request that holds pages of the file waits for the cluster. Its pages are
//!   dropped right after its answer.
//!
//! The last resort, where the kernel cannot sweep names or a read of those very pages takes long, is
//! to acknowledge when the longest timeout given before has run out. Pages are dropped as soon
//! as the read ends, and the next open starts without any. It is counted and logged.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use ctfs_meta::Change;
use ctfs_types::{Ino, LogIndex};
use ctfs_vfs::{CACHE_TIMEOUT_MAX, KernelCache, Vfs};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::{
    caches::{Caches, Kept},
    notice::NoticeChannel,
};

/// The longest timeout a reply carries, and a margin for the kernel's clock ticks.
const TIMEOUTS_RUN_OUT: Duration = CACHE_TIMEOUT_MAX.saturating_add(Duration::from_millis(50));
/// An expiry that takes so much longer than an expiry does waits for a directory's lock. It is also
/// well above what the kernel takes to work in an answer that it has been given: the names of one
/// that came before the mark must not come after the sweep, which would not find them.
const SWEEP_AFTER: Duration = Duration::from_millis(20);
/// Changes waiting to be told; past it the kernel is told to forget everything instead.
const JOBS_MAX: usize = 65536;
/// Inodes in a directory that are told of one by one; past it the kernel forgets everything.
const CHILDREN_MAX: usize = 8192;
/// Threads that tell; one blocked by a directory or a page must not hold up the others.
const NAME_THREADS: usize = 2;
const PAGE_THREADS: usize = 8;

/// Tells one mount's kernel. Cheap to clone.
#[derive(Clone)]
pub struct Notifier {
    shared: Arc<Shared>,
}

struct Shared {
    caches: Arc<Caches>,
    vfs: Arc<Vfs>,
    channel: Arc<NoticeChannel>,
    state: Mutex<State>,
    names_ready: Condvar,
    attrs_ready: Condvar,
    pages_ready: Condvar,
    /// Something became outstanding, or the end.
    outstanding: Condvar,
    told: watch::Sender<LogIndex>,
    /// Acknowledgements that only the end of all timeouts made possible.
    last_resorts: AtomicU64,
    sweeps: AtomicU64,
}

#[derive(Default)]
struct State {
    applied: LogIndex,
    next_job: u64,
    names: VecDeque<Job>,
    attrs: VecDeque<Job>,
    pages: VecDeque<Job>,
    /// Jobs that hold up an acknowledgement, by number.
    holding: BTreeMap<u64, Held>,
    stopping: bool,
}

/// An acknowledgement that waits for a job.
#[derive(Clone, Copy)]
struct Held {
    index: LogIndex,
    since: Instant,
    what: What,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    NamesIn(Ino),
    Attr,
    PagesOf(Ino),
    Everything,
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
    pub(crate) fn start(vfs: Arc<Vfs>, caches: Arc<Caches>, channel: Arc<NoticeChannel>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            caches,
            vfs,
            channel,
            state: Mutex::default(),
            names_ready: Condvar::new(),
            attrs_ready: Condvar::new(),
            pages_ready: Condvar::new(),
            outstanding: Condvar::new(),
            told: watch::Sender::new(LogIndex(0)),
            last_resorts: AtomicU64::new(0),
            sweeps: AtomicU64::new(0),
        });
        let spawn = |name: String, body: fn(&Shared)| {
            let shared = shared.clone();
            thread::Builder::new().name(name).spawn(move || body(&shared)).map(drop)
        };
        for thread in 0..NAME_THREADS {
            spawn(format!("ctfs-names-{thread}"), |shared| shared.tell(|state| &mut state.names, &shared.names_ready))?;
        }
        spawn("ctfs-attrs".into(), |shared| shared.tell(|state| &mut state.attrs, &shared.attrs_ready))?;
        for thread in 0..PAGE_THREADS {
            spawn(format!("ctfs-pages-{thread}"), |shared| shared.tell(|state| &mut state.pages, &shared.pages_ready))?;
        }
        spawn("ctfs-timeouts".into(), Shared::watch_outstanding)?;
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

    /// Acknowledgements so far that had to wait until every timeout given before had run out.
    pub fn last_resorts(&self) -> u64 {
        self.shared.last_resorts.load(Relaxed)
    }

    /// How often the kernel was made to throw out all names.
    pub fn sweeps(&self) -> u64 {
        self.shared.sweeps.load(Relaxed)
    }

    /// Ends the threads; whatever was applied counts as told, for there is no kernel any more.
    pub(crate) fn stop(&self) {
        let mut state = self.shared.state.lock();
        state.stopping = true;
        self.shared.clear(&mut state);
        state.holding.clear();
        self.shared.advance(&state);
        self.shared.names_ready.notify_all();
        self.shared.attrs_ready.notify_all();
        self.shared.pages_ready.notify_all();
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
        state.holding.retain(|_, held| held.what != What::PagesOf(ino));
        if state.holding.len() < before {
            self.shared.advance(&state);
        }
    }
}

impl Shared {
    fn enqueue(&self, index: Option<LogIndex>, changes: Vec<Change>) {
        let mut too_many = false;
        let changes: Vec<Change> = changes.into_iter().flat_map(|change| self.with_children(change, &mut too_many)).collect();
        // Marked before anything is told, and outside the lock of the queue.
        let told = |change: Change| {
            let holds = self.mark(&change);
            // Only then: whoever opens the directory from here on is given no listing to keep.
            let listing = self.mark_listing(&change);
            holds.map(|holds| (change, holds)).into_iter().chain(listing)
        };
        let changes: Vec<(Change, bool)> = changes.into_iter().flat_map(told).collect();

        let mut state = self.state.lock();
        if let Some(index) = index {
            state.applied = state.applied.max(index);
        }
        if state.stopping {
            self.advance(&state);
            return;
        }
        if too_many || state.names.len() + state.attrs.len() + state.pages.len() + changes.len() > JOBS_MAX {
            tracing::warn!("too much to tell the kernel one by one; telling it to forget everything");
            self.forget_everything(&mut state);
            return;
        }
        for (change, holds) in changes {
            // What no entry caused holds no entry up.
            let holds = holds && index.is_some();
            self.push(&mut state, Forget::Change(change), holds);
        }
        self.advance(&state);
    }

    /// Notes what replies under way must not let the kernel keep. `None`: the kernel keeps nothing
    /// of it. Else whether the acknowledgement has to wait for it.
    fn mark(&self, change: &Change) -> Option<bool> {
        match change {
            Change::Entry { parent, .. } => {
                let kept = self.caches.mark_directory(*parent);
                // No timeout given before the mark is still running: the kernel asks anyway.
                let keeps = matches!(kept, Kept::Before(since) if since.elapsed() < TIMEOUTS_RUN_OUT);
                self.caches.is_known(*parent).then_some(keeps)
            }
            Change::Children { dir } => {
                let kept = self.caches.mark_directory(*dir);
                let keeps = matches!(kept, Kept::Before(since) if since.elapsed() < TIMEOUTS_RUN_OUT);
                (self.caches.is_known(*dir) && keeps).then_some(true)
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
            | Change::Covered { .. }
            | Change::ChunkWanted { .. }
            | Change::ChunkForgotten { .. }
            | Change::Members
            | Change::Fenced { .. } => None,
        }
    }

    /// A listing that the kernel keeps is dropped like the pages of a file. Nobody waits for the cluster with
    /// one of its pages.
    fn mark_listing(&self, change: &Change) -> Option<(Change, bool)> {
        let (Change::Entry { parent: dir, .. } | Change::Children { dir }) = change else { return None };
        let drop = Change::Data { ino: *dir, offset: 0, len: u64::MAX };
        self.caches.listings.changed(*dir).then_some((drop, true))
    }

    /// With a directory goes what the kernel keeps of anything in it: another server may change that
    /// from here on and tell nobody.
    fn with_children(&self, change: Change, too_many: &mut bool) -> Vec<Change> {
        let dir = match change {
            Change::Children { dir } => dir,
            Change::Covered { ino } => return vec![Change::Attr { ino }, Change::Data { ino, offset: 0, len: u64::MAX }],
            other => return vec![other],
        };
        let children = self.vfs.inodes_in(dir, CHILDREN_MAX);
        *too_many |= children.len() >= CHILDREN_MAX;
        let below = children.into_iter().flat_map(|ino| {
            [Change::Attr { ino }, Change::Data { ino, offset: 0, len: u64::MAX }]
        });
        std::iter::once(change).chain(below).collect()
    }

    fn clear(&self, state: &mut State) {
        state.names.drain(..).for_each(|job| self.caches.untold.told(job.number));
        state.attrs.clear();
        state.pages.clear();
    }

    fn forget_everything(&self, state: &mut State) {
        self.caches.mark_everything();
        self.clear(state);
        // Each entry not acknowledged so far waits for the one job that replaces them all.
        let oldest = state.holding.values().next().copied();
        state.holding.clear();
        self.push(state, Forget::Everything, true);
        if let (Some(oldest), Some(held)) = (oldest, state.holding.values_mut().next()) {
            *held = Held { index: oldest.index, ..*held };
        }
        self.advance(state);
    }

    fn push(&self, state: &mut State, change: Forget, holds: bool) {
        let number = state.next_job;
        state.next_job += 1;
        let what = match &change {
            Forget::Change(Change::Entry { parent: dir, .. } | Change::Children { dir }) => What::NamesIn(*dir),
            Forget::Change(Change::Data { ino, .. }) => What::PagesOf(*ino),
            Forget::Change(_) => What::Attr,
            Forget::Everything => What::Everything,
        };
        if holds {
            state.holding.insert(number, Held { index: state.applied, since: Instant::now(), what });
            self.outstanding.notify_one();
        }
        let (queue, ready) = match what {
            What::NamesIn(_) => (&mut state.names, &self.names_ready),
            What::Attr => (&mut state.attrs, &self.attrs_ready),
            What::PagesOf(_) | What::Everything => (&mut state.pages, &self.pages_ready),
        };
        if let Forget::Change(Change::Entry { parent, .. }) = &change {
            self.caches.untold.add(number, *parent);
        }
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
            let told = self.tell_one(&job.change);
            self.caches.untold.told(job.number);
            state = self.state.lock();
            if told && state.holding.remove(&job.number).is_some() {
                self.advance(&state);
            }
        }
    }

    /// Answers whether the kernel keeps nothing of it any more.
    fn tell_one(&self, change: &Forget) -> bool {
        let told = match change {
            Forget::Change(Change::Entry { parent, name }) => {
                self.channel.forget_entry(*parent, name, self.vfs.is_name_gone(*parent, name))
            }
            Forget::Change(Change::Data { ino, offset, len }) => {
                self.channel.forget_pages(*ino, *offset, if *len == u64::MAX { 0 } else { *len })
            }
            Forget::Change(Change::Attr { ino } | Change::Orphaned { ino }) => self.channel.forget_attr(*ino),
            // All its names, also those that are not there: they go with the next sweep.
            Forget::Change(Change::Children { .. }) => return false,
            Forget::Change(_) => Ok(()),
            Forget::Everything => return self.tell_everything(),
        };
        if let Err(error) = told {
            // Its timeout runs out by itself; only pages could stay, and the next open drops them.
            tracing::warn!(%error, "the kernel did not take a notice");
        }
        true
    }

    /// Pages first, for they have no timeout. Names the kernel may keep until theirs have run out, if
    /// they cannot be swept.
    fn tell_everything(&self) -> bool {
        let marked = Instant::now();
        for ino in self.caches.known() {
            if let Err(error) = self.channel.forget_pages(ino, 0, 0) {
                tracing::warn!(%error, "the kernel did not take a notice");
            }
        }
        // Answers given before the mark are in the kernel by then.
        thread::sleep(SWEEP_AFTER.saturating_sub(marked.elapsed()));
        self.sweep()
    }

    fn sweep(&self) -> bool {
        let swept = self.channel.forget_names();
        if swept {
            self.sweeps.fetch_add(1, Relaxed);
        }
        swept
    }

    /// Lets acknowledgements go on that wait for what the kernel holds locked.
    fn watch_outstanding(&self) {
        let mut state = self.state.lock();
        // Where names cannot be swept, only the end of all timeouts helps.
        let mut sweep_again = Instant::now();
        while !state.stopping {
            let now = Instant::now();
            self.let_timeouts_run_out(&mut state, now);
            let stuck = |held: &&Held| matches!(held.what, What::NamesIn(_)) && now >= held.since + SWEEP_AFTER;
            if now >= sweep_again && state.holding.values().any(|held| stuck(&held)) {
                drop(state);
                let swept = self.sweep_stuck(now);
                state = self.state.lock();
                sweep_again = now + if swept { SWEEP_AFTER } else { TIMEOUTS_RUN_OUT };
                continue;
            }
            let next = state.holding.values().map(|held| match held.what {
                What::NamesIn(_) => sweep_again.max(held.since + SWEEP_AFTER).min(held.since + TIMEOUTS_RUN_OUT),
                _ => held.since + TIMEOUTS_RUN_OUT,
            });
            match next.min() {
                Some(at) => drop(self.outstanding.wait_until(&mut state, at)),
                None => self.outstanding.wait(&mut state),
            }
        }
    }

    /// Takes every name from the kernel, and releases those whose directories were given no timeout
    /// for a while: the others' could still be on their way.
    fn sweep_stuck(&self, now: Instant) -> bool {
        let before = now.checked_sub(SWEEP_AFTER).unwrap_or(now);
        let dirs: BTreeSet<Ino> = self.state.lock().holding.values().filter_map(|held| held.what.directory()).collect();
        let dirs = self.caches.marked_before(dirs.into_iter(), before);
        if !self.sweep() {
            return false;
        }
        self.caches.swept(&dirs, before);
        let mut state = self.state.lock();
        // What came after the sweep is of a directory of which the kernel was given nothing since.
        state.holding.retain(|_, held| held.what.directory().is_none_or(|dir| !dirs.contains(&dir)));
        self.advance(&state);
        true
    }

    fn let_timeouts_run_out(&self, state: &mut State, now: Instant) {
        let late = |held: &Held| now.duration_since(held.since) >= TIMEOUTS_RUN_OUT;
        let expired: Vec<What> = state.holding.values().filter(|held| late(held)).map(|held| held.what).collect();
        if expired.is_empty() {
            return;
        }
        state.holding.retain(|_, held| !late(held));
        // Of everything, only names are left by now, and this is how they end.
        let resorts = expired.iter().filter(|what| **what != What::Everything).count() as u64;
        if resorts > 0 {
            let count = self.last_resorts.fetch_add(resorts, Relaxed) + resorts;
            tracing::warn!(count, "acknowledged only after the kernel's timeouts ran out");
        }
        self.vfs.distrust_pages();
        self.advance(state);
    }
}

impl What {
    fn directory(self) -> Option<Ino> {
        match self {
            Self::NamesIn(dir) => Some(dir),
            Self::Attr | Self::PagesOf(_) | Self::Everything => None,
        }
    }
}
