//! Random workloads that mostly hit.
//!
//! A [`Step`] is a handful of small numbers; [`resolve`] turns it into a command by pointing them
//! at what the model holds at that moment. So shrinking stays simple, and most commands do
//! something instead of missing.

use std::fmt;

use ctfs_types::{CellSize, ExtentData, FileUse, Holder, Incarnation, Ino, NodeId, Stamp, Timestamp, limits::FILE_BYTES_MAX};
use proptest::{collection::vec, prelude::*};

use super::{
    harness::{CLIENT, chunk, chunk_id, inline, name, time},
    model::Model,
};
use crate::{CellWrite, NewContent, NewNode, Op, Quota, RenameMode, SetAttr, XattrMode};

#[derive(Debug, Clone, Copy)]
pub enum Action {
    Make,
    Link,
    Unlink,
    Rmdir,
    Rename,
    SetAttr,
    Truncate,
    Xattr,
    Write,
    Punch,
    Clone,
    Reap,
    Forget,
    Own,
    Disown,
    Quota,
    Reserve,
}

/// What to do and where; each byte is a choice whose meaning depends on the action.
#[derive(Clone, Copy)]
pub struct Step(pub Action, pub [u8; 8]);

/// On one line also where a whole workload is printed.
impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Step({:?}, {:?})", self.0, self.1)
    }
}

pub fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let action = prop_oneof![
        10 => Just(Action::Make),
        4 => Just(Action::Link),
        4 => Just(Action::Unlink),
        3 => Just(Action::Rmdir),
        10 => Just(Action::Rename),
        4 => Just(Action::SetAttr),
        4 => Just(Action::Truncate),
        2 => Just(Action::Xattr),
        8 => Just(Action::Write),
        2 => Just(Action::Punch),
        3 => Just(Action::Clone),
        2 => Just(Action::Reap),
        1 => Just(Action::Forget),
        3 => Just(Action::Own),
        6 => Just(Action::Disown),
        3 => Just(Action::Quota),
        3 => Just(Action::Reserve),
    ];
    vec((action, any::<[u8; 8]>()).prop_map(|(action, choices)| Step(action, choices)), 1..most)
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
const MODES: [u16; 6] = [0o644, 0o755, 0o2755, 0o4755, 0o6711, 0o1777];
const CHUNK_LENS: [u32; 6] = [1, 4096, 4097, 100_000, 1 << 19, (1 << 20) - 4096];
const STARTS: [u32; 3] = [0, 7, 4096];
const CELL: u64 = 1 << 20;
const SIZES: [u64; 11] =
    [0, 1, 100, 4096, 5000, CELL - 1, CELL, CELL + 5, 2 * CELL + 77, 3 * CELL, FILE_BYTES_MAX + 1];

fn of<T: Copy>(list: &[T], choice: u8) -> T {
    list[choice as usize % list.len()]
}

/// Some inode, now and then one that is gone or never was.
fn some_inode(model: &Model, choice: u8) -> Ino {
    if choice >= 250 {
        return Ino(u64::from(choice - 248) * (model.next / 4 + 1));
    }
    let all: Vec<Ino> = model.inodes.keys().copied().collect();
    of(&all, choice)
}

fn some_dir(model: &Model, choice: u8) -> Ino {
    let dirs: Vec<Ino> = model.inodes.keys().copied().filter(|ino| model.is_dir(*ino)).collect();
    if choice >= 245 { some_inode(model, choice.wrapping_mul(37)) } else { of(&dirs, choice) }
}

/// As [`some_file`], and never a directory that is there: held directories have a model of their own.
fn some_file_alone(model: &Model, choice: u8) -> Ino {
    let ino = some_file(model, choice);
    if model.is_dir(ino) { Ino(1 << 40) } else { ino }
}

fn some_file(model: &Model, choice: u8) -> Ino {
    let files: Vec<Ino> = model.inodes.keys().copied().filter(|ino| !model.is_dir(*ino)).collect();
    if choice >= 245 || files.is_empty() { some_inode(model, choice.wrapping_mul(37)) } else { of(&files, choice) }
}

/// A directory and a name in it, mostly one that is there.
fn some_entry(model: &Model, choice: u8, second: u8) -> (Ino, ctfs_types::FileName) {
    let all: Vec<_> = model.inodes.iter().flat_map(|(dir, inode)| inode.entries.keys().map(|n| (*dir, n))).collect();
    if second >= 210 || all.is_empty() {
        return (some_dir(model, choice), name(of(&NAMES, second)));
    }
    let (dir, found) = all[(usize::from(choice) * 7 + usize::from(second)) % all.len()];
    (dir, found.clone())
}

/// The command a step stands for, given what the model holds.
pub fn resolve(model: &Model, Step(action, c): Step) -> Op {
    match action {
        Action::Make => Op::Make {
            parent: some_dir(model, c[0]),
            name: name(of(&NAMES, c[1])),
            node: NewNode {
                content: some_content(c[2]),
                mode: of(&MODES, c[3]),
                umask: of(&[0, 0o022, 0o077], c[4]),
                uid: u32::from(c[5] % 3),
                gid: u32::from(c[6] % 3),
                exclusive: c[7] % 2 == 0,
                // Held directories have a model of their own (`two_servers`).
                holder: (c[7] % 8 >= 6 && some_content(c[2]) != NewContent::Directory).then(|| holder(c[7])),
                ino: some_number(model, c[6] / 3, c[5] / 3),
                cell: None,
            },
        },
        Action::Reserve => Op::ReserveInos { count: of(&[1, 2, 3, 7, 0, 300, 1 << 16, (1 << 16) + 1], c[0]) },
        Action::Own => Op::Own { ino: some_file_alone(model, c[0]), holder: holder(c[1]), although_shared: c[2] < 128 },
        Action::Disown => {
            let held_since = |ino: &Ino| match model.inodes.get(ino).map(|inode| inode.attr.usage) {
                Some(FileUse::Owned { since, .. }) => since - u64::from(c[5] % 8 == 0),
                _ => 1,
            };
            let inos = [some_file(model, c[0]), some_file(model, c[1]), some_file(model, c[2])];
            Op::Disown { files: inos.iter().map(|ino| (*ino, held_since(ino))).collect(), holder: holder(c[3]), shared: c[4] < 80 }
        }
        Action::Link => {
            let ino = if c[3] < 230 { some_file(model, c[0]) } else { some_inode(model, c[0]) };
            Op::Link { ino, parent: some_dir(model, c[1]), name: name(of(&NAMES, c[2])) }
        }
        Action::Unlink => {
            let (parent, name) = some_entry(model, c[0], c[1]);
            Op::Unlink { parent, name }
        }
        Action::Rmdir => {
            let (parent, name) = some_entry(model, c[0], c[1]);
            Op::Rmdir { parent, name }
        }
        Action::Rename => {
            let (from, name) = some_entry(model, c[0], c[1]);
            let (to, new_name) = some_entry(model, c[2], c[3].wrapping_mul(if c[5] < 100 { 1 } else { 3 }));
            let (to, new_name) = if c[5] % 3 == 0 { (some_dir(model, c[2]), self::name(of(&NAMES, c[3]))) } else { (to, new_name) };
            let modes = [RenameMode::Replace, RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange];
            Op::Rename { from, name, to, new_name, mode: of(&modes, c[4]) }
        }
        Action::SetAttr => Op::SetAttr { ino: some_inode(model, c[0]), set: some_set(c) },
        Action::Truncate => {
            let ino = some_file(model, c[0]);
            let set = SetAttr { size: Some(of(&SIZES, c[1])), drop_privileges: c[2] < 64, ..SetAttr::default() };
            Op::SetAttr { ino, set }
        }
        Action::Xattr => {
            let (ino, name) = (some_inode(model, c[0]), of(&["user.a", "user.b", "security.capability"], c[1]).into());
            match c[2] % 4 {
                0 => Op::RemoveXattr { ino, name },
                n => {
                    let mode = of(&[XattrMode::Set, XattrMode::Create, XattrMode::Replace], n);
                    Op::SetXattr { ino, name, value: vec![c[3]; usize::from(c[4])], mode }
                }
            }
        }
        Action::Write => some_write(model, c),
        Action::Punch => {
            let cells = of(&[1, 2, 3, u64::MAX], c[2]);
            Op::Punch { ino: some_file(model, c[0]), first: u64::from(c[1] % 5), cells }
        }
        Action::Clone => {
            let (source, ino) = (some_file(model, c[0]), some_file(model, c[1]));
            let (first, cells) = (u64::from(c[2] % 4), u64::from(c[3] % 3) + 1);
            let mut to = u64::from(c[4] % 4);
            if source == ino && to < first + cells && first < to + cells {
                to = first + cells;
            }
            Op::CloneCells { source, first, ino, to, cells, size_at_least: (to + cells) * CELL }
        }
        Action::Reap => {
            let orphans: Vec<Ino> = model.inodes.keys().copied().filter(|ino| model.is_orphan(*ino)).collect();
            let inos = if c[0] < 128 { orphans } else { vec![some_inode(model, c[1]), some_inode(model, c[2])] };
            Op::Reap { inos }
        }
        Action::Quota => {
            let (bytes, files) = (of(&[0, 512, 4096, CELL / 2, 3 * CELL], c[2]), u64::from(c[3] % 5));
            let quota = Quota { bytes: (c[1] & 1 == 1).then_some(bytes), files: (c[1] & 2 == 2).then_some(files) };
            Op::SetQuota { ino: some_dir(model, c[0]), quota }
        }
        Action::Forget => Op::ForgetChunks { chunks: (0..6).filter(|n| c[0] >> n & 1 == 1).map(chunk_id).collect() },
    }
}

/// None, or a number of a reserved range; now and then one that is not reserved any more, or never was.
fn some_number(model: &Model, choice: u8, second: u8) -> Option<Ino> {
    let (next, end) = match model.numbers.values().nth(usize::from(choice) % model.numbers.len().max(1)) {
        _ if choice % 8 < 4 => return None,
        None => return (choice % 8 == 7).then_some(Ino(u64::from(second))),
        Some(range) => *range,
    };
    Some(Ino(match second % 16 {
        0..10 => next,
        10..13 => next + 1,
        13 => end - 1,
        14 => end,
        _ => next - 1,
    }))
}

fn some_content(choice: u8) -> NewContent {
    match choice % 16 {
        0..=6 => NewContent::File,
        7..=11 => NewContent::Directory,
        12 => NewContent::Symlink { target: b"../somewhere".to_vec() },
        13 => NewContent::Symlink { target: if choice < 128 { vec![] } else { vec![b'x'; 4096] } },
        14 => NewContent::Fifo,
        _ => NewContent::CharDevice { rdev: 0x103 },
    }
}

/// This client's life of a server, or another's.
fn holder(choice: u8) -> Holder {
    let client = if choice % 4 == 3 { CLIENT + 1 } else { CLIENT };
    Holder { node: NodeId(client), incarnation: Incarnation(client) }
}

fn some_set(c: [u8; 8]) -> SetAttr {
    let mut set = SetAttr::default();
    match c[1] % 4 {
        0 => set.mode = Some(of(&MODES, c[2])),
        1 => {
            set.uid = Some(u32::from(c[2] % 3));
            set.gid = (c[3] < 128).then_some(u32::from(c[3] % 3));
            set.drop_privileges = c[4] < 128;
        }
        2 => set.mtime = Some(Timestamp::new(i64::from(c[2]) - 100, 9)),
        _ => set.atime = Some(time(u64::from(c[2]))),
    }
    set
}

fn some_write(model: &Model, c: [u8; 8]) -> Op {
    let ino = some_file(model, c[0]);
    let first = u64::from(c[1] % 4);
    let mut cells = vec![some_cell(model, ino, first, [c[2], c[3], c[4]])];
    if c[5] < 100 {
        cells.push(some_cell(model, ino, first + 1 + u64::from(c[5] % 2), [c[4], c[2], c[3]]));
    }
    let end = |w: &CellWrite| w.data.as_ref().map_or(0, |d| w.cell * CELL + u64::from(w.start + d.len()));
    let end = cells.iter().map(end).max().unwrap_or(0);
    let size_at_least = match c[6] {
        0..180 => end + of(&[0, 0, 0, 1, 5000, 2 * CELL], c[6]),
        // A writer that does not know how long the file became of it.
        180..250 => end.saturating_sub(of(&[100, 5000, CELL], c[6])),
        _ => FILE_BYTES_MAX + 1,
    };
    let size = model.inodes.get(&ino).map_or(0, |inode| inode.attr.size);
    let appends_at = match c[7] % 16 {
        0..3 => Some(size),
        3 => Some(size + 1),
        _ => None,
    };
    let mtime = (c[7] % 2 == 0).then(|| time(u64::from(c[7])));
    Op::Write { ino, cells, size_at_least, mtime, drop_privileges: c[7] < 64, appends_at, noted: None }
}

fn some_cell(model: &Model, ino: Ino, cell: u64, c: [u8; 3]) -> CellWrite {
    let there = model.inodes.get(&ino).and_then(|inode| inode.cells.get(&cell));
    let stamp = there.map_or(Stamp(0), |extent| extent.stamp);
    // One in eight is late: somebody else has written meanwhile.
    let expect = if c[0] % 8 == 0 { Stamp(stamp.0.saturating_sub(1)) } else { stamp };
    let data: Option<ExtentData> = match c[1] % 8 {
        0 => None,
        1 | 2 => Some(inline(&vec![c[1]; of(&[1, 100, 512, 513, 4096], c[2])])),
        _ => {
            let n = c[2] % CHUNK_LENS.len() as u8;
            Some(chunk(n, of(&CHUNK_LENS, n)))
        }
    };
    debug_assert_eq!(CellSize::DEFAULT.bytes(), CELL);
    CellWrite { cell, expect, start: of(&STARTS, c[0] / 8), data, copies: c[2] % 4 }
}
