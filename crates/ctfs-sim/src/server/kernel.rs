//! The kernel above one server, as far as coherence goes: it keeps names and attributes for as long as
//! a reply allows, and drops what a notice names.
//!
//! [`Kernel`] is also the observer of the replica, as `ctfs-node`'s `Events` with the notifier of
//! `ctfs-fuse`: an entry is acknowledged when the kernel was told of it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use ctfs_consensus::Observer;
use ctfs_meta::Change;
use ctfs_types::{
    Attr, Ino, LogIndex, NodeId,
    rules::{Rule, keeps},
};
use ctfs_vfs::{FsError, KernelCache, Opened, Vfs};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};

use crate::shared::Shared;

/// As the notifier of `ctfs-fuse`.
const SWEEP_AFTER: Duration = Duration::from_millis(20);

pub struct Kernel {
    node: NodeId,
    shared: Arc<Shared>,
    own: AtomicU64,
    vfs: OnceLock<Weak<Vfs>>,
    kept: Mutex<Kept>,
    /// Held by requests that change names in a directory, from their question to their answer.
    directories: Mutex<BTreeMap<Ino, Arc<tokio::sync::Mutex<()>>>>,
    notices: mpsc::UnboundedSender<Notice>,
    told: watch::Sender<LogIndex>,
    /// Where the member list changed last.
    members: watch::Sender<LogIndex>,
    pub fenced: Notify,
    /// Notices wait until this is over.
    stuck: watch::Sender<bool>,
}

struct Notice {
    index: Option<LogIndex>,
    changes: Vec<Change>,
}

#[derive(Default)]
struct Kept {
    /// Counts drops: a reply that was on its way during one is not kept.
    drops: u64,
    /// What requests of this kernel change at this moment: nothing of it is kept.
    changing: BTreeMap<Subject, u32>,
    /// Pages have no timeout: they stay until a notice, or an open that does not keep them.
    pages: BTreeMap<Ino, Bytes>,
    names: BTreeMap<(Ino, Vec<u8>), (Option<Attr>, Instant)>,
    attrs: BTreeMap<Ino, (Attr, Instant)>,
}

impl Kept {
    /// As the notifier of `ctfs-fuse`; `children` are the inodes in a directory that is taken.
    fn drop_for(&mut self, change: &Change, children: &[Ino]) {
        self.drops += 1;
        match change {
            Change::Entry { parent, name } => drop(self.names.remove(&(*parent, name.as_bytes().to_vec()))),
            Change::Children { dir } => {
                self.names.retain(|(parent, _), _| parent != dir);
                children.iter().for_each(|ino| self.drop_inode(*ino));
            }
            Change::Data { ino, .. } | Change::Covered { ino } => self.drop_inode(*ino),
            Change::Attr { ino } | Change::Orphaned { ino } => self.drop_attributes(*ino),
            _ => {}
        }
    }

    fn drop_subject(&mut self, subject: &Subject) {
        self.drops += 1;
        match subject {
            Subject::Name(parent, name) => {
                self.names.remove(&(*parent, name.clone()));
                self.attrs.remove(parent);
            }
            Subject::Inode(ino) => self.drop_inode(*ino),
        }
    }

    /// Whether a request changes the inode at this moment.
    fn changes(&self, ino: Ino) -> bool {
        self.changing.contains_key(&Subject::Inode(ino))
    }

    fn drop_inode(&mut self, ino: Ino) {
        self.pages.remove(&ino);
        self.drop_attributes(ino);
    }

    fn drop_attributes(&mut self, ino: Ino) {
        self.attrs.remove(&ino);
        // In this model of a kernel names carry attributes.
        self.names.retain(|_, (attr, _)| attr.as_ref().is_none_or(|attr| attr.ino != ino));
    }

    fn drop_all(&mut self) {
        self.drops += 1;
        self.names.clear();
        self.attrs.clear();
        self.pages.clear();
    }
}

impl Kernel {
    pub fn new(node: NodeId, life: u64, shared: Arc<Shared>) -> (Arc<Self>, impl Future<Output = ()> + Send + 'static) {
        let (notices, mut queue) = mpsc::unbounded_channel::<Notice>();
        let kernel = Arc::new(Self {
            node,
            shared,
            own: AtomicU64::new(life),
            vfs: OnceLock::new(),
            kept: Mutex::default(),
            directories: Mutex::default(),
            notices,
            told: watch::Sender::new(LogIndex(0)),
            members: watch::Sender::new(LogIndex(0)),
            fenced: Notify::new(),
            stuck: watch::Sender::new(false),
        });
        let this = Arc::downgrade(&kernel);
        let notifier = async move {
            while let Some(notice) = queue.recv().await {
                let Some(kernel) = this.upgrade() else { return };
                let _ = kernel.stuck.subscribe().wait_for(|stuck| !stuck).await;
                if !notice.changes.is_empty() {
                    let micros = kernel.shared.draw(|chance| chance.between(20, 1_500));
                    tokio::time::sleep(Duration::from_micros(micros)).await;
                    for change in &notice.changes {
                        kernel.await_directory(change).await;
                    }
                    for change in &notice.changes {
                        let children = match (change, kernel.vfs()) {
                            (Change::Children { dir }, Some(vfs)) => vfs.inodes_in(*dir, usize::MAX),
                            _ => Vec::new(),
                        };
                        kernel.kept.lock().drop_for(change, &children);
                    }
                }
                if let Some(index) = notice.index {
                    kernel.told.send_replace(index);
                }
            }
        };
        (kernel, notifier)
    }

    pub fn serve(&self, vfs: &Arc<Vfs>) {
        assert!(self.vfs.set(Arc::downgrade(vfs)).is_ok(), "the file system starts once");
    }

    /// A request is about to change names in a directory: nobody else does until the lock is dropped.
    pub async fn lock_directory(&self, dir: Ino) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = self.directories.lock().entry(dir).or_default().clone();
        lock.lock_owned().await
    }

    /// Expiring a name takes the directory's lock. If that is not to be had in a moment, the kernel is
    /// made to throw out every name, which takes none.
    async fn await_directory(&self, change: &Change) {
        let Change::Entry { parent, .. } = change else { return };
        if !keeps(Rule::NoticesWaitForNoLock) {
            drop(self.lock_directory(*parent).await);
        } else if tokio::time::timeout(SWEEP_AFTER, self.lock_directory(*parent)).await.is_err() {
            let mut kept = self.kept.lock();
            kept.drops += 1;
            kept.names.clear();
        }
    }

    fn vfs(&self) -> Option<Arc<Vfs>> {
        self.vfs.get().and_then(Weak::upgrade)
    }

    /// Fires when the member list may have changed.
    pub fn members(&self) -> watch::Receiver<LogIndex> {
        self.members.subscribe()
    }

    pub fn begin_life(&self, life: u64) {
        self.own.store(life, Relaxed);
    }

    /// Keeps the notifier from going on, as a kernel does that waits for a lock of its own.
    pub fn stick(&self, stuck: bool) {
        self.stuck.send_replace(stuck);
    }

    /// Nobody waits for this kernel any more.
    pub fn drop_all(&self) {
        self.kept.lock().drop_all();
        if let Some(vfs) = self.vfs() {
            vfs.distrust_pages();
        }
    }

    /// Looks a name up, from what is kept if it may be.
    ///
    /// # Errors
    /// As [`Vfs::lookup`]; a name that is not there is `None`.
    pub async fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Option<Attr>, FsError> {
        let key = (parent, name.to_vec());
        let drops = {
            let kept = self.kept.lock();
            if let Some((known, until)) = kept.names.get(&key)
                && Instant::now() < *until
            {
                return Ok(known.clone());
            }
            kept.drops
        };
        let vfs = self.vfs().ok_or(FsError::Shutdown)?;
        let found = match vfs.lookup(parent, name).await {
            Ok(attr) => Some(attr),
            Err(FsError::Meta(ctfs_meta::MetaError::NoSuchEntry { .. })) => None,
            Err(error) => return Err(error),
        };
        let until = Instant::now() + vfs.cache_timeout();
        let mut kept = self.kept.lock();
        let is_changing = kept.changing.contains_key(&Subject::Name(key.0, key.1.clone())) || found.as_ref().is_some_and(|attr| kept.changes(attr.ino));
        if kept.drops == drops && !is_changing {
            kept.names.insert(key, (found.clone(), until));
            if let Some(attr) = found.as_ref().filter(|attr| vfs.may_cache(attr)) {
                kept.attrs.insert(attr.ino, (attr.clone(), until));
            }
        }
        Ok(found)
    }

    /// stat(2), from what is kept if it may be.
    ///
    /// # Errors
    /// As [`Vfs::getattr`].
    pub async fn stat(&self, ino: Ino) -> Result<Attr, FsError> {
        let drops = {
            let kept = self.kept.lock();
            if let Some((known, until)) = kept.attrs.get(&ino)
                && Instant::now() < *until
            {
                return Ok(known.clone());
            }
            kept.drops
        };
        let vfs = self.vfs().ok_or(FsError::Shutdown)?;
        let attr = vfs.getattr(ino).await?;
        let until = Instant::now() + vfs.cache_timeout();
        let mut kept = self.kept.lock();
        if kept.drops == drops && !kept.changes(ino) && vfs.may_cache(&attr) {
            kept.attrs.insert(ino, (attr.clone(), until));
        }
        Ok(attr)
    }

    /// Reads a whole file through an open handle, from pages if they may be used.
    ///
    /// # Errors
    /// As [`Vfs::read_file`].
    pub async fn read(&self, ino: Ino, opened: Opened, len: u32) -> Result<Bytes, FsError> {
        let drops = {
            let mut kept = self.kept.lock();
            if !opened.keep_cache || opened.direct {
                kept.pages.remove(&ino);
            }
            if let Some(pages) = kept.pages.get(&ino) {
                return Ok(pages.clone());
            }
            kept.drops
        };
        let vfs = self.vfs().ok_or(FsError::Shutdown)?;
        let bytes = vfs.read_file(ino, opened.handle, 0, len).await?;
        let mut kept = self.kept.lock();
        if kept.drops == drops && !kept.changes(ino) && !vfs.is_direct(ino, opened.handle) {
            kept.pages.insert(ino, bytes.clone());
        }
        Ok(bytes)
    }

    /// A request of this kernel is about to change a name: the kernel keeps nothing of it until the guard
    /// is dropped.
    ///
    /// Kinder than Linux, which answers from a negative dentry, or from attributes it has, until the request
    /// is answered; another server may show the change a moment before that.
    #[must_use = "the change is over when it is dropped"]
    pub fn changes_name(self: &Arc<Self>, parent: Ino, name: &[u8]) -> Changing {
        Changing::begin(self, Subject::Name(parent, name.to_vec()))
    }

    /// The same of attributes and pages.
    #[must_use = "the change is over when it is dropped"]
    pub fn changes_inode(self: &Arc<Self>, ino: Ino) -> Changing {
        Changing::begin(self, Subject::Inode(ino))
    }
}

/// What a request of the kernel changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Name(Ino, Vec<u8>),
    Inode(Ino),
}

/// A request of the kernel that changes something, under way.
pub struct Changing {
    kernel: Arc<Kernel>,
    subject: Subject,
}

impl Changing {
    fn begin(kernel: &Arc<Kernel>, subject: Subject) -> Self {
        let mut kept = kernel.kept.lock();
        kept.drop_subject(&subject);
        *kept.changing.entry(subject.clone()).or_default() += 1;
        Self { kernel: kernel.clone(), subject }
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        let mut kept = self.kernel.kept.lock();
        kept.drop_subject(&self.subject);
        let others = kept.changing.get(&self.subject).map_or(0, |count| count - 1);
        if others > 0 {
            kept.changing.insert(self.subject.clone(), others);
        } else {
            kept.changing.remove(&self.subject);
        }
    }
}

impl Observer for Kernel {
    fn applied(&self, index: LogIndex, changes: Vec<(u64, Change)>) {
        self.shared.trace.lock().count(&index.0.to_le_bytes());
        if let Some(vfs) = self.vfs() {
            let all: Vec<Change> = changes.iter().map(|(_, change)| change.clone()).collect();
            vfs.changed(&all);
        }
        let own = self.own.load(Relaxed);
        if changes.iter().any(|(_, change)| matches!(change, Change::Fenced { incarnation, .. } if incarnation.0 == own)) {
            self.shared.note(self.node, format_args!("this life was ended"));
            self.fenced.notify_one();
        }
        if changes.iter().any(|(_, change)| matches!(change, Change::Members)) {
            self.members.send_replace(index);
        }
        let is_news = |(client, change): &(u64, Change)| *client != own || matches!(change, Change::Covered { .. });
        let changes = changes.into_iter().filter(is_news).map(|(_, change)| change).collect();
        let _ = self.notices.send(Notice { index: Some(index), changes });
    }

    fn happened(&self, changes: &[Change]) {
        if let Some(vfs) = self.vfs() {
            vfs.changed(changes);
        }
    }

    fn installed_snapshot(&self) {
        self.members.send_modify(|_| {});
        self.fenced.notify_one();
        if let Some(vfs) = self.vfs() {
            vfs.replaced();
        }
        self.kept.lock().drop_all();
    }

    fn invalidated(&self) -> watch::Receiver<LogIndex> {
        self.told.subscribe()
    }
}

impl KernelCache for Kernel {
    fn invalidate(&self, changes: Vec<Change>) {
        let _ = self.notices.send(Notice { index: None, changes });
    }

    fn pages_wait(&self, _ino: Ino) {}
}
