//! A volume that a test drives one command at a time, with a clock that ticks once a command.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use ctfs_types::{Attr, ChunkId, ExtentData, FileName, Incarnation, Ino, NodeId, RequestId, Stamp, Timestamp};
use parking_lot::Mutex;

use crate::{
    About, Batch, CellWrite, Change, ClusterIdentity, Command, Lock, LockKind, LockOwner, Member, MemberState, MemoryStore,
    MetaError, Namespace, NewContent, NewNode, Op, RenameMode, Reply, SetAttr, Store, StoreError, TokenRecord,
    XattrMode,
};

/// The client all commands of a [`Volume`] come from unless a test says otherwise; no life of a
/// server in the tests has this number.
pub const CLIENT: u64 = 1 << 50;

pub type Verdict = Result<Reply, MetaError>;

pub struct Volume {
    pub ns: Namespace,
    /// Commands run so far; also the clock and the `seq` of the last request.
    pub ticks: u64,
    /// Changes of the last entry.
    pub changes: Vec<Change>,
    /// Batches the store was given.
    pub writes: Arc<AtomicU64>,
    /// Keys the store was asked for by name.
    pub asked: Arc<Mutex<BTreeSet<Vec<u8>>>>,
}

impl Volume {
    pub fn new() -> Self {
        Self::over(MemoryStore::default())
    }

    pub fn over(store: MemoryStore) -> Self {
        let writes = Arc::new(AtomicU64::new(0));
        let asked = Arc::new(Mutex::default());
        let store = CountingStore { inner: store, writes: writes.clone(), asked: asked.clone() };
        let ns = Namespace::open(Box::new(store)).expect("memory store opens");
        let ticks = ns.applied().0;
        Self { ns, ticks, changes: Vec::new(), writes, asked }
    }

    /// A volume of which one command frees no more than so many cells.
    pub fn freeing_at_most(cells: usize) -> Self {
        let mut volume = Self::new();
        volume.ns = volume.ns.freeing_at_most(cells);
        volume
    }

    /// Frees what earlier commands left behind, one command at a time; answers how many it took.
    pub fn free_all(&mut self) -> u64 {
        let mut commands = 0;
        loop {
            let inos = self.ns.unfreed(2);
            if inos.is_empty() {
                return commands;
            }
            self.ok(Op::FreeCells { inos });
            commands += 1;
            assert!(commands < 1000, "freeing ends");
        }
    }

    /// The time of the last command.
    pub fn now(&self) -> Timestamp {
        time(self.ticks)
    }

    /// Makes the next command of the usual client.
    pub fn command(&mut self, op: Op) -> Command {
        self.ticks += 1;
        let request = RequestId { client: CLIENT, seq: self.ticks };
        Command { request, answered: self.ticks - 1, at: self.now(), about: About::Inodes(Vec::new()), op }
    }

    /// One command in an entry of its own.
    pub fn run(&mut self, op: Op) -> Verdict {
        let command = self.command(op);
        self.apply(std::slice::from_ref(&command)).pop().expect("one verdict for one command")
    }

    pub fn apply(&mut self, commands: &[Command]) -> Vec<Verdict> {
        self.apply_with(commands, Batch::new())
    }

    pub fn apply_with(&mut self, commands: &[Command], extra: Batch) -> Vec<Verdict> {
        let index = self.ns.applied().next();
        let applied = self.ns.apply(index, commands, extra).expect("memory store does not fail");
        assert_eq!(self.ns.applied(), index);
        assert_eq!(applied.verdicts.len(), commands.len());
        self.changes = applied.changes.into_iter().map(|(_, change)| change).collect();
        applied.verdicts
    }

    // What most tests need, panicking when refused.

    #[track_caller]
    pub fn ok(&mut self, op: Op) -> Reply {
        self.run(op.clone()).unwrap_or_else(|error| panic!("{op:?} refused: {error}"))
    }

    #[track_caller]
    pub fn make(&mut self, parent: Ino, text: &str, node: NewNode) -> Attr {
        match self.ok(Op::Make { parent, name: name(text), node }) {
            Reply::Entry { attr, made: true } => attr,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    pub fn file(&mut self, parent: Ino, text: &str) -> Ino {
        self.make(parent, text, node(NewContent::File, 0o644)).ino
    }

    #[track_caller]
    pub fn dir(&mut self, parent: Ino, text: &str) -> Ino {
        self.make(parent, text, node(NewContent::Directory, 0o755)).ino
    }

    pub fn link(&mut self, ino: Ino, parent: Ino, text: &str) -> Verdict {
        self.run(Op::Link { ino, parent, name: name(text) })
    }

    pub fn unlink(&mut self, parent: Ino, text: &str) -> Verdict {
        self.run(Op::Unlink { parent, name: name(text) })
    }

    pub fn rmdir(&mut self, parent: Ino, text: &str) -> Verdict {
        self.run(Op::Rmdir { parent, name: name(text) })
    }

    pub fn rename(&mut self, from: Ino, old: &str, to: Ino, new: &str, mode: RenameMode) -> Verdict {
        self.run(Op::Rename { from, name: name(old), to, new_name: name(new), mode })
    }

    pub fn set(&mut self, ino: Ino, set: SetAttr) -> Verdict {
        self.run(Op::SetAttr { ino, set })
    }

    pub fn chmod(&mut self, ino: Ino, mode: u16) -> Verdict {
        self.set(ino, SetAttr { mode: Some(mode), ..SetAttr::default() })
    }

    pub fn truncate(&mut self, ino: Ino, size: u64) -> Verdict {
        self.set(ino, SetAttr { size: Some(size), ..SetAttr::default() })
    }

    pub fn set_xattr(&mut self, ino: Ino, key: &str, value: &[u8]) -> Verdict {
        self.run(Op::SetXattr { ino, name: key.into(), value: value.into(), mode: XattrMode::Set })
    }

    /// Writes one cell over whatever is there, growing the file to cover it.
    pub fn write(&mut self, ino: Ino, cell: u64, data: ExtentData) -> Verdict {
        let expect = self.stamp(ino, cell);
        let end = self.attr(ino).cell.start_of(cell) + u64::from(data.len());
        let cells = vec![CellWrite { cell, expect, start: 0, data: Some(data), copies: 0 }];
        self.run(write_op(ino, cells, end))
    }

    #[track_caller]
    pub fn attr(&self, ino: Ino) -> Attr {
        self.ns.attr(ino).expect("memory store").unwrap_or_else(|| panic!("no inode {ino}"))
    }

    pub fn exists(&self, ino: Ino) -> bool {
        self.ns.attr(ino).expect("memory store").is_some()
    }

    pub fn lookup(&self, parent: Ino, text: &str) -> Option<Ino> {
        self.ns.lookup(parent, &name(text)).expect("memory store")
    }

    pub fn xattr(&self, ino: Ino, key: &str) -> Option<Vec<u8>> {
        self.ns.xattr(ino, key.as_bytes()).expect("memory store")
    }

    /// The stamp of a cell, 0 for a hole.
    pub fn stamp(&self, ino: Ino, cell: u64) -> Stamp {
        let cells = self.ns.cells(ino, cell, 1).expect("memory store");
        cells.first().map_or(Stamp(0), |cell| cell.extent.stamp)
    }

    /// References of a chunk; `None` when the metadata knows nothing of it.
    pub fn references(&self, id: ChunkId) -> Option<u64> {
        self.ns.chunk(&id).expect("memory store").map(|record| record.references)
    }

    /// All records but the caller's own under 0xff.
    pub fn records(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        dump(self.ns.store(), &[0xff])
    }
}

/// Everything below key `to`.
pub fn dump(store: &dyn Store, to: &[u8]) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut records = BTreeMap::new();
    let mut keep = |key: &[u8], value: &[u8]| {
        records.insert(key.to_vec(), value.to_vec());
        ControlFlow::Continue(())
    };
    store.range(&[], to, &mut keep).expect("memory store");
    records
}

/// What a namespace leaves on disk.
pub fn copy(ns: &Namespace) -> MemoryStore {
    let store = MemoryStore::default();
    let batch = dump(ns.store(), &[0xff; 40]).into_iter().map(|(key, value)| (key, Some(value))).collect();
    store.write(batch).expect("memory store");
    store
}

/// Counts the batches written and notes the keys asked for.
struct CountingStore {
    inner: MemoryStore,
    writes: Arc<AtomicU64>,
    asked: Arc<Mutex<BTreeSet<Vec<u8>>>>,
}

impl Store for CountingStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.asked.lock().insert(key.to_vec());
        self.inner.get(key)
    }

    fn range(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        self.inner.range(from, to, visit)
    }

    fn write(&self, batch: Batch) -> Result<(), StoreError> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.inner.write(batch)
    }
}

pub fn time(tick: u64) -> Timestamp {
    Timestamp::new(1_000_000 + tick as i64, 5)
}

pub fn name(text: &str) -> FileName {
    FileName::new(text.as_bytes()).expect("a valid name")
}

/// An exclusive make by uid 1000, gid 100.
pub fn node(content: NewContent, mode: u16) -> NewNode {
    NewNode { content, mode, umask: 0, uid: 1000, gid: 100, exclusive: true, holder: None, ino: None, cell: None }
}

pub fn write_op(ino: Ino, cells: Vec<CellWrite>, size_at_least: u64) -> Op {
    Op::Write { ino, cells, size_at_least, mtime: Some(time(0)), drop_privileges: false, appends_at: None, noted: None }
}

/// A chunk whose name starts with `n`.
pub fn chunk(n: u8, len: u32) -> ExtentData {
    ExtentData::Chunk { id: chunk_id(n), len }
}

pub fn chunk_id(n: u8) -> ChunkId {
    ChunkId([n; 32])
}

pub fn inline(bytes: &[u8]) -> ExtentData {
    ExtentData::Inline(bytes.to_vec())
}

pub fn owner(node: u64, incarnation: u64, owner: u64) -> LockOwner {
    LockOwner { node: NodeId(node), incarnation: Incarnation(incarnation), owner }
}

pub fn record_lock(owner: LockOwner, exclusive: bool, start: u64, end: u64) -> Lock {
    Lock { owner, kind: LockKind::Record, exclusive, start, end, pid: 100 + owner.owner as u32 }
}

/// Server `n`, called `server-n`, in its first life.
pub fn member(n: u64) -> Member {
    Member {
        node: NodeId(n),
        name: format!("server-{n}"),
        zone: "here".into(),
        key: [n as u8; 32],
        addresses: vec![format!("127.0.0.1:{}", 7000 + n)],
        capacity: 1 << 30,
        state: MemberState::Active,
        incarnation: Incarnation(1),
        version: "0.1.0".into(),
        fenced: false,
        pair: None,
        joined: time(0),
    }
}

pub fn identity() -> ClusterIdentity {
    ClusterIdentity { id: [9; 16], name: "brave-otter".into(), ca_certificate: vec![1, 2, 3] }
}

/// A token good until tick 1000.
pub fn token(n: u8, uses_left: u32) -> TokenRecord {
    TokenRecord { hash: [n; 32], expires: time(1000), uses_left }
}

/// A founded volume with servers 1 to `servers`.
pub fn cluster(servers: u64) -> Volume {
    let mut volume = Volume::new();
    volume.ok(Op::Found { cluster: identity(), member: member(1) });
    volume.ok(Op::CreateToken { token: token(200, 100) });
    for n in 2..=servers {
        volume.ok(Op::Join { token: [200; 32], member: member(n) });
    }
    volume
}
