//! What this server does for its peers: the one place where requests from the network arrive.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_chunk::{ChunkStore, Chunks, PeerError, wire as chunk_wire};
use ctfs_consensus::Consensus;
use ctfs_net::Handler;
use ctfs_pair::{Pairs, wire};
use ctfs_types::{ChunkId, NodeId, limits::CHUNK_BYTES_MAX};
use ctfs_vfs::Vfs;
use parking_lot::Mutex;

use crate::{
    join::Doorman,
    members::Membership,
    messages::{self, HeldFile, LIST_MAX, OpenOrphans, service},
    peers::FULL,
    report::Figures,
};

/// Peers may call before this server has finished starting; they are told to come back.
const STARTING: &str = "server is starting";

/// Everything a request may need, filled in as the server starts.
#[derive(Default)]
pub struct Services {
    consensus: OnceLock<Consensus>,
    chunks: OnceLock<(Arc<ChunkStore>, Chunks)>,
    vfs: OnceLock<Arc<Vfs>>,
    pairs: OnceLock<Arc<Pairs>>,
    doorman: OnceLock<Arc<Doorman>>,
    membership: OnceLock<Arc<Membership>>,
    figures: OnceLock<Arc<Figures>>,
    heard: Mutex<HashMap<NodeId, Heard>>,
}

/// When a peer's connection was last known to live.
#[derive(Debug, Clone, Copy)]
pub enum Heard {
    Connected,
    LostAt(Instant),
}

impl Services {
    pub fn serve_consensus(&self, consensus: Consensus) {
        assert!(self.consensus.set(consensus).is_ok(), "consensus starts once");
    }

    pub fn serve_chunks(&self, store: Arc<ChunkStore>, chunks: Chunks) {
        assert!(self.chunks.set((store, chunks)).is_ok(), "the chunk store starts once");
    }

    pub fn serve_vfs(&self, vfs: Arc<Vfs>) {
        assert!(self.vfs.set(vfs).is_ok(), "the file system starts once");
    }

    pub fn serve_pairs(&self, pairs: Arc<Pairs>) {
        assert!(self.pairs.set(pairs).is_ok(), "the journals start once");
    }

    pub fn serve_cluster(&self, doorman: Arc<Doorman>, membership: Arc<Membership>, figures: Arc<Figures>) {
        assert!(self.doorman.set(doorman).is_ok(), "the cluster services start once");
        assert!(self.membership.set(membership).is_ok(), "the cluster services start once");
        assert!(self.figures.set(figures).is_ok(), "the cluster services start once");
    }

    /// When the connection to `node` was last alive; `None` if it never was.
    pub fn heard(&self, node: NodeId) -> Option<Heard> {
        self.heard.lock().get(&node).copied()
    }

    /// The file system, if it is in the life that is asked.
    fn holder(&self, file: &HeldFile) -> Result<&Arc<Vfs>, String> {
        let vfs = self.vfs.get().ok_or(STARTING)?;
        if vfs.incarnation() == file.incarnation { Ok(vfs) } else { Err("that life of this server has ended".to_owned()) }
    }

    async fn open_orphans(&self, question: OpenOrphans) -> Result<Vec<u8>, String> {
        if question.inos.len() > LIST_MAX {
            return Err(format!("more than {LIST_MAX} inodes in one question"));
        }
        let consensus = self.consensus.get().ok_or(STARTING)?;
        let vfs = self.vfs.get().ok_or(STARTING)?;
        let mut applied = consensus.applied();
        let reached = applied.wait_for(|&index| index >= question.applied);
        tokio::time::timeout(Duration::from_secs(3), reached)
            .await
            .map_err(|_| "this server lags behind".to_owned())?
            .map_err(|_| STARTING.to_owned())?;
        Ok(messages::encode(&vfs.open_orphans(&question.inos)))
    }
}

#[async_trait]
impl Handler for Services {
    async fn call(&self, from: NodeId, service: u16, payload: Vec<u8>) -> Result<Vec<u8>, String> {
        match service {
            number if service::CONSENSUS.contains(&number) => {
                self.consensus.get().ok_or(STARTING)?.serve(from, service, payload).await
            }
            service::HAVE_CHUNKS => {
                let ids: Vec<ChunkId> = messages::decode(&payload)?;
                if ids.len() > LIST_MAX {
                    return Err(format!("more than {LIST_MAX} chunks in one question"));
                }
                let (store, _) = self.chunks.get().ok_or(STARTING)?;
                Ok(messages::encode(&store.has(&ids)))
            }
            service::OPEN_ORPHANS => self.open_orphans(messages::decode(&payload)?).await,
            service::RECALL => {
                let file: HeldFile = messages::decode(&payload)?;
                let vfs = self.holder(&file)?;
                vfs.give_up(file.ino).await.map_err(|error| error.to_string())?;
                Ok(Vec::new())
            }
            service::PEEK => {
                let file: HeldFile = messages::decode(&payload)?;
                let attr = self.holder(&file)?.peek_here(file.ino).await.map_err(|error| error.to_string())?;
                Ok(messages::encode(&attr))
            }
            service::SETTLE => {
                let life: HeldFile = messages::decode(&payload)?;
                self.holder(&life)?.settle_here().await.map_err(|error| error.to_string())?;
                Ok(Vec::new())
            }
            service::JOURNAL => {
                let (header, batch) = wire::split_call(Bytes::from(payload))?;
                self.pairs.get().ok_or(STARTING)?.accept(from, &header, batch).await
            }
            service::REPORT => Ok(messages::encode(&self.figures.get().ok_or(STARTING)?.local())),
            service::REMOVE_MEMBER => {
                let (node, force): (NodeId, bool) = messages::decode(&payload)?;
                let verdict = self.membership.get().ok_or(STARTING)?.remove_here(node, force).await;
                Ok(messages::encode(&verdict))
            }
            unknown => Err(format!("no service {unknown:#06x}; is this server of an older version?")),
        }
    }

    async fn bulk(&self, from: NodeId, service: u16, header: Vec<u8>, body: Bytes) -> Result<(Vec<u8>, Bytes), String> {
        if service == service::JOURNAL_BULK {
            let answer = self.pairs.get().ok_or(STARTING)?.accept(from, &header, body).await?;
            return Ok((answer, Bytes::new()));
        }
        let (store, chunks) = self.chunks.get().ok_or(STARTING)?;
        let id: ChunkId = messages::decode(&header)?;
        match service {
            service::GET_CHUNK => {
                let store = store.clone();
                let packed = tokio::task::spawn_blocking(move || {
                    store.get(&id).map(|chunk| chunk.map(|bytes| chunk_wire::pack(&bytes)))
                })
                .await
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())?;
                Ok((Vec::new(), packed.map_or_else(Bytes::new, Bytes::from)))
            }
            service::PUT_CHUNK => {
                let bytes = chunk_wire::unpack(&body, CHUNK_BYTES_MAX).map_err(|error| error.to_string())?;
                match chunks.serve_put(id, bytes).await {
                    Ok(()) => Ok((Vec::new(), Bytes::new())),
                    Err(PeerError::Full) => Err(FULL.to_owned()),
                    Err(error) => Err(error.to_string()),
                }
            }
            unknown => Err(format!("no bulk service {unknown:#06x}; is this server of an older version?")),
        }
    }

    async fn join(&self, remote: SocketAddr, key: [u8; 32], public_key: Vec<u8>, request: Vec<u8>) -> Result<Vec<u8>, String> {
        self.doorman.get().ok_or(STARTING)?.admit(remote, key, &public_key, &request).await
    }

    fn connected(&self, peer: NodeId, remote: SocketAddr) {
        tracing::info!(%peer, %remote, "peer connected");
        self.heard.lock().insert(peer, Heard::Connected);
    }

    fn disconnected(&self, peer: NodeId) {
        tracing::warn!(%peer, "peer stopped answering");
        self.heard.lock().insert(peer, Heard::LostAt(Instant::now()));
    }
}
