//! Lock commands that nobody answers: whether or not they happened, no lock is left behind.

use async_trait::async_trait;
use ctfs_chunk::{CacheTier, TierSettings};
use ctfs_meta::{Durability, Reply, SharedNamespace, Subject};
use ctfs_types::{ChunkId, FileBytes, Holder, Ino, LogIndex};

use super::{super::memory::MemoryMeta, *};
use crate::{ChunkAccess, Holders, Request, SpaceReport};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Nothing,
    /// Commands are lost on the way.
    Commands,
    /// Commands happen, their answers are lost.
    Answers,
}

/// What a server has of its cluster, over a bad line.
#[derive(Clone)]
struct Line {
    meta: Arc<MemoryMeta>,
    loss: Arc<Mutex<Loss>>,
}

struct OverLine(Line, Arc<dyn Request>);

const LOST: FsError = FsError::NoQuorum { waited: Duration::ZERO };

#[async_trait]
impl Request for OverLine {
    async fn propose(&self, op: Op) -> Result<Reply, FsError> {
        let loss = *self.0.loss.lock();
        if loss == Loss::Commands {
            return Err(LOST);
        }
        let answer = self.1.propose(op).await;
        if loss == Loss::Answers { Err(LOST) } else { answer }
    }
}

#[async_trait]
impl Metadata for Line {
    fn replica(&self) -> &SharedNamespace {
        Metadata::replica(&*self.meta)
    }

    fn request(&self) -> Arc<dyn Request> {
        Arc::new(OverLine(self.clone(), Metadata::request(&*self.meta)))
    }

    fn happen(&self, _: &Op) -> Option<crate::Happened> {
        None
    }

    async fn settled(&self) -> Result<(), FsError> {
        Ok(())
    }

    fn close_ahead(&self, dirs: &[Ino]) {
        self.replica().write().close_ahead(dirs);
    }

    fn write_down(&self, _bytes: &FileBytes) -> Option<u64> {
        None
    }

    fn let_go(&self, _ino: Ino, _upto: u64) {}

    fn kept_from(&self) -> u64 {
        0
    }

    fn journal_counts(&self, _class: Durability) -> bool {
        false
    }

    async fn durable(&self, _class: Durability) -> Result<bool, FsError> {
        Ok(false)
    }

    async fn barrier(&self) -> Result<(), FsError> {
        Metadata::barrier(&*self.meta).await
    }

    fn node(&self) -> NodeId {
        Metadata::node(&*self.meta)
    }

    fn incarnation(&self) -> Incarnation {
        Metadata::incarnation(&*self.meta)
    }

    fn leased_for(&self) -> Duration {
        self.meta.leased_for()
    }

    fn ahead(&self) -> Option<LogIndex> {
        self.meta.ahead()
    }

    fn unseen_change(&self, subject: &Subject) -> Option<LogIndex> {
        self.meta.unseen_change(subject)
    }

    async fn await_visible(&self, index: LogIndex) -> Result<(), FsError> {
        self.meta.await_visible(index).await
    }
}

/// Locks need no bytes.
struct Nothing;

#[async_trait]
impl ChunkAccess for Nothing {
    async fn get(&self, id: ChunkId, _len: u32) -> Result<Bytes, FsError> {
        Err(FsError::ChunkLost { chunk: id })
    }

    async fn put(&self, _bytes: Bytes, _copies: u8) -> Result<ChunkId, FsError> {
        Err(FsError::NoSpace)
    }

    fn prefetch(&self, _id: ChunkId, _len: u32) {}

    fn free(&self) -> SpaceReport {
        SpaceReport::default()
    }
}

#[async_trait]
impl Holders for Nothing {
    async fn recall(&self, _holder: Holder, _ino: Ino) -> Result<(), FsError> {
        Err(FsError::Shutdown)
    }

    async fn peek(&self, _holder: Holder, _ino: Ino) -> Result<Attr, FsError> {
        Err(FsError::Shutdown)
    }

    async fn settle(&self, _life: Holder) -> Result<(), FsError> {
        Err(FsError::Shutdown)
    }
}

/// A server behind a bad line and one behind a good one, and a file open on both.
struct Pair {
    world: World,
    line: Line,
    vfs: Arc<Vfs>,
    ino: Ino,
    handle: HandleId,
    others: HandleId,
}

impl Pair {
    async fn new() -> Self {
        Self::with(VfsSettings::default()).await
    }

    async fn with(settings: VfsSettings) -> Self {
        let world = World::new(2);
        let line = Line { meta: world.servers[0].meta.clone(), loss: Arc::new(Mutex::new(Loss::Nothing)) };
        let tier = CacheTier::open(TierSettings::new(world.dir().join("behind-the-line"), 64 << 20)).unwrap();
        let vfs = Vfs::new(Arc::new(line.clone()), Arc::new(Nothing), Arc::new(Nothing), tier, settings);
        let told = vfs.clone();
        world.cluster.listen(Box::new(move |_, _, changes| told.changed(changes)));
        let ino = file(world.vfs(1), ROOT, "f", b"").await.ino;
        world.vfs(1).give_up_all().await;
        let (handle, others) = (open(&vfs, ino, libc::O_RDONLY).await, open(world.vfs(1), ino, libc::O_RDONLY).await);
        Self { world, line, vfs, ino, handle, others }
    }

    fn lose(&self, loss: Loss) {
        *self.line.loss.lock() = loss;
    }

    async fn lock(&self, request: LockRequest, wait: bool) -> Result<(), FsError> {
        ends(self.vfs.setlk(self.ino, self.handle, request, wait, 0)).await
    }

    fn other_waits(&self, request: LockRequest) -> JoinHandle<Result<(), FsError>> {
        wait_for(&self.world, 1, self.ino, self.others, request)
    }

    async fn other_sees(&self, request: LockRequest) -> Option<ctfs_meta::Lock> {
        self.world.vfs(1).getlk(self.ino, request).await.unwrap()
    }
}

const LOSSES: [Loss; 2] = [Loss::Commands, Loss::Answers];

#[tokio::test]
async fn a_lock_whose_outcome_was_unknown_is_given_back() {
    for (loss, wait) in LOSSES.into_iter().flat_map(|loss| [(loss, false), (loss, true)]) {
        let pair = Pair::new().await;
        pair.lose(loss);
        assert_eq!(pair.lock(whole(1), wait).await.unwrap_err().errno(), libc::EIO);
        assert_eq!(pair.other_sees(whole(1)).await.is_some(), loss == Loss::Answers);
        pair.lose(Loss::Nothing);
        ends(pair.other_waits(whole(1))).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_place_in_the_queue_whose_outcome_was_unknown_is_left() {
    for loss in LOSSES {
        let pair = Pair::new().await;
        pair.world.vfs(1).setlk(pair.ino, pair.others, whole(1), false, 0).await.unwrap();
        pair.lose(loss);
        assert!(pair.lock(whole(1), true).await.is_err());
        queue_is(&pair.world, pair.ino, usize::from(loss == Loss::Answers)).await;
        pair.lose(Loss::Nothing);
        queue_is(&pair.world, pair.ino, 0).await;
    }
}

#[tokio::test]
async fn an_upgrade_whose_outcome_was_unknown_leaves_what_was_held_before() {
    for loss in LOSSES {
        let pair = Pair::new().await;
        pair.lock(shared(1), false).await.unwrap();
        pair.lose(loss);
        assert!(pair.lock(whole(1), false).await.is_err());
        pair.lose(Loss::Nothing);
        ends(pair.other_waits(shared(1))).await.unwrap().unwrap();
        assert!(!pair.other_sees(whole(1)).await.expect("still held").exclusive);
    }
}

#[tokio::test]
async fn an_unlock_whose_outcome_was_unknown_happens_and_takes_nothing_later() {
    for loss in LOSSES {
        let pair = Pair::new().await;
        pair.lock(whole(1), false).await.unwrap();
        let waiter = pair.other_waits(range(1, 0, 9));
        queue_is(&pair.world, pair.ino, 1).await;
        pair.lose(loss);
        assert!(pair.vfs.unlock(pair.ino, whole(1)).await.is_err());
        pair.lose(Loss::Nothing);
        // Behind the unlock, which is still being settled.
        pair.lock(range(1, 10, 19), false).await.unwrap();
        ends(waiter).await.unwrap().unwrap();
        assert!(pair.other_sees(range(2, 10, 19)).await.is_some(), "locked anew and kept");
    }
}

#[tokio::test]
async fn a_withdrawal_whose_outcome_was_unknown_leaves_neither_place_nor_lock() {
    for loss in LOSSES {
        let settings = VfsSettings {
            interrupted: |thread| thread == 9,
            interrupt_check: Duration::from_millis(1),
            ..VfsSettings::default()
        };
        let pair = Pair::with(settings).await;
        pair.world.vfs(1).setlk(pair.ino, pair.others, whole(1), false, 0).await.unwrap();
        // The answer to the first command comes, all later ones are lost.
        let (line, told) = (pair.line.loss.clone(), Mutex::new(Some(loss)));
        pair.world.cluster.listen(Box::new(move |_, _, _| {
            if let Some(loss) = told.lock().take() {
                *line.lock() = loss;
            }
        }));
        let ended = ends(pair.vfs.setlk(pair.ino, pair.handle, whole(1), true, 9)).await;
        assert_eq!(ended.unwrap_err().errno(), libc::EINTR);
        pair.world.vfs(1).unlock(pair.ino, whole(1)).await.unwrap();
        assert_eq!(pair.other_sees(whole(2)).await.is_some(), loss == Loss::Commands, "granted to nobody who knows");
        pair.lose(Loss::Nothing);
        ends(pair.other_waits(whole(2))).await.unwrap().unwrap();
    }
}
