//! Where each record lives: one byte of kind, then numbers in big endian so that they sort.

use ctfs_types::{CellIndex, ChunkId, FileName, Holder, Ino, NodeId, Timestamp};

use crate::LockOwner;

pub const INODE: u8 = 1;
pub const NAME: u8 = 2;
pub const COOKIE: u8 = 3;
pub const LINK: u8 = 4;
pub const XATTR: u8 = 5;
pub const CELL: u8 = 6;
pub const CHUNK: u8 = 7;
pub const CONDEMNED: u8 = 8;
pub const LOCKS: u8 = 9;
pub const ORPHAN: u8 = 10;
pub const POLICY: u8 = 11;
pub const MEMBER: u8 = 12;
pub const REMOVED_KEY: u8 = 13;
pub const TOKEN: u8 = 14;
pub const CLUSTER: u8 = 15;
pub const VERDICT: u8 = 16;
pub const COUNTERS: u8 = 17;
pub const STATE_HASH: u8 = 18;
pub const CUTS: u8 = 19;
pub const OWNED: u8 = 20;
pub const QUOTA: u8 = 21;
pub const WAITING: u8 = 22;
pub const WAIT: u8 = 23;
pub const TOTALS: u8 = 24;
pub const NUMBERS: u8 = 25;
pub const NOTED: u8 = 26;
pub const LEFT: u8 = 27;
pub const STREAMED: u8 = 28;
/// Keys from here on belong to whoever owns the store.
pub const CALLER: u8 = 0xff;

type Key = Vec<u8>;

fn key(kind: u8, numbers: &[u64], tail: &[u8]) -> Key {
    let mut key = Vec::with_capacity(1 + numbers.len() * 8 + tail.len());
    key.push(kind);
    for number in numbers {
        key.extend_from_slice(&number.to_be_bytes());
    }
    key.extend_from_slice(tail);
    key
}

pub fn inode(ino: Ino) -> Key {
    key(INODE, &[ino.0], &[])
}

pub fn name(parent: Ino, name: &FileName) -> Key {
    key(NAME, &[parent.0], name.as_bytes())
}

pub fn cookie(parent: Ino, cookie: u64) -> Key {
    key(COOKIE, &[parent.0, cookie], &[])
}

/// One name of an inode, so that paths and the home of a hard-linked file are found.
pub fn link(ino: Ino, parent: Ino, name: &FileName) -> Key {
    key(LINK, &[ino.0, parent.0], name.as_bytes())
}

pub fn xattr(ino: Ino, name: &[u8]) -> Key {
    key(XATTR, &[ino.0], name)
}

pub fn cell(ino: Ino, cell: CellIndex) -> Key {
    key(CELL, &[ino.0, cell], &[])
}

/// One past the cells of an inode below `end`; `u64::MAX` is past all of them.
pub fn cells_end(ino: Ino, end: CellIndex) -> Key {
    if end == u64::MAX { under(CELL, &[ino.0]).1 } else { cell(ino, end) }
}

/// Cells of an inode that were taken away and are not freed yet.
pub fn cuts(ino: Ino) -> Key {
    key(CUTS, &[ino.0], &[])
}

pub fn chunk(id: &ChunkId) -> Key {
    key(CHUNK, &[], &id.0)
}

pub fn condemned(at: Timestamp, id: &ChunkId) -> Key {
    // Flipping the sign bit makes negative seconds sort before positive ones.
    let seconds = (at.secs as u64) ^ (1 << 63);
    key(CONDEMNED, &[seconds, u64::from(at.nanos)], &id.0)
}

pub fn locks(ino: Ino) -> Key {
    key(LOCKS, &[ino.0], &[])
}

/// The queue for the locks of an inode.
pub fn waiting(ino: Ino) -> Key {
    key(WAITING, &[ino.0], &[])
}

/// One place in a queue, so that it is found what an owner waits for.
pub fn wait(owner: LockOwner, ino: Ino, ticket: u64) -> Key {
    key(WAIT, &[owner.node.0, owner.incarnation.0, owner.owner, ino.0, ticket], &[])
}

pub fn waits_of(owner: LockOwner) -> (Key, Key) {
    under(WAIT, &[owner.node.0, owner.incarnation.0, owner.owner])
}

/// How many places there are in queues of all owners of one life.
pub fn waits_of_life(owner: LockOwner) -> Key {
    key(WAIT, &[owner.node.0, owner.incarnation.0], &[])
}

/// The inode and ticket in a key that [`wait`] made.
pub fn waited_for(key: &[u8]) -> Option<(Ino, u64)> {
    Some((Ino(number_at(key, 25)?), number_at(key, 33)?))
}

/// A file that a life of a server holds, so that they are found when it ends.
pub fn owned(holder: Holder, ino: Ino) -> Key {
    key(OWNED, &[holder.node.0, holder.incarnation.0, ino.0], &[])
}

pub fn orphan(ino: Ino) -> Key {
    key(ORPHAN, &[ino.0], &[])
}

pub fn policy(ino: Ino) -> Key {
    key(POLICY, &[ino.0], &[])
}

/// A directory with a quota, so that they are found.
pub fn quota(ino: Ino) -> Key {
    key(QUOTA, &[ino.0], &[])
}

/// Recursive counts of a directory; no record stands for none. Changed by adding alone
/// ([`super::txn::Txn::add`]).
pub fn totals(dir: Ino) -> Key {
    key(TOTALS, &[dir.0], &[])
}

/// A range of inode numbers that a client reserved.
pub fn numbers(client: u64, first: Ino) -> Key {
    key(NUMBERS, &[client, first.0], &[])
}

/// Bytes that a life's journal has of a file up to a position are in the metadata.
pub fn noted(life: u64, upto: u64, ino: Ino) -> Key {
    key(NOTED, &[life, upto, ino.0], &[])
}

/// What a life's journal has before this position is not needed. Positions count from 1, so the place of
/// position 0 is free.
pub fn kept_from(life: u64) -> Key {
    noted(life, 0, Ino(0))
}

/// A life that was ended and whose journal is being taken over.
pub fn left(life: u64) -> Key {
    key(LEFT, &[life], &[])
}

pub fn member(node: NodeId) -> Key {
    key(MEMBER, &[node.0], &[])
}

pub fn removed_key(hash: &[u8; 32]) -> Key {
    key(REMOVED_KEY, &[], hash)
}

pub fn token(hash: &[u8; 32]) -> Key {
    key(TOKEN, &[], hash)
}

pub fn cluster() -> Key {
    vec![CLUSTER]
}

pub fn verdict(client: u64, seq: u64) -> Key {
    key(VERDICT, &[client, seq], &[])
}

/// The highest `seq` of a client whose verdict may have been forgotten. Requests count from 1, so
/// the place of request 0 is free.
pub fn floor(client: u64) -> Key {
    verdict(client, 0)
}

/// As [`floor`]: the client's life has ended, none of its requests happens any more.
pub const ENDED: u64 = u64::MAX;

/// The last `seq` of a life that came to the log behind what happened there. Those come in their order, so what is
/// up to there has come, and needs no verdict each.
pub fn streamed(life: u64) -> Key {
    key(STREAMED, &[life], &[])
}

pub fn counters() -> Key {
    vec![COUNTERS]
}

pub fn state_hash() -> Key {
    vec![STATE_HASH]
}

/// All keys of one kind below these numbers.
pub fn under(kind: u8, numbers: &[u64]) -> (Key, Key) {
    let from = key(kind, numbers, &[]);
    let mut to = from.clone();
    // The kind byte is below 0xff, so there is always a byte to count up.
    while let Some(last) = to.pop() {
        if last < 0xff {
            to.push(last + 1);
            break;
        }
    }
    (from, to)
}

/// A big-endian number inside a key.
pub fn number_at(key: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(at..at + 8)?.try_into().ok()?))
}
