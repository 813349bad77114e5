//! One file on several servers while commands and puts fail.
//!
//! A command that ends without an answer happened or did not. So after a failure the file is looked
//! at in calm weather, and each byte must be what it was or what it was to become; from then on it
//! must stay what it was seen to be, however many retries are still under way.

use bytes::Bytes;
use ctfs_types::Ino;
use futures_util::future::join_all;
use proptest::{collection::vec, prelude::*};

use super::{
    check::{read_all, same_bytes, told},
    run::{data, servers},
    steps::{CELL, History, SERVERS, Setup, len, offset},
};
use crate::{
    Caller, FsError, HandleId, SetAttrRequest,
    vfs::tests::memory::{Cluster, Server, Weather},
};

#[derive(Debug, Clone, Copy)]
pub enum Deed {
    Write { offset: u64, len: u64, seed: u8 },
    Append { len: u64, seed: u8 },
    Truncate { size: u64 },
    Punch { offset: u64, len: u64 },
    ZeroRange { offset: u64, len: u64 },
    /// Within the file: what was read there is written here.
    Copy { from: u64, to: u64, len: u64 },
    Sync,
    /// Closes all handles of the server and opens them again.
    Reopen,
    Chmod,
    Read,
    Background,
    Evict,
    /// All servers at once, each in a lane of its own.
    Race { base: u64, lane: u64, seed: u8 },
}

#[derive(Debug, Clone, Copy)]
pub struct Step {
    at: usize,
    deed: Deed,
    /// While commands and puts fail.
    storm: bool,
    /// Who looks at the file afterwards, if anybody must.
    look: usize,
    looks: bool,
}

pub fn history(most: usize) -> impl Strategy<Value = History<Step>> {
    let deed = prop_oneof![
        8 => (offset(), len(), 1..255u8).prop_map(|(offset, len, seed)| Deed::Write { offset, len, seed }),
        3 => (1..3000u64, 1..255u8).prop_map(|(len, seed)| Deed::Append { len, seed }),
        2 => offset().prop_map(|size| Deed::Truncate { size }),
        3 => (offset(), len()).prop_map(|(offset, len)| Deed::Punch { offset, len }),
        1 => (offset(), len()).prop_map(|(offset, len)| Deed::ZeroRange { offset, len }),
        1 => (0..3u64, 0..3u64, len()).prop_map(|(a, b, len)| Deed::Copy { from: a * CELL, to: b * CELL, len }),
        3 => Just(Deed::Sync),
        1 => Just(Deed::Reopen),
        1 => Just(Deed::Chmod),
        2 => Just(Deed::Read),
        3 => Just(Deed::Background),
        1 => Just(Deed::Evict),
        4 => (offset(), 1..3000u64, 1..250u8).prop_map(|(base, lane, seed)| Deed::Race { base, lane, seed }),
    ];
    let step = (0..SERVERS, deed, any::<bool>(), 0..SERVERS, prop::bool::weighted(0.2))
        .prop_map(|(at, deed, storm, look, looks)| Step { at, deed, storm, look, looks });
    vec(step, 1..most).prop_map(History)
}

struct Handles {
    plain: HandleId,
    append: HandleId,
}

struct Run {
    servers: Vec<Server>,
    handles: Vec<Handles>,
    ino: Ino,
    bytes: Vec<u8>,
}

/// How a deed ended: with these bytes, or with these or any of the old ones.
enum End {
    Done(Vec<u8>),
    Failed { after: Vec<u8>, error: FsError },
}

pub async fn run(setup: Setup, history: &[Step]) -> Result<(), TestCaseError> {
    let (servers, cluster, _dir) = servers(setup).await;
    let made = servers[0].vfs.mknod(Caller::ROOT, Ino::ROOT, b"f", 0o644 | libc::S_IFREG, 0, 0).await.unwrap();
    let mut run = Run { servers, handles: Vec::new(), ino: made.ino, bytes: Vec::new() };
    let calm = Weather { pauses: setup.pauses, ..Weather::default() };
    for at in 0..SERVERS {
        let handles = run.open(at).await.map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
        run.handles.push(handles);
    }
    for (n, step) in history.iter().enumerate() {
        let weather = if step.storm { Weather { lost: 80, failed_puts: 40, ..calm } } else { calm };
        cluster.set_weather(weather);
        run.step(&cluster, calm, step).await.map_err(|error| told(error, &format!("step {n}, {step:?}")))?;
    }
    cluster.set_weather(calm);
    for at in 0..SERVERS {
        // What earlier failures left to be told is told here.
        let _ = run.servers[at].vfs.fsync(run.ino, run.handles[at].plain).await;
        run.servers[at].vfs.content().work_in_background().await;
    }
    for at in 0..SERVERS {
        run.look(at).await.map_err(|error| told(error, &format!("at the end, server {at}")))?;
    }
    Ok(())
}

fn over(bytes: &[u8], offset: u64, data: &[u8]) -> Vec<u8> {
    let mut all = bytes.to_vec();
    let end = offset as usize + data.len();
    if all.len() < end {
        all.resize(end, 0);
    }
    all[offset as usize..end].copy_from_slice(data);
    all
}

fn zeroed(bytes: &[u8], offset: u64, len: u64) -> Vec<u8> {
    let mut all = bytes.to_vec();
    let range = all.len().min(offset as usize)..all.len().min((offset + len) as usize);
    all[range].fill(0);
    all
}

/// Each byte is the one from before or the one from after, and what is in only one of them may lack.
fn is_between(seen: &[u8], before: &[u8], after: &[u8]) -> Result<(), TestCaseError> {
    let (least, most) = (before.len().min(after.len()), before.len().max(after.len()));
    prop_assert!((least..=most).contains(&seen.len()), "{} bytes, before {}, after {}", seen.len(), before.len(), after.len());
    for (n, byte) in seen.iter().enumerate() {
        let possible = [before.get(n).copied().unwrap_or(0), after.get(n).copied().unwrap_or(0)];
        prop_assert!(possible.contains(byte), "byte {n} is {byte}, not one of {possible:?}");
    }
    Ok(())
}

impl Run {
    async fn open(&self, at: usize) -> Result<Handles, FsError> {
        let vfs = &self.servers[at].vfs;
        let plain = vfs.open(Caller::ROOT, self.ino, libc::O_RDWR).await?.handle;
        let append = vfs.open(Caller::ROOT, self.ino, libc::O_WRONLY | libc::O_APPEND).await?.handle;
        Ok(Handles { plain, append })
    }

    async fn look(&mut self, at: usize) -> Result<(), TestCaseError> {
        let seen = read_all(&self.servers[at].vfs, self.ino).await?;
        same_bytes(&seen, &self.bytes, 0)?;
        let size = self.servers[at].vfs.getattr(self.ino).await.map(|attr| attr.size);
        prop_assert_eq!(size, Ok(self.bytes.len() as u64));
        Ok(())
    }

    async fn step(&mut self, cluster: &Cluster, calm: Weather, step: &Step) -> Result<(), TestCaseError> {
        let end = self.run(step).await?;
        cluster.set_weather(calm);
        match end {
            End::Done(bytes) => {
                self.bytes = bytes;
                if step.looks {
                    self.look(step.look).await?;
                }
            }
            End::Failed { after, error } => {
                // What sync and close tell may be of an earlier failure.
                let may_tell = matches!(step.deed, Deed::Sync | Deed::Reopen);
                prop_assert!(step.storm || may_tell, "in calm weather: {:?}", error);
                let seen = read_all(&self.servers[step.look].vfs, self.ino).await?;
                is_between(&seen, &self.bytes, &after).map_err(|why| told(why, &format!("after {error:?}")))?;
                self.bytes = seen;
            }
        }
        Ok(())
    }

    async fn run(&mut self, step: &Step) -> Result<End, TestCaseError> {
        let (vfs, ino) = (self.servers[step.at].vfs.clone(), self.ino);
        let handles = &self.handles[step.at];
        let before = self.bytes.clone();
        let unchanged = before.clone();
        let (after, done) = match step.deed {
            Deed::Write { offset, len, seed } => {
                return Ok(self.write(step.at, handles.plain, offset, data(seed, len)).await);
            }
            Deed::Append { len, seed } => {
                let end = before.len() as u64;
                return Ok(self.write(step.at, handles.append, end, data(seed, len)).await);
            }
            Deed::Truncate { size } => {
                let mut after = before;
                after.resize(size as usize, 0);
                let request = SetAttrRequest { size: Some(size), ..SetAttrRequest::default() };
                (after, vfs.setattr(Caller::ROOT, ino, request).await.map(drop))
            }
            Deed::Punch { offset, len } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                (zeroed(&before, offset, len), vfs.fallocate(ino, handles.plain, offset, len, mode).await)
            }
            Deed::ZeroRange { offset, len } => {
                let mut after = zeroed(&before, offset, len);
                after.resize(after.len().max((offset + len) as usize), 0);
                (after, vfs.fallocate(ino, handles.plain, offset, len, libc::FALLOC_FL_ZERO_RANGE).await)
            }
            Deed::Copy { from, to, len } => {
                let range = before.len().min(from as usize)..before.len().min((from + len) as usize);
                let part = before[range].to_vec();
                let overlap = from < to + part.len() as u64 && to < from + part.len() as u64;
                if part.is_empty() || overlap {
                    return Ok(End::Done(before));
                }
                let copied = vfs.copy_file_range((ino, handles.plain, from), (ino, handles.plain, to), part.len() as u64).await;
                match copied {
                    Ok(copied) if copied < part.len() as u64 => {
                        self.bytes = over(&before, to, &part[..copied as usize]);
                        (over(&before, to, &part), Err(FsError::Invalid("a short copy")))
                    }
                    done => (over(&before, to, &part), done.map(drop)),
                }
            }
            Deed::Sync => (unchanged, vfs.fsync(ino, handles.plain).await),
            Deed::Reopen => {
                let mut told = Ok(());
                for handle in [handles.plain, handles.append] {
                    told = told.and(vfs.flush(ino, handle, 1).await);
                    vfs.release(handle).await;
                }
                self.handles[step.at] = loop {
                    if let Ok(handles) = self.open(step.at).await {
                        break handles;
                    }
                };
                (unchanged, told)
            }
            Deed::Chmod => {
                let request = SetAttrRequest { mode: Some(0o600), ..SetAttrRequest::default() };
                (unchanged, vfs.setattr(Caller::ROOT, ino, request).await.map(drop))
            }
            Deed::Read => match vfs.read_file(ino, handles.plain, 0, 4 << 20).await {
                Ok(seen) => {
                    same_bytes(&seen, &before, 0)?;
                    (unchanged, Ok(()))
                }
                Err(error) => (unchanged, Err(error)),
            },
            Deed::Background => {
                vfs.content().work_in_background().await;
                (unchanged, Ok(()))
            }
            Deed::Evict => {
                vfs.content().evict_all();
                (unchanged, Ok(()))
            }
            Deed::Race { base, lane, seed } => return self.race(step, base, lane, seed).await,
        };
        Ok(match done {
            Ok(()) => End::Done(after),
            Err(error) => End::Failed { after, error },
        })
    }

    async fn write(&self, at: usize, handle: HandleId, offset: u64, data: Vec<u8>) -> End {
        let after = over(&self.bytes, offset, &data);
        let len = data.len();
        match self.servers[at].vfs.write(Caller::ROOT, self.ino, handle, offset, data.clone().into(), false, false).await {
            Ok(written) if written as usize == len => End::Done(after),
            // The rest failed; it was never answered, so nobody counts on it either way.
            Ok(_) => End::Failed { after, error: FsError::Invalid("a short write") },
            Err(error) => End::Failed { after, error },
        }
    }

    /// Bytes of a write that was answered must be there; those of one that failed may.
    async fn race(&mut self, step: &Step, base: u64, lane: u64, seed: u8) -> Result<End, TestCaseError> {
        let racers = (0..SERVERS).map(|at| {
            let bytes = data(seed + at as u8, lane);
            let (vfs, ino, handle) = (self.servers[at].vfs.clone(), self.ino, self.handles[at].plain);
            async move {
                let offset = base + at as u64 * lane;
                let written = vfs.write(Caller::ROOT, ino, handle, offset, Bytes::from(bytes.clone()), false, false).await;
                (offset, bytes, written)
            }
        });
        let mut failed = None;
        let mut after = self.bytes.clone();
        for (offset, bytes, written) in join_all(racers).await {
            after = over(&after, offset, &bytes);
            match written {
                Ok(written) => {
                    // From here on it must be there.
                    self.bytes = over(&self.bytes, offset, &bytes[..written as usize]);
                }
                Err(error) => failed = Some(error),
            }
        }
        let Some(error) = failed else { return Ok(End::Done(after)) };
        prop_assert!(step.storm, "in calm weather: {:?}", error);
        Ok(End::Failed { after, error })
    }
}
