//! The lives of servers: ending that of one that stays silent, and going on after one's own ended.
//!
//! A server that nobody hears of holds files and locks that others wait for. Its lease is over after
//! some seconds, so it acknowledges nothing any more; some seconds later the leader ends its life by
//! a log entry, and everything it held is free. A server that was only cut off learns of it from the
//! log: it drops what it had not flushed, tells the programs that wrote it or held locks, and goes on
//! in a new life.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ctfs_meta::Op;

use crate::{node::Node, stop};

/// A life is ended after this silence. Well past the longest lease, so that its own server knows by
/// then that it may not answer; long enough for a restart of the daemon, which ends the life itself.
const FENCE_AFTER: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_secs(1);
/// Between tries to begin a new life: the disk or the majority may come back.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// At the leader: ends the lives of members that are silent.
pub async fn end_silent(node: Arc<Node>) {
    let mut stopping = node.stop.subscribe();
    let mut ticks = tokio::time::interval(TICK);
    let mut leads_since = None;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop::requested(&mut stopping) => return,
        }
        let status = node.consensus.status();
        // One that is cut off itself hears nobody, and may have been replaced.
        if !status.is_leader || !status.leased {
            leads_since = None;
            continue;
        }
        let led_for = leads_since.get_or_insert_with(Instant::now).elapsed();
        let silent: Vec<_> = {
            let replica = node.consensus.replica();
            let namespace = replica.read();
            let Ok(members) = namespace.members() else { continue };
            let is_silent = |id| {
                let heard = status.servers.get(&id).and_then(|server| server.last_heard);
                heard.unwrap_or(led_for).min(led_for) >= FENCE_AFTER
            };
            members
                .into_iter()
                // One that has joined and not come up yet has no life to end.
                .filter(|member| member.node != node.id && member.incarnation.0 != 0 && !member.fenced)
                .filter(|member| is_silent(member.node))
                .collect()
        };
        for member in silent {
            tracing::warn!(server = member.name, "nothing heard for long: what it holds and has locked is free now");
            let fence = Op::Fence { node: member.node, incarnation: member.incarnation };
            if let Err(error) = node.consensus.propose(fence).await {
                tracing::debug!(%error, "could not end a silent life yet");
            }
        }
    }
}

/// Has the kernel forget everything whenever the read lease has lapsed.
pub async fn forget_at_lapse(node: Arc<Node>) {
    let mut stopping = node.stop.subscribe();
    loop {
        tokio::select! {
            () = node.consensus.lease_lapsed() => {}
            () = stop::requested(&mut stopping) => return,
        }
        tracing::info!("the read lease has lapsed; the kernel's caches are dropped");
        node.events.lease_lapsed();
    }
}

/// Goes on in a new life whenever this one was ended.
pub async fn outlive(node: Arc<Node>) {
    let mut stopping = node.stop.subscribe();
    loop {
        tokio::select! {
            () = node.events.fenced() => {}
            () = stop::requested(&mut stopping) => return,
        }
        let life = node.consensus.incarnation();
        if !node.consensus.replica().read().is_ended(life).unwrap_or(false) {
            continue;
        }
        tracing::warn!("the others went on without this server: unflushed writes and locks of its programs are lost");
        // Before the new life: it could write what the old one must not.
        let (lost, journal) = node.consensus.end_stream();
        if !lost.is_empty() {
            tracing::warn!(changes = lost.len(), "changes of directories that this server held did not reach the others");
        }
        node.vfs.lost(lost.into_iter().map(|command| command.op));
        node.consensus.lost_is_told();
        node.pairs.journal_ended();
        // Its thread ends before the next life reads what is in it.
        let closed = tokio::task::spawn_blocking(move || journal.map_or(Ok(()), |journal| journal.close())).await;
        if let Ok(Err(error)) = closed {
            tracing::error!(%error, "the journal of the ended life was not closed");
        }
        node.vfs.life_ended().await;
        // The kernel was told of them, and of versions that come again.
        node.events.lease_lapsed();
        let next = loop {
            let beginning = node.clone();
            match tokio::task::spawn_blocking(move || beginning.state.begin_life(beginning.id)).await {
                Ok(Ok((_, next))) => break next,
                Ok(Err(problem)) => tracing::error!(what = problem.what, why = problem.why, "cannot begin a new life"),
                Err(error) => tracing::error!(%error, "cannot begin a new life"),
            }
            tokio::select! {
                () = tokio::time::sleep(TRY_AGAIN) => {}
                () = stop::requested(&mut stopping) => return,
            }
        };
        node.events.begin_life(next);
        node.consensus.begin_life(next);
        node.clone().report_life(next).await;
    }
}
