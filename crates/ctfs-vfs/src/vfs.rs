//! Every operation the kernel can ask of the file system.
//!
//! An operation that reads takes the local replica's lock for a moment; one that changes something
//! proposes a command and answers with its verdict. [`Vfs::read`](Vfs) keeps the rules of reading:
//! under a lease, checked again afterwards, or after a barrier; and nothing is told before every
//! server shows it.
//!
//! The operations by topic: [`names`], [`attrs`], [`xattrs`], [`files`], [`locks`].

mod attrs;
mod files;
mod leaving;
mod lock_doubts;
mod locks;
mod names;
mod settle;
mod unused;
mod xattrs;

#[cfg(test)]
pub(crate) mod tests;


use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use ctfs_chunk::CacheTier;
use ctfs_meta::{Change, Durability, LockOwner, MetaError, Op, Reply, Totals, quota};
use ctfs_types::{
    Attr, FileBytes, FileKind, FileName, FileUse, Holder, Incarnation, Ino, LogIndex,
    rules::{Rule, keeps},
};
use parking_lot::Mutex;
use tokio::sync::watch;

pub use files::Opened;
pub use leaving::Leaving;
pub use names::{DirItem, SetTime};
pub use attrs::SetAttrRequest;
pub use locks::LockRequest;

use self::{leaving::Leavings, lock_doubts::Turns};
use crate::{
    ChunkAccess, Content, ContentSettings, FsError, Holders, LeftBytes, Metadata, PageWaits, SpaceReport, Successor, caller,
    content::{Around, Moment},
    delegations::{DelegationFigures, DelegationSettings, Delegations, RuledMetadata},
    handles::Handles,
    partition::{Partition, Sight},
    view::View,
    waiters::{Fate, LockWaiters},
};

/// The longest that the kernel may keep names and attributes without asking. A little less than
/// what is used of a lease: an acknowledgement that can only wait for the end of all timeouts must
/// come before the leader stops renewing this server's lease for want of it.
pub const CACHE_TIMEOUT_MAX: Duration = Duration::from_millis(1750);
/// How long `statfs` waits for the replica's lock before it answers from memory.
const STATFS_PATIENCE: Duration = Duration::from_millis(50);
/// Inodes whose page-cache version we remember; past it we forget all, which costs re-reads only.
const PAGE_VERSIONS_MAX: usize = 1 << 18;

/// Numbers that bound this server's tables.
#[derive(Debug, Clone)]
pub struct VfsSettings {
    pub content: ContentSettings,
    pub delegations: DelegationSettings,
    /// Open files and directories; a few hundred bytes each.
    pub handles_max: usize,
    /// Threads that may wait for locks at the same time.
    pub lock_waiters_max: usize,
    /// How long a command about locks waits for an earlier one of its owner that is in doubt.
    pub lock_patience: Duration,
    /// How long a reader waits for a lock behind writers that wait, before it asks to be let past.
    pub reader_patience: Duration,
    /// How often a thread waiting for a lock is looked at for signals.
    pub interrupt_check: Duration,
    /// Whether a thread shall stop waiting; tests put their own here.
    pub interrupted: fn(u32) -> bool,
}

impl Default for VfsSettings {
    fn default() -> Self {
        Self {
            content: ContentSettings::default(),
            delegations: DelegationSettings::default(),
            handles_max: 1 << 20,
            lock_waiters_max: 4096,
            // A command is given up after 8 s.
            lock_patience: Duration::from_secs(10),
            reader_patience: Duration::from_secs(2),
            interrupt_check: Duration::from_millis(50),
            interrupted: caller::interrupted,
        }
    }
}

/// The kernel's caches, told about changes that its own requests did not show it.
pub trait KernelCache: Send + Sync + 'static {
    /// Drops what the kernel keeps of the changed things, soon. Never blocks.
    fn invalidate(&self, changes: Vec<Change>);

    /// A request that holds pages of `ino` begins to wait for the cluster. Nothing may wait for
    /// those pages from here on: what the request waits for could be waiting for it.
    fn pages_wait(&self, ino: Ino);
}

/// The file system as one server offers it.
pub struct Vfs {
    /// With the rules of [`crate::delegations`] around them.
    meta: Arc<dyn Metadata>,
    delegations: Arc<Delegations>,
    chunks: Arc<dyn ChunkAccess>,
    holders: Arc<dyn Holders>,
    content: Content,
    partition: Arc<Partition>,
    settings: VfsSettings,
    handles: Handles,
    waiters: Arc<LockWaiters>,
    turns: Turns,
    leavings: Arc<Leavings>,
    /// `data_version` up to which the kernel's pages of an inode are good.
    page_versions: Mutex<HashMap<Ino, u64>>,
    /// What `statfs` last saw, for when the replica is busy.
    last_totals: Mutex<Totals>,
    waits: Arc<PageWaits>,
    /// Counts mounts that ended; a wait for a lock belongs to one.
    connection: watch::Sender<u64>,
}

/// What `df` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statfs {
    pub space: SpaceReport,
    /// Inodes in use.
    pub files_used: u64,
    /// Bytes of file content that are not holes.
    pub bytes_used: u64,
}

impl Vfs {
    pub fn new(
        meta: Arc<dyn Metadata>,
        chunks: Arc<dyn ChunkAccess>,
        holders: Arc<dyn Holders>,
        tier: CacheTier,
        settings: VfsSettings,
    ) -> Arc<Self> {
        let waits = Arc::new(PageWaits::default());
        let runtime = settings.content.runtime.clone().unwrap_or_else(tokio::runtime::Handle::current);
        let delegations = Delegations::new(meta, holders.clone(), settings.delegations.clone(), runtime.clone());
        let meta: Arc<dyn Metadata> = Arc::new(RuledMetadata(delegations.clone()));
        let partition = Partition::new(meta.clone(), runtime.clone());
        let around =
            Around { meta: meta.clone(), chunks: chunks.clone(), holders: holders.clone(), waits: waits.clone(), partition: partition.clone() };
        let vfs = Arc::new(Self {
            partition,
            content: Content::new(around, tier, settings.content.clone()),
            handles: Handles::new(settings.handles_max),
            waiters: LockWaiters::new(settings.lock_waiters_max),
            turns: Turns::default(),
            leavings: Arc::default(),
            page_versions: Mutex::default(),
            last_totals: Mutex::default(),
            waits,
            connection: watch::Sender::new(0),
            meta,
            delegations,
            chunks,
            holders,
            settings,
        });
        runtime.spawn(unused::give_up(Arc::downgrade(&vfs)));
        vfs
    }

    pub fn content(&self) -> &Content {
        &self.content
    }

    /// How long the kernel may keep a name or attribute answered now: no longer than the lease holds.
    pub fn cache_timeout(&self) -> Duration {
        self.meta.leased_for().min(CACHE_TIMEOUT_MAX)
    }

    /// Tells everybody here what an applied entry changed: cache tier, lock waiters, handles.
    /// Quick; never blocks. The kernel is told by its notifier, not from here.
    pub fn changed(&self, changes: &[Change]) {
        for change in changes {
            self.content.changed(change);
            match change {
                Change::LockGranted { owner, ticket } => self.lock_wait_ended(owner, *ticket, Fate::Granted),
                Change::LockWaitEnded { owner, ticket } => self.lock_wait_ended(owner, *ticket, Fate::Ended),
                Change::Reaped { ino } => {
                    // Only when this server was away: what was written through these is gone.
                    self.handles.spread_error(*ino, &FsError::Stale(*ino));
                    self.handles.reaped(*ino);
                    self.page_versions.lock().remove(ino);
                }
                _ => {}
            }
        }
    }

    /// The whole replica was replaced; whoever waits looks again.
    pub fn replaced(&self) {
        self.distrust_pages();
        self.waiters.replaced();
    }

    /// The kernel may keep pages that are old: the next open of each file drops them.
    pub fn distrust_pages(&self) {
        self.page_versions.lock().clear();
    }

    /// Whether this replica knows that nothing has this name.
    pub fn is_name_gone(&self, parent: Ino, name: &FileName) -> bool {
        matches!(self.meta.replica().read().lookup(parent, name), Ok(None))
    }

    /// Up to `limit` inodes that have a name in a directory, as this replica knows it.
    pub fn inodes_in(&self, dir: Ino, limit: usize) -> Vec<Ino> {
        let listed = self.meta.replica().read().list(dir, 0, limit);
        listed.map(|entries| entries.into_iter().map(|entry| entry.ino).collect()).unwrap_or_default()
    }

    /// Whether a request that holds pages of `ino` waits for the cluster.
    pub fn pages_wait(&self, ino: Ino) -> bool {
        self.waits.any(ino)
    }

    /// Another server wants to use a file that this one holds.
    ///
    /// # Errors
    /// What is buffered here could not be flushed; this server holds the file on.
    pub async fn give_up(&self, ino: Ino) -> Result<(), FsError> {
        let kind = self.meta.replica().read().attr(ino)?.map(|attr| attr.kind);
        match kind {
            Some(FileKind::Directory) => {
                self.delegations.give_up(ino).await?;
                self.content.give_up_soon();
                Ok(())
            }
            _ => self.content.give_up(ino).await,
        }
    }

    /// Has a command of the server's own happen, and whoever holds what it touches give that up first.
    ///
    /// # Errors
    /// As [`Metadata::propose`].
    pub async fn propose(&self, op: Op) -> Result<Reply, FsError> {
        self.meta.propose(op).await
    }

    /// Whether reads are answered without asking the others, who do not answer.
    pub fn is_cut_off(&self) -> bool {
        self.partition.is_cut_off()
    }

    /// Reads so far that were answered with what this server knew last.
    pub fn stale_reads(&self) -> u64 {
        self.partition.stale_reads()
    }

    pub fn delegations(&self) -> DelegationFigures {
        self.delegations.figures()
    }

    /// The attributes of a file that this server holds, as programs here see them.
    ///
    /// # Errors
    /// [`FsError::Stale`]: it does not hold it.
    pub async fn peek_here(&self, ino: Ino) -> Result<Attr, FsError> {
        let since = self.content.moment();
        let attr = self.read(|view| view.attr_of(ino)).await?;
        match attr.usage {
            FileUse::Owned { holder, .. } if holder == self.meta.holder() => self.shown(attr, since).await,
            _ => Err(FsError::Stale(ino)),
        }
    }

    /// Whether the kernel may keep attributes of this file: not while another server writes it.
    pub fn may_cache(&self, attr: &Attr) -> bool {
        attr.usage.held_from(self.meta.holder()).is_none()
    }

    /// This life of the server was ended while it was cut off: what it held others may have by now.
    /// Unflushed bytes are dropped and told to who wrote them; handles through which locks were held
    /// are dead.
    pub async fn life_ended(&self) {
        if keeps(Rule::LostLocksEndHandles) {
            self.handles.lose_locks();
        }
        self.waiters.replaced();
        for ino in self.content.life_ended().await {
            let why = "this server was cut off for so long that others went on without it".to_owned();
            self.handles.spread_error(ino, &FsError::LostWrites { ino, why });
            if keeps(Rule::NewLifeForgets) {
                self.invalidate(vec![Change::Data { ino, offset: 0, len: u64::MAX }, Change::Attr { ino }]);
            }
        }
    }

    /// These commands had happened here and are lost, because this life was ended: whoever has open what they
    /// were about is told once.
    pub fn lost(&self, ops: impl Iterator<Item = Op>) {
        for op in ops {
            let inos = match op {
                Op::Make { parent, node, .. } => [Some(parent), node.ino],
                Op::Unlink { parent, .. } | Op::Rmdir { parent, .. } => [Some(parent), None],
                Op::Rename { from, to, .. } => [Some(from), Some(to).filter(|to| *to != from)],
                Op::Link { ino, parent, .. } => [Some(ino), Some(parent)],
                Op::SetAttr { ino, .. } | Op::SetXattr { ino, .. } | Op::RemoveXattr { ino, .. } | Op::Write { ino, .. } => [Some(ino), None],
                _ => [None, None],
            };
            for ino in inos.into_iter().flatten() {
                let why = "this server was cut off for so long that others went on without it".to_owned();
                self.handles.spread_error(ino, &FsError::LostWrites { ino, why });
            }
        }
    }

    /// Has the metadata hold the bytes of files that a life left in its journal.
    ///
    /// # Errors
    /// What kept some of them from being put or named; it may be asked again.
    pub async fn write_left(&self, life: Holder, left: Vec<(u64, FileBytes)>, successor: &dyn Successor) -> Result<LeftBytes, FsError> {
        self.content.write_left(life, left, successor).await
    }

    /// Gives up every file that this server holds and could flush; before it stops.
    pub async fn give_up_all(&self) {
        self.content.give_up_all().await;
    }

    /// For each inode whether a program here has it open. One that is not can never be opened here
    /// again: opening and this question share one latch.
    pub fn open_orphans(&self, inos: &[Ino]) -> Vec<bool> {
        self.handles.open_orphans(inos)
    }

    /// Open files and directories on this server.
    pub fn open_handles(&self) -> usize {
        self.handles.count()
    }

    /// Where to send invalidations that no request of the kernel's own implies.
    pub fn set_kernel(&self, kernel: Option<Arc<dyn KernelCache>>) {
        self.waits.set_kernel(kernel);
    }

    /// Makes every write so far durable.
    ///
    /// # Errors
    /// The first inode's failure; the others were tried nevertheless.
    pub async fn flush_all(&self) -> Result<(), FsError> {
        self.content.flush_all().await
    }

    /// The kernel is gone: ends every wait for a lock, closes what it left open.
    pub async fn disconnect(&self) {
        self.connection.send_modify(|connection| *connection += 1);
        for handle in self.handles.all() {
            self.close(handle).await;
        }
        self.distrust_pages();
    }

    /// Space and inodes, from this server's own state: never waits for the network, and for the
    /// replica's lock at most 50 ms. Where a quota leaves less than the volume has, it is shown as if
    /// the directory were a volume of that size.
    pub fn statfs(&self, ino: Ino) -> Statfs {
        let fresh = self
            .meta
            .replica()
            .try_read_for(STATFS_PATIENCE)
            .and_then(|ns| Some((ns.totals(Ino::ROOT).ok()??, ns.quotas_over(ino).ok()?)));
        let (totals, quotas) = match fresh {
            Some((totals, quotas)) => {
                *self.last_totals.lock() = totals;
                (totals, quotas)
            }
            None => (*self.last_totals.lock(), Vec::new()),
        };
        let mut statfs = Statfs {
            space: self.chunks.free(),
            files_used: totals.inodes().saturating_add(1),
            bytes_used: totals.allocated,
        };
        let (bytes, files) = quota::tightest(&quotas);
        if let Some((quota, limit)) = bytes.and_then(|quota| Some((quota, quota.quota.bytes?))) {
            let (space, left) = (&mut statfs.space, limit.saturating_sub(quota.totals.allocated));
            space.available = space.available.min(left);
            if limit < space.total {
                (space.total, space.free) = (limit, left);
                statfs.bytes_used = quota.totals.allocated;
            }
        }
        if let Some((quota, left)) = files.and_then(|quota| Some((quota, quota.files_left()?)))
            && left < statfs.space.files
        {
            statfs.space.files = left;
            statfs.files_used = quota.totals.inodes();
        }
        statfs
    }

    /// Reads the replica so that the answer is the truth of some moment during the call, and told
    /// by no server before all may tell it.
    ///
    /// Look first, then wait: if what was looked at changed and other servers may still answer the old,
    /// the answer is held back until none does. It is the truth of the moment when that became visible.
    /// The lease is looked at again after reading: a pause in between may have ended it.
    ///
    /// What another server alone knows is asked of it: it gives that up first.
    async fn read<T>(&self, look: impl Fn(&View<'_>) -> Result<T, FsError>) -> Result<T, FsError> {
        let deadline = Instant::now() + self.settings.delegations.patience;
        loop {
            match self.read_once(&look).await {
                Err(FsError::Meta(MetaError::Held { ino, holder })) if Instant::now() < deadline => {
                    self.delegations.recall(ino, holder, deadline).await?;
                }
                seen => return seen,
            }
        }
    }

    /// Reads where a policy may allow what this server knew last ([`Partition`]): never to decide what to change.
    async fn read_of<T>(&self, ino: Ino, look: impl Fn(&View<'_>) -> Result<T, FsError>) -> Result<T, FsError> {
        self.read_with_sight(ino, look).await.map(|(seen, _)| seen)
    }

    async fn read_with_sight<T>(&self, ino: Ino, look: impl Fn(&View<'_>) -> Result<T, FsError>) -> Result<(T, Sight), FsError> {
        let reading = self.partition.begin();
        loop {
            let sight = reading.sight(ino).await?;
            let seen = match sight {
                Sight::Present => self.read(&look).await,
                Sight::Past => look(&View::past(&*self.meta, &self.meta.replica().read())),
            };
            match seen {
                Err(error) if sight == Sight::Present && reading.is_cut_off_by(&error) => {}
                seen => return seen.map(|seen| (seen, sight)),
            }
        }
    }

    async fn read_once<T>(&self, look: &impl Fn(&View<'_>) -> Result<T, FsError>) -> Result<T, FsError> {
        if self.meta.leased() {
            let (seen, unseen) = self.look(look);
            if let Some(index) = unseen {
                self.meta.await_visible(index).await?;
            }
            if self.meta.leased() {
                return seen;
            }
        }
        self.meta.barrier().await?;
        let (seen, unseen) = self.look(look);
        if let Some(index) = unseen {
            self.meta.await_visible(index).await?;
        }
        seen
    }

    /// Returns when all that happened here before the call is in the log.
    async fn settled(&self) -> Result<(), FsError> {
        if keeps(Rule::FsyncWaitsForLog) { self.meta.settled().await } else { Ok(()) }
    }

    /// [`Self::settled`], and for [`Durability::All`] until every server with a lease has it: each has its
    /// log on its disk before it applies.
    async fn settled_as(&self, class: Durability) -> Result<(), FsError> {
        self.settled().await?;
        if class != Durability::All {
            return Ok(());
        }
        let ahead = {
            let _shown = self.meta.replica().read();
            self.meta.ahead()
        };
        match ahead {
            Some(index) => self.meta.await_visible(index).await,
            None => Ok(()),
        }
    }

    /// What the replica shows, and the index that must be visible before it is told.
    fn look<T>(&self, look: impl Fn(&View<'_>) -> Result<T, FsError>) -> (Result<T, FsError>, Option<LogIndex>) {
        let namespace = self.meta.replica().read();
        let view = View::new(&*self.meta, &namespace);
        let seen = look(&view);
        (seen, view.newest_unseen().filter(|_| keeps(Rule::ReadsWaitForVisible)))
    }

    /// Attributes as programs see them: committed ones, which were read after `since`, with unflushed writes on top.
    async fn shown(&self, mut attr: Attr, mut since: Moment) -> Result<Attr, FsError> {
        while !self.content.overlay(&mut attr, since) {
            since = self.content.moment();
            attr = match self.read_of(attr.ino, |view| view.attr_of(attr.ino)).await {
                // Removed meanwhile: it is shown as it was last.
                Err(FsError::Stale(_)) => break,
                now => now?,
            };
        }
        Ok(attr)
    }

    /// This life of the server.
    pub fn incarnation(&self) -> Incarnation {
        self.meta.incarnation()
    }

    fn lock_wait_ended(&self, owner: &LockOwner, ticket: u64, fate: Fate) {
        if owner.node == self.meta.node() {
            self.waiters.decided(owner.incarnation, ticket, fate);
        }
    }

    /// Tells the kernel to drop what it keeps, if one is attached. Never blocks.
    pub fn invalidate(&self, changes: Vec<Change>) {
        if let Some(kernel) = self.waits.kernel() {
            kernel.invalidate(changes);
        }
    }

    /// Remembers up to which version the kernel's pages of `ino` are good. Changes made elsewhere
    /// are invalidated as they are applied, so at any moment they are good for the present version.
    fn pages_are_current(&self, ino: Ino) {
        if !self.meta.leased() {
            // Behind on changes, and so on invalidations: what is applied next may not be told yet.
            self.page_versions.lock().remove(&ino);
            return;
        }
        let version = match self.meta.replica().read().attr(ino) {
            Ok(Some(attr)) => attr.data_version,
            _ => return,
        };
        let mut versions = self.page_versions.lock();
        if versions.len() >= PAGE_VERSIONS_MAX {
            versions.clear();
        }
        versions.insert(ino, version);
    }

    fn knows_pages(&self, ino: Ino, data_version: u64) -> bool {
        self.page_versions.lock().get(&ino) == Some(&data_version)
    }

    fn now() -> ctfs_types::Timestamp {
        std::time::SystemTime::now().into()
    }
}

/// A reply of another kind than the command has: the replica is not what this code was built for.
fn unexpected(reply: &Reply) -> FsError {
    tracing::error!(?reply, "a command was answered with another command's reply");
    FsError::Store("unexpected reply".into())
}

fn entry(reply: Reply) -> Result<Attr, FsError> {
    match reply {
        Reply::Entry { attr, .. } | Reply::Attr(attr) => Ok(attr),
        other => Err(unexpected(&other)),
    }
}
