//! What the leader collects: unreferenced chunks after their grace time, and inodes that have
//! neither a name nor an open handle.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use ctfs_consensus::Consensus;
use ctfs_meta::{MemberState, Op};
use ctfs_net::Network;
use ctfs_types::{Ino, NodeId, Timestamp};
use ctfs_vfs::Vfs;
use tokio::sync::watch;

use crate::{
    stop,
    messages::{self, OpenOrphans, service},
    peers::CALL_DEADLINE,
};

/// How often orphans are asked about: their space comes back this much later.
const ORPHANS_EVERY: Duration = Duration::from_secs(1);
/// How often condemned chunks are looked at.
const CHUNKS_EVERY: Duration = Duration::from_secs(5);
/// Inodes or chunks in one command; keeps a log entry near 64 KiB.
const BATCH: usize = 1024;
/// Inodes in one reaping command, each with a few records that go while the replica is locked.
const REAPED: usize = 64;
/// Commands in a row that free cells of large files: a minute's worth of orphans does not wait
/// behind one file.
const FREEING: usize = 64;

pub struct Collector {
    pub consensus: Consensus,
    pub network: Network,
    pub vfs: Arc<Vfs>,
    pub node: NodeId,
    pub grace: Duration,
}

impl Collector {
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut orphans = tokio::time::interval(ORPHANS_EVERY);
        let mut chunks = tokio::time::interval(CHUNKS_EVERY);
        loop {
            tokio::select! {
                _ = orphans.tick() => if self.consensus.status().is_leader {
                    self.reap().await;
                    self.free_cells().await;
                },
                _ = chunks.tick() => if self.consensus.status().is_leader { self.forget_chunks().await },
                () = stop::requested(&mut stop) => return,
            }
        }
    }

    /// Reaps the orphans that no server has open.
    ///
    /// Every active member must answer for itself: one that does not may have them open. A
    /// member that is away has lost its leases, and with them its handles.
    async fn reap(&self) {
        let mut after = Ino(0);
        loop {
            let (inos, applied, members) = {
                let replica = self.consensus.replica();
                let namespace = replica.read();
                match (namespace.orphans(after, BATCH), namespace.members()) {
                    (Ok(inos), Ok(mut members)) => {
                        // A life that was ended has nothing open that counts.
                        members.retain(|member| !member.fenced);
                        (inos, namespace.applied(), members)
                    }
                    _ => return,
                }
            };
            let Some(&last) = inos.last() else { return };
            // Those that stay open do not keep the ones behind them waiting.
            after = last;
            let mut open = self.vfs.open_orphans(&inos);
            let question = messages::encode(&OpenOrphans { applied, inos: inos.clone() });
            let others = members.iter().filter(|m| m.node != self.node && m.state == MemberState::Active);
            let answers = others.map(|member| async {
                let reply = self.network.call(member.node, service::OPEN_ORPHANS, question.clone(), CALL_DEADLINE).await.ok()?;
                messages::decode::<Vec<bool>>(&reply).ok().filter(|answer| answer.len() == inos.len())
            });
            for answer in futures_util::future::join_all(answers).await {
                let Some(answer) = answer else { return };
                for (here, there) in open.iter_mut().zip(answer) {
                    *here |= there;
                }
            }
            let unused: Vec<Ino> = inos.iter().zip(&open).filter(|(_, open)| !**open).map(|(ino, _)| *ino).collect();
            for some in unused.chunks(REAPED) {
                if self.consensus.propose(Op::Reap { inos: some.to_vec() }).await.is_err() {
                    return;
                }
            }
            if inos.len() < BATCH {
                return;
            }
        }
    }

    /// Goes on freeing the cells of large files that were cut or reaped; each command a bounded
    /// number of them.
    async fn free_cells(&self) {
        for _ in 0..FREEING {
            let inos = self.consensus.replica().read().unfreed(REAPED);
            if inos.is_empty() || self.consensus.propose(Op::FreeCells { inos }).await.is_err() {
                return;
            }
        }
    }

    /// Second phase of garbage collection: forgets what stayed unreferenced for the grace time.
    async fn forget_chunks(&self) {
        let Some(before) = SystemTime::now().checked_sub(self.grace).map(Timestamp::from) else { return };
        loop {
            let chunks = match self.consensus.replica().read().condemned(before, BATCH) {
                Ok(chunks) if !chunks.is_empty() => chunks,
                _ => return,
            };
            let last = chunks.len() < BATCH;
            if self.consensus.propose(Op::ForgetChunks { chunks }).await.is_err() || last {
                return;
            }
        }
    }
}
