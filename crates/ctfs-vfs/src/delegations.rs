//! Directories that this server holds, and those that others hold.
//!
//! Who is alone in changing a directory takes it ([`Op::Own`]). From then on what happens there
//! happens at once and follows into the log in order ([`Metadata::happen`]); directories made in it
//! are held from birth. Another server that looks at anything in it, or wants to change it, has it
//! given up first: all that happened is in the log then.
//!
//! - A directory is taken in the background when a name in it was changed through the log. That one
//!   change costs what it always did; those after it are local.
//! - Whoever gives up a directory that is wanted elsewhere gives up with it what it has not changed for
//!   a moment, so that a walk over a large tree asks once and not once for each directory.
//! - A directory that is recalled again shortly after stays shared for a minute: two servers that
//!   write it in turn would only take it from each other.
//! - What nobody changed for long and nobody here has in use is given up unasked: the next who looks at
//!   it elsewhere, over whatever distance, need not ask.
//!
//! [`Delegations`] stands between the file system and the metadata: every command comes through it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ctfs_meta::{Durability, MetaError, Namespace, Op, Reply, SharedNamespace, Subject};
use ctfs_types::{
    Attr, FileBytes, FileKind, FileUse, Holder, Incarnation, Ino, LogIndex, NodeId,
    rules::{Rule, keeps},
};
use parking_lot::Mutex;
use tokio::{runtime::Handle, time::timeout};
use tracing::debug;

use crate::{FsError, Happened, Holders, Metadata, Request, content::is_over};

/// Directories given up by one command.
const GIVE_UP_MAX: usize = 512;
/// Directories looked through for some that nobody uses.
const HELD_MAX: usize = 8192;
/// Directories whose last change is remembered; past it all count as changed long ago.
const REMEMBERED_MAX: usize = 1 << 16;

/// When directories change hands.
#[derive(Debug, Clone)]
pub struct DelegationSettings {
    /// Whether this server takes directories. What others hold it respects in any case.
    pub takes: bool,
    /// How long another server that holds a directory is waited for. Longer than it takes to declare
    /// it ended.
    pub patience: Duration,
    /// How long one question to it may take.
    pub call_patience: Duration,
    /// A holder that did not answer is asked again after this.
    pub ask_again: Duration,
    /// A directory not changed for so long is given up together with another one.
    pub idle: Duration,
    /// A directory not changed for so long is given up unasked.
    pub unused: Duration,
    /// Recalled twice within this, a directory is shared...
    pub flapping: Duration,
    /// ...for so long.
    pub shared_for: Duration,
}

impl Default for DelegationSettings {
    fn default() -> Self {
        Self {
            takes: false,
            patience: Duration::from_secs(20),
            call_patience: Duration::from_secs(8),
            ask_again: Duration::from_millis(300),
            idle: Duration::from_secs(1),
            unused: Duration::from_secs(10),
            flapping: Duration::from_secs(10),
            shared_for: Duration::from_secs(60),
        }
    }
}

/// What this server did about directories, counted since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DelegationFigures {
    /// Directories taken by a command of their own.
    pub taken: u64,
    /// Commands that happened here before they were in the log.
    pub ahead: u64,
    /// Recalls by other servers that were answered.
    pub given_up: u64,
    /// Directories given up unasked, because nobody used them.
    pub unused: u64,
    /// Directories that were left shared, because they were recalled again and again.
    pub shared: u64,
    /// Recalls of what other servers held.
    pub recalled: u64,
}

/// The metadata, with the rules of holding directories around them.
pub struct Delegations {
    inner: Arc<dyn Metadata>,
    holders: Arc<dyn Holders>,
    settings: DelegationSettings,
    runtime: Handle,
    state: Mutex<State>,
    /// One directory, or set of them, is given up at a time.
    giving_up: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Being taken.
    taking: HashSet<Ino>,
    /// Given up by a command whose outcome is not known: held at most until it is taken anew.
    in_doubt: HashSet<Ino>,
    changed: HashMap<Ino, Instant>,
    /// Inodes with other changes than of names, since it was looked last which directories nobody uses.
    touched: HashSet<Ino>,
    recalled: HashMap<Ino, Instant>,
    figures: DelegationFigures,
}

impl State {
    fn remember(map: &mut HashMap<Ino, Instant>, dir: Ino) {
        if map.len() >= REMEMBERED_MAX {
            map.clear();
        }
        map.insert(dir, Instant::now());
    }
}

impl Delegations {
    pub fn new(inner: Arc<dyn Metadata>, holders: Arc<dyn Holders>, settings: DelegationSettings, runtime: Handle) -> Arc<Self> {
        Arc::new(Self { inner, holders, settings, runtime, state: Mutex::default(), giving_up: tokio::sync::Mutex::default() })
    }

    pub fn figures(&self) -> DelegationFigures {
        self.state.lock().figures
    }

    /// Has whoever holds the directory give it up; by whom is known from a read or a refusal.
    ///
    /// # Errors
    /// [`MetaError::Held`] after the deadline.
    pub async fn recall(&self, dir: Ino, holder: Holder, deadline: Instant) -> Result<(), FsError> {
        if holder == self.inner.holder() {
            return self.give_up(dir).await;
        }
        self.state.lock().figures.recalled += 1;
        let _kept = if keeps(Rule::WaitingGivesUp) { None } else { Some(self.giving_up.lock().await) };
        let patience = deadline.saturating_duration_since(Instant::now()).min(self.settings.call_patience);
        match timeout(patience, self.holders.recall(holder, dir)).await {
            // The holder says that it is given up; without a lease it may not be applied here yet.
            Ok(Ok(())) => return self.inner.be_current().await,
            Ok(Err(error)) => debug!(%dir, node = %holder.node, %error, "the holder did not give the directory up"),
            Err(_) => debug!(%dir, node = %holder.node, "the holder did not answer"),
        }
        if Instant::now() >= deadline {
            return Err(MetaError::Held { ino: dir, holder }.into());
        }
        tokio::time::sleep(self.settings.ask_again).await;
        // It may have ended meanwhile.
        self.inner.be_current().await
    }

    /// Another server wants the directory: all that happened there is in the log, and the directory is
    /// free, when this answers.
    ///
    /// # Errors
    /// The log did not answer in time; this server may hold the directory on.
    pub async fn give_up(&self, dir: Ino) -> Result<(), FsError> {
        let _one_at_a_time = self.giving_up.lock().await;
        let me = self.inner.holder();
        let mut given: Vec<(Ino, u64)> = Vec::new();
        let shared;
        {
            let replica = self.inner.replica().read();
            let Some(since) = held_since(&replica, dir, me)? else { return Ok(()) };
            let mut state = self.state.lock();
            state.figures.given_up += 1;
            shared = state.recalled.get(&dir).is_some_and(|at| at.elapsed() < self.settings.flapping);
            State::remember(&mut state.recalled, dir);
            given.push((dir, since));
            let is_idle = |ino: &Ino| state.changed.get(ino).is_none_or(|at| at.elapsed() >= self.settings.idle);
            if shared {
                state.figures.shared += 1;
            } else if is_idle(&dir) {
                for (ino, since) in replica.held_directories(me, GIVE_UP_MAX - 1)? {
                    if ino != dir && is_idle(&ino) {
                        given.push((ino, since));
                    }
                }
            }
        }
        self.disown(given, shared).await
    }

    /// Gives up unasked what was not changed for long. `busy` says in which directories programs here are at
    /// work; it is asked only when there is something to give up. Answers how many were given up.
    ///
    /// # Errors
    /// As [`Self::give_up`].
    pub async fn give_up_unused(&self, busy: impl FnOnce() -> Result<HashSet<Ino>, FsError>) -> Result<usize, FsError> {
        let _one_at_a_time = self.giving_up.lock().await;
        let mut given = {
            let replica = self.inner.replica().read();
            let mut state = self.state.lock();
            for ino in std::mem::take(&mut state.touched) {
                if let Some((dir, _)) = replica.cover(ino)? {
                    State::remember(&mut state.changed, dir);
                }
            }
            let is_unused = |ino: &Ino| state.changed.get(ino).is_none_or(|at| at.elapsed() >= self.settings.unused);
            let mut held = replica.held_directories(self.inner.holder(), HELD_MAX)?;
            held.retain(|(ino, _)| is_unused(ino) && !state.in_doubt.contains(ino));
            held
        };
        if given.is_empty() {
            return Ok(0);
        }
        let busy = busy()?;
        given.retain(|(ino, _)| !busy.contains(ino));
        given.truncate(GIVE_UP_MAX);
        let count = given.len();
        if count > 0 {
            self.disown(given, false).await?;
            self.state.lock().figures.unused += count as u64;
        }
        Ok(count)
    }

    /// The caller gives up alone.
    async fn disown(&self, given: Vec<(Ino, u64)>, shared: bool) -> Result<(), FsError> {
        let me = self.inner.holder();
        let dirs: Vec<Ino> = given.iter().map(|(dir, _)| *dir).collect();
        self.inner.close_ahead(&dirs);
        match self.inner.request().propose(Op::Disown { files: given, holder: me, shared }).await {
            Ok(_) | Err(FsError::Meta(_)) => {
                // Closed once by this, and once more by an earlier try whose outcome was not known.
                let mut open = dirs.clone();
                {
                    let mut state = self.state.lock();
                    for dir in &dirs {
                        open.extend(state.in_doubt.take(dir));
                        state.changed.remove(dir);
                    }
                }
                self.inner.replica().write().open_ahead(&open);
                Ok(())
            }
            Err(error) => {
                // It may still happen, at any time: nothing happens there any more until it is taken anew.
                let known: Vec<Ino> = {
                    let mut state = self.state.lock();
                    dirs.into_iter().filter(|dir| !state.in_doubt.insert(*dir)).collect()
                };
                self.inner.replica().write().open_ahead(&known);
                Err(error)
            }
        }
    }

    /// A command went through the log: whoever is alone in a directory takes it, for the next ones.
    fn take_for_next_time(self: &Arc<Self>, op: &Op) {
        if !self.settings.takes {
            return;
        }
        for dir in dirs_of(op) {
            let wanted = self.inner.replica().read().attr(dir).ok().flatten().is_some_and(|attr| self.may_take(&attr));
            if wanted && self.state.lock().taking.insert(dir) {
                let this = self.clone();
                self.runtime.spawn(async move { this.take(dir).await });
            }
        }
    }

    fn may_take(&self, attr: &Attr) -> bool {
        let me = self.inner.holder();
        match attr.usage {
            FileUse::Free => true,
            FileUse::Owned { holder, .. } => holder == me && self.state.lock().in_doubt.contains(&attr.ino),
            FileUse::Shared { since } => is_over(since, self.settings.shared_for),
        }
    }

    async fn take(&self, dir: Ino) {
        let taken = self.inner.request().propose(Op::Own { ino: dir, holder: self.inner.holder(), although_shared: true }).await;
        let mut state = self.state.lock();
        state.taking.remove(&dir);
        match taken {
            Ok(_) => {
                state.figures.taken += 1;
                State::remember(&mut state.changed, dir);
                if state.in_doubt.remove(&dir) {
                    drop(state);
                    self.inner.replica().write().open_ahead(&[dir]);
                }
            }
            Err(error) => debug!(%dir, %error, "the directory is not held"),
        }
    }

    /// Has the command happen here, if that may be.
    fn try_ahead(&self, op: &Op) -> Option<Happened> {
        let happened = self.inner.happen(op)?;
        if !matches!(happened, Happened::Answered(Err(_))) {
            let mut state = self.state.lock();
            state.figures.ahead += 1;
            // A directory that was just made will be used.
            let made = match &happened {
                Happened::Answered(Ok(Reply::Entry { attr, .. })) if attr.kind == FileKind::Directory => Some(attr.ino),
                _ => None,
            };
            for dir in dirs_of(op).chain(made) {
                State::remember(&mut state.changed, dir);
            }
            if let Op::SetAttr { ino, .. } | Op::SetXattr { ino, .. } | Op::RemoveXattr { ino, .. } = op
                && state.touched.len() < REMEMBERED_MAX
            {
                state.touched.insert(*ino);
            }
        }
        Some(happened)
    }
}

/// Directories in which the command changes names.
fn dirs_of(op: &Op) -> impl Iterator<Item = Ino> {
    let dirs = match op {
        Op::Make { parent, .. } | Op::Unlink { parent, .. } | Op::Rmdir { parent, .. } | Op::Link { parent, .. } => [Some(*parent), None],
        Op::Rename { from, to, .. } => [Some(*from), Some(*to).filter(|to| to != from)],
        _ => [None, None],
    };
    dirs.into_iter().flatten()
}

fn held_since(ns: &Namespace, dir: Ino, me: Holder) -> Result<Option<u64>, FsError> {
    Ok(match ns.attr(dir)?.map(|attr| attr.usage) {
        Some(FileUse::Owned { holder, since }) if holder == me => Some(since),
        _ => None,
    })
}

/// One request; see [`Request`].
struct Ruled {
    delegations: Arc<Delegations>,
    /// The present one. A refusal because of a holder is the last word of a request, so the next try is
    /// another one.
    inner: Mutex<Option<Arc<dyn Request>>>,
}

#[async_trait]
impl Request for Ruled {
    async fn propose(&self, op: Op) -> Result<Reply, FsError> {
        let delegations = &self.delegations;
        let deadline = Instant::now() + delegations.settings.patience;
        loop {
            let known = self.inner.lock().clone();
            let request = match known {
                Some(request) => request,
                None => {
                    match delegations.try_ahead(&op) {
                        Some(Happened::Answered(answer)) => return answer,
                        Some(Happened::Unsure(reply)) => return delegations.inner.settled().await.map(|()| reply),
                        None => {}
                    }
                    let request = delegations.inner.request();
                    *self.inner.lock() = Some(request.clone());
                    request
                }
            };
            match request.propose(op.clone()).await {
                Err(FsError::Meta(MetaError::Held { ino, holder })) if delegations.is_directory(ino) && Instant::now() < deadline => {
                    delegations.recall(ino, holder, deadline).await?;
                    *self.inner.lock() = None;
                }
                Ok(reply) => {
                    delegations.take_for_next_time(&op);
                    return Ok(reply);
                }
                refused => return refused,
            }
        }
    }
}

impl Delegations {
    fn is_directory(&self, ino: Ino) -> bool {
        matches!(self.inner.replica().read().attr(ino), Ok(Some(attr)) if attr.kind == FileKind::Directory)
    }
}

/// The metadata as the file system uses them: with the rules of holding directories.
pub struct RuledMetadata(pub Arc<Delegations>);

#[async_trait]
impl Metadata for RuledMetadata {
    fn replica(&self) -> &SharedNamespace {
        self.0.inner.replica()
    }

    fn request(&self) -> Arc<dyn Request> {
        Arc::new(Ruled { delegations: self.0.clone(), inner: Mutex::new(None) })
    }

    fn happen(&self, op: &Op) -> Option<Happened> {
        self.0.try_ahead(op)
    }

    fn close_ahead(&self, dirs: &[Ino]) {
        self.0.inner.close_ahead(dirs);
    }

    async fn settled(&self) -> Result<(), FsError> {
        self.0.inner.settled().await
    }

    fn write_down(&self, bytes: &FileBytes) -> Option<u64> {
        self.0.inner.write_down(bytes)
    }

    fn let_go(&self, ino: Ino, upto: u64) {
        self.0.inner.let_go(ino, upto);
    }

    fn kept_from(&self) -> u64 {
        self.0.inner.kept_from()
    }

    fn journal_counts(&self, class: Durability) -> bool {
        self.0.inner.journal_counts(class)
    }

    async fn durable(&self, class: Durability) -> Result<bool, FsError> {
        self.0.inner.durable(class).await
    }

    async fn barrier(&self) -> Result<(), FsError> {
        self.0.inner.barrier().await
    }

    fn node(&self) -> NodeId {
        self.0.inner.node()
    }

    fn incarnation(&self) -> Incarnation {
        self.0.inner.incarnation()
    }

    fn leased_for(&self) -> Duration {
        self.0.inner.leased_for()
    }

    fn ahead(&self) -> Option<LogIndex> {
        self.0.inner.ahead()
    }

    fn unseen_change(&self, subject: &Subject) -> Option<LogIndex> {
        self.0.inner.unseen_change(subject)
    }

    async fn await_visible(&self, index: LogIndex) -> Result<(), FsError> {
        self.0.inner.await_visible(index).await
    }
}
