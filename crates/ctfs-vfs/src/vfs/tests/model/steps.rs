//! What can happen in a random history.
//!
//! A [`Step`] holds small numbers; they are pointed at what the reference has at that moment, so
//! that most steps do something and shrinking stays simple.

use std::fmt;

use ctfs_types::CellSize;
use proptest::{collection::vec, prelude::*};

use crate::Caller;

pub const SERVERS: usize = 3;
pub const SLOTS: usize = 8;
/// The smallest cell there is, so that little data lies in several.
pub const CELL: u64 = 256 << 10;
/// Just over three cells.
const REACH: u64 = 3 * CELL + 10_000;
const NAMES: [&[u8]; 4] = [b"a", b"b", b"c", b"d"];
const XATTRS: [&[u8]; 4] = [b"user.one", b"user.two", b"trusted.x", b"security.capability"];

pub fn cell_size() -> CellSize {
    CellSize::from_bytes(CELL).expect("a cell size")
}

/// A directory, counted through those there are, and a name in it.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub dir: usize,
    name: usize,
}

impl Place {
    pub fn name(&self) -> &'static [u8] {
        NAMES[self.name]
    }
}

/// What an operation on an inode is about.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    Named(Place),
    /// What this handle has open, also without a name.
    Opened(usize),
}

#[derive(Debug, Clone, Copy)]
pub struct OpenFlags {
    pub access: i32,
    pub create: bool,
    pub exclusive: bool,
    pub truncate: bool,
    pub append: bool,
}

impl OpenFlags {
    pub fn bits(self) -> i32 {
        let bit = |set: bool, bit: i32| if set { bit } else { 0 };
        self.access | bit(self.exclusive, libc::O_EXCL) | bit(self.truncate, libc::O_TRUNC) | bit(self.append, libc::O_APPEND)
    }

    pub fn writes(self) -> bool {
        self.access != libc::O_RDONLY
    }
}

#[derive(Debug, Clone, Copy)]
pub enum Attribute {
    Mode(u16),
    Owner { uid: Option<u32>, gid: Option<u32> },
    Size(u64),
    Times { atime: Option<i64>, mtime: Option<i64> },
    /// chown(-1, -1)
    Nothing,
}

#[derive(Debug, Clone, Copy)]
pub enum Made {
    Directory,
    Symlink,
    File,
    Fifo,
    Device,
}

/// What one of several does while the others do theirs, all on the file of one handle.
#[derive(Debug, Clone, Copy)]
pub enum Deed {
    /// In so many pieces; at the end where the handle appends.
    Write { pieces: u64 },
    Punch,
    Zero,
    Read,
    Sync,
    /// truncate(2) to the size it has.
    KeepSize,
    Chmod,
    Reopen,
    Background,
    Evict,
}

#[derive(Debug, Clone)]
pub enum Step {
    Open { at: usize, who: usize, place: Place, flags: OpenFlags, slot: usize },
    /// Opens what another handle of the same server has open, by its number.
    Reopen { slot: usize, of: usize, access: i32 },
    Close { slot: usize },
    Read { slot: usize, offset: u64, len: u64 },
    Write { slot: usize, who: usize, offset: u64, len: u64, seed: u8 },
    Allocate { slot: usize, mode: i32, offset: u64, len: u64 },
    Copy { from: usize, to: usize, read_at: u64, write_at: u64, len: u64 },
    Seek { slot: usize, offset: u64 },
    Sync { slot: usize },
    /// Lanes of `lane` bytes from `base` on, one for each deed.
    Race { slot: usize, base: u64, lane: u64, deeds: Vec<(usize, Deed)>, seed: u8 },
    Make { at: usize, who: usize, place: Place, made: Made, mode: u16, umask: u16 },
    Rmdir { at: usize, place: Place },
    Unlink { at: usize, place: Place },
    Rename { at: usize, from: Place, to: Place, flags: u32 },
    Link { at: usize, source: Target, to: Place },
    SetAttr { at: usize, who: usize, target: Target, attribute: Attribute },
    SetXattr { at: usize, target: Target, name: usize, len: usize, flags: i32 },
    RemoveXattr { at: usize, target: Target, name: usize },
    /// The collector of the cluster does its round.
    Reap,
    Background { at: usize },
    Evict { at: usize },
}

pub fn xattr_name(index: usize) -> &'static [u8] {
    XATTRS[index % XATTRS.len()]
}

/// A program's user. Alice and Bob share no group.
pub fn caller(who: usize) -> Caller {
    let id = [0, 1000, 1001][who % 3];
    Caller { uid: id, gid: id, pid: 0 }
}

/// How one server is looked at after a step.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    pub at: usize,
    /// Also bytes, which takes files from those who hold them.
    pub contents: bool,
}

#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Decides how long everything takes.
    pub seed: u64,
    pub pauses: u32,
    pub flushes_at_once: bool,
    pub shared_for_ms: u64,
    pub cache_bytes: u64,
}

pub fn setup() -> impl Strategy<Value = Setup> {
    let shared_for_ms = prop_oneof![Just(0), Just(20), Just(10_000)];
    (any::<u64>(), 0..6u32, any::<bool>(), shared_for_ms, prop_oneof![Just(256u64 << 20), Just(3 << 20)]).prop_map(
        |(seed, pauses, flushes_at_once, shared_for_ms, cache_bytes)| Setup {
            seed,
            pauses,
            flushes_at_once,
            shared_for_ms,
            cache_bytes,
        },
    )
}

/// Printed with a step on each line.
#[derive(Clone)]
pub struct History<S>(pub Vec<S>);

impl<S: fmt::Debug> fmt::Debug for History<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().enumerate().try_for_each(|(n, step)| write!(f, "\n{n:3} {step:?}"))
    }
}

pub fn history(most: usize) -> impl Strategy<Value = History<(Step, Look)>> {
    let look = (0..SERVERS, prop::bool::weighted(0.15)).prop_map(|(at, contents)| Look { at, contents });
    vec((step(), look), 1..most).prop_map(History)
}

/// Offsets like real ones: small, at cell edges, anywhere.
pub fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..9_000u64,
        2 => (0..4u64, 0..3u64).prop_map(|(cell, near)| (cell * CELL + near).saturating_sub(1)),
        1 => (0..200u64).prop_map(|page| page * 4096),
        1 => 0..REACH
    ]
}

pub fn len() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 1..5000u64, 2 => 1..40_000u64, 1 => Just(CELL), 1 => CELL - 2..2 * CELL]
}

fn place() -> impl Strategy<Value = Place> {
    (prop_oneof![3 => Just(0usize), 1 => 0..8usize], prop_oneof![2 => Just(0usize), 3 => 0..NAMES.len()])
        .prop_map(|(dir, name)| Place { dir, name })
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![place().prop_map(Target::Named), (0..SLOTS).prop_map(Target::Opened)]
}

fn access() -> impl Strategy<Value = i32> {
    prop_oneof![1 => Just(libc::O_RDONLY), 1 => Just(libc::O_WRONLY), 3 => Just(libc::O_RDWR)]
}

fn open_flags() -> impl Strategy<Value = OpenFlags> {
    let rarely = || prop::bool::weighted(0.1);
    (access(), prop::bool::weighted(0.8), rarely(), rarely(), prop::bool::weighted(0.25)).prop_map(
        |(access, create, exclusive, truncate, append)| OpenFlags { access, create, exclusive, truncate, append },
    )
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        8 => (1..6u64).prop_map(|pieces| Deed::Write { pieces }),
        1 => Just(Deed::Punch),
        1 => Just(Deed::Zero),
        2 => Just(Deed::Read),
        2 => Just(Deed::Sync),
        1 => Just(Deed::KeepSize),
        1 => Just(Deed::Chmod),
        1 => Just(Deed::Reopen),
        2 => Just(Deed::Background),
        1 => Just(Deed::Evict),
    ]
}

fn attribute() -> impl Strategy<Value = Attribute> {
    let id = || prop::option::of(prop_oneof![Just(0u32), Just(1000), Just(1001)]);
    let time = || prop::option::of(1_000_000..2_000_000i64);
    prop_oneof![
        3 => mode().prop_map(Attribute::Mode),
        2 => (id(), id()).prop_map(|(uid, gid)| Attribute::Owner { uid, gid }),
        6 => offset().prop_map(Attribute::Size),
        2 => (time(), time()).prop_map(|(atime, mtime)| Attribute::Times { atime, mtime }),
        1 => Just(Attribute::Nothing),
    ]
}

pub fn mode() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0o644), Just(0o755), Just(0o6755), Just(0o2775), Just(0o2664), Just(0o4711), 0..0o10000u16]
}

fn allocate_mode() -> impl Strategy<Value = i32> {
    prop_oneof![
        1 => Just(0),
        1 => Just(libc::FALLOC_FL_KEEP_SIZE),
        3 => Just(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
        1 => Just(libc::FALLOC_FL_ZERO_RANGE),
        1 => Just(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let at = || 0..SERVERS;
    let who = || 0..3usize;
    let slot = || 0..SLOTS;
    let bytes = prop_oneof![
        20 => (slot(), who(), offset(), len(), any::<u8>())
            .prop_map(|(slot, who, offset, len, seed)| Step::Write { slot, who, offset, len, seed }),
        8 => (slot(), offset(), len()).prop_map(|(slot, offset, len)| Step::Read { slot, offset, len }),
        4 => (slot(), allocate_mode(), offset(), len())
            .prop_map(|(slot, mode, offset, len)| Step::Allocate { slot, mode, offset, len }),
        2 => (slot(), slot(), offset(), offset(), len())
            .prop_map(|(from, to, read_at, write_at, len)| Step::Copy { from, to, read_at, write_at, len }),
        2 => (slot(), slot(), 0..3u64, 0..3u64, len())
            .prop_map(|(from, to, a, b, len)| Step::Copy { from, to, read_at: a * CELL, write_at: b * CELL, len }),
        1 => (slot(), offset()).prop_map(|(slot, offset)| Step::Seek { slot, offset }),
        4 => slot().prop_map(|slot| Step::Sync { slot }),
        12 => (slot(), offset(), prop_oneof![1..200u64, 1..5000u64], vec((slot(), deed()), 2..6), any::<u8>())
            .prop_map(|(slot, base, lane, deeds, seed)| Step::Race { slot, base, lane, deeds, seed }),
    ];
    let made = prop_oneof![
        4 => Just(Made::Directory),
        1 => Just(Made::Symlink),
        2 => Just(Made::File),
        1 => Just(Made::Fifo),
        1 => Just(Made::Device)
    ];
    let rename_flags = prop_oneof![4 => Just(0), 1 => Just(libc::RENAME_NOREPLACE), 1 => Just(libc::RENAME_EXCHANGE), 1 => Just(libc::RENAME_WHITEOUT)];
    let xattr_flags = prop_oneof![3 => Just(0), 1 => Just(libc::XATTR_CREATE), 1 => Just(libc::XATTR_REPLACE)];
    let names = prop_oneof![
        4 => (at(), who(), place(), made, mode(), prop_oneof![Just(0), Just(0o022), Just(0o077)])
            .prop_map(|(at, who, place, made, mode, umask)| Step::Make { at, who, place, made, mode, umask }),
        1 => (at(), place()).prop_map(|(at, place)| Step::Rmdir { at, place }),
        3 => (at(), place()).prop_map(|(at, place)| Step::Unlink { at, place }),
        4 => (at(), place(), place(), rename_flags).prop_map(|(at, from, to, flags)| Step::Rename { at, from, to, flags }),
        2 => (at(), target(), place()).prop_map(|(at, source, to)| Step::Link { at, source, to }),
    ];
    let attributes = prop_oneof![
        8 => (at(), who(), target(), attribute())
            .prop_map(|(at, who, target, attribute)| Step::SetAttr { at, who, target, attribute }),
        3 => (at(), target(), 0..4usize, 0..50usize, xattr_flags)
            .prop_map(|(at, target, name, len, flags)| Step::SetXattr { at, target, name, len, flags }),
        1 => (at(), target(), 0..4usize).prop_map(|(at, target, name)| Step::RemoveXattr { at, target, name }),
    ];
    prop_oneof![
        8 => (at(), who(), place(), open_flags(), slot())
            .prop_map(|(at, who, place, flags, slot)| Step::Open { at, who, place, flags, slot }),
        1 => (slot(), slot(), access()).prop_map(|(slot, of, access)| Step::Reopen { slot, of, access }),
        3 => slot().prop_map(|slot| Step::Close { slot }),
        24 => bytes,
        7 => names,
        6 => attributes,
        1 => Just(Step::Reap),
        3 => at().prop_map(|at| Step::Background { at }),
        2 => at().prop_map(|at| Step::Evict { at }),
    ]
}
