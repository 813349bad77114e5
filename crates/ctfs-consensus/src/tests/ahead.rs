//! Claims about what happens ahead of the log.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use ctfs_journal::{Journal, JournalId, SystemDisk};
use ctfs_meta::{MetaError, NewContent, NewNode, Op, Reply};
use ctfs_types::{FileUse, Holder, Incarnation, Ino};
use tempfile::TempDir;
use tokio::time::timeout;

use super::cluster::*;
use crate::{Consensus, Happened, ProposeError, Settings};

fn ahead(settings: &mut Settings) {
    settings.acts_ahead = true;
}

/// Three servers, of which the first holds the root directory.
pub(super) struct Holding {
    pub cluster: Cluster,
    pub server: Consensus,
    pub _journal: TempDir,
}

impl Holding {
    pub async fn start() -> Self {
        let cluster = Cluster::of(3, ahead).await;
        let server = cluster.get(node(1));
        let dir = TempDir::new().unwrap();
        let id = JournalId { cluster: [7; 16], node: node(1), incarnation: Incarnation(1) };
        server.set_journal(Arc::new(Journal::create(Arc::new(SystemDisk), dir.path(), id, Default::default()).unwrap()));
        server.propose(Op::ReserveInos { count: 1000 }).await.unwrap().unwrap();
        let holder = Holder { node: node(1), incarnation: Incarnation(1) };
        server.propose(Op::Own { ino: Ino::ROOT, holder, although_shared: false }).await.unwrap().unwrap();
        Self { cluster, server, _journal: dir }
    }
}

pub(super) fn mkdir(name: &str) -> Op {
    let node = NewNode { content: NewContent::Directory, mode: 0o755, umask: 0, uid: 0, gid: 0, exclusive: true, holder: None, ino: None, cell: None };
    Op::Make { parent: Ino::ROOT, name: file_name(name), node }
}

/// Of a life that was not reported nobody knows that it ended: what it held stayed held for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_life_holds_nothing_before_it_is_reported() {
    let cluster = Cluster::of(1, ahead).await;
    let server = cluster.get(node(1));
    let holder = Holder { node: node(1), incarnation: Incarnation(1) };
    let mut asked = tokio::spawn({
        let server = server.clone();
        async move { server.propose(Op::Own { ino: Ino::ROOT, holder, although_shared: false }).await }
    });
    assert!(timeout(Duration::from_millis(200), &mut asked).await.is_err(), "it waits");
    let dir = TempDir::new().unwrap();
    let id = JournalId { cluster: [7; 16], node: node(1), incarnation: Incarnation(1) };
    server.set_journal(Arc::new(Journal::create(Arc::new(SystemDisk), dir.path(), id, Default::default()).unwrap()));
    asked.await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_holder_does_happens_at_once_and_comes_to_the_others_in_order() {
    let Holding { cluster, server, _journal } = Holding::start().await;
    for number in 0..200 {
        let Some(Happened::Answered(Ok(Reply::Entry { attr, .. }))) = server.happen(&mkdir(&format!("d{number}"))) else { panic!("it is alone there") };
        assert!(matches!(attr.usage, FileUse::Owned { .. }), "held from birth");
        assert!(has(&server, &format!("d{number}")));
    }
    assert_eq!(server.happen(&mkdir("d7")), Some(Happened::Answered(Err(MetaError::Exists { parent: Ino::ROOT, name: file_name("d7") }))));
    server.await_streamed().await.unwrap();
    for other in cluster.running() {
        assert!((0..200).all(|number| has(&other, &format!("d{number}"))), "visible everywhere when it is streamed");
    }
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happened_comes_to_the_log_whoever_leads() {
    let Holding { cluster, server, _journal } = Holding::start().await;
    let all = [node(1), node(2), node(3)];
    for round in 0..3 {
        for number in 0..50 {
            // Without a lease it goes through the log, and may take a while.
            let name = format!("r{round}-{number}");
            if server.happen(&mkdir(&name)).is_none() {
                server.propose(mkdir(&name)).await.unwrap().unwrap();
            }
        }
        let leader = cluster.leader(&all).await.status().node;
        cluster.isolate(leader);
        let others: Vec<_> = all.into_iter().filter(|number| *number != leader).collect();
        cluster.leader(&others).await;
        cluster.heal();
        cluster.all_leased().await;
    }
    server.await_streamed().await.unwrap();
    cluster.converge().await;
    let other = cluster.get(node(2));
    assert!((0..3).all(|round| (0..50).all(|number| has(&other, &format!("r{round}-{number}")))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_was_given_up_is_decided_before_its_inodes_go_ahead_again() {
    let Holding { cluster, server, _journal } = Holding::start().await;
    // One that was never sent is about nothing any more.
    drop(server.request());
    let goes_ahead = |name: &str| matches!(server.happen(&mkdir(name)), Some(Happened::Answered(Ok(_))));
    assert!(goes_ahead("before"));
    server.await_streamed().await.unwrap();

    cluster.isolate(node(1));
    let request = server.request();
    let given_up = timeout(Duration::from_millis(100), request.propose(Op::Link { ino: Ino(2), parent: Ino::ROOT, name: file_name("link") })).await;
    assert!(given_up.is_err(), "nobody can answer it");
    assert!(server.replica().read().is_on_the_way(Ino::ROOT));
    drop(request);
    assert!(server.replica().read().is_on_the_way(Ino::ROOT), "it may still come to the log");
    cluster.heal();
    until(&server, "the doubt to end", || !server.replica().read().is_on_the_way(Ino::ROOT)).await;
    until(&server, "a lease", || server.leased()).await;
    assert!(goes_ahead("after"));
    server.await_streamed().await.unwrap();
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_what_happened_hears_that_its_life_was_ended() {
    let Holding { cluster, server, _journal } = Holding::start().await;
    cluster.isolate(node(1));
    let Some(Happened::Answered(Ok(_))) = server.happen(&mkdir("lost")) else { panic!("the lease lasts a moment longer") };
    let waits = tokio::spawn({
        let server = server.clone();
        async move { server.await_streamed().await }
    });
    let leader = cluster.leader(&[node(2), node(3)]).await;
    leader.propose(Op::Fence { node: node(1), incarnation: Incarnation(1) }).await.unwrap().unwrap();
    cluster.heal();
    until(&server, "the end of the life", || !has(&server, "lost")).await;
    assert_eq!(waits.await.unwrap(), Err(ProposeError::LifeEnded));
    until(&server, "the end of the stream", || server.streaming() == 0).await;
    assert_eq!(server.await_streamed().await, Err(ProposeError::LifeEnded), "until it is told, nobody hears that all is well");
    let (lost, _) = server.end_stream();
    assert_eq!(lost.iter().map(|command| &command.op).count(), 1, "{lost:?}");
    assert_eq!(server.core.numbers.lock().span(), 0, "or else nothing happens ahead any more after some thousand requests");
    server.lost_is_told();
    assert_eq!(server.await_streamed().await, Ok(()));
    assert!(!has(&leader, "lost"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_is_no_room_what_happened_before_and_what_frees_room_come_to_the_log() {
    let Holding { cluster, server, _journal } = Holding::start().await;
    assert!(matches!(server.happen(&mkdir("before")), Some(Happened::Answered(Ok(_)))));
    for other in cluster.running() {
        other.core.health.pretend_free(Some(100 << 20));
    }
    until(&server, "the shortage to be known", || if server.core.leads() { server.core.is_short_of_room() } else { server.core.refuses_growth.load(Relaxed) }).await;
    assert_eq!(server.happen(&mkdir("more")), None, "programs are to hear of it");
    assert_eq!(server.propose(mkdir("more")).await, Err(ProposeError::NoSpace));
    server.propose(Op::Rmdir { parent: Ino::ROOT, name: file_name("before") }).await.unwrap().unwrap();
    server.await_streamed().await.unwrap();
    cluster.converge().await;
}
