//! Other servers, as the consensus and chunk crates want to see them: thin adapters over the
//! network.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_chunk::{ChunkPeers, PeerError, wire};
use ctfs_consensus::{Transport, TransportError};
use ctfs_net::{NetError, Network};
use ctfs_types::{ChunkId, NodeId, limits::CHUNK_BYTES_MAX};

use crate::messages::{self, service};

/// A small call between servers gets this long; a LAN answers in under a millisecond, a WAN in 300 ms.
pub const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// An 8 MiB chunk over 10 Mbit/s takes 7 s.
pub const BULK_DEADLINE: Duration = Duration::from_secs(20);

/// The network, seen by consensus and the chunk layer.
#[derive(Clone)]
pub struct Peers {
    network: Network,
}

impl Peers {
    pub fn new(network: Network) -> Arc<Self> {
        Arc::new(Self { network })
    }
}

#[async_trait]
impl Transport for Peers {
    async fn call(&self, to: NodeId, service: u16, payload: Vec<u8>, deadline: Duration) -> Result<Vec<u8>, TransportError> {
        self.network.call(to, service, payload, deadline).await.map_err(|error| match error {
            NetError::Refused(why) => TransportError::Refused(why),
            NetError::Deadline => TransportError::Deadline,
            NetError::TooLong => TransportError::TooLong,
            NetError::Closed => TransportError::Closed,
            NetError::Unreachable | NetError::Busy | NetError::NotAdmitted | NetError::Identity(_) | NetError::Bind { .. } => TransportError::Unreachable,
        })
    }

    fn reachable(&self, to: NodeId) -> bool {
        self.network.peer(to).connected
    }
}

fn peer_error(error: NetError) -> PeerError {
    match error {
        NetError::Refused(why) if why == FULL => PeerError::Full,
        NetError::Refused(why) => PeerError::Failed(why),
        NetError::Unreachable | NetError::Closed => PeerError::Unreachable,
        NetError::Deadline => PeerError::Deadline,
        other => PeerError::Failed(other.to_string()),
    }
}

/// The refusal of a put by a store without room, told apart from other refusals.
pub const FULL: &str = "chunk store is full";

#[async_trait]
impl ChunkPeers for Peers {
    async fn get(&self, node: NodeId, id: ChunkId) -> Result<Option<Bytes>, PeerError> {
        let header = messages::encode(&id);
        let (_, body) = self.network.bulk(node, service::GET_CHUNK, header, Bytes::new(), BULK_DEADLINE).await.map_err(peer_error)?;
        if body.is_empty() {
            return Ok(None);
        }
        wire::unpack(&body, CHUNK_BYTES_MAX).map(Some).map_err(|error| PeerError::Refused(error.to_string()))
    }

    async fn put(&self, node: NodeId, id: ChunkId, bytes: Bytes) -> Result<(), PeerError> {
        let header = messages::encode(&id);
        let body = Bytes::from(wire::pack(&bytes));
        self.network.bulk(node, service::PUT_CHUNK, header, body, BULK_DEADLINE).await.map_err(peer_error)?;
        Ok(())
    }

    async fn has(&self, node: NodeId, ids: Vec<ChunkId>) -> Result<Vec<bool>, PeerError> {
        let asked = ids.len();
        let reply = self.network.call(node, service::HAVE_CHUNKS, messages::encode(&ids), CALL_DEADLINE).await.map_err(peer_error)?;
        let held: Vec<bool> = messages::decode(&reply).map_err(PeerError::Refused)?;
        if held.len() == asked { Ok(held) } else { Err(PeerError::Refused("answer of another length".into())) }
    }

    fn reachable(&self, node: NodeId) -> bool {
        self.network.peer(node).connected
    }

    fn rtt(&self, node: NodeId) -> Option<Duration> {
        self.network.peer(node).rtt
    }
}
