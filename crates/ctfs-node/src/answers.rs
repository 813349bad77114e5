//! What the admin socket answers: the node's state as documents.

use std::{path::Path, sync::{Arc, atomic::Ordering::Relaxed}, time::Duration};

use async_trait::async_trait;
use ctfs_chunk::{ChunkPeers, Placement, tier::Residency};
use ctfs_meta::{Cell, Member, MemberState, Op, Policy};
use ctfs_types::{Attr, ByteSize, ChunkId, ExtentData, FileKind, FileUse, FileName, Ino, NodeId};
use ctfs_vfs::{DelegationFigures, FsError};

use crate::{
    admin::{
        AdminHandler, CELLS_SHOWN_MAX, CacheDropReport, CacheReport, CachedAs, CellKind, CellReport, ChunksReport, DirectoriesReport, ReadsReport, DfReport, DfServer,
        DoneReport, HolderReport, InfoReport, JobReport, JournalReport, MountReport, NodesReport, PingReport, PolicyReport, Request, Response, Room,
        ServerReport, ServerRole, ServerState, StatusReport, TokenReport, WirePath,
    },
    node::{Node, placement_of},
    problem::{Code, Problem},
    verdict::{Judgement, Seen, judge},
};

/// How long one `ctfs sync` may take: as long as it may take every server to write out what it has.
const SYNC_DEADLINE: Duration = Duration::from_secs(600);

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
            Request::PolicySet { path, copies, cell, durability, on_partition } => {
                let (ino, _) = node.resolve(path.as_path())?;
                let mut policy = node.consensus.replica().read().policy(ino).map_err(store)?;
                policy.copies = copies.or(policy.copies);
                policy.cell = cell.or(policy.cell);
                policy.durability = durability.or(policy.durability);
                policy.on_partition = on_partition.or(policy.on_partition);
                node.set_policy(ino, policy).await?;
                node.policy(&path).map(Response::Policy)
            }
            Request::PolicyShow { path } => node.policy(&path).map(Response::Policy),
            Request::QuotaSet { path, bytes, files } => node.set_quota(&path, bytes, files).await.map(Response::Quotas),
            Request::QuotaClear { path } => node.clear_quota(&path).await.map(Response::Quotas),
            Request::QuotaList { path } => node.quotas(path.as_ref()).map(Response::Quotas),
            Request::CacheDrop => {
                let content = node.vfs.content();
                let before = content.usage();
                let files = content.evict_all();
                let after = content.usage();
                let freed = ByteSize(before.clean.saturating_sub(after.clean));
                Ok(Response::CacheDrop(CacheDropReport { freed, files, kept: ByteSize(after.clean + after.dirty) }))
            }
            Request::Sync => node.sync().await.map(Response::Done),
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

pub(crate) fn store(error: ctfs_meta::StoreError) -> Problem {
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

    /// The member list; when the metadata can no longer be read, as it was last known.
    fn members(&self) -> Result<Vec<Member>, Problem> {
        match self.consensus.replica().read().members() {
            Err(_) if self.consensus.status().stopped.is_some() => Ok(self.state.peers()),
            members => members.map_err(store),
        }
    }

    pub(crate) fn servers(&self) -> Result<Vec<ServerReport>, Problem> {
        let status = self.consensus.status();
        let report = |member: Member| {
            let pulse = self.membership.pulse(member.node);
            let alive = pulse.up;
            let peer = self.network.peer(member.node);
            let own = member.node == self.id;
            let figures = self.figures.latest(member.node);
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
                store_refused: figures.as_ref().filter(|_| alive).map_or(0, |f| f.refused),
                store_failed: figures.as_ref().filter(|_| alive).and_then(|f| f.store_failed.clone()),
                stopped: self.figures.stopped(member.node).filter(|_| alive),
                room: figures.as_ref().filter(|_| alive).map_or(Room::Enough, |f| f.room),
                version: figures.as_ref().map_or(member.version, |f| f.version.clone()),
                last_heard_secs: pulse.silent_for.map(|silent| silent.as_secs()),
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
        let totals = match self.consensus.replica().read().totals(Ino::ROOT) {
            // The verdict says why; it must not be missing because of a count.
            Err(_) if consensus.stopped.is_some() => None,
            totals => totals.map_err(store)?,
        };
        let totals = totals.unwrap_or_default();
        let cache = self.vfs.content().usage();
        let chunks = self.chunk_counts(&servers)?;
        let Judgement { verdict, summary, why, action } = judge(&Seen {
            this_node: &self.settings.name,
            servers: &servers,
            chunks: &chunks,
            majority: consensus.leader.is_some() && consensus.leased,
            voters: consensus.voters.len(),
            away_after: self.settings.away_after,
        });
        let repair = self.repair.progress();
        let mut jobs = Vec::new();
        if repair.walking.load(Relaxed) || chunks.below_policy > 0 {
            jobs.push(JobReport {
                name: "repair".into(),
                detail: format!("{} chunks copied here since start, {} to go", repair.fetched.load(Relaxed), self.repair.walked().missing),
                done: repair.walked.load(Relaxed),
                total: repair.total.load(Relaxed),
            });
        }
        let depth = self.consensus.journal_depth().unwrap_or_default();
        let journal = JournalReport {
            pair: self.pairs.pair().and_then(name_of),
            alone: members.len() == 1,
            records: depth.records,
            bytes: ByteSize(depth.bytes),
        };
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
            leased: consensus.leased,
            reads: ReadsReport { cut_off: self.vfs.is_cut_off(), stale: self.vfs.stale_reads() },
            journal,
            directories: self.directories(),
        })
    }

    fn directories(&self) -> DirectoriesReport {
        let held = self.consensus.replica().read().delegated();
        let DelegationFigures { taken, ahead, given_up, unused, shared, recalled } = self.vfs.delegations();
        DirectoriesReport { held, taken, ahead, given_up, unused, shared, recalled }
    }

    /// Chunks of the volume and how many the servers say they still lack.
    fn chunk_counts(&self, servers: &[ServerReport]) -> Result<ChunksReport, Problem> {
        let total = self.consensus.replica().read().chunk_count();
        let mut below = self.repair.walked().missing;
        let members = self.members()?;
        for member in members.iter().filter(|m| m.node != self.id) {
            below += self.figures.of(member.node).map_or(0, |(_, figures)| figures.missing);
        }
        // A server that is down and still counted on holds copies nobody can read now.
        let down = servers.iter().filter(|s| s.state == ServerState::Down).filter_map(|s| s.chunks).max().unwrap_or(0);
        Ok(ChunksReport { total, below_policy: below.max(down).min(total), lost: 0 })
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

    async fn sync(&self) -> Result<DoneReport, Problem> {
        let settled = tokio::time::timeout(SYNC_DEADLINE, self.vfs.settle_everywhere()).await;
        let index = match settled {
            Ok(Ok(index)) => index,
            Ok(Err(FsError::HolderAway { node, why })) => {
                let name = self.consensus.replica().read().member(node).ok().flatten().map_or(node.to_string(), |member| member.name);
                return Err(Problem::new(Code::NoQuorum, format!("server {name} has not put what it did into the metadata"))
                    .why(why)
                    .try_next("ctfs status"));
            }
            Ok(Err(error @ FsError::NoQuorum { .. })) => return Err(Problem::no_quorum(&error.to_string())),
            Ok(Err(error)) => return Err(Problem::not_flushed(&error.to_string())),
            Err(_) => return Err(Problem::new(Code::TimedOut, "not everything is written out yet").try_next("ctfs sync    goes on where this one stopped")),
        };
        let message = format!("all that was acknowledged before, on whichever server, is in the metadata up to log index {}", index.0);
        Ok(DoneReport { message, notes: Vec::new() })
    }

    async fn remove_member(&self, name: &str, force: bool) -> Result<DoneReport, Problem> {
        let members = self.members()?;
        let member = members
            .iter()
            .find(|m| m.name == name || m.node.to_string() == name)
            .ok_or_else(|| Problem::no_such_server(name))?;
        let alive = members.iter().filter(|m| m.node != member.node && self.membership.pulse(m.node).up).count();
        if alive == 0 && members.len() > 1 {
            return Err(Problem::no_quorum("no other server answers"));
        }
        let own = member.node == self.id;
        if own && !force {
            // What was written here and is on no store yet would go with it.
            self.write_back().await?;
        }
        self.membership.remove(member.node, force).await?;
        let mut notes = Vec::new();
        if own {
            self.end(Problem::removed());
            notes.push("this was the server itself: its files can no longer be used here; stop it: ctfs down".to_owned());
            notes.push("to come back as a new server: move the state directory away and join with a new token".to_owned());
        }
        if force {
            notes.push("what only it held is lost; ctfs status shows what is copied from the others".to_owned());
        }
        if members.len() == 3 {
            notes.push("two servers are left: the loss of either stops writing; add another: ctfs token".to_owned());
        }
        Ok(DoneReport { message: format!("removed {}", member.name), notes })
    }

    fn df(&self, path: Option<WirePath>) -> Result<DfReport, Problem> {
        let found = path.as_ref().map(|path| self.resolve(path.as_path())).transpose()?;
        let ino = found.as_ref().map_or(Ino::ROOT, |(ino, _)| *ino);
        let replica = self.consensus.replica();
        let (totals, policy) = {
            let namespace = replica.read();
            (namespace.totals(ino).map_err(store)?, namespace.effective_policy(ino).map_err(store)?)
        };
        // Only a directory has sums; anything else counts itself.
        let (files, bytes) = match (totals, &found) {
            (Some(totals), _) => (totals.files, totals.bytes),
            (None, Some((_, attr))) => (1, attr.size),
            (None, None) => (0, 0),
        };
        let quotas = self.quotas_over(ino)?;
        let mut space = self.figures.space();
        for quota in &quotas {
            if let Some(limit) = quota.bytes_limit {
                space.total = space.total.min(limit.0);
                space.available = space.available.min(limit.0.saturating_sub(quota.bytes_used.0));
            }
        }
        let servers = self.servers()?;
        let active = servers.iter().filter(|s| s.state != ServerState::Away).count();
        Ok(DfReport {
            path,
            files,
            bytes: ByteSize(bytes),
            available: ByteSize(space.available),
            total: ByteSize(space.total),
            copies: Placement::copies_for(policy.copies, active) as u8,
            quotas,
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
    pub(crate) fn resolve(&self, path: &Path) -> Result<(Ino, Attr), Problem> {
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
                .ok_or_else(|| Problem::new(Code::NotInside, format!("{} does not exist", WirePath::from(path))).try_next("check the path"))?;
        }
        let attr = namespace.attr(ino).map_err(store)?.ok_or_else(|| Problem::not_inside(path))?;
        Ok((ino, attr))
    }

    async fn set_policy(&self, ino: Ino, policy: Policy) -> Result<(), Problem> {
        match self.vfs.propose(Op::SetPolicy { ino, policy }).await {
            Ok(_) => {
                self.repair.walk_soon();
                Ok(())
            }
            Err(FsError::Meta(verdict)) => Err(Problem::new(Code::InvalidArgument, verdict.to_string())),
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
            durability_set: set.durability,
            on_partition_set: set.on_partition,
            copies: effective.copies,
            cell: ByteSize(effective.cell.bytes()),
            durability: effective.durability,
            on_partition: effective.on_partition,
            copies_now: Placement::copies_for(effective.copies, active) as u8,
        })
    }

    async fn info(&self, path: &WirePath) -> Result<InfoReport, Problem> {
        let content = self.vfs.content();
        let (ino, attr) = loop {
            let since = content.moment();
            let (ino, mut attr) = self.resolve(path.as_path())?;
            if content.overlay(&mut attr, since) {
                break (ino, attr);
            }
        };
        let replica = self.consensus.replica();
        let (policy, members, cells, holder) = {
            let namespace = replica.read();
            let last = attr.cell.cell_of(attr.size.saturating_sub(1)) + 1;
            let cells = if attr.kind == FileKind::File { namespace.cells(ino, 0, last).map_err(store)? } else { Vec::new() };
            let members = namespace.members().map_err(store)?;
            let holder = match attr.usage {
                FileUse::Owned { holder, .. } => Some(holder),
                _ => namespace.cover(ino).map_err(store)?.map(|(_, holder)| holder),
            };
            let holder = holder.and_then(|holder| members.iter().find(|member| member.node == holder.node)).map(|member| member.name.clone());
            (namespace.effective_policy(ino).map_err(store)?, members, cells, holder)
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
            durability: policy.durability,
            holder,
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
