//! Peers over QUIC: identity, framing, small calls and bulk transfers.
//!
//! This crate carries bytes between servers that know each other and knows no message type. It is
//! the only user of `quinn` and `rustls`.
//!
//! A server's identity is its Ed25519 key; its [`NodeId`] is the first eight bytes of the key's
//! BLAKE3 hash. Every connection is TLS 1.3 with certificates on both sides, and a connection
//! between members is accepted only when the certificate was signed by the cluster's
//! [`Authority`] *and* the whole key hash stands in the list last given to
//! [`Network::set_members`]. A stranger reaches exactly one thing, [`Handler::join`], with one
//! request, and only while [`Network::set_joining`] is on.
//!
//! Between two members there is one connection, whoever dialled it. Small calls share one
//! long-lived framed stream per class (`service >> 8`), so that classes do not block each other;
//! every bulk transfer has a stream of its own at lower priority, and the bytes bulk may have
//! under way are bounded below the connection's flow control window, so that a small call never
//! queues behind it.
//!
//! Every wait has a deadline, every queue a bound, and what a peer sends is length-checked before
//! memory is reserved. A peer that breaks the framing loses its connection, nothing else.
//!
//! Reading order: [`identity`] and [`authority`] (who is who), [`token`] (how a stranger learns
//! whom to trust), `tls` (who is let in), `wire` (the bytes), `calls` and `bulk` (the two kinds of
//! traffic), `link` (one connection), `peer` (all connections of one server, dialling), [`network`].

pub mod authority;
mod bulk;
mod calls;
pub mod error;
pub mod identity;
mod join;
mod link;
pub mod network;
mod peer;
pub mod settings;
mod socket;
mod tls;
pub mod token;
mod wire;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_types::NodeId;

pub use authority::{Authority, CaDer};
pub use error::{IdentityError, NetError, TokenError};
pub use identity::{Identity, key_hash, node_of};
pub use join::Joined;
pub use network::{Network, PeerStatus};
pub use settings::NetSettings;
pub use token::JoinToken;
pub use wire::{BULK_BODY_BYTES_MAX, BULK_HEADER_BYTES_MAX, CALL_BYTES_MAX, JOIN_BYTES_MAX, JOIN_REPLY_BYTES_MAX};

/// A member as the network needs to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    pub node: NodeId,
    /// BLAKE3 of the public key (DER SubjectPublicKeyInfo); `node` is its first eight bytes.
    pub key: [u8; 32],
    /// `host:port` spellings, best first. May be empty: then only the peer can dial us.
    pub addresses: Vec<String>,
}

/// What this server does with what its peers ask.
///
/// Each request runs in a task of its own. A request whose asker went away still runs to its end;
/// a handler bounds its own waits. A handler that keeps a [`Network`] keeps it alive: such a
/// program ends it with [`Network::close`].
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Answers a small call. `Err` reaches the caller as [`NetError::Refused`].
    async fn call(&self, from: NodeId, service: u16, payload: Vec<u8>) -> Result<Vec<u8>, String>;

    /// Answers a bulk transfer.
    async fn bulk(&self, from: NodeId, service: u16, header: Vec<u8>, body: Bytes) -> Result<(Vec<u8>, Bytes), String>;

    /// Answers a stranger who has proven to hold the private key of `public_key_der`
    /// (`key` is its BLAKE3 hash). The same request may arrive more than once.
    async fn join(
        &self,
        remote: SocketAddr,
        key: [u8; 32],
        public_key_der: Vec<u8>,
        request: Vec<u8>,
    ) -> Result<Vec<u8>, String>;

    /// The peer has its first live connection. Returns quickly and calls nothing of the network
    /// but [`Network::peer`]; strictly alternates with [`Handler::disconnected`] for each peer.
    fn connected(&self, peer: NodeId, remote: SocketAddr);

    /// The peer has no live connection any more.
    fn disconnected(&self, peer: NodeId);
}
