//! The bytes that are in logs, snapshots, states and messages, compared with `golden.txt`.
//!
//! Where this fails, what was written before is no longer read as it was meant, or a replica of an
//! older program would answer otherwise. Then the version in front of it must be raised; see
//! `docs/formats.md`. A new variant at the end of an enum only adds lines.

use ctfs_types::{Attr, CellSize, FileKind, FileUse, Holder, Incarnation, Ino, NodeId, Stamp, codec};
use serde::Serialize;

use super::harness::{
    CLIENT, Volume, chunk, chunk_id, dump, identity, inline, member, name, node, owner, record_lock, time, token,
};
use crate::{
    About, CellWrite, Command, Durability, LockKind, MemberState, MetaError, NewContent, NewNode, Noted, OnPartition, Op, Policy, Quota, RenameMode, Reply, SetAttr, XattrMode,
};

const ROOT: Ino = Ino::ROOT;
const CELL: u64 = 1 << 20;
const HOLDER: Holder = Holder { node: NodeId(2), incarnation: Incarnation(1) };

/// Every operation at least once, each of which does something.
fn ops() -> Vec<Op> {
    let make = |parent, text: &str, content| Op::Make { parent, name: name(text), node: node(content, 0o2755) };
    let (dir, file, copy) = (Ino(2), Ino(3), Ino(4));
    let cell = |cell, data| CellWrite { cell, expect: Stamp(0), start: 7, data, copies: 2 };
    let locker = owner(2, 1, 99);
    vec![
        Op::Noop,
        Op::Found { cluster: identity(), member: member(1) },
        Op::CreateToken { token: token(200, 2) },
        Op::CreateToken { token: token(201, 1) },
        Op::Join { token: [200; 32], member: member(2) },
        Op::Join { token: [200; 32], member: member(3) },
        Op::RevokeToken { hash: [201; 32] },
        Op::CreateToken { token: token(202, 5) },
        make(ROOT, "dir", NewContent::Directory),
        make(dir, "file", NewContent::File),
        make(dir, "copy", NewContent::File),
        make(dir, "link", NewContent::Symlink { target: b"../else\xff".to_vec() }),
        make(dir, "fifo", NewContent::Fifo),
        make(dir, "socket", NewContent::Socket),
        make(dir, "tty", NewContent::CharDevice { rdev: 0x501 }),
        make(dir, "disk", NewContent::BlockDevice { rdev: 0x800_0001 }),
        make(dir, "gone", NewContent::File),
        Op::SetPolicy { ino: dir, policy: Policy { copies: Some(2), cell: CellSize::from_bytes(CELL), durability: Some(Durability::Quorum), on_partition: Some(OnPartition::Block) } },
        Op::Write {
            ino: file,
            cells: (0..7).map(|n| cell(n, Some(chunk(n as u8, 4096)))).collect(),
            size_at_least: 8 * CELL,
            mtime: Some(time(1)),
            drop_privileges: true,
            appends_at: None,
            noted: None,
        },
        Op::Write {
            ino: file,
            cells: vec![cell(7, Some(inline(b"abc")))],
            size_at_least: 0,
            mtime: None,
            drop_privileges: false,
            appends_at: Some(8 * CELL),
            noted: Some(Noted { upto: 300, kept_from: 200 }),
        },
        Op::CloneCells { source: file, first: 6, ino: copy, to: 0, cells: 2, size_at_least: 2 * CELL },
        Op::Punch { ino: file, first: 1, cells: 1 },
        Op::ForgetChunks { chunks: vec![chunk_id(1), chunk_id(2)] },
        Op::Link { ino: file, parent: ROOT, name: name("hard") },
        Op::Rename { from: dir, name: name("fifo"), to: ROOT, new_name: name("pipe"), mode: RenameMode::NoReplace },
        Op::Rename { from: dir, name: name("tty"), to: dir, new_name: name("disk"), mode: RenameMode::Exchange },
        Op::Rename { from: dir, name: name("gone"), to: dir, new_name: name("socket"), mode: RenameMode::Replace },
        Op::SetXattr { ino: file, name: b"user.a".to_vec(), value: vec![1, 2, 3], mode: XattrMode::Create },
        Op::SetXattr { ino: file, name: b"user.b".to_vec(), value: vec![4], mode: XattrMode::Set },
        Op::SetXattr { ino: file, name: b"user.a".to_vec(), value: vec![5], mode: XattrMode::Replace },
        Op::RemoveXattr { ino: file, name: b"user.b".to_vec() },
        Op::SetAttr {
            ino: copy,
            set: SetAttr {
                mode: Some(0o6751),
                uid: Some(7),
                gid: Some(8),
                size: Some(CELL + 2),
                atime: Some(ctfs_types::Timestamp::new(-5, 6)),
                mtime: Some(time(2)),
                drop_privileges: true,
                drop_setgid: true,
            },
        },
        Op::Lock { ino: file, lock: record_lock(locker, true, 10, 19) },
        Op::Lock { ino: file, lock: record_lock(owner(2, 1, 98), false, 30, u64::MAX) },
        Op::Unlock { ino: file, owner: locker, kind: LockKind::Record, start: 12, end: 15 },
        Op::Lock { ino: copy, lock: record_lock(locker, false, 0, 0) },
        Op::UnlockAll { ino: copy, owner: locker },
        Op::Unlink { parent: dir, name: name("copy") },
        Op::Reap { inos: vec![Ino(9), Ino(7)] },
        // With a bound of two cells most of the file waits to be freed.
        Op::SetAttr { ino: file, set: SetAttr { size: Some(0), ..SetAttr::default() } },
        Op::FreeCells { inos: vec![file] },
        Op::SetMemberState { node: NodeId(2), state: MemberState::Away },
        Op::Fence { node: NodeId(2), incarnation: Incarnation(2) },
        Op::Incarnate {
            node: NodeId(1),
            incarnation: Incarnation(7),
            addresses: vec!["a:1".into(), "b:2".into()],
            capacity: 1 << 40,
            version: "0.2.0".into(),
        },
        Op::RemoveMember { node: NodeId(3) },
        make(ROOT, "empty", NewContent::Directory),
        Op::Rmdir { parent: ROOT, name: name("empty") },
        Op::Own { ino: Ino(10), holder: HOLDER, although_shared: true },
        // Late, and so passed over.
        Op::Disown { files: vec![(Ino(10), 3)], holder: HOLDER, shared: true },
        Op::SetQuota { ino: dir, quota: Quota { bytes: Some(1 << 40), files: Some(300) } },
        Op::AwaitLock { ino: file, lock: record_lock(owner(2, 1, 97), true, 10, 19), ticket: 300 },
        Op::AwaitLock { ino: file, lock: record_lock(owner(2, 1, 96), false, 10, 19), ticket: 301 },
        Op::WithdrawLock { ino: file, owner: owner(2, 1, 96), ticket: 301 },
        Op::Overtake { ino: file, owner: owner(2, 1, 97), ticket: 300 },
        Op::ReserveInos { count: 300 },
        Op::Make {
            parent: dir,
            name: name("numbered"),
            node: NewNode { ino: Some(Ino(20)), ..node(NewContent::File, 0o644) },
        },
        Op::SetPair { life: holder(1, 7), pair: Some(NodeId(2)) },
        Op::Fence { node: NodeId(1), incarnation: Incarnation(7) },
        Op::EndLife { life: holder(1, 7), by: holder(1, 8) },
        Op::SetPair { life: HOLDER, pair: Some(NodeId(1)) },
        Op::Fence { node: HOLDER.node, incarnation: HOLDER.incarnation },
        // Refused, and so remembered.
        Op::Unlink { parent: ROOT, name: name("nothing") },
    ]
}

fn holder(node: u64, incarnation: u64) -> Holder {
    Holder { node: NodeId(node), incarnation: Incarnation(incarnation) }
}

fn errors() -> Vec<MetaError> {
    let (ino, entry) = (Ino(3), || name("name"));
    vec![
        MetaError::NoSuchInode(ino),
        MetaError::NoSuchEntry { parent: ino, name: entry() },
        MetaError::Exists { parent: ino, name: entry() },
        MetaError::NotDirectory(ino),
        MetaError::IsDirectory(ino),
        MetaError::NotEmpty(ino),
        MetaError::UnderItself(ino),
        MetaError::TooManyLinks(ino),
        MetaError::WrongKind(ino),
        MetaError::FileTooBig,
        MetaError::BadTarget,
        MetaError::NoSuchXattr,
        MetaError::XattrExists,
        MetaError::XattrTooBig,
        MetaError::BadAcl,
        MetaError::CellChanged { ino, cell: 300 },
        MetaError::Locked { holder: Box::new(record_lock(owner(1, 2, 3), true, 4, 5)) },
        MetaError::SizeChanged(ino),
        MetaError::Held { ino, holder: HOLDER },
        MetaError::Shared(ino),
        MetaError::StaleIncarnation,
        MetaError::Answered,
        MetaError::AlreadyFounded,
        MetaError::NoSuchToken,
        MetaError::TokenExpired,
        MetaError::NoSuchMember,
        MetaError::MemberNameTaken("a".into()),
        MetaError::KeyRemoved,
        MetaError::BadPolicy("why".into()),
        MetaError::QuotaExceeded { dir: ino },
        MetaError::AcrossQuota { from: ino, to: Ino(4) },
        MetaError::Deadlock,
        MetaError::TooManyWaiters,
        MetaError::NotWaiting,
        MetaError::NumberNotReserved(ino),
        MetaError::BadReservation(70_000),
        MetaError::TooManyReservations,
    ]
}

fn replies() -> Vec<Reply> {
    let attr = Attr {
        ino: Ino(300),
        generation: 1,
        kind: FileKind::File,
        mode: 0o644,
        uid: 70_000,
        gid: 100,
        nlink: 2,
        size: 1 << 40,
        allocated: 4096,
        atime: time(1),
        mtime: time(2),
        ctime: time(3),
        btime: time(4),
        rdev: 5,
        data_version: 6,
        cell: CellSize::DEFAULT,
        usage: FileUse::Owned { holder: HOLDER, since: 300 },
    };
    vec![
        Reply::Done,
        Reply::Entry { attr: attr.clone(), made: true },
        Reply::Attr(attr.clone()),
        Reply::Written { attr, stamp: Stamp(251) },
        Reply::Joined { member: member(1) },
        Reply::Locked,
        Reply::Queued,
        Reply::Inos { first: Ino(300), count: 70_000 },
    ]
}

fn line(what: &str, value: &impl Serialize) -> String {
    format!("{what} {}\n", hex(&codec::encode(3, value)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The first word of a value's debug text: which variant it is.
fn variant(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}").chars().take_while(char::is_ascii_alphanumeric).collect()
}

#[test]
fn the_encoded_bytes_are_those_of_version_5() {
    let mut text = String::new();
    for error in errors() {
        text += &line(&format!("error {}", variant(&error)), &error);
    }
    for reply in replies() {
        text += &line(&format!("reply {}", variant(&reply)), &reply);
    }
    let mut volume = Volume::freeing_at_most(2);
    let ops = ops();
    let last = ops.len() - 1;
    for (number, op) in ops.into_iter().enumerate() {
        let command = Command { about: About::Ahead, ..volume.command(op) };
        text += &line(&format!("command {}", variant(&command.op)), &command);
        let verdict = volume.apply(std::slice::from_ref(&command)).remove(0);
        assert_eq!(verdict.is_ok(), number != last, "{:?}: {verdict:?}", command.op);
    }
    let records = dump(volume.ns.store(), &[0xff]);
    let mut kinds: Vec<u8> = records.keys().map(|key| key[0]).collect();
    kinds.dedup();
    assert_eq!(kinds, (1..=28).collect::<Vec<_>>(), "a record of each kind");
    for (key, value) in records {
        text += &format!("record {} {}\n", hex(&key), hex(&value));
    }
    let golden = include_str!("golden.txt");
    let differs = text.lines().zip(golden.lines()).find(|(now, then)| now != then);
    assert!(text == golden, "first difference, now and then: {differs:#?}\nall of it now:\n{text}");
    assert_eq!(CLIENT, 1 << 50, "the client in these commands");
}
