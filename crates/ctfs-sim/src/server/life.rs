//! The tasks of `ctfs-node` that coherence hangs on: reporting a life, ending silent ones, going on
//! after one's own was ended, reaping.

use std::{sync::Arc, time::Duration};

use ctfs_consensus::{ProposeError, Transport};
use ctfs_meta::{MemberState, MetaError, Op};
use ctfs_pair::ReplayError;
use ctfs_types::{
    Incarnation, Ino,
    rules::{Rule, keeps},
};
use ctfs_vfs::Metadata;
use tokio::time::{Instant, interval, sleep};

use super::{Server, metadata::{OpenOrphans, decode, encode, service}};

const TICK: Duration = Duration::from_secs(1);
const TRY_AGAIN: Duration = Duration::from_secs(1);
const ORPHANS_MAX: usize = 64;
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// Reports the new life when a majority is back, after all of the lives before was sent.
pub async fn report(server: &Arc<Server>, life: Incarnation) {
    loop {
        match server.pairs.replay(life).await {
            Ok(0) => {}
            Ok(happened) => server.note(format_args!("{happened} commands of earlier lives were sent again")),
            Err(why) => {
                if matches!(why, ReplayError::Journal(_) | ReplayError::Record(_)) {
                    let what = format!("s{} cannot read the journal of an earlier life: {why}", server.node.0);
                    server.shared.history.lock().violation(server.shared.now(), what);
                }
                server.note(format_args!("earlier lives are not in the log yet: {why}"));
                sleep(TRY_AGAIN).await;
                continue;
            }
        }
        let op = Op::Incarnate { node: server.node, incarnation: life, addresses: vec![], capacity: 1, version: String::new() };
        match server.consensus.propose(op).await {
            Ok(Ok(_)) => {
                server.pairs.begin_journal(life).expect("a new life has no journal yet");
                server.reported.send_replace(Some(life));
                server.note(format_args!("life {} begins", life.0));
                return;
            }
            // It was ended before its report was answered; the next one comes of that.
            Ok(Err(MetaError::StaleIncarnation)) => return,
            Ok(Err(verdict)) => panic!("s{} cannot report a life: {verdict}", server.node.0),
            Err(ProposeError::Stopped(why)) => panic!("s{} has stopped: {why}", server.node.0),
            Err(_) => {}
        }
    }
}

/// At the leader: ends the lives of members that are silent.
pub async fn end_silent(server: Arc<Server>) {
    let mut ticks = interval(TICK);
    let mut leads_since = None;
    loop {
        ticks.tick().await;
        let status = server.consensus.status();
        if !status.is_leader || !status.leased {
            leads_since = None;
            continue;
        }
        let led_for = leads_since.get_or_insert_with(Instant::now).elapsed();
        let silent: Vec<_> = {
            let members = server.metadata.replica.read().members().unwrap_or_default();
            let is_silent = |id| {
                let heard = status.servers.get(&id).and_then(|server| server.last_heard);
                heard.unwrap_or(led_for).min(led_for) >= server.shared.fence_after()
            };
            members
                .into_iter()
                .filter(|member| member.node != server.node && member.incarnation.0 != 0 && !member.fenced)
                .filter(|member| is_silent(member.node))
                .collect()
        };
        for member in silent {
            server.note(format_args!("ends life {} of s{}", member.incarnation.0, member.node.0));
            server.shared.history.lock().life_ends(server.shared.now(), member.incarnation);
            let fence = Op::Fence { node: member.node, incarnation: member.incarnation };
            let _ = server.consensus.propose(fence).await;
        }
    }
}

/// Has the kernel forget everything whenever the read lease has lapsed.
pub async fn forget_at_lapse(server: Arc<Server>) {
    loop {
        server.consensus.lease_lapsed().await;
        server.note(format_args!("the lease has lapsed"));
        if keeps(Rule::NewLifeForgets) {
            server.kernel.drop_all();
        }
    }
}

/// Goes on in a new life whenever this one was ended.
pub async fn outlive(server: Arc<Server>) {
    loop {
        server.kernel.fenced.notified().await;
        let life = server.consensus.incarnation();
        if !server.consensus.replica().read().is_ended(life).unwrap_or(false) {
            continue;
        }
        let (lost, journal) = server.consensus.end_stream();
        server.note(format_args!("goes on in another life; {} commands are lost", lost.len()));
        server.vfs.lost(lost.into_iter().map(|command| command.op));
        server.consensus.lost_is_told();
        server.pairs.journal_ended();
        // Also where others still read it: nothing more is written when the next life looks at it.
        if let Some(Err(why)) = journal.map(|journal| journal.close()) {
            server.note(format_args!("the journal of the ended life was not closed: {why}"));
        }
        server.vfs.life_ended().await;
        if keeps(Rule::NewLifeForgets) {
            server.kernel.drop_all();
        }
        let next = server.next_life();
        server.kernel.begin_life(next.0);
        server.consensus.begin_life(next);
        report(&server, next).await;
    }
}

/// At the leader: drops inodes without a name that nobody has open.
pub async fn reap(server: Arc<Server>) {
    let mut ticks = interval(TICK);
    loop {
        ticks.tick().await;
        if !server.consensus.status().is_leader {
            continue;
        }
        let (inos, applied, members) = {
            let replica = server.metadata.replica.read();
            let Ok(inos) = replica.orphans(Ino(0), ORPHANS_MAX) else { continue };
            (inos, replica.applied(), replica.members().unwrap_or_default())
        };
        if inos.is_empty() {
            continue;
        }
        let mut open = server.vfs.open_orphans(&inos);
        let question = encode(&OpenOrphans { applied, inos: inos.clone() });
        let others = members.iter().filter(|m| !m.fenced && m.node != server.node && m.state == MemberState::Active);
        let mut all_answered = true;
        for member in others {
            let answer = server.link.call(member.node, service::OPEN_ORPHANS, question.clone(), CALL_DEADLINE).await;
            match answer.map_err(|error| error.to_string()).and_then(|answer| decode::<Vec<bool>>(&answer)) {
                Ok(there) => open.iter_mut().zip(there).for_each(|(here, there)| *here |= there),
                Err(_) => all_answered = false,
            }
        }
        let unused: Vec<Ino> = inos.iter().zip(&open).filter(|(_, open)| !**open).map(|(ino, _)| *ino).collect();
        if all_answered && !unused.is_empty() {
            let _ = server.consensus.propose(Op::Reap { inos: unused }).await;
        }
    }
}

/// Waits until the server has applied `applied`, then says which inodes are open here.
///
/// # Errors
/// A text for who asks.
pub async fn open_orphans(server: &Server, question: OpenOrphans) -> Result<Vec<u8>, String> {
    let mut applied = server.consensus.applied();
    let reached = tokio::time::timeout(CALL_DEADLINE, applied.wait_for(|applied| *applied >= question.applied)).await;
    if !matches!(reached, Ok(Ok(_))) {
        return Err("not applied yet".to_owned());
    }
    let _ = server.metadata.incarnation();
    Ok(encode(&server.vfs.open_orphans(&question.inos)))
}
