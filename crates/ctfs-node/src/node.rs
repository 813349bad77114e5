//! One server, from its state directory to its mount and back.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use ctfs_chunk::{
    ChunkSettings, ChunkStore, Chunks, Placement, Server, StoreSettings,
    tier::{CacheTier, TierSettings},
};
use ctfs_consensus::Consensus;
use ctfs_fuse::{Mount, MountSettings};
use ctfs_journal::{Copies, CopySettings, Settings as JournalSettings, SystemDisk};
use ctfs_meta::{ClusterIdentity, Member, MemberState, MetaError, Op, Policy};
use ctfs_net::{Authority, Identity, NetSettings, Network, PeerInfo};
use ctfs_pair::{Journals, Pairs, ReplayError};
use ctfs_types::{Incarnation, Ino, NodeId, Timestamp};
use ctfs_vfs::{DelegationSettings, Vfs, VfsSettings};
use parking_lot::Mutex;
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    stop,
    access::{ClusterChunks, PeerHolders, ReplicatedMetadata},
    collect::Collector,
    events::Events,
    join::{self, Doorman},
    life,
    members::Membership,
    messages::{JoinReply, JoinRequest},
    pairs::PairPeers,
    peers::Peers,
    problem::{Code, Problem},
    repair::Repair,
    report::Figures,
    roundtrip,
    services::Services,
    settings::NodeSettings,
    state::{ClusterRecord, StateDir},
};
use crate::{
    admin::{AdminSocket, SOCKET_NAME},
    answers::Answers,
};

/// A restarted server waits this long for the others before it serves what it has.
const CATCH_UP: Duration = Duration::from_secs(30);
/// `down` writes back what is dirty for this long before it gives up and says so.
const FLUSH_DEADLINE: Duration = Duration::from_secs(120);

/// Before a journal is sent again that could not be sent.
const REPLAY_PAUSE: Duration = Duration::from_secs(1);

/// A running server.
pub struct Node {
    /// The journals of this server's lives, and the copies of others'.
    pub(crate) pairs: Arc<Pairs>,
    pub(crate) settings: NodeSettings,
    pub(crate) state: Arc<StateDir>,
    pub(crate) id: NodeId,
    /// BLAKE3 of this server's public key.
    key: [u8; 32],
    pub(crate) record: ClusterRecord,
    pub(crate) network: Network,
    pub(crate) consensus: Consensus,
    pub(crate) store: Arc<ChunkStore>,
    pub(crate) chunks: Chunks,
    pub(crate) peers: Arc<Peers>,
    pub(crate) vfs: Arc<Vfs>,
    pub(crate) membership: Arc<Membership>,
    pub(crate) doorman: Arc<Doorman>,
    pub(crate) repair: Arc<Repair>,
    pub(crate) figures: Arc<Figures>,
    pub(crate) events: Arc<Events>,
    mount: Mutex<Option<Arc<Mount>>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    pub(crate) stop: watch::Sender<bool>,
    /// Why this server can no longer take part, once it knows.
    pub(crate) ended: Mutex<Option<Problem>>,
}

fn mountpoint_problem(path: &std::path::Path, error: &ctfs_fuse::MountError) -> Problem {
    use ctfs_fuse::MountError;
    let code = match error {
        MountError::NotDirectory(_) => Code::NotADirectory,
        MountError::NotEmpty(_) => Code::NotEmpty,
        MountError::AlreadyMounted { .. } => Code::AlreadyMounted,
        _ => return Problem::mount_failed(path, &error.to_string()),
    };
    Problem::new(code, error.to_string()).try_next("choose an empty directory that is not mounted")
}

/// Whether two directories are on one file system, so that what the one takes the other lacks.
fn same_disk(a: &Path, b: &Path) -> bool {
    let disk = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev());
    matches!((disk(a), disk(b)), (Ok(a), Ok(b)) if a == b)
}

/// A taken port is noticed before a cluster is made or a token used up.
fn port_is_free(listen: SocketAddr) -> Result<(), Problem> {
    match std::net::UdpSocket::bind(listen) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Err(Problem::address_not_here(listen, &error.to_string())),
        Err(error) => Err(Problem::port_in_use(listen, &error.to_string())),
    }
}

/// What a server needs to speak for itself.
struct Credentials {
    identity: Identity,
    authority: Authority,
    record: ClusterRecord,
    incarnation: Incarnation,
}

impl Node {
    /// Starts this server: as a cluster of one, as a member that joins, or as the member it
    /// was before; returns when the mount serves.
    ///
    /// # Errors
    /// A [`Problem`] for the person who asked; nothing that existed before is lost.
    pub async fn start(settings: NodeSettings) -> Result<Arc<Self>, Problem> {
        // Before the first write to STATE: where both are on a full disk, this is what makes room.
        if let Err(error) = CacheTier::wipe(&settings.cache_dir) {
            tracing::warn!(%error, dir = %settings.cache_dir.display(), "cannot empty the cache yet");
        }
        let state = Arc::new(StateDir::open(&settings.state)?);
        let mut settings = settings;
        port_is_free(settings.listen)?;
        let credentials = credentials(&state, &mut settings).await?;
        let Credentials { identity, authority, record, incarnation } = credentials;
        let id = identity.node();
        let key = identity.key_hash();

        let services = Arc::new(Services::default());
        let network = Network::bind(
            NetSettings { listen: settings.listen, ..NetSettings::default() },
            identity,
            authority.certificate(),
            services.clone(),
        )
        .await
        .map_err(|error| Problem::port_in_use(settings.listen, &error.to_string()))?;
        network.set_members(peer_infos(&state.peers(), id));
        let peers = Peers::new(network.clone());

        let (events, deletions) = Events::new(incarnation);
        let rtt = settings.rtt.or_else(|| roundtrip::remembered(&state)).unwrap_or_default();
        let mut consensus_settings = ctfs_consensus::Settings::new(state.join("meta"), id, incarnation);
        consensus_settings.timings = ctfs_consensus::Timings::for_rtt(rtt);
        consensus_settings.acts_ahead = true;
        let consensus = Consensus::start(consensus_settings, peers.clone(), events.clone())
            .await
            .map_err(|error| Problem::metadata(&error.to_string()))?;
        services.serve_consensus(consensus.clone());

        let store_settings = StoreSettings::with_capacity(settings.capacity.0);
        let store = ChunkStore::open(&state.join("chunks"), store_settings).map_err(|e| Problem::chunk_store(&e.to_string()))?;
        let store = Arc::new(store);
        let chunks = Chunks::new(id, store.clone(), peers.clone(), ChunkSettings::default());
        services.serve_chunks(store.clone(), chunks.clone());

        if record.took_part && !consensus.is_initialized() {
            return Err(Problem::metadata("its log is gone, and with it its votes"));
        }
        if record.founder && !is_founded(&consensus)? {
            found(&consensus, &settings, &record, key, incarnation, &network).await?;
        }

        let tier = CacheTier::open(TierSettings::new(settings.cache_dir.clone(), settings.cache_size.0))
            .map_err(|error| Problem::io(&format!("open the cache tier in {}", settings.cache_dir.display()), &error))?;
        let figures = Figures::new(network.clone(), consensus.clone(), store.clone(), id);
        let metadata = Arc::new(ReplicatedMetadata { consensus: consensus.clone(), replica: consensus.replica(), node: id });
        let runtime = tokio::runtime::Handle::current();
        let cluster_chunks = Arc::new(ClusterChunks { chunks: chunks.clone(), figures: figures.clone(), runtime: runtime.clone() });
        let vfs_settings = VfsSettings {
            delegations: DelegationSettings { takes: true, ..DelegationSettings::default() },
            ..VfsSettings::default()
        };
        let vfs = Vfs::new(metadata, cluster_chunks, Arc::new(PeerHolders { network: network.clone() }), tier, vfs_settings);
        figures.watch_cache(vfs.clone(), same_disk(&settings.cache_dir, &state.join("chunks")));
        events.tell_vfs(vfs.clone());
        services.serve_vfs(vfs.clone());

        let disk = Arc::new(SystemDisk);
        let journals = Journals {
            disk: disk.clone(),
            root: state.join("journal"),
            cluster: record.identity.id,
            node: id,
            settings: JournalSettings::default(),
        };
        let copies = Copies::open(disk, &state.join("copies"), record.identity.id, CopySettings::default())
            .map_err(|error| Problem::metadata(&format!("the copies of journals cannot be read: {error}")))?;
        let copies = Arc::new(copies);
        let pair_peers = Arc::new(PairPeers { network: network.clone() });
        let pairs = Pairs::new(journals, consensus.clone(), vfs.clone(), copies, pair_peers, events.members());
        services.serve_pairs(pairs.clone());

        let repair = Repair::new(consensus.clone(), store.clone(), chunks.clone());
        figures.watch_repair(repair.clone());
        events.tell_repair(repair.clone());
        let membership = Membership::new(consensus.clone(), services.clone(), network.clone(), figures.clone(), id, settings.away_after, events.members());
        let doorman = Arc::new(Doorman::new(consensus.clone(), authority));
        services.serve_cluster(doorman.clone(), membership.clone(), figures.clone());

        let node = Arc::new(Self {
            pairs,
            doorman,
            settings,
            state,
            id,
            key,
            record,
            network,
            consensus,
            store,
            chunks,
            peers,
            vfs,
            membership,
            repair,
            figures,
            events,
            mount: Mutex::new(None),
            tasks: Mutex::default(),
            stop: watch::Sender::new(false),
            ended: Mutex::new(None),
        });
        node.follow_members();
        node.spawn_tasks(deletions);
        node.spawn(roundtrip::run(node.consensus.clone(), node.network.clone(), node.state.clone(), rtt, node.stop.subscribe()));
        let socket = AdminSocket::bind(&node.state.join(SOCKET_NAME)).map_err(|error| Problem::io("open the admin socket", &error))?;
        node.spawn(socket.serve(Arc::new(Answers(node.clone())), node.stop.subscribe()));
        let serving = async {
            node.take_part(incarnation).await?;
            node.remember_taking_part()?;
            node.mount()
        };
        match serving.await {
            Ok(()) => Ok(node),
            Err(problem) => {
                node.shutdown().await;
                Err(problem)
            }
        }
    }

    /// Waits until this server's replica is current, then reports its new life.
    async fn take_part(self: &Arc<Self>, incarnation: Incarnation) -> Result<(), Problem> {
        let deadline = Instant::now() + CATCH_UP;
        let mut applied = self.consensus.applied();
        let mut last = Problem::no_quorum("the other servers did not answer");
        while Instant::now() < deadline {
            let member = self.member(self.id)?;
            if let Some(member) = member {
                // Reporting this life ends the last one, and what it left behind.
                if let Err(error) = self.pairs.replay(incarnation).await {
                    last = self.not_replayed(error)?;
                    tokio::time::sleep(REPLAY_PAUSE).await;
                    continue;
                }
                let op = self.new_life(incarnation, &member);
                let proposed = tokio::select! {
                    proposed = self.consensus.propose(op) => proposed,
                    () = self.membership.turned_away() => return Err(Problem::removed()),
                };
                match proposed {
                    Ok(Ok(_)) => return self.begin_journal(incarnation),
                    Ok(Err(MetaError::NoSuchMember)) => return Err(Problem::removed()),
                    Ok(Err(verdict)) => return Err(Problem::internal(&verdict.to_string())),
                    Err(ctfs_consensus::ProposeError::Stopped(why)) => return Err(Problem::metadata(&why)),
                    Err(error) => last = Problem::no_quorum(&error.to_string()),
                }
            } else {
                // The leader adds this server as a learner first; the entry that names it comes
                // with the log.
                let more = tokio::time::timeout(Duration::from_millis(500), applied.changed());
                if let Ok(Err(_)) = more.await {
                    return Err(Problem::metadata("the log stopped"));
                }
            }
        }
        // A server that was part of the cluster before serves what it has: reads by the stated
        // policy, writes when a majority is back. One that joins has nothing yet.
        if self.member(self.id)?.is_some() {
            tracing::warn!(why = last.what, "starting without a majority");
            self.spawn(self.clone().report_life(incarnation));
            Ok(())
        } else {
            Err(last)
        }
    }

    fn new_life(&self, incarnation: Incarnation, member: &Member) -> Op {
        Op::Incarnate {
            node: self.id,
            incarnation,
            addresses: advertised(&self.settings, &self.network, &member.addresses),
            capacity: self.settings.capacity.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// Reports the new life when a majority is back: until then the locks of the last one hold.
    pub(crate) async fn report_life(self: Arc<Self>, incarnation: Incarnation) {
        let mut stopping = self.stop.subscribe();
        loop {
            let Ok(Some(member)) = self.member(self.id) else { return };
            if let Err(error) = self.pairs.replay(incarnation).await {
                match self.not_replayed(error) {
                    Ok(problem) => tracing::debug!(why = problem.why, "an earlier life is not in the log yet"),
                    Err(problem) => return self.end(problem),
                }
                tokio::select! {
                    () = tokio::time::sleep(REPLAY_PAUSE) => continue,
                    () = stop::requested(&mut stopping) => return,
                }
            }
            let proposed = tokio::select! {
                proposed = self.consensus.propose(self.new_life(incarnation, &member)) => proposed,
                () = stop::requested(&mut stopping) => return,
            };
            match proposed {
                Ok(Ok(_)) => {
                    if let Err(problem) = self.begin_journal(incarnation) {
                        self.end(problem);
                    }
                    return;
                }
                Ok(Err(MetaError::NoSuchMember)) => return self.end(Problem::removed()),
                Ok(Err(verdict)) => return tracing::error!(%verdict, "cannot report this life"),
                Err(ctfs_consensus::ProposeError::Stopped(_)) => return,
                // A proposal has waited for its deadline already.
                Err(error) => tracing::debug!(%error, "cannot report this life yet"),
            }
        }
    }

    /// Whether a journal of an earlier life can be sent later, or never.
    fn not_replayed(&self, error: ReplayError) -> Result<Problem, Problem> {
        match error {
            ReplayError::Log(ctfs_consensus::ProposeError::Stopped(why)) => Err(Problem::metadata(&why)),
            ReplayError::Log(error) => Ok(Problem::no_quorum(&error.to_string())),
            ReplayError::Files(error) => Ok(Problem::no_quorum(&error.to_string())),
            damaged => Err(Problem::metadata(&format!("the journal of an earlier life cannot be read: {damaged}"))),
        }
    }

    /// From here on this server may act ahead of the log, where it alone may change something.
    fn begin_journal(&self, life: Incarnation) -> Result<(), Problem> {
        self.pairs.begin_journal(life).map_err(|error| Problem::metadata(&error.to_string()))
    }

    /// From now on an empty log is a lost one.
    fn remember_taking_part(&self) -> Result<(), Problem> {
        match self.state.cluster()? {
            Some(record) if !record.took_part => self.state.set_cluster(&ClusterRecord { took_part: true, ..record }),
            _ => Ok(()),
        }
    }

    /// From here on every request is answered with the reason.
    pub(crate) fn end(&self, problem: Problem) {
        let mut ended = self.ended.lock();
        if ended.is_none() {
            tracing::error!(code = problem.code, what = problem.what, why = problem.why, "this server takes no further part");
            *ended = Some(problem);
        }
    }

    fn member(&self, node: NodeId) -> Result<Option<Member>, Problem> {
        self.consensus.replica().read().member(node).map_err(|error| Problem::metadata(&error.to_string()))
    }

    /// Mounts, if this server has a mountpoint and is not mounted yet.
    pub fn mount(self: &Arc<Self>) -> Result<(), Problem> {
        let Some(path) = self.settings.mountpoint.clone() else { return Ok(()) };
        let mut slot = self.mount.lock();
        if slot.is_some() {
            return Ok(());
        }
        let settings = MountSettings { mountpoint: path.clone(), threads: self.settings.threads, ..MountSettings::default() };
        let mount = Mount::start(self.vfs.clone(), tokio::runtime::Handle::current(), settings)
            .map_err(|error| mountpoint_problem(&path, &error))?;
        let mount = Arc::new(mount);
        let notifier = mount.notifier();
        self.spawn(self.events.clone().follow(notifier.invalidated()));
        self.events.tell_kernel(Some(notifier));
        *slot = Some(mount.clone());
        drop(slot);
        let node = Arc::downgrade(self);
        self.spawn(async move {
            mount.ended().await;
            if let Some(node) = node.upgrade() {
                tracing::info!(path = %path.display(), "unmounted");
                node.events.tell_kernel(None);
                *node.mount.lock() = None;
            }
        });
        Ok(())
    }

    /// Unmounts and keeps serving peers; what is dirty is written back first.
    pub async fn unmount(&self) -> Result<(), Problem> {
        self.write_back().await?;
        self.detach().await?;
        // What the kernel had kept of mapped files came with the unmount.
        self.write_back().await
    }

    /// Takes the mount out of the tree.
    async fn detach(&self) -> Result<(), Problem> {
        let Some(mount) = self.mount.lock().clone() else { return Ok(()) };
        tokio::task::spawn_blocking(move || mount.unmount())
            .await
            .map_err(|error| Problem::internal(&error.to_string()))?
            .map_err(|error| Problem::internal(&format!("unmount: {error}")))?;
        self.events.tell_kernel(None);
        *self.mount.lock() = None;
        Ok(())
    }

    pub fn is_mounted(&self) -> bool {
        self.mount.lock().is_some()
    }

    pub(crate) async fn write_back(&self) -> Result<(), Problem> {
        match tokio::time::timeout(FLUSH_DEADLINE, self.vfs.flush_all()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Problem::not_flushed(&error.to_string())),
            Err(_) => Err(Problem::not_flushed("it took too long")),
        }
    }

    /// Flushes, unmounts and stops. Safe to call more than once.
    pub async fn shutdown(&self) {
        // Each step whatever the one before said: a mount must not outlive its server.
        for step in [self.write_back().await, self.detach().await, self.write_back().await] {
            if let Err(problem) = step {
                tracing::error!(code = problem.code, what = problem.what, why = problem.why, "shutting down with a problem");
            }
        }
        // Else others would have to wait for this server to be back, or to be declared ended.
        if tokio::time::timeout(FLUSH_DEADLINE, self.vfs.give_up_all()).await.is_err() {
            tracing::warn!("files stay owned by this server until it is back: nobody answered");
        }
        self.stop.send_replace(true);
        let tasks = std::mem::take(&mut *self.tasks.lock());
        for task in tasks {
            let abort = task.abort_handle();
            if tokio::time::timeout(Duration::from_secs(5), task).await.is_err() {
                abort.abort();
            }
        }
        self.consensus.shutdown().await;
        self.network.close().await;
    }

    /// Resolves when [`Self::shutdown`] was asked for by the admin socket.
    pub async fn stopped(&self) {
        let mut stop = self.stop.subscribe();
        // The sender lives as long as `self`.
        stop::requested(&mut stop).await;
    }

    /// Asks whoever runs this node to shut it down.
    pub fn request_stop(&self) {
        self.stop.send_replace(true);
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        tasks.retain(|task| !task.is_finished());
        tasks.push(tokio::spawn(task));
    }

    fn spawn_tasks(self: &Arc<Self>, mut deletions: tokio::sync::mpsc::Receiver<ctfs_types::ChunkId>) {
        let stop = || self.stop.subscribe();
        self.spawn(self.membership.clone().run(stop()));
        self.spawn(self.repair.clone().run(stop()));
        self.spawn(self.figures.clone().run(stop()));
        let collector = Collector {
            consensus: self.consensus.clone(),
            network: self.network.clone(),
            vfs: self.vfs.clone(),
            node: self.id,
            grace: self.settings.gc_grace,
        };
        self.spawn(collector.run(stop()));
        self.spawn(life::end_silent(self.clone()));
        self.spawn(life::outlive(self.clone()));
        self.spawn(life::forget_at_lapse(self.clone()));
        let (pairs, mut stopping) = (self.pairs.clone(), stop());
        self.spawn(async move {
            tokio::select! {
                () = pairs.keep() => {}
                () = stop::requested(&mut stopping) => {}
            }
        });
        let (pairs, mut stopping) = (self.pairs.clone(), stop());
        self.spawn(async move {
            tokio::select! {
                () = pairs.succeed() => {}
                () = stop::requested(&mut stopping) => {}
            }
        });

        let node = Arc::downgrade(self);
        let (mut members, mut stopping) = (self.events.members(), stop());
        self.spawn(async move {
            loop {
                // Tokens run out without an event, hence the timer.
                let news = tokio::select! {
                    changed = members.changed() => if changed.is_err() { return } else { true },
                    () = tokio::time::sleep(Duration::from_secs(5)) => false,
                    () = stop::requested(&mut stopping) => return,
                };
                let index = *members.borrow_and_update();
                let Some(node) = node.upgrade() else { return };
                if node.follow_members() || news {
                    // Also where the placement stays as it is: whoever removes a server waits for
                    // a walk that began when its leaving was applied, and counted as applied.
                    let mut applied = node.consensus.applied();
                    let counted = applied.wait_for(|applied| *applied >= index);
                    let _ = tokio::time::timeout(Duration::from_secs(5), counted).await;
                    node.repair.walk_soon();
                }
            }
        });

        let node = Arc::downgrade(self);
        let mut stopping = stop();
        self.spawn(async move {
            let Some(node) = node.upgrade() else { return };
            tokio::select! {
                () = node.membership.turned_away() => node.end(Problem::removed()),
                () = stop::requested(&mut stopping) => {}
            }
        });

        let (store, consensus, mut stopping) = (self.store.clone(), self.consensus.clone(), stop());
        self.spawn(async move {
            loop {
                let chunk = tokio::select! {
                    chunk = deletions.recv() => match chunk { Some(chunk) => chunk, None => return },
                    () = stop::requested(&mut stopping) => return,
                };
                // A replica that catches up sees old deletions of chunks that later entries name again.
                if consensus.barrier().await.is_err() {
                    continue;
                }
                let unknown = matches!(consensus.replica().read().chunk(&chunk), Ok(None));
                if unknown && let Err(error) = store.delete(&chunk).await {
                    tracing::warn!(%chunk, %error, "cannot delete a chunk");
                }
            }
        });

        let (store, mut stopping) = (self.store.clone(), stop());
        self.spawn(async move {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_secs(30)) => {}
                    () = stop::requested(&mut stopping) => return,
                }
                if let Err(error) = store.compact().await {
                    tracing::warn!(%error, "compaction of the chunk store failed");
                }
            }
        });

        let (damaged, repair, mut stopping) = (self.store.damaged(), self.repair.clone(), stop());
        self.spawn(async move {
            let Some(mut damaged) = damaged else { return };
            loop {
                tokio::select! {
                    chunk = damaged.recv() => match chunk { Some(chunk) => repair.want(chunk), None => return },
                    () = stop::requested(&mut stopping) => return,
                }
            }
        });
    }

    /// Carries the replicated member list into the network, the placement and the state directory;
    /// says whether the placement became another.
    fn follow_members(&self) -> bool {
        let (members, removed, tokens) = {
            let replica = self.consensus.replica();
            let namespace = replica.read();
            match (namespace.members(), namespace.removed_keys(), namespace.tokens()) {
                (Ok(members), Ok(removed), Ok(tokens)) => (members, removed, tokens),
                (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => {
                    tracing::error!(%error, "cannot read the member list");
                    return false;
                }
            }
        };
        if members.is_empty() {
            return false;
        }
        if removed.contains(&self.key) {
            self.end(Problem::removed());
        }
        let now = Timestamp::from(SystemTime::now());
        let door_open = tokens.iter().any(|t| t.expires > now && t.uses_left > 0) || members.iter().any(|m| m.incarnation.0 == 0);
        self.network.set_joining(door_open);
        if members != self.state.peers() {
            if let Err(problem) = self.state.set_peers(&members) {
                tracing::warn!(what = problem.what, why = problem.why, "cannot remember the members");
            }
        }
        self.network.set_members(peer_infos(&members, self.id));
        let placement = placement_of(&members);
        self.chunks.set_members(members.iter().map(|member| member.node).collect());
        let another = self.chunks.placement().servers() != placement.servers();
        if another {
            self.chunks.set_placement(placement);
        }
        another
    }
}

/// The servers chunks are placed on: members that are not away, weighted by capacity.
pub fn placement_of(members: &[Member]) -> Placement {
    let servers = members
        .iter()
        .filter(|member| member.state == MemberState::Active)
        .map(|member| Server { node: member.node, zone: member.zone.clone(), weight: (member.capacity >> 30).max(1) })
        .collect();
    Placement::new(servers)
}

fn peer_infos(members: &[Member], own: NodeId) -> Vec<PeerInfo> {
    members
        .iter()
        .filter(|member| member.node != own)
        .map(|member| PeerInfo { node: member.node, key: member.key, addresses: member.addresses.clone() })
        .collect()
}

/// Loads what this server is, or makes it so: founds a cluster or joins one.
async fn credentials(state: &StateDir, settings: &mut NodeSettings) -> Result<Credentials, Problem> {
    let identity_dir = state.join("identity");
    let identity_error = |error: ctfs_net::IdentityError| Problem::damaged(&identity_dir, &error.to_string());
    match (state.cluster()?, settings.join.take()) {
        (Some(record), token) => {
            if let Some(token) = token
                && token.ca_hash != *blake3::hash(&record.identity.ca_certificate).as_bytes()
            {
                return Err(Problem::foreign_cluster(state.path(), &record.identity.name));
            }
            settings.name = record.name;
            settings.zone = record.zone;
        }
        (None, Some(token)) => {
            become_member(state, settings, &token).await?;
        }
        (None, None) => {
            become_founder(state, settings)?;
        }
    }
    let identity = Identity::load(&identity_dir).map_err(identity_error)?;
    let (record, incarnation) = state.begin_life(identity.node())?;
    let key = String::from_utf8(state.read("ca.key")?).map_err(|_| Problem::damaged(&state.join("ca.key"), "it is not text"))?;
    let authority = Authority::from_pem(&key)
        .map_err(|error| Problem::damaged(&state.join("ca.key"), &error.to_string()))?;
    Ok(Credentials { identity, authority, record, incarnation })
}

fn become_founder(state: &StateDir, settings: &NodeSettings) -> Result<(), Problem> {
    let internal = |error: ctfs_net::IdentityError| Problem::internal(&error.to_string());
    let name = crate::names::cluster_name();
    let authority = Authority::create(&name).map_err(internal)?;
    let mut identity = own_identity(state).map_err(internal)?;
    let certificate = authority.sign(identity.public_key_der(), &identity.node().to_string()).map_err(internal)?;
    identity.install(&certificate, &authority.certificate()).map_err(internal)?;
    state.write("ca.key", authority.to_pem().as_bytes())?;
    // Last: with this record the state directory is a member's.
    state.set_cluster(&ClusterRecord {
        identity: ClusterIdentity { id: rand::random(), name, ca_certificate: authority.certificate_der().to_vec() },
        lives: 0,
        founder: true,
        took_part: false,
        name: settings.name.clone(),
        zone: settings.zone.clone(),
    })
}

/// This server's key: that of an earlier try, so that the cluster knows it, or a new one.
fn own_identity(state: &StateDir) -> Result<Identity, ctfs_net::IdentityError> {
    let dir = state.join("identity");
    if Identity::exists(&dir) { Identity::load(&dir) } else { Identity::create(&dir) }
}

async fn become_member(state: &StateDir, settings: &NodeSettings, token: &ctfs_net::JoinToken) -> Result<(), Problem> {
    let internal = |error: ctfs_net::IdentityError| Problem::internal(&error.to_string());
    let mut identity = own_identity(state).map_err(internal)?;
    let request = JoinRequest {
        secret: token.secret,
        name: settings.name.clone(),
        zone: settings.zone.clone(),
        addresses: settings.advertise.clone(),
        port: settings.listen.port(),
        capacity: settings.capacity.0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let (JoinReply { cluster, certificate, authority_key, members }, rtt) = join::ask(token, &identity, request).await?;
    if *blake3::hash(&cluster.ca_certificate).as_bytes() != token.ca_hash {
        return Err(Problem::wrong_authority("the cluster named another authority than its certificate"));
    }
    let ca = ctfs_net::CaDer::from_der(&cluster.ca_certificate).map_err(internal)?;
    identity.install(&certificate, &ca).map_err(internal)?;
    state.write("ca.key", authority_key.as_bytes())?;
    // The first life of this server votes already, so its timings are settled before it.
    roundtrip::remember(state, rtt)?;
    state.set_peers(&members)?;
    // Last: with this record the state directory is a member's.
    state.set_cluster(&ClusterRecord {
        identity: cluster,
        lives: 0,
        founder: false,
        took_part: false,
        name: settings.name.clone(),
        zone: settings.zone.clone(),
    })
}

/// Whether the volume has had its first command.
fn is_founded(consensus: &Consensus) -> Result<bool, Problem> {
    let cluster = consensus.replica().read().cluster().map_err(|error| Problem::metadata(&error.to_string()))?;
    Ok(cluster.is_some())
}

async fn found(
    consensus: &Consensus,
    settings: &NodeSettings,
    record: &ClusterRecord,
    key: [u8; 32],
    incarnation: Incarnation,
    network: &Network,
) -> Result<(), Problem> {
    let member = Member {
        node: ctfs_net::node_of(&key),
        name: settings.name.clone(),
        zone: settings.zone.clone(),
        key,
        addresses: advertised(settings, network, &[]),
        capacity: settings.capacity.0,
        state: MemberState::Active,
        incarnation,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        fenced: false,
        pair: None,
        joined: Timestamp::from(SystemTime::now()),
    };
    let op = Op::Found { cluster: record.identity.clone(), member };
    match consensus.found(op).await {
        // A crash came after the command and before it was applied here again.
        Ok(()) | Err(ctfs_consensus::ProposeError::Refused(MetaError::AlreadyFounded)) => {}
        Err(error) => return Err(Problem::metadata(&error.to_string())),
    }
    if settings.copies > 0 {
        let policy = Policy { copies: Some(settings.copies), ..Policy::default() };
        match consensus.propose(Op::SetPolicy { ino: Ino::ROOT, policy }).await {
            Ok(Ok(_)) => {}
            Ok(Err(verdict)) => return Err(Problem::internal(&verdict.to_string())),
            Err(error) => return Err(Problem::no_quorum(&error.to_string())),
        }
    }
    Ok(())
}

/// Where this server can be reached: what it was told, else its interfaces' addresses.
fn advertised(settings: &NodeSettings, network: &Network, known: &[String]) -> Vec<String> {
    if !settings.advertise.is_empty() {
        return settings.advertise.clone();
    }
    let port = network.local_addr().port();
    let listen = settings.listen.ip();
    if !listen.is_unspecified() {
        return vec![SocketAddr::new(listen, port).to_string()];
    }
    let mut addresses: Vec<String> =
        crate::interfaces::addresses().into_iter().map(|ip: IpAddr| SocketAddr::new(ip, port).to_string()).collect();
    for address in known {
        if !addresses.contains(address) && addresses.len() < 8 {
            addresses.push(address.clone());
        }
    }
    addresses
}
