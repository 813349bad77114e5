//! What the pure parts of CTFS cost, without disk, network or kernel.
//!
//! `cargo bench --bench pure --profile dev` runs all of it in the profile everything else is
//! built in; a name behind it narrows it, e.g. `-- placement`. The whole program is measured by
//! `scripts/bench`.

use std::hint::black_box;

use ctfs_chunk::{Placement, Server, tier::RangeSet, wire};
use ctfs_meta::{About, Batch, CellWrite, Command, MemoryStore, Namespace, NewContent, NewNode, Op, Reply, SetAttr};
use ctfs_types::{ChunkId, ExtentData, FileName, Ino, NodeId, RequestId, Stamp, Timestamp, codec, limits::CHUNK_BYTES_MAX};
use divan::{
    Bencher,
    counter::{BytesCount, ItemsCount},
};

const MIB: usize = 1 << 20;

fn main() {
    divan::main();
}

/// A namespace in memory and the commands of one client, one after the other.
struct Volume {
    namespace: Namespace,
    seq: u64,
}

impl Volume {
    /// A volume whose root holds `files` files.
    fn with_files(files: u64) -> Self {
        let namespace = Namespace::open(Box::new(MemoryStore::default())).expect("memory store opens");
        let mut volume = Self { namespace, seq: 0 };
        for _ in 0..files {
            volume.make(1);
        }
        volume
    }

    /// Every command has a number of its own and says that the one before was answered.
    fn command(&mut self, op: impl FnOnce(u64) -> Op) -> Command {
        self.seq += 1;
        let seq = self.seq;
        Command { request: RequestId { client: 7, seq }, answered: seq - 1, at: Timestamp::new(seq as i64, 0), about: About::Inodes(Vec::new()), op: op(seq) }
    }

    /// Applies one entry of the log and returns its last reply.
    fn apply(&mut self, commands: &[Command]) -> Reply {
        let index = self.namespace.applied().next();
        let mut applied = self.namespace.apply(index, commands, Batch::new()).expect("memory store does not fail");
        applied.verdicts.pop().expect("one verdict for each command").expect("the command is valid")
    }

    /// One entry that makes `count` files; returns the last one.
    fn make(&mut self, count: usize) -> Ino {
        let commands: Vec<_> = (0..count).map(|_| self.command(make_op)).collect();
        match self.apply(&commands) {
            Reply::Entry { attr, .. } => attr.ino,
            other => panic!("make answered {other:?}"),
        }
    }
}

fn make_op(seq: u64) -> Op {
    let name = FileName::new(format!("file-{seq}").as_bytes()).expect("a valid name");
    let node = NewNode {
        content: NewContent::File,
        mode: 0o644,
        umask: 0o022,
        uid: 1000,
        gid: 1000,
        exclusive: true,
        holder: None,
        ino: None,
        cell: None,
    };
    Op::Make { parent: Ino::ROOT, name, node }
}

/// One cell of a file becomes a chunk, over what the stamp names.
fn write_op(seq: u64, ino: Ino, expect: Stamp) -> Op {
    let data = Some(ExtentData::Chunk { id: chunk(seq), len: MIB as u32 });
    let cells = vec![CellWrite { cell: 0, expect, start: 0, data, copies: 0 }];
    Op::Write {
        ino,
        cells,
        size_at_least: MIB as u64,
        mtime: Some(Timestamp::new(seq as i64, 0)),
        drop_privileges: false,
        appends_at: None,
        noted: None,
    }
}

fn chunk(number: u64) -> ChunkId {
    ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// Lines that differ and compress well, as logs and sources do.
fn text(len: usize) -> Vec<u8> {
    let lines = (0u64..).flat_map(|n| format!("{n}: GET /page/{}/index.html 200\n", n * 7919 % 1000).into_bytes());
    lines.take(len).collect()
}

mod apply {
    use super::*;

    /// Files made by one entry of the log, in a directory that holds `FILES_BEFORE`.
    #[divan::bench(args = [1, 64])]
    fn make(bencher: Bencher, batch: usize) {
        let mut volume = Volume::with_files(FILES_BEFORE);
        bencher.counter(ItemsCount::new(batch)).bench_local(|| volume.make(batch));
    }

    #[divan::bench]
    fn set_mode(bencher: Bencher) {
        let mut volume = Volume::with_files(FILES_BEFORE);
        let ino = volume.make(1);
        bencher.bench_local(|| {
            let mode = Some(0o600 + (volume.seq % 2) as u16);
            let command = volume.command(|_| Op::SetAttr { ino, set: SetAttr { mode, ..SetAttr::default() } });
            volume.apply(&[command])
        });
    }

    /// The same cell written again and again: the old chunk is given up, the new one counted.
    #[divan::bench]
    fn write(bencher: Bencher) {
        let mut volume = Volume::with_files(FILES_BEFORE);
        let ino = volume.make(1);
        let mut stamp = Stamp(0);
        bencher.bench_local(|| {
            let command = volume.command(|seq| write_op(seq, ino, stamp));
            match volume.apply(&[command]) {
                Reply::Written { stamp: new, .. } => stamp = new,
                other => panic!("write answered {other:?}"),
            }
        });
    }

    /// Enough that a lookup goes through a few levels of the tree.
    const FILES_BEFORE: u64 = 10_000;
}

mod command {
    use super::*;

    const VERSION: u8 = 1;

    fn samples() -> [Command; 2] {
        let mut volume = Volume::with_files(0);
        [volume.command(make_op), volume.command(|seq| write_op(seq, Ino(2), Stamp(0)))]
    }

    #[divan::bench]
    fn encode(bencher: Bencher) {
        let commands = samples();
        bencher
            .counter(ItemsCount::new(commands.len()))
            .bench(|| black_box(&commands).each_ref().map(|command| codec::encode(VERSION, command)));
    }

    #[divan::bench]
    fn decode(bencher: Bencher) {
        let records = samples().map(|command| codec::encode(VERSION, &command));
        bencher.counter(ItemsCount::new(records.len())).bench(|| {
            black_box(&records).each_ref().map(|record| codec::decode::<Command>(VERSION, record, 1 << 20).expect("our own record"))
        });
    }
}

/// The order of all servers for one chunk: done for every chunk written, read and repaired.
#[divan::bench(args = [3, 12, 50])]
fn placement(bencher: Bencher, servers: u64) {
    let server = |n| Server { node: NodeId(n), zone: format!("zone{}", n % 4), weight: 1 << 40 };
    let placement = Placement::new((1..=servers).map(server).collect());
    let id = chunk(1);
    bencher.bench(|| placement.rank(black_box(&id)));
}

/// A thousand writes of 4 KiB in no order into 64 MiB: the dirty ranges of a busy file.
#[divan::bench]
fn range_set(bencher: Bencher) {
    let starts: Vec<u64> = (0..1000).map(|n| n * 7919 % 16384 * 4096).collect();
    bencher.counter(ItemsCount::new(starts.len())).bench(|| {
        let mut set = RangeSet::new();
        for &start in black_box(&starts) {
            set.insert(start..start + 4096);
        }
        set
    });
}

mod chunk_bytes {
    use super::*;

    #[divan::bench(args = ["noise", "text"])]
    fn pack(bencher: Bencher, kind: &str) {
        let raw = sample(kind);
        bencher.counter(BytesCount::new(MIB)).bench(|| wire::pack(black_box(&raw)));
    }

    #[divan::bench(args = ["noise", "text"])]
    fn unpack(bencher: Bencher, kind: &str) {
        let packed = wire::pack(&sample(kind));
        bencher
            .counter(BytesCount::new(MIB))
            .bench(|| wire::unpack(black_box(&packed), CHUNK_BYTES_MAX).expect("our own chunk"));
    }

    #[divan::bench]
    fn blake3(bencher: Bencher) {
        let raw = noise(MIB);
        bencher.counter(BytesCount::new(MIB)).bench(|| ::blake3::hash(black_box(&raw)));
    }

    fn sample(kind: &str) -> Vec<u8> {
        if kind == "text" { text(MIB) } else { noise(MIB) }
    }
}
