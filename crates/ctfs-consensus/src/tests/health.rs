//! Claims about servers whose disk failed or is full.

use ctfs_meta::Op;
use ctfs_types::{Ino, NodeId};

use super::cluster::*;
use crate::{Consensus, ProposeError, Space, messages};

fn all() -> [NodeId; 3] {
    [node(1), node(2), node(3)]
}

/// The leader of three, and one that follows.
async fn leader_and_follower(cluster: &Cluster) -> (Consensus, Consensus) {
    let leader = cluster.leader(&all()).await;
    let follower = all().into_iter().find(|number| *number != leader.status().node).unwrap();
    (leader, cluster.get(follower))
}

fn others(without: &Consensus) -> Vec<NodeId> {
    all().into_iter().filter(|number| *number != without.status().node).collect()
}

/// Whether some leader says that `number` takes part.
fn takes_part(cluster: &Cluster, number: NodeId) -> Option<bool> {
    let leader = cluster.running().into_iter().find(|server| server.core.leads())?;
    leader.status().servers.get(&number).map(|server| server.answers)
}

fn unlink(name: &str) -> Op {
    Op::Unlink { parent: Ino::ROOT, name: file_name(name) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_store_failed_falls_silent_says_why_and_is_noticed() {
    let cluster = Cluster::of(3, |_| {}).await;
    let (leader, broken) = leader_and_follower(&cluster).await;
    let number = broken.status().node;
    until(&leader, "an answer", || leader.status().servers[&number].last_answered.is_some()).await;
    assert!(leader.status().servers.values().all(|server| server.answers));

    // Nothing that openraft would notice by itself.
    broken.core.health.fail("the disk broke");
    until(&leader, "its silence to be noticed", || takes_part(&cluster, number) == Some(false)).await;
    assert!(leader.status().servers[&number].last_answered.is_some_and(|ago| ago >= timings().lease));
    let status = broken.status();
    assert_eq!(status.stopped.as_deref(), Some("the disk broke"));
    assert_eq!((status.leader, status.leased), (None, false));
    let stopped = Err(ProposeError::Stopped("the disk broke".to_owned()));
    assert_eq!(broken.barrier().await, stopped);
    assert_eq!(broken.propose(make("by it")).await.map(drop), stopped);
    for service in [messages::service::RENEW, messages::service::READ_INDEX, messages::service::APPEND_ENTRIES] {
        let refused = broken.serve(leader.status().node, service, Vec::new()).await;
        assert_eq!(refused, Err("consensus has stopped: the disk broke".to_owned()));
    }
    make_surely(&leader, "without it").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_store_failed_is_replaced() {
    let cluster = Cluster::of(3, |_| {}).await;
    let (broken, _) = leader_and_follower(&cluster).await;
    make_surely(&broken, "before").await.unwrap();
    let left = others(&broken);
    broken.core.health.fail("the disk broke");
    let next = cluster.leader(&left).await;
    make_surely(&next, "after").await.unwrap();
    assert!(has(&next, "before") && !broken.core.leads() && !broken.leased());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_whose_disk_is_full_is_done_without_and_comes_back() {
    let cluster = Cluster::of(3, |_| {}).await;
    let (leader, full) = leader_and_follower(&cluster).await;
    let number = full.status().node;
    full.core.health.pretend_free(Some(0));
    make_surely(&leader, "without it").await.unwrap();
    until(&leader, "its silence to be noticed", || takes_part(&cluster, number) == Some(false)).await;
    let status = full.status();
    assert_eq!((status.space, status.stopped), (Space::Full, None));
    assert_eq!(full.propose(make("by it")).await.map(drop), Err(ProposeError::NoSpace));
    make_surely(&leader, "still without it").await.unwrap();
    let term = leader.status().term;

    full.core.health.pretend_free(None);
    until(&leader, "it to answer", || takes_part(&cluster, number) == Some(true)).await;
    assert_eq!(leader.status().term, term, "it comes back without an election");
    cluster.converge().await;
    cluster.all_leased().await;
    make_surely(&full, "by it").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_is_full_is_replaced_and_follows_when_there_is_room() {
    let cluster = Cluster::of(3, |_| {}).await;
    let (full, _) = leader_and_follower(&cluster).await;
    let left = others(&full);
    full.core.health.pretend_free(Some(0));
    let stuck = tokio::spawn({
        let full = full.clone();
        async move { full.propose(make("stuck")).await }
    });
    let next = cluster.leader(&left).await;
    make_surely(&next, "after").await.unwrap();
    full.core.health.pretend_free(None);
    // Whatever became of it, it happened at most once and on all alike.
    let _ = stuck.await.unwrap();
    until(&next, "the old leader to follow", || !full.core.leads() && full.leased()).await;
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_of_room_the_volume_does_not_grow_and_deleting_goes_on() {
    let cluster = Cluster::of(3, |_| {}).await;
    let leader = cluster.leader(&all()).await;
    for name in ["a", "b", "c"] {
        make_surely(&leader, name).await.unwrap();
    }
    let servers = cluster.running();
    let low = 100 << 20;
    // One of three: the others are a majority with room.
    servers[0].core.health.pretend_free(Some(low));
    until(&leader, "one to be short of room", || leader.status().servers[&node(1)].short_of_room).await;
    assert_eq!(servers[0].status().space, Space::Low);
    make_surely(&leader, "d").await.unwrap();

    servers[1].core.health.pretend_free(Some(low));
    until(&leader, "two to be short of room", || leader.core.is_short_of_room()).await;
    for (server, name) in servers.iter().zip(["a", "b", "c"]) {
        assert_eq!(server.propose(make("more")).await.map(drop), Err(ProposeError::NoSpace));
        server.propose(unlink(name)).await.unwrap().unwrap();
    }
    assert!(!has(&leader, "more"));

    servers[1].core.health.pretend_free(None);
    until(&leader, "room", || !leader.core.is_short_of_room()).await;
    for (server, name) in servers.iter().zip(["a", "b", "c"]) {
        make_surely(server, name).await.unwrap();
    }
}
