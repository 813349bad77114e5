//! Claims about what is in the journal, and about what is in no log at all.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use ctfs_journal::{JournalId, Position};
use ctfs_meta::{CellWrite, Durability, Lock, LockKind, LockOwner, NewContent, NewNode, Noted, Op, Reply};
use ctfs_types::{ExtentData, FileBytes, Holder, Incarnation, Ino, NodeId, Stamp, Timestamp};
use tokio::time::timeout;

use super::{
    ahead::{Holding, mkdir},
    cluster::*,
};
use crate::{Consensus, Happened, JournalCopy, Second};

const HOLDER: Holder = Holder { node: NodeId(1), incarnation: Incarnation(1) };

/// Makes a file that its server holds, ahead of the log.
fn make(server: &Consensus, name: &str) -> Ino {
    let node = NewNode { content: NewContent::File, mode: 0o644, umask: 0, uid: 0, gid: 0, exclusive: true, holder: Some(HOLDER), ino: None, cell: None };
    match server.happen(&Op::Make { parent: Ino::ROOT, name: file_name(name), node }) {
        Some(Happened::Answered(Ok(Reply::Entry { attr, .. }))) => attr.ino,
        other => panic!("it is alone there: {other:?}"),
    }
}

fn bytes(ino: Ino) -> FileBytes {
    FileBytes { ino, mtime: Timestamp::EPOCH, drop_privileges: false, pieces: vec![(0, b"synced".to_vec())] }
}

fn lock(ino: Ino, owner: u64) -> Op {
    let owner = LockOwner { node: HOLDER.node, incarnation: HOLDER.incarnation, owner };
    Op::Lock { ino, lock: Lock { owner, kind: LockKind::Record, exclusive: true, start: 0, end: 9, pid: 1 } }
}

fn locks(server: &Consensus, ino: Ino) -> usize {
    server.replica().read().locks(ino, LockKind::Record).unwrap().len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_journal_lets_go_of_bytes_when_the_write_that_has_them_is_in_the_log() {
    let Holding { cluster, server, _journal } = Holding::start().await;
    let ino = make(&server, "f");
    server.await_streamed().await.unwrap();
    let upto = server.write_down(&bytes(ino)).expect("there is a journal");
    // From here on nothing gets to the log; the lease lasts a moment longer.
    cluster.isolate(node(1));
    let cell = CellWrite { cell: 0, expect: Stamp(0), start: 0, data: Some(ExtentData::Inline(b"synced".to_vec())), copies: 0 };
    let noted = Some(Noted { upto, kept_from: server.kept_from() });
    let write = Op::Write { ino, cells: vec![cell], size_at_least: 6, mtime: None, drop_privileges: false, appends_at: None, noted };
    let Some(Happened::Answered(Ok(Reply::Written { .. }))) = server.happen(&write) else { panic!("it is alone there") };
    server.let_go(ino, upto);
    assert!(server.journal_depth().unwrap().trimmed.0 < upto, "the write itself is nowhere else");
    cluster.heal();
    server.await_streamed().await.unwrap();
    until(&server, "the journal to be trimmed", || server.journal_depth().unwrap().trimmed.0 >= upto).await;
    cluster.converge().await;
}

struct Pair {
    id: JournalId,
    has: bool,
}

#[async_trait]
impl JournalCopy for Pair {
    fn id(&self) -> JournalId {
        self.id
    }

    async fn durable_at(&self, _position: Position) -> bool {
        self.has
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_the_journal_counts_as_the_class_and_the_second_disk_allow() {
    let Holding { cluster: _cluster, server, _journal } = Holding::start().await;
    let ino = make(&server, "f");
    server.write_down(&bytes(ino)).expect("there is a journal");
    let id = JournalId { cluster: [7; 16], node: HOLDER.node, incarnation: HOLDER.incarnation };
    let other = JournalId { incarnation: Incarnation(2), ..id };
    let pair = |id, has| Second::Copy(Arc::new(Pair { id, has }));
    for (second, by_pair) in [(Second::Unknown, false), (Second::Nobody, true), (pair(id, true), true), (pair(id, false), false), (pair(other, true), false)] {
        server.set_second(second);
        assert_eq!(server.durable(Durability::Pair).await, Ok(by_pair));
        assert_eq!(server.durable(Durability::Local).await, Ok(true));
        assert_eq!(server.durable(Durability::Quorum).await, Ok(false));
        assert_eq!(server.durable(Durability::All).await, Ok(false));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_in_a_held_directory_is_in_no_log_until_the_directory_is_given_up() {
    let Holding { cluster, server, _journal } = Holding::start().await;
    let ino = make(&server, "f");
    server.await_streamed().await.unwrap();
    assert_eq!(server.happen(&lock(ino, 7)), Some(Happened::Answered(Ok(Reply::Locked))));
    let refused = server.happen(&lock(ino, 8));
    assert!(matches!(refused, Some(Happened::Answered(Err(ctfs_meta::MetaError::Locked { .. })))), "{refused:?}");
    assert_eq!((server.streaming(), locks(&server, ino)), (0, 1));
    let others: Vec<_> = [node(2), node(3)].map(|node| cluster.get(node)).into();
    assert!(others.iter().all(|other| locks(other, ino) == 0));

    server.close_ahead(&[Ino::ROOT]);
    server.await_streamed().await.unwrap();
    assert!(others.iter().all(|other| locks(other, ino) == 1), "everybody sees it before the directory is anybody else's");
    assert_eq!(locks(&server, ino), 1);
    server.replica().write().open_ahead(&[Ino::ROOT]);
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn locks_that_become_known_hold_up_nothing_else_that_happens() {
    let Holding { cluster, server, _journal } = Holding::start().await;
    let ino = make(&server, "f");
    let tells = tokio::spawn({
        let server = server.clone();
        async move {
            for owner in 0..200 {
                server.happen(&lock(ino, owner));
                server.close_ahead(&[Ino::ROOT]);
                server.replica().write().open_ahead(&[Ino::ROOT]);
                server.happen(&Op::UnlockAll { ino, owner: LockOwner { node: HOLDER.node, incarnation: HOLDER.incarnation, owner } });
                tokio::task::yield_now().await;
            }
        }
    });
    let makes = tokio::spawn({
        let server = server.clone();
        async move {
            for number in 0..200 {
                server.happen(&mkdir(&format!("d{number}")));
                server.let_go(ino, 0);
                tokio::task::yield_now().await;
            }
        }
    });
    timeout(Duration::from_secs(30), async { tokio::try_join!(tells, makes) }).await.expect("nobody waits for ever").unwrap();
    server.await_streamed().await.unwrap();
    cluster.converge().await;
}
