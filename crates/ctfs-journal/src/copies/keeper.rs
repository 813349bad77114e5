//! The one thread that keeps the copies.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use ctfs_host::Worker;
use ctfs_types::{
    codec,
    rules::{Rule, keeps},
};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{Receiver, error::TryRecvError};
use tracing::{error, info};

use super::{COPIES_MAX, CopySettings, CopyStatus, Fenced, Refusal, Reply, Request};
use crate::{
    Batch, Disk, JournalError, JournalId, Position, Record,
    disk::{remove_whole, replace, sweep},
    frame::frame_bytes,
    segments::{Segments, WriteError, is_full},
};

const FENCES: &str = "fences";
const FENCES_VERSION: u8 = 1;
const FENCES_BYTES_MAX: usize = 1 << 20;
/// Requests that are served between two syncs. More makes the first of them wait longer than a sync costs.
const GROUP_MAX: usize = 16;
/// Bytes compared at once where a batch overlaps.
const COMPARE_BYTES: usize = 1 << 20;

/// Of one server: the last life that was fenced, and in which epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fence {
    pub node: u64,
    pub incarnation: u64,
    pub epoch: u64,
}

/// What stands in the file.
pub(crate) fn seal_fences(cluster: [u8; 16], fences: &[Fence]) -> Vec<u8> {
    codec::seal(FENCES_VERSION, &(cluster, fences))
}

enum Held {
    Open(Segments),
    /// Not to be used until it was opened again.
    Failed(String),
}

pub(super) struct Keeper {
    disk: Arc<dyn Disk>,
    root: PathBuf,
    cluster: [u8; 16],
    settings: CopySettings,
    fences: BTreeMap<u64, Fence>,
    copies: BTreeMap<JournalId, Held>,
    /// Whether a fence is on the disk is unknown: nothing is accepted or fenced until it is read again.
    failed: Option<String>,
    inbox: Receiver<Request>,
}

impl Worker for Keeper {
    /// Serves until nobody can ask any more.
    fn run(mut self) {
        while let Some(first) = self.inbox.blocking_recv() {
            self.serve_group(first);
        }
    }

    fn turn(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(first) => self.serve_group(first),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }
}

impl Keeper {
    pub fn open(
        disk: Arc<dyn Disk>,
        root: &Path,
        cluster: [u8; 16],
        settings: CopySettings,
        inbox: Receiver<Request>,
    ) -> Result<Self, JournalError> {
        let failed = |source| JournalError::io("open copies in", root, source);
        disk.create_dir(root).map_err(failed)?;
        let names = sweep(&*disk, root).map_err(failed)?;
        let fences = if names.iter().any(|name| name == FENCES) { read_fences(&*disk, root, cluster)? } else { Vec::new() };
        let mut copies = BTreeMap::new();
        for id in names.iter().filter_map(|name| JournalId::of_dir_name(cluster, name)) {
            let held = match Segments::recover(disk.clone(), &root.join(id.dir_name()), id, settings.segment_bytes) {
                Ok(Some(segments)) => Held::Open(segments),
                Ok(None) => {
                    remove_whole(&*disk, root, &id.dir_name()).map_err(failed)?;
                    continue;
                }
                Err(why) => {
                    error!(copy = %id, %why, "a copy cannot be used");
                    Held::Failed(shorten(&why))
                }
            };
            copies.insert(id, held);
        }
        let fences = fences.into_iter().map(|fence| (fence.node, fence)).collect();
        Ok(Self { disk, root: root.to_owned(), cluster, settings, fences, copies, failed: None, inbox })
    }

    /// Serves this request and those that wait behind it, with one sync for all.
    fn serve_group(&mut self, first: Request) {
        let mut group = Vec::new();
        self.serve(first, &mut group);
        for _ in 1..GROUP_MAX {
            match self.inbox.try_recv() {
                Ok(request) => self.serve(request, &mut group),
                Err(_) => break,
            }
        }
        self.finish(&mut group);
    }

    /// Does one request; what it wrote is not durable yet where it is put into `group`.
    fn serve(&mut self, request: Request, group: &mut Vec<Written>) {
        if !matches!(request, Request::Accept { .. }) {
            self.finish(group);
        }
        // Who asked may be gone; what was asked is done all the same.
        match request {
            Request::Accept { id, batch, reply } => {
                let trim = batch.kept_from.before();
                match self.accept(id, batch) {
                    Ok(()) => group.push(Written { id, trim, reply }),
                    Err(refusal) => drop(reply.send(Err(refusal))),
                }
            }
            Request::Fence { id, epoch, reply } => drop(reply.send(self.fence(id, epoch))),
            Request::Trim { id, upto, reply } => drop(reply.send(self.trim(id, upto))),
            Request::Remove { id, reply } => drop(reply.send(self.remove(id))),
            Request::List { reply } => drop(reply.send(Ok(self.list()))),
        }
    }

    fn check(&self) -> Result<(), Refusal> {
        self.failed.as_ref().map_or(Ok(()), |why| Err(Refusal::Failed(why.clone())))
    }

    fn fence_of(&self, id: JournalId) -> Option<Fence> {
        self.fences.get(&id.node.0).copied().filter(|fence| fence.incarnation >= id.incarnation.0)
    }

    /// Writes what is new in `batch`.
    fn accept(&mut self, id: JournalId, batch: Batch) -> Result<(), Refusal> {
        self.check()?;
        let kept_from = batch.kept_from;
        let records = batch.records().ok_or(Refusal::Invalid)?;
        if id.cluster != self.cluster || kept_from == Position::NONE {
            return Err(Refusal::Invalid);
        }
        if let Some(Fence { epoch, .. }) = self.fence_of(id) {
            return Err(Refusal::Fenced { epoch });
        }
        self.begin(id, kept_from)?;
        let bytes_max = self.settings.bytes_max;
        self.with(id, |segments| {
            let has = segments.written();
            let Some(first) = records.first().map(|record| record.position) else { return Ok(Ok(())) };
            if first > has.next() {
                return Ok(Err(Refusal::Gap { has }));
            }
            let known = records.partition_point(|record| record.position <= has);
            let (known, new) = records.split_at(known);
            if let Err(refusal) = compare(segments, known) {
                return Ok(Err(refusal));
            }
            let bytes: u64 = new.iter().map(|record| frame_bytes(&record.payload) as u64).sum();
            if segments.kept_bytes() + bytes > bytes_max {
                return Ok(Err(Refusal::Full));
            }
            match segments.write(new) {
                Ok(()) => Ok(Ok(())),
                Err(WriteError::NoRoom(_)) => Ok(Err(Refusal::Full)),
                Err(WriteError::Failed(why)) => Err(why),
            }
        })?
    }

    /// Sees that there is a copy of `id` that reaches up to `kept_from`, or can begin there.
    fn begin(&mut self, id: JournalId, kept_from: Position) -> Result<(), Refusal> {
        match self.copies.get(&id) {
            Some(Held::Open(segments)) if segments.written().next() < kept_from => {
                info!(copy = %id, %kept_from, "the owner has trimmed past this copy, which begins anew");
                self.remove(id)?;
            }
            Some(_) => return Ok(()),
            None => {}
        }
        if self.copies.len() >= COPIES_MAX {
            return Err(Refusal::Full);
        }
        let name = id.dir_name();
        let dir = self.root.join(&name);
        match Segments::create(self.disk.clone(), &dir, id, kept_from, self.settings.segment_bytes) {
            Ok(segments) => {
                self.copies.insert(id, Held::Open(segments));
                Ok(())
            }
            Err(why) => {
                // Nothing was ever in it. What cannot be removed now is at the next start.
                let _ = remove_whole(&*self.disk, &self.root, &name);
                match why {
                    JournalError::Io { source, .. } if is_full(&source) => Err(Refusal::Full),
                    why => Err(Refusal::Failed(shorten(&why))),
                }
            }
        }
    }

    /// Does something with a copy, which is not used again when that fails.
    fn with<T>(&mut self, id: JournalId, step: impl FnOnce(&mut Segments) -> io::Result<T>) -> Result<T, Refusal> {
        let held = self.copies.get_mut(&id).ok_or(Refusal::Invalid)?;
        let why = match held {
            Held::Failed(why) => return Err(Refusal::Failed(why.clone())),
            Held::Open(segments) => match step(segments) {
                Ok(done) => return Ok(done),
                Err(why) => why,
            },
        };
        error!(copy = %id, %why, "a copy failed and refuses everything from now on");
        let why = shorten(&why);
        *held = Held::Failed(why.clone());
        Err(Refusal::Failed(why))
    }

    /// Makes durable what the group wrote, and answers.
    fn finish(&mut self, group: &mut Vec<Written>) {
        let touched: BTreeSet<JournalId> = group.iter().map(|written| written.id).collect();
        let synced: BTreeMap<JournalId, Result<Position, Refusal>> = touched
            .into_iter()
            .map(|id| (id, self.with(id, |segments| segments.sync().map(|()| segments.synced()))))
            .collect();
        let mut trims = Vec::new();
        for Written { id, trim, reply } in group.drain(..) {
            let answer = synced.get(&id).cloned().unwrap_or(Err(Refusal::Invalid));
            let _ = reply.send(answer);
            trims.push((id, trim));
        }
        for (id, trim) in trims {
            // Its failure shows with the next batch.
            let _ = self.with(id, |segments| {
                segments.prepare();
                segments.trim(trim)
            });
        }
    }

    fn fence(&mut self, id: JournalId, epoch: u64) -> Result<Option<Fenced>, Refusal> {
        self.check()?;
        if id.cluster != self.cluster {
            return Err(Refusal::Invalid);
        }
        let before = self.fences.get(&id.node.0).copied();
        if let Some(Fence { epoch: passed, .. }) = before.filter(|fence| fence.epoch > epoch) {
            return Err(Refusal::Superseded { epoch: passed });
        }
        let incarnation = before.map_or(0, |fence| fence.incarnation).max(id.incarnation.0);
        let fence = Fence { node: id.node.0, incarnation, epoch };
        if before != Some(fence) && keeps(Rule::FencedBeforeRead) {
            self.fences.insert(fence.node, fence);
            let fences: Vec<Fence> = self.fences.values().copied().collect();
            if let Err(why) = replace(&*self.disk, &self.root, FENCES, &seal_fences(self.cluster, &fences)) {
                error!(copy = %id, %why, "a fence could not be written; the copies take nothing more");
                self.failed = Some(shorten(&why));
                self.check()?;
            }
            info!(copy = %id, epoch, "fenced");
        }
        if !self.copies.contains_key(&id) {
            return Ok(None);
        }
        self.with(id, |segments| {
            // Nothing that a refused batch had left in memory may be read before it is durable.
            segments.sync()?;
            let (kept_from, last) = (segments.trimmed().next(), segments.written());
            Ok(Some(Fenced { kept_from, last, reader: segments.reader() }))
        })
    }

    fn trim(&mut self, id: JournalId, upto: Position) -> Result<(), Refusal> {
        self.with(id, |segments| segments.trim(upto))
    }

    fn remove(&mut self, id: JournalId) -> Result<(), Refusal> {
        if self.copies.contains_key(&id) {
            remove_whole(&*self.disk, &self.root, &id.dir_name()).map_err(|why| Refusal::Failed(shorten(&why)))?;
            self.copies.remove(&id);
        }
        Ok(())
    }

    fn list(&self) -> Vec<CopyStatus> {
        let status = |(&id, held): (&JournalId, &Held)| {
            let fenced = self.fence_of(id).map(|fence| fence.epoch);
            let empty = CopyStatus { id, kept_from: Position::NONE, last: Position::NONE, bytes: 0, fenced, failed: None };
            match held {
                Held::Open(segments) => CopyStatus {
                    kept_from: segments.trimmed().next(),
                    last: segments.synced(),
                    bytes: segments.kept_bytes(),
                    ..empty
                },
                Held::Failed(why) => CopyStatus { failed: Some(why.clone()), ..empty },
            }
        };
        self.copies.iter().map(status).collect()
    }
}

/// An accepted batch that is not durable yet.
struct Written {
    id: JournalId,
    trim: Position,
    reply: Reply<Position>,
}

/// Whether `known`, which the copy has by position, is what it has. Trimmed records were needed by
/// nobody and are not compared.
fn compare(segments: &Segments, known: &[Record]) -> Result<(), Refusal> {
    let skip = known.partition_point(|record| record.position <= segments.trimmed());
    let mut known = &known[skip..];
    while let Some(first) = known.first() {
        let here = segments.reader().read(first.position, COMPARE_BYTES);
        let here = here.map_err(|why| Refusal::Failed(shorten(&why)))?;
        if here.is_empty() {
            return Err(Refusal::Gap { has: first.position.before() });
        }
        if let Some((sent, _)) = known.iter().zip(&here).find(|(sent, here)| sent != here) {
            return Err(Refusal::Diverged { position: sent.position });
        }
        known = &known[here.len().min(known.len())..];
    }
    Ok(())
}

fn read_fences(disk: &dyn Disk, root: &Path, cluster: [u8; 16]) -> Result<Vec<Fence>, JournalError> {
    let path = root.join(FENCES);
    let failed = |source| JournalError::io("read", &path, source);
    let file = disk.open(&path).map_err(failed)?;
    let mut bytes = vec![0; FENCES_BYTES_MAX];
    let count = file.read_at(&mut bytes, 0).map_err(failed)?;
    match codec::unseal::<([u8; 16], Vec<Fence>)>(FENCES_VERSION, &bytes[..count], FENCES_BYTES_MAX) {
        Ok((of, fences)) if of == cluster => Ok(fences),
        Ok(_) => Err(JournalError::damaged(&path, 0, "of another cluster")),
        Err(_) => Err(JournalError::damaged(&path, 0, "does not check")),
    }
}

/// An error as it may travel.
fn shorten(why: &impl ToString) -> String {
    why.to_string().chars().take(500).collect()
}
