//! Several servers on one file at once.
//!
//! Each has a lane of bytes of its own, so the outcome is known although the order is not; appended
//! records are unique, and each writer's must be there once, whole and in order.

use bytes::Bytes;
use futures_util::future::join_all;
use proptest::prelude::*;

use super::{
    check,
    reference::Node,
    run::{Open, Run, data},
    steps::Deed,
};
use crate::{Caller, FsError, SetAttrRequest};

/// Bytes of one appended record.
const RECORD: usize = 12;

/// One of those that race.
struct Racer {
    number: usize,
    open: Open,
    deed: Deed,
    /// Its lane.
    at: u64,
    len: u64,
    seed: u8,
}

impl Racer {
    fn appends(&self) -> bool {
        self.open.append && matches!(self.deed, Deed::Write { .. })
    }

    fn record(&self, n: u64) -> Vec<u8> {
        format!("<{}-{:02}-{:03}>\n\n\n", self.number, n, self.seed).into_bytes()[..RECORD].to_vec()
    }

    /// What the deed does to the file.
    fn apply(&self, node: &mut Node) {
        match self.deed {
            Deed::Write { .. } if self.open.append => node.write(node.size(), &[], Caller::ROOT),
            Deed::Write { .. } => node.write(self.at, &data(self.seed, self.len), Caller::ROOT),
            Deed::Punch | Deed::Zero => node.zero(self.at, self.len),
            Deed::KeepSize => node.mtime = None,
            Deed::Chmod => node.mode = 0o700,
            _ => {}
        }
    }
}

impl Run {
    pub async fn race(&mut self, slot: usize, base: u64, lane: u64, deeds: &[(usize, Deed)], seed: u8) -> Result<(), TestCaseError> {
        let Some(first) = self.open.get(&slot).copied() else { return Ok(()) };
        let size = self.reference.node(first.id).size();
        let racers: Vec<Racer> = deeds
            .iter()
            .enumerate()
            .filter_map(|(number, &(slot, deed))| {
                // Of the same file, else the first handle does it: mostly there is something to race.
                let open = self.open.get(&slot).filter(|open| open.id == first.id).copied().unwrap_or(first);
                let at = base + number as u64 * lane;
                let seed = seed.wrapping_add(number as u8).max(1);
                Some(Racer { number, open, deed, at, len: lane, seed })
            })
            .filter(|racer| racer.open.write || !matches!(racer.deed, Deed::Write { .. } | Deed::Punch | Deed::Zero))
            .collect();
        let appends = racers.iter().any(Racer::appends);
        let touches = |racer: &Racer| matches!(racer.deed, Deed::Write { .. } | Deed::Punch | Deed::Zero);
        let passes_end = |racer: &Racer| !racer.appends() && touches(racer) && racer.at + racer.len > size;
        let any_grows = racers.iter().any(passes_end);
        let racers: Vec<Racer> = racers
            .into_iter()
            // What is at the end must not depend on the order.
            .filter(|racer| !(appends && passes_end(racer)))
            .filter(|racer| !(matches!(racer.deed, Deed::KeepSize) && (appends || any_grows)))
            .collect();
        let before = self.reference.node(first.id).clone();
        let mut after = before.clone();
        racers.iter().for_each(|racer| racer.apply(&mut after));

        let results = join_all(racers.iter().map(|racer| self.run_racer(racer, &before, &after, appends))).await;
        for (racer, result) in racers.iter().zip(results) {
            let who = format!("{:?} on server {}, bytes {} to {}", racer.deed, racer.open.at, racer.at, racer.at + racer.len);
            result.map_err(|error| check::told(error, &who))?;
        }
        *self.reference.node_mut(first.id) = after;
        if appends {
            self.find_records(first, size, &racers).await?;
        }
        Ok(())
    }

    async fn run_racer(&self, racer: &Racer, before: &Node, after: &Node, appends: bool) -> Result<(), TestCaseError> {
        let vfs = self.vfs(racer.open.at);
        let Open { ino, handle, .. } = racer.open;
        let failed = |error: FsError| TestCaseError::fail(format!("{error:?}"));
        if matches!(racer.deed, Deed::Write { .. }) {
            self.kernel_drops_capability(racer.open).await?;
        }
        match racer.deed {
            Deed::Write { pieces } if racer.open.append => {
                for n in 0..pieces {
                    vfs.write(Caller::ROOT, ino, handle, 0, racer.record(n).into(), false, false).await.map_err(failed)?;
                }
            }
            Deed::Write { pieces } => {
                let bytes = Bytes::from(data(racer.seed, racer.len));
                let step = racer.len.div_ceil(pieces) as usize;
                for from in (0..bytes.len()).step_by(step) {
                    let piece = bytes.slice(from..bytes.len().min(from + step));
                    let at = racer.at + from as u64;
                    vfs.write(Caller::ROOT, ino, handle, at, piece.clone(), false, false).await.map_err(failed)?;
                    // Read your own writes, also from a server that does not know of them.
                    let other = self.open.values().filter(|open| open.id == racer.open.id).nth(racer.number);
                    if let Some(other) = other {
                        let got = self.vfs(other.at).read_file(ino, other.handle, at, piece.len() as u32).await.map_err(failed)?;
                        check::same_bytes(&got, &piece, at)
                            .map_err(|error| check::told(error, &format!("read back on server {}", other.at)))?;
                    }
                }
            }
            Deed::Punch => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                vfs.fallocate(ino, handle, racer.at, racer.len, mode).await.map_err(failed)?;
            }
            Deed::Zero => {
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                vfs.fallocate(ino, handle, racer.at, racer.len, mode).await.map_err(failed)?;
            }
            Deed::Read => {
                let got = vfs.read_file(ino, handle, 0, 4 << 20).await.map_err(failed)?;
                let (old, new) = (before.bytes(), after.bytes());
                let extra = if appends { usize::MAX } else { old.len().max(new.len()) };
                prop_assert!(got.len() >= old.len().min(new.len()) && got.len() <= extra, "{} bytes read", got.len());
                for (n, &byte) in got.iter().enumerate().take(old.len().max(new.len())) {
                    // A byte between the old end and a write may be zero before it is written.
                    let possible = [old.get(n).copied().unwrap_or(0), new.get(n).copied().unwrap_or(0)];
                    prop_assert!(possible.contains(&byte), "byte {n} is {byte}, not one of {possible:?}");
                }
            }
            Deed::Sync => vfs.fsync(ino, handle).await.map_err(failed)?,
            Deed::KeepSize => {
                let request = SetAttrRequest { size: Some(before.size()), ..SetAttrRequest::default() };
                vfs.setattr(Caller::ROOT, ino, request).await.map_err(failed)?;
            }
            Deed::Chmod => {
                let request = SetAttrRequest { mode: Some(0o700), ..SetAttrRequest::default() };
                vfs.setattr(Caller::ROOT, ino, request).await.map_err(failed)?;
            }
            Deed::Reopen => {
                let opened = vfs.open(Caller::ROOT, ino, libc::O_RDWR).await.map_err(failed)?;
                vfs.flush(ino, opened.handle, 77).await.map_err(failed)?;
                vfs.release(opened.handle).await;
            }
            Deed::Background => vfs.content().work_in_background().await,
            Deed::Evict => drop(vfs.content().evict_all()),
        }
        Ok(())
    }

    /// The order of the records is the file's to choose; the reference takes it over.
    async fn find_records(&mut self, open: Open, end: u64, racers: &[Racer]) -> Result<(), TestCaseError> {
        let bytes = check::read_all(self.vfs(open.at), open.ino).await?;
        let tail = bytes.get(end as usize..).unwrap_or_default();
        let found: Vec<&[u8]> = tail.chunks(RECORD).collect();
        let mut expected = 0;
        for racer in racers.iter().filter(|racer| racer.appends()) {
            let Deed::Write { pieces } = racer.deed else { continue };
            let own: Vec<Vec<u8>> = (0..pieces).map(|n| racer.record(n)).collect();
            let prefix = format!("<{}-", racer.number);
            let got: Vec<Vec<u8>> =
                found.iter().filter(|record| record.starts_with(prefix.as_bytes())).map(|record| record.to_vec()).collect();
            let text = |records: &[Vec<u8>]| records.iter().map(|r| String::from_utf8_lossy(r).into_owned()).collect::<Vec<_>>();
            prop_assert_eq!(text(&got), text(&own), "records of racer {}", racer.number);
            expected += own.len();
        }
        prop_assert_eq!(found.len(), expected, "records in all");
        let tail = tail.to_vec();
        self.reference.node_mut(open.id).write(end, &tail, Caller::ROOT);
        Ok(())
    }
}
