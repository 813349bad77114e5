//! What becomes of chunks that nobody names, as collector and repair of `ctfs-node` have it, in short.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use ctfs_meta::Op;
use ctfs_types::{ChunkId, Timestamp};
use tokio::time::interval;

use super::Server;

const TICK: Duration = Duration::from_secs(1);
/// Chunks that nothing refers to are forgotten after this.
const GRACE: Duration = Duration::from_secs(3);
const BATCH: usize = 256;

/// At the leader: forgets chunks that stayed unreferenced.
pub async fn forget(server: Arc<Server>) {
    let mut ticks = interval(TICK);
    loop {
        ticks.tick().await;
        if !server.consensus.status().is_leader {
            continue;
        }
        let Some(before) = SystemTime::now().checked_sub(GRACE).map(Timestamp::from) else { continue };
        let chunks = server.metadata.replica.read().condemned(before, BATCH).unwrap_or_default();
        if !chunks.is_empty() {
            let _ = server.consensus.propose(Op::ForgetChunks { chunks }).await;
        }
    }
}

/// Drops what this server has and nothing names.
pub async fn drop_unnamed(server: Arc<Server>) {
    let mut ticks = interval(TICK);
    loop {
        ticks.tick().await;
        let unpinned = server.shared.chunks.lock().unpinned(server.node, server.shared.now());
        let unknown: Vec<ChunkId> = {
            let replica = server.metadata.replica.read();
            unpinned.into_iter().filter(|id| matches!(replica.chunk(id), Ok(None))).take(BATCH).collect()
        };
        if unknown.is_empty() {
            continue;
        }
        // An old replica does not know what was written last.
        if server.consensus.barrier().await.is_err() {
            continue;
        }
        let now = server.shared.now();
        let dropped = {
            let replica = server.metadata.replica.read();
            let mut chunks = server.shared.chunks.lock();
            let unnamed = unknown.iter().filter(|id| matches!(replica.chunk(id), Ok(None)));
            unnamed.filter(|id| chunks.delete(server.node, id, now)).count()
        };
        server.note(format_args!("{dropped} chunks are dropped"));
    }
}
