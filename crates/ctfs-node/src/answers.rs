//! What the admin socket answers: the node's state as documents.

use std::{path::Path, sync::{Arc, atomic::Ordering::Relaxed}, time::Duration};

use async_trait::async_trait;
use ctfs_chunk::{ChunkPeers, Placement, tier::Residency};
use ctfs_meta::{Cell, Member, MemberState, Op, Policy};
use ctfs_types::{Attr, ByteSize, ChunkId, ExtentData, FileKind, FileName, Ino, NodeId};

use crate::{
    admin::{
        AdminHandler, CELLS_SHOWN_MAX, CacheDropReport, CacheReport, CachedAs, CellKind, CellReport, ChunksReport, DfReport, DfServer,
        DoneReport, HolderReport, InfoReport, JobReport, MountReport, NodesReport, PingReport, PolicyReport, Request, Response,
        ServerReport, ServerRole, ServerState, StatusReport, TokenReport, Verdict, WirePath,
    },
    node::{Node, placement_of},
    problem::{Code, Problem},
    services::Heard,
};

/// The handler holds the node weakly: the socket must not keep a stopped node alive.
pub struct Answers(pub Arc<Node>);

#[async_trait]
impl AdminHandler for Answers {
    async fn handle(&self, request: Request) -> Result<Response, Problem> {
        let node = &self.0;
        match request {
            Request::Ping => Ok(Response::Ping(node.ping())),
            Request::Status => node.status().map(Response::Status),
            Request::Nodes => {
                let servers = node.servers()?;
                Ok(Response::Nodes(NodesReport { this_node: node.settings.name.clone(), servers }))
            }
            Request::Token { ttl_secs, uses } => node.token(ttl_secs, uses).await.map(Response::Token),
            Request::NodeRemove { name, force } => node.remove_member(&name, force).await.map(Response::Done),
            Request::Df { path } => node.df(path).map(Response::Df),
            Request::Info { path } => node.info(&path).await.map(Response::Info),
            Request::PolicySet { path, copies, cell } => {
                let (ino, _) = node.resolve(path.as_path())?;
                let mut policy = node.consensus.replica().read().policy(ino).map_err(store)?;
                policy.copies = copies.or(policy.copies);
                policy.cell = cell.or(policy.cell);
                node.set_policy(ino, policy).await?;
                node.policy(&path).map(Response::Policy)
            }
            Request::PolicyShow { path } => node.policy(&path).map(Response::Policy),
            Request::CacheDrop => {
                let content = node.vfs.content();
                let before = content.usage();
                let files = content.evict_all();
                let after = content.usage();
                let freed = ByteSize(before.clean.saturating_sub(after.clean));
                Ok(Response::CacheDrop(CacheDropReport { freed, files, kept: ByteSize(after.clean + after.dirty) }))
            }
            Request::Umount { force } => {
                let path = node.settings.mountpoint.clone();
                let open = node.vfs.open_handles();
                if open > 0 && node.is_mounted() && !force {
                    return Err(Problem::busy(open));
                }
                node.unmount().await?;
                let message = path.map_or("nothing was mounted".to_owned(), |path| format!("unmounted {}", path.display()));
                Ok(Response::Done(DoneReport { message, notes: Vec::new() }))
            }
            Request::Mount { path } => {
                if let (Some(asked), Some(own)) = (&path, &node.settings.mountpoint)
                    && asked.as_path() != own
                {
                    return Err(Problem::new(Code::ChoiceDiffers, format!("this server mounts at {}", own.display()))
                        .try_next(format!("ctfs mount {}", own.display())));
                }
                node.mount()?;
                let message = node.settings.mountpoint.as_ref().map_or_else(
                    || "this server has no mount point".to_owned(),
                    |path| format!("mounted {}", path.display()),
                );
                Ok(Response::Done(DoneReport { message, notes: Vec::new() }))
            }
            Request::Down => {
                node.request_stop();
                Ok(Response::Done(DoneReport { message: "stopping".into(), notes: Vec::new() }))
            }
        }
    }
}

fn store(error: ctfs_meta::StoreError) -> Problem {
    Problem::metadata(&error.to_string())
}

impl Node {
    fn ping(&self) -> PingReport {
        PingReport {
            pid: std::process::id(),
            name: self.settings.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mountpoint: self.settings.mountpoint.clone().filter(|_| self.is_mounted()).map(WirePath::from),
            authority: blake3::hash(&self.record.identity.ca_certificate).to_hex().to_string(),
        }
    }

    fn members(&self) -> Result<Vec<Member>, Problem> {
        self.consensus.replica().read().members().map_err(store)
    }

    /// Whether a peer answers now, and for how many seconds it has not.
    fn alive(&self, node: NodeId) -> (bool, Option<u64>) {
        if node == self.id || self.network.peer(node).connected {
            return (true, Some(0));
        }
        match self.services.heard(node) {
            Some(Heard::LostAt(at)) => (false, Some(at.elapsed().as_secs())),
            Some(Heard::Connected) => (false, Some(0)),
            None => (false, None),
        }
    }

    pub(crate) fn servers(&self) -> Result<Vec<ServerReport>, Problem> {
        let status = self.consensus.status();
        let report = |member: Member| {
            let (alive, heard) = self.alive(member.node);
            let peer = self.network.peer(member.node);
            let own = member.node == self.id;
            let figures = if own { Some(self.figures.local()) } else { self.figures.of(member.node).map(|(_, figures)| figures) };
            let state = match (alive, member.state) {
                _ if own => ServerState::Up,
                (_, MemberState::Away) => ServerState::Away,
                (true, MemberState::Active) => ServerState::Up,
                (false, MemberState::Active) => ServerState::Down,
            };
            let role = if status.leader == Some(member.node) {
                ServerRole::Leader
            } else if status.voters.contains(&member.node) {
                ServerRole::Voter
            } else if status.learners.contains(&member.node) {
                ServerRole::Learner
            } else {
                ServerRole::None
            };
            let size = |pick: fn(&crate::messages::ServerFigures) -> u64| figures.as_ref().map(|f| ByteSize(pick(f)));
            let newest = status.last_log.0.max(status.committed.0);
            ServerReport {
                node: member.node.to_string(),
                zone: member.zone,
                state,
                role,
                addresses: member.addresses,
                connected: peer.remote.filter(|_| peer.connected && !own).map(|remote| remote.to_string()),
                rtt_ms: peer.rtt.filter(|_| alive && !own).map(|rtt| rtt.as_secs_f64() * 1e3),
                mtu: peer.mtu.filter(|_| alive && !own),
                cache_used: size(|f| f.cache_used),
                cache_limit: size(|f| f.cache_limit),
                store_used: size(|f| f.store_used),
                store_capacity: size(|f| f.store_capacity),
                chunks: figures.as_ref().map(|f| f.chunks),
                version: figures.as_ref().map_or(member.version, |f| f.version.clone()),
                last_heard_secs: heard,
                lag: figures.as_ref().map(|f| newest.saturating_sub(f.applied)).filter(|_| alive),
                name: member.name,
            }
        };
        Ok(self.members()?.into_iter().map(report).collect())
    }

    pub(crate) fn status(&self) -> Result<StatusReport, Problem> {
        if let Some(problem) = self.ended.lock().clone() {
            return Err(problem);
        }
        let servers = self.servers()?;
        let consensus = self.consensus.status();
        let members = self.members()?;
        let name_of = |node: NodeId| members.iter().find(|m| m.node == node).map(|m| m.name.clone());
        let totals = self.consensus.replica().read().totals(Ino::ROOT).map_err(store)?.unwrap_or_default();
        let cache = self.vfs.content().usage();
        let chunks = self.chunk_counts(&servers)?;
        let (verdict, summary, why, action) = self.judge(&servers, &consensus, &chunks);
        let repair = self.repair.progress();
        let mut jobs = Vec::new();
        if repair.walking.load(Relaxed) || chunks.below_policy > 0 {
            jobs.push(JobReport {
                name: "repair".into(),
                detail: format!("{} chunks copied here since start, {} to go", repair.fetched.load(Relaxed), self.repair.missing()),
                done: repair.walked.load(Relaxed),
                total: repair.total.load(Relaxed),
            });
        }
        let mounts = self.settings.mountpoint.clone().filter(|_| self.is_mounted()).map(|path| MountReport {
            path: WirePath::from(path),
            files: totals.files,
            bytes: ByteSize(totals.bytes),
            open_handles: self.vfs.open_handles() as u64,
        });
        Ok(StatusReport {
            cluster_name: self.record.identity.name.clone(),
            cluster_id: self.record.identity.id.iter().map(|b| format!("{b:02x}")).collect(),
            verdict,
            summary,
            why,
            action,
            this_node: self.settings.name.clone(),
            servers,
            mounts: mounts.into_iter().collect(),
            cache: CacheReport {
                used: ByteSize(cache.clean + cache.dirty),
                limit: ByteSize(cache.limit),
                dirty: ByteSize(cache.dirty),
                hits: cache.hits,
                misses: cache.misses,
            },
            jobs,
            chunks,
            applied: consensus.applied.0,
            term: consensus.term,
            leader: consensus.leader.and_then(name_of),
        })
    }

    /// Chunks of the volume and how many the servers say they still lack.
    fn chunk_counts(&self, servers: &[ServerReport]) -> Result<ChunksReport, Problem> {
        let total = self.consensus.replica().read().chunk_count();
        let mut below = self.repair.missing();
        let members = self.members()?;
        for member in members.iter().filter(|m| m.node != self.id) {
            below += self.figures.of(member.node).map_or(0, |(_, figures)| figures.missing);
        }
        // A server that is down and still counted on holds copies nobody can read now.
        let down = servers.iter().filter(|s| s.state == ServerState::Down).filter_map(|s| s.chunks).max().unwrap_or(0);
        Ok(ChunksReport { total, below_policy: below.max(down).min(total), lost: 0 })
    }

    /// The verdict, in a sentence; why; and what to do.
    fn judge(
        &self,
        servers: &[ServerReport],
        consensus: &ctfs_consensus::ConsensusStatus,
        chunks: &ChunksReport,
    ) -> (Verdict, String, Vec<String>, Vec<String>) {
        let (mut why, mut action) = (Vec::new(), Vec::new());
        let alive = servers.iter().filter(|s| s.state == ServerState::Up).count();
        let mut verdict = Verdict::Healthy;
        for server in servers.iter().filter(|s| s.state != ServerState::Up) {
            verdict = Verdict::Degraded;
            let since = match server.last_heard_secs {
                Some(seconds) => format!("for {}", humanly(seconds)),
                None => "since this server started".to_owned(),
            };
            why.push(format!("{} ({}) unreachable {since}", server.name, server.zone));
            match server.state {
                ServerState::Down => {
                    let left = self.settings.away_after.as_secs().saturating_sub(server.last_heard_secs.unwrap_or(0));
                    action.push(format!(
                        "none needed: if {} stays away its copies are re-made elsewhere in {}; sooner: ctfs node remove {}",
                        server.name,
                        humanly(left),
                        server.name
                    ));
                }
                _ => action.push(format!(
                    "its copies are being kept elsewhere; if it is gone for good: ctfs node remove {}",
                    server.name
                )),
            }
        }
        if chunks.below_policy > 0 && verdict == Verdict::Healthy {
            verdict = Verdict::Degraded;
            why.push(format!("{} chunks have fewer copies than their policy asks for; they are being copied", chunks.below_policy));
            action.push("none needed: wait for the repair job".into());
        }
        if consensus.leader.is_none() || !consensus.leased {
            let voting = consensus.voters.len();
            let answering = servers.iter().filter(|s| s.state == ServerState::Up && s.role != ServerRole::Learner).count();
            verdict = Verdict::Unavailable;
            why.insert(0, format!("no majority of the {voting} voting servers agrees now ({answering} answer): files can be neither read nor changed"));
            // Neither waiting for copies nor removing anybody works without a majority.
            action = vec!["bring the unreachable servers back (ctfs up on each), or wait some seconds for an election".into()];
        }
        let state = match verdict {
            Verdict::Healthy | Verdict::Degraded => "all data readable and writable",
            Verdict::Unavailable => "files cannot be used",
        };
        if verdict == Verdict::Healthy {
            match servers.len() {
                1 => action.push("1 server = 1 copy: losing this disk loses the data; ctfs token prints the line for the next server".into()),
                2 => action.push("2 servers = 2 copies, but the loss of either stops writing; add a third: ctfs token".into()),
                _ => {}
            }
        }
        (verdict, format!("{alive} of {} servers alive, {state}", servers.len()), why, action)
    }

    async fn token(&self, ttl_secs: u64, uses: u32) -> Result<TokenReport, Problem> {
        let own = self.members()?.into_iter().find(|m| m.node == self.id);
        let addresses = own.map(|m| m.addresses).unwrap_or_default();
        let token = self.doorman.issue(addresses, Duration::from_secs(ttl_secs), uses).await?;
        self.network.set_joining(true);
        let path = self.settings.mountpoint.clone().unwrap_or_else(|| "/srv/data".into());
        Ok(TokenReport {
            line: format!("ctfs up {} --join {token}", path.display()),
            token: token.to_string(),
            expires: token.expires,
            uses,
        })
    }

    async fn remove_member(&self, name: &str, force: bool) -> Result<DoneReport, Problem> {
        let members = self.members()?;
        let member = members
            .iter()
            .find(|m| m.name == name || m.node.to_string() == name)
            .ok_or_else(|| Problem::no_such_server(name))?;
        let alive = members.iter().filter(|m| m.node != member.node && self.alive(m.node).0).count();
        if alive == 0 && members.len() > 1 {
            return Err(Problem::no_quorum("no other server answers"));
        }
        self.membership.remove(member.node, force).await?;
        let mut notes = Vec::new();
        if force {
            notes.push("what only it held is lost; ctfs status shows what is copied from the others".to_owned());
        }
        if members.len() == 3 {
            notes.push("two servers are left: the loss of either stops writing; add another: ctfs token".to_owned());
        }
        Ok(DoneReport { message: format!("removed {}", member.name), notes })
    }

    fn df(&self, path: Option<WirePath>) -> Result<DfReport, Problem> {
        let ino = match &path {
            Some(path) => self.resolve(path.as_path())?.0,
            None => Ino::ROOT,
        };
        let replica = self.consensus.replica();
        let (totals, policy) = {
            let namespace = replica.read();
            (namespace.totals(ino).map_err(store)?.unwrap_or_default(), namespace.effective_policy(ino).map_err(store)?)
        };
        let space = self.figures.space();
        let servers = self.servers()?;
        let active = servers.iter().filter(|s| s.state != ServerState::Away).count();
        Ok(DfReport {
            path,
            files: totals.files,
            bytes: ByteSize(totals.bytes),
            available: ByteSize(space.available),
            total: ByteSize(space.total),
            copies: Placement::copies_for(policy.copies, active) as u8,
            servers: servers
                .into_iter()
                .map(|s| DfServer {
                    name: s.name,
                    store_used: s.store_used,
                    store_capacity: s.store_capacity,
                    cache_used: s.cache_used,
                    cache_limit: s.cache_limit,
                })
                .collect(),
        })
    }

    /// The inode at an absolute path inside the mount, or at a path from the root of the volume
    /// when this server has no mount. Symlinks are not followed.
    fn resolve(&self, path: &Path) -> Result<(Ino, Attr), Problem> {
        let inside = match &self.settings.mountpoint {
            Some(mountpoint) => path.strip_prefix(mountpoint).map_err(|_| Problem::not_inside(path))?,
            None => path.strip_prefix("/").unwrap_or(path),
        };
        let replica = self.consensus.replica();
        let namespace = replica.read();
        let mut ino = Ino::ROOT;
        for component in inside.components() {
            use std::os::unix::ffi::OsStrExt;
            let name = FileName::new(component.as_os_str().as_bytes()).map_err(|_| Problem::not_inside(path))?;
            ino = namespace
                .lookup(ino, &name)
                .map_err(store)?
                .ok_or_else(|| Problem::new(Code::NotInside, format!("{} does not exist", WirePath::from(path))))?;
        }
        let attr = namespace.attr(ino).map_err(store)?.ok_or_else(|| Problem::not_inside(path))?;
        Ok((ino, attr))
    }

    async fn set_policy(&self, ino: Ino, policy: Policy) -> Result<(), Problem> {
        match self.consensus.propose(Op::SetPolicy { ino, policy }).await {
            Ok(Ok(_)) => {
                self.repair.walk_soon();
                Ok(())
            }
            Ok(Err(verdict)) => Err(Problem::new(Code::InvalidArgument, verdict.to_string())),
            Err(error) => Err(Problem::no_quorum(&error.to_string())),
        }
    }

    fn policy(&self, path: &WirePath) -> Result<PolicyReport, Problem> {
        let (ino, _) = self.resolve(path.as_path())?;
        let replica = self.consensus.replica();
        let namespace = replica.read();
        let set = namespace.policy(ino).map_err(store)?;
        let effective = namespace.effective_policy(ino).map_err(store)?;
        let active = namespace.members().map_err(store)?.iter().filter(|m| m.state == MemberState::Active).count();
        Ok(PolicyReport {
            path: path.clone(),
            copies_set: set.copies,
            cell_set: set.cell.map(|cell| ByteSize(cell.bytes())),
            copies: effective.copies,
            cell: ByteSize(effective.cell.bytes()),
            copies_now: Placement::copies_for(effective.copies, active) as u8,
        })
    }

    async fn info(&self, path: &WirePath) -> Result<InfoReport, Problem> {
        let (ino, mut attr) = self.resolve(path.as_path())?;
        self.vfs.content().overlay(&mut attr);
        let replica = self.consensus.replica();
        let (policy, members, cells) = {
            let namespace = replica.read();
            let last = attr.cell.cell_of(attr.size.saturating_sub(1)) + 1;
            let cells = if attr.kind == FileKind::File { namespace.cells(ino, 0, last).map_err(store)? } else { Vec::new() };
            (namespace.effective_policy(ino).map_err(store)?, namespace.members().map_err(store)?, cells)
        };
        let placement = placement_of(&members);
        let active = members.iter().filter(|m| m.state == MemberState::Active).count();
        let cached = self.vfs.content().resident(ino);
        let cells_more = cells.len().saturating_sub(CELLS_SHOWN_MAX) as u64;
        let shown = &cells[..cells.len().min(CELLS_SHOWN_MAX)];
        let chunks: Vec<ChunkId> = shown.iter().filter_map(|cell| cell.extent.chunk()).collect();
        let located = self.locate(&members, &chunks).await;
        let holders = |id: ChunkId| -> Vec<HolderReport> {
            let copies = replica.read().chunk(&id).ok().flatten().map_or(policy.copies, |record| record.copies);
            let wanted = Placement::copies_for(copies, active);
            let mut all: Vec<(usize, NodeId)> = placement.rank(&id).into_iter().enumerate().collect();
            let ranked: Vec<NodeId> = all.iter().map(|(_, node)| *node).collect();
            all.extend(members.iter().map(|m| m.node).filter(|n| !ranked.contains(n)).map(|node| (usize::MAX, node)));
            all.into_iter()
                .filter_map(|(rank, node)| {
                    let member = members.iter().find(|m| m.node == node)?;
                    let holds = located.get(&(node, id)).copied().flatten();
                    let placed = rank < wanted;
                    if !placed && holds != Some(true) {
                        return None;
                    }
                    let why = match (placed, holds) {
                        (true, Some(true)) => format!("placed here (zone {})", member.zone),
                        (true, Some(false)) => "placed here, not copied yet".into(),
                        (true, None) => "placed here, does not answer now".into(),
                        (false, _) => "surplus: goes once the placed servers have it".into(),
                    };
                    let rank = if rank == usize::MAX { 0 } else { rank as u32 + 1 };
                    Some(HolderReport { name: member.name.clone(), rank, holds, why })
                })
                .collect()
        };
        let cell_report = |cell: &Cell| {
            let cached = cached.iter().find(|(index, _)| *index == cell.index).map_or(CachedAs::None, |(_, state)| match state {
                Residency::Unflushed { .. } => CachedAs::Dirty,
                Residency::Clean { .. } => CachedAs::Clean,
            });
            let chunk = cell.extent.chunk();
            CellReport {
                index: cell.index,
                offset: attr.cell.start_of(cell.index) + u64::from(cell.extent.start),
                len: u64::from(cell.extent.data.len()),
                kind: match cell.extent.data {
                    ExtentData::Inline(_) => CellKind::Inline,
                    ExtentData::Chunk { .. } => CellKind::Chunk,
                },
                chunk: chunk.map(|id| id.to_string()),
                holders: chunk.map(holders).unwrap_or_default(),
                cached,
            }
        };
        let cell_bytes = attr.cell.bytes();
        let (mut clean, mut unflushed) = (0, 0);
        for (_, residency) in &cached {
            match residency {
                Residency::Clean { bytes } => clean += bytes,
                Residency::Unflushed { dirty, clean: between } => {
                    unflushed += dirty;
                    clean += between;
                }
            }
        }
        Ok(InfoReport {
            path: path.clone(),
            ino: ino.0,
            kind: kind_name(attr.kind).to_owned(),
            size: ByteSize(attr.size),
            allocated: ByteSize(attr.allocated),
            copies: policy.copies,
            copies_now: Placement::copies_for(policy.copies, active) as u8,
            cell: ByteSize(cell_bytes),
            cells: shown.iter().map(cell_report).collect(),
            cells_more,
            cached: ByteSize((clean + unflushed).min(attr.size)),
            dirty: ByteSize(unflushed),
        })
    }

    /// Asks every member about all of these chunks at once.
    async fn locate(
        &self,
        members: &[Member],
        chunks: &[ChunkId],
    ) -> std::collections::HashMap<(NodeId, ChunkId), Option<bool>> {
        let asked = members.iter().map(|member| async move {
            let mut answers: Vec<Option<bool>> = Vec::with_capacity(chunks.len());
            for page in chunks.chunks(crate::messages::LIST_MAX) {
                if member.node == self.id {
                    answers.extend(page.iter().map(|id| Some(self.store.holds(id))));
                    continue;
                }
                match self.peers.has(member.node, page.to_vec()).await {
                    Ok(held) => answers.extend(held.into_iter().map(Some)),
                    Err(_) => answers.extend(page.iter().map(|_| None)),
                }
            }
            (member.node, answers)
        });
        let mut located = std::collections::HashMap::new();
        for (node, answers) in futures_util::future::join_all(asked).await {
            for (id, holds) in chunks.iter().zip(answers) {
                located.insert((node, *id), holds);
            }
        }
        located
    }
}

fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharDevice => "character device",
        FileKind::BlockDevice => "block device",
    }
}

/// `4 min 12 s`
fn humanly(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}
