//! Claims about the operations, over the real namespace and the real cache tier, without a mount.

#[allow(dead_code)] // Some of it only `ctfs-fuse` uses.
pub mod memory;
mod claims;
mod delegations;
mod locks;
mod model;
mod partition;
mod quotas;
mod rights;
mod sharing;
mod visible;

use std::sync::Arc;

use bytes::Bytes;
use ctfs_meta::MetaError;
use ctfs_types::{Attr, Ino};
use memory::{Cluster, Server};

use crate::{Caller, FsError, HandleId, Metadata as _, Vfs, VfsSettings};

pub const ALICE: Caller = Caller { uid: 1000, gid: 1000, pid: 0 };
pub const ROOT: Ino = Ino::ROOT;

/// Some servers of one cluster.
pub struct World {
    pub cluster: Arc<Cluster>,
    pub servers: Vec<Server>,
    dir: tempfile::TempDir,
}

impl World {
    pub fn new(servers: u64) -> Self {
        Self::with(servers, VfsSettings::default())
    }

    pub fn with(servers: u64, settings: VfsSettings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::new();
        let servers = (1..=servers).map(|node| cluster.server(node, dir.path(), settings.clone())).collect();
        Self { cluster, servers, dir }
    }

    /// Holds the servers' cache directories: `tier-1` and so on.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// Makes the servers members, so that their lives can be ended.
    pub async fn found(&self) {
        use ctfs_meta::{ClusterIdentity, Member, MemberState, Op, TokenRecord};
        use ctfs_types::{Incarnation, NodeId, Timestamp};
        let member = |number: u64| Member {
            node: NodeId(number),
            name: format!("s{number}"),
            zone: "z".into(),
            key: [number as u8; 32],
            addresses: vec![],
            capacity: 1,
            state: MemberState::Active,
            incarnation: Incarnation(number),
            fenced: false,
            pair: None,
            version: String::new(),
            joined: Timestamp::EPOCH,
        };
        let founder = &self.servers[0].meta;
        let cluster = ClusterIdentity { id: [0; 16], name: "test".into(), ca_certificate: vec![] };
        founder.propose(Op::Found { cluster, member: member(1) }).await.unwrap();
        let token = TokenRecord { hash: [7; 32], expires: Timestamp::new(i64::MAX, 0), uses_left: 100 };
        founder.propose(Op::CreateToken { token }).await.unwrap();
        for number in 2..=self.servers.len() as u64 {
            founder.propose(Op::Join { token: [7; 32], member: member(number) }).await.unwrap();
        }
    }

    /// The version of a file's bytes that all servers have applied.
    pub fn version(&self, ino: Ino) -> u64 {
        self.servers[0].meta.replica().read().attr(ino).unwrap().unwrap().data_version
    }

    pub fn vfs(&self, server: usize) -> &Arc<Vfs> {
        &self.servers[server].vfs
    }
}

/// Makes a file with `content` and closes it.
pub async fn file(vfs: &Vfs, parent: Ino, name: &str, content: &[u8]) -> Attr {
    let (attr, opened) = vfs.create(Caller::ROOT, parent, name.as_bytes(), 0o644, 0, libc::O_RDWR).await.unwrap();
    if !content.is_empty() {
        write(vfs, attr.ino, opened.handle, 0, content).await;
    }
    vfs.flush(attr.ino, opened.handle, 1).await.unwrap();
    vfs.release(opened.handle).await;
    vfs.getattr(attr.ino).await.unwrap()
}

pub async fn open(vfs: &Vfs, ino: Ino, flags: i32) -> HandleId {
    vfs.open(Caller::ROOT, ino, flags).await.unwrap().handle
}

pub async fn write(vfs: &Vfs, ino: Ino, handle: HandleId, offset: u64, bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    let len = bytes.len() as u32;
    let written = vfs.write(Caller::ROOT, ino, handle, offset, bytes, false, false).await.unwrap();
    assert_eq!(written, len);
}

pub async fn read(vfs: &Vfs, ino: Ino, handle: HandleId) -> Vec<u8> {
    vfs.read_file(ino, handle, 0, 1 << 20).await.unwrap().to_vec()
}

/// Reads all of a file as a program would that opens it now.
pub async fn content(vfs: &Vfs, ino: Ino) -> Vec<u8> {
    let handle = open(vfs, ino, libc::O_RDONLY).await;
    let bytes = read(vfs, ino, handle).await;
    vfs.release(handle).await;
    bytes
}

pub fn is_locked(error: &FsError) -> bool {
    matches!(error, FsError::Meta(MetaError::Locked { .. }))
}
