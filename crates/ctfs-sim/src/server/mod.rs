//! One server: the real consensus and the real file system, wired as `ctfs-node` does it, between a
//! simulated network, disk and kernel.

pub mod care;
pub mod kernel;
pub mod life;
pub mod metadata;
pub mod pairs;

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use ctfs_chunk::{CacheTier, TierSettings};
use ctfs_consensus::{Consensus, Settings};
use ctfs_meta::{ClusterIdentity, Member, MemberState, Op};
use ctfs_pair::{Pairs, wire};
use ctfs_types::{
    Incarnation, NodeId, Timestamp,
    rules::{Rule, keeps},
};
use ctfs_vfs::{DelegationSettings, Metadata as _, Vfs, VfsSettings};
use tokio::sync::{mpsc, watch};

use self::{
    kernel::Kernel,
    metadata::{HeldFile, OpenOrphans, PeerHolders, ReplicatedMetadata, decode, encode, service},
};
use crate::{
    CrashDisk,
    chunks::{PINNED_FOR, ReachedChunks},
    network::{Content, Link, Packet},
    shared::Shared,
};

/// A program that waits for its server looks so often.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What of a server outlives its end.
pub struct Disks {
    /// Holds log and snapshots; on a file system in memory.
    pub dir: PathBuf,
    pub(crate) journal: CrashDisk,
    /// Lives that were begun.
    pub lives: Arc<AtomicU64>,
}

/// One running server.
pub struct Server {
    pub node: NodeId,
    pub consensus: Consensus,
    pub metadata: Arc<ReplicatedMetadata>,
    pub vfs: Arc<Vfs>,
    pub kernel: Arc<Kernel>,
    pub pairs: Arc<Pairs>,
    pub link: Arc<Link>,
    pub shared: Arc<Shared>,
    lives: Arc<AtomicU64>,
    /// The life that was reported, and may act ahead.
    reported: watch::Sender<Option<Incarnation>>,
}

/// What a server is started with.
pub struct Start {
    pub node: NodeId,
    pub disks: Disks,
    pub shared: Arc<Shared>,
    pub adjust: Arc<dyn Fn(&mut Settings, &mut VfsSettings) + Send + Sync>,
}

/// What reaches a running server from outside.
pub enum Input {
    Packet(Packet),
    /// A program of this server begins.
    Program(Program),
}

pub type Program = Box<dyn FnOnce(Arc<Server>) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

impl Server {
    /// A line of the trace.
    pub fn note(&self, what: fmt::Arguments<'_>) {
        self.shared.note(self.node, what);
    }

    /// Begins the next life on disk.
    pub fn next_life(&self) -> Incarnation {
        next_life(self.node, &self.lives)
    }

    /// The metadata as this server has them.
    pub fn replica(&self) -> &ctfs_meta::SharedNamespace {
        &self.metadata.replica
    }

    /// Whether all that happened here is in the log, now.
    pub async fn metadata_settled(&self) -> bool {
        self.metadata.settled().await.is_ok()
    }

    /// Returns when its life is reported and it holds a lease.
    pub async fn ready(&self) {
        let mut reported = self.reported.subscribe();
        loop {
            let life = *reported.borrow_and_update();
            let now = self.consensus.incarnation();
            let is_over = self.metadata.replica.read().is_ended(now).unwrap_or(true);
            if life == Some(now) && !is_over && self.consensus.leased() {
                return;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Returns when its journal has a pair, or has none, as wished.
    pub async fn await_pair(&self, is_good: impl Fn(Option<NodeId>) -> bool) {
        while !is_good(self.pairs.pair()) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn serve(self: &Arc<Self>, question: &Packet, number: u16, payload: Vec<u8>) -> Result<Vec<u8>, String> {
        match number {
            service::RECALL => {
                let file: HeldFile = decode(&payload)?;
                self.is_holder(&file)?;
                self.vfs.give_up(file.ino).await.map_err(|error| error.to_string())?;
                Ok(Vec::new())
            }
            service::PEEK => {
                let file: HeldFile = decode(&payload)?;
                self.is_holder(&file)?;
                let attr = self.vfs.peek_here(file.ino).await.map_err(|error| error.to_string())?;
                Ok(encode(&attr))
            }
            service::SETTLE => {
                let life: HeldFile = decode(&payload)?;
                self.is_holder(&life)?;
                self.vfs.settle_here().await.map_err(|error| error.to_string())?;
                Ok(Vec::new())
            }
            service::JOURNAL => {
                let (header, batch) = wire::split_call(payload.into())?;
                self.pairs.accept(question.from, &header, batch).await
            }
            service::OPEN_ORPHANS => life::open_orphans(self, decode::<OpenOrphans>(&payload)?).await,
            number => self.consensus.serve(question.from, number, payload).await,
        }
    }

    fn is_holder(&self, file: &HeldFile) -> Result<(), String> {
        if file.incarnation == self.consensus.incarnation() { Ok(()) } else { Err("that life is over".to_owned()) }
    }
}

/// Unique among all lives of all servers, and later ones are greater.
fn next_life(node: NodeId, lives: &AtomicU64) -> Incarnation {
    Incarnation((node.0 << 32) | (lives.fetch_add(1, Relaxed) + 1))
}

/// The last life that was begun.
pub fn life_of(node: NodeId, lives: &AtomicU64) -> Incarnation {
    Incarnation((node.0 << 32) | lives.load(Relaxed))
}

fn member(node: NodeId) -> Member {
    Member {
        node,
        name: format!("s{}", node.0),
        zone: format!("z{}", node.0),
        key: [node.0 as u8; 32],
        addresses: vec![],
        capacity: 1,
        state: MemberState::Active,
        incarnation: Incarnation(0),
        fenced: false,
        pair: None,
        version: String::new(),
        joined: Timestamp::EPOCH,
    }
}

/// The first command of a volume.
pub fn found(node: NodeId) -> Op {
    let cluster = ClusterIdentity { id: [7; 16], name: "brave-otter".to_owned(), ca_certificate: vec![1] };
    Op::Found { cluster, member: member(node) }
}

/// Adds a member by the token that [`invitation`] makes.
pub fn join(node: NodeId) -> Op {
    Op::Join { token: [9; 32], member: member(node) }
}

pub fn invitation() -> Op {
    let token = ctfs_meta::TokenRecord { hash: [9; 32], expires: Timestamp::new(i64::MAX, 0), uses_left: 100 };
    Op::CreateToken { token }
}

/// Starts a server on what its disks hold, and runs it until it is dropped.
pub async fn run(start: Start, mut inputs: mpsc::UnboundedReceiver<Input>) {
    let Start { node, disks, shared, adjust } = start;
    let life = next_life(node, &disks.lives);
    let link = Arc::new(Link { me: node, shared: shared.clone() });
    let (kernel, notifier) = Kernel::new(node, life.0, shared.clone());
    tokio::spawn(notifier);

    let mut settings = Settings::new(disks.dir.join("meta"), node, life);
    settings.acts_ahead = true;
    settings.storage.state_in_memory = true;
    let mut vfs_settings = VfsSettings {
        delegations: DelegationSettings { takes: true, ..DelegationSettings::default() },
        ..VfsSettings::default()
    };
    vfs_settings.content.put_age_max = PINNED_FOR / 2;
    adjust(&mut settings, &mut vfs_settings);
    let consensus = Consensus::start(settings, link.clone(), kernel.clone()).await.expect("the storage opens");
    if disks.lives.load(Relaxed) > 1 && !consensus.is_initialized() && keeps(Rule::LostLogVotesNot) {
        shared.note(node, format_args!("its log is gone, and with it its votes"));
        shared.wires.lock().goes_down(node);
        return;
    }
    let metadata = Arc::new(ReplicatedMetadata { consensus: consensus.clone(), replica: consensus.replica(), node });
    let tier = TierSettings::new(disks.dir.join("tier"), 64 << 20);
    let tier = CacheTier::open(TierSettings { reserve_bytes: 0, ..tier }).expect("the cache tier opens");
    let chunks = Arc::new(ReachedChunks { me: node, shared: shared.clone() });
    let vfs = Vfs::new(metadata.clone(), chunks, Arc::new(PeerHolders(link.clone())), tier, vfs_settings);
    kernel.serve(&vfs);
    vfs.set_kernel(Some(kernel.clone()));
    let copies = pairs::copies(&disks.journal);
    let journals = pairs::journals(&disks.journal, node);
    let pairs = Pairs::new(journals, consensus.clone(), vfs.clone(), copies, link.clone(), kernel.members());
    let (lives, reported) = (disks.lives, watch::Sender::new(None));
    let server = Arc::new(Server { node, consensus, metadata, vfs, kernel, pairs, link, shared, lives, reported });
    server.note(format_args!("starts, life {}", life.0));

    tokio::spawn(life::end_silent(server.clone()));
    tokio::spawn(life::forget_at_lapse(server.clone()));
    tokio::spawn(life::reap(server.clone()));
    tokio::spawn(care::forget(server.clone()));
    tokio::spawn(care::drop_unnamed(server.clone()));
    let (keeping, succeeding) = (server.pairs.clone(), server.pairs.clone());
    tokio::spawn(async move { keeping.keep().await });
    tokio::spawn(async move { succeeding.succeed().await });
    let reporter = server.clone();
    tokio::spawn(async move {
        // A server that joins has no member entry before it is told of one.
        let mut applied = reporter.consensus.applied();
        while !matches!(reporter.metadata.replica.read().member(reporter.node), Ok(Some(_))) {
            if applied.changed().await.is_err() {
                return;
            }
        }
        life::report(&reporter, life).await;
        life::outlive(reporter).await;
    });

    while let Some(input) = inputs.recv().await {
        let server = server.clone();
        match input {
            Input::Program(program) => drop(tokio::spawn(program(server))),
            Input::Packet(packet) => {
                let Content::Question(payload) = packet.content.clone() else { continue };
                tokio::spawn(async move {
                    let answer = server.serve(&packet, packet.service, payload).await;
                    server.link.answer(&packet, answer);
                });
            }
        }
    }
}
