//! The files of a store: segments, their index files, open handles, and start-up.
//!
//! ```text
//! DIR/lock                      held while a program has the store open
//! DIR/segments/00000001.seg     frames, see frame.rs
//! DIR/segments/00000001.idx     sealed record of [`IndexFile`], once the segment is full
//! ```

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fs::{self, File, OpenOptions},
    hash::{BuildHasher, Hasher, RandomState},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use ctfs_types::{ChunkId, codec};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{
    StoreError,
    frame::{self, BadSegment, Entry, SEGMENT_HEADER_BYTES, Scan},
    state::State,
};

/// What the store asks of its disk: the real one, or one in a test that fails or hangs.
pub trait Disk: Send + Sync + 'static {
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Fills `bytes`; what does not reach so far is an [`io::ErrorKind::UnexpectedEof`].
    fn read(&self, file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        file.read_exact_at(bytes, offset)
    }
    /// Makes the file's bytes and length durable.
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Bytes an unprivileged program may still write to the file system of `dir`.
    fn free(&self, dir: &Path) -> io::Result<u64>;
}

pub struct RealDisk;

impl Disk for RealDisk {
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
        file.write_at(bytes, offset)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn free(&self, dir: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

const INDEX_VERSION: u8 = 1;
/// An index file is read whole; a segment of nothing but tombstones needs the most.
const INDEX_BYTES_MAX: usize = 64 << 20;

/// What a sealed segment holds, so that start-up need not read the segment.
#[derive(Debug, Serialize, Deserialize)]
struct IndexFile {
    segment: u32,
    salt: u64,
    /// Length of the segment file; another length means another file.
    bytes: u64,
    entries: Vec<Entry>,
}

/// Open segment files kept at hand; a store of 1 TiB has 16,000 segments, a process 1024 handles
/// by default.
const HANDLES_MAX: usize = 256;

/// The directory of segments.
pub struct Files {
    dir: PathBuf,
    open: Mutex<Handles>,
    _lock: File,
}

/// Open segments. A handle in use stays valid through its `Arc` when it is pushed out here.
#[derive(Default)]
struct Handles {
    files: HashMap<u32, Arc<File>>,
    /// The one opened longest ago first.
    order: VecDeque<u32>,
}

impl Files {
    pub fn lock(dir: &Path) -> Result<Self, StoreError> {
        let segments = dir.join("segments");
        fs::create_dir_all(&segments).map_err(|e| StoreError::io("create store directory", &e))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join("lock"))
            .map_err(|e| StoreError::io("open store lock", &e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(StoreError::Locked),
            Err(fs::TryLockError::Error(e)) => return Err(StoreError::io("lock store", &e)),
        }
        sync_dir(dir).map_err(|e| StoreError::io("sync store directory", &e))?;
        Ok(Self { dir: segments, open: Mutex::default(), _lock: lock })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn segment_path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{number:08}.seg"))
    }

    pub fn index_path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{number:08}.idx"))
    }

    pub fn sync_dir(&self) -> io::Result<()> {
        sync_dir(&self.dir)
    }

    /// A handle for reading; stays good after the file is removed.
    pub fn handle(&self, number: u32) -> io::Result<Arc<File>> {
        if let Some(file) = self.open.lock().files.get(&number) {
            return Ok(file.clone());
        }
        let file = Arc::new(File::open(self.segment_path(number))?);
        let mut open = self.open.lock();
        if open.files.insert(number, file.clone()).is_none() {
            open.order.push_back(number);
        }
        if open.order.len() > HANDLES_MAX
            && let Some(oldest) = open.order.pop_front()
        {
            open.files.remove(&oldest);
        }
        Ok(file)
    }

    /// Asks the kernel to forget a segment's pages, so that the next read sees the disk.
    pub fn drop_cached(&self, number: u32) {
        if let Ok(file) = self.handle(number) {
            let _ = rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed); // only advice
        }
    }

    /// Makes an empty segment, durable with its name.
    pub fn create(&self, disk: &dyn Disk, number: u32) -> io::Result<(File, u64)> {
        let salt = RandomState::new().build_hasher().finish();
        let path = self.segment_path(number);
        let file = OpenOptions::new().create_new(true).read(true).write(true).open(&path)?;
        let made = write_all(disk, &file, &frame::segment_header(number, salt), 0)
            .and_then(|()| disk.sync(&file))
            .and_then(|()| self.sync_dir());
        if let Err(error) = made {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok((file, salt))
    }

    /// Removes a segment for good: durable when it returns.
    pub fn remove(&self, number: u32) -> io::Result<()> {
        fs::remove_file(self.segment_path(number))?;
        remove_if_there(&self.index_path(number))?;
        {
            let mut open = self.open.lock();
            open.files.remove(&number);
            open.order.retain(|&other| other != number);
        }
        self.sync_dir()
    }

    /// Writes the index file of a sealed segment, whole or not at all.
    pub fn write_index(&self, number: u32, salt: u64, bytes: u64, entries: &[Entry]) -> io::Result<()> {
        let index = IndexFile { segment: number, salt, bytes, entries: entries.to_vec() };
        let temp = self.dir.join(format!("{number:08}.tmp"));
        let file = File::create(&temp)?;
        file.write_all_at(&codec::seal(INDEX_VERSION, &index), 0)?;
        file.sync_all()?;
        fs::rename(&temp, self.index_path(number))?;
        self.sync_dir()
    }

    /// The index file of a segment, or `None` when it is missing, damaged, or of another file.
    fn read_index(&self, number: u32, bytes: u64) -> Option<IndexFile> {
        let path = self.index_path(number);
        if fs::metadata(&path).ok()?.len() > INDEX_BYTES_MAX as u64 {
            return None;
        }
        let index: IndexFile = codec::unseal(INDEX_VERSION, &fs::read(path).ok()?, INDEX_BYTES_MAX).ok()?;
        let fits = |entry: &Entry| u64::from(entry.offset) + entry.frame_len() <= bytes;
        (index.segment == number && index.bytes == bytes && index.entries.iter().all(fits)).then_some(index)
    }

    /// What a segment of `bytes` bytes holds, from its index file or by reading it.
    pub fn entries(&self, number: u32, salt: u64, bytes: u64) -> io::Result<Vec<Entry>> {
        if let Some(index) = self.read_index(number, bytes).filter(|index| index.salt == salt) {
            return Ok(index.entries);
        }
        let (content, unreadable) = read_segment(&*self.handle(number)?, bytes)?;
        if unreadable {
            return Err(io::Error::other(format!("segment {number} is not readable throughout")));
        }
        Ok(frame::scan(&content, salt).entries)
    }
}

/// What start-up found out beyond the state itself.
#[derive(Debug, Default)]
pub struct Opened {
    pub state: State,
    /// The segment to append to next, if the last one has room: its number and entries.
    pub active: Option<(u32, Vec<Entry>)>,
    pub next_number: u32,
    pub damages: u64,
    /// Chunks known to have lost their copy here.
    pub damaged: Vec<ChunkId>,
    pub torn_bytes: u64,
}

/// Reads every segment's index and scans what has none, oldest first.
pub fn open(files: &Files, disk: &dyn Disk, segment_bytes: u64) -> Result<Opened, StoreError> {
    let fail = |what: &str, e: io::Error| StoreError::io(what, &e);
    let numbers = list(files).map_err(|e| fail("list segments", e))?;
    let mut opened = Opened { next_number: numbers.last().map_or(1, |last| last + 1), ..Opened::default() };
    for &number in &numbers {
        let last = Some(&number) == numbers.last();
        open_segment(files, disk, number, last.then_some(segment_bytes), &mut opened)?;
    }
    files.sync_dir().map_err(|e| fail("sync store directory", e))?;
    let held = |id: &ChunkId| opened.state.index.contains_key(id);
    let lost: Vec<_> = opened.damaged.iter().copied().filter(|id| !held(id)).collect();
    opened.damaged = lost;
    Ok(opened)
}

/// `last` carries the size at which a segment is full, for the one segment that may be unfinished.
fn open_segment(
    files: &Files,
    disk: &dyn Disk,
    number: u32,
    last: Option<u64>,
    opened: &mut Opened,
) -> Result<(), StoreError> {
    let fail = |what: &str, e: io::Error| StoreError::io(what, &e);
    let path = files.segment_path(number);
    let file = OpenOptions::new().read(true).write(last.is_some()).open(&path).map_err(|e| fail("open segment", e))?;
    let bytes = file.metadata().map_err(|e| fail("look at segment", e))?.len();

    let mut header = [0; SEGMENT_HEADER_BYTES];
    let header = match file.read_exact_at(&mut header, 0) {
        Ok(()) => frame::parse_segment_header(&header, number),
        Err(_) => Err(BadSegment::Damaged),
    };
    if let Err(BadSegment::Version(version)) = header {
        return Err(StoreError::Version { segment: number, version });
    }
    let index = files.read_index(number, bytes);
    // The salt is in two places, so that one bad sector does not cost the whole segment.
    let salt = match (header, &index) {
        (Ok(salt), _) => salt,
        (Err(_), Some(index)) => index.salt,
        (Err(_), None) if bytes <= SEGMENT_HEADER_BYTES as u64 => {
            // The crash came while the segment was made; nothing in it was ever acknowledged.
            fs::remove_file(&path).map_err(|e| fail("remove unfinished segment", e))?;
            return Ok(());
        }
        (Err(_), None) => {
            warn!(segment = number, bytes, "segment has no readable header and no index: left aside");
            opened.damages += 1;
            return Ok(());
        }
    };
    if let Some(index) = index.filter(|index| index.salt == salt) {
        take(&mut opened.state, number, salt, bytes, &index.entries);
        opened.state.segment_mut(number).sealed = true;
        return Ok(());
    }

    let (content, unreadable) = read_segment(&file, bytes).map_err(|e| fail("read segment", e))?;
    let Scan { entries, end, damaged, damages, tail_damages } = frame::scan(&content, salt);
    // What was found may have been written and not yet synced when the program ended.
    disk.sync(&file).map_err(|e| fail("sync segment", e))?;
    let mut bytes = bytes;
    let torn = bytes - end as u64;
    match last {
        Some(segment_bytes) if !unreadable && end as u64 >= SEGMENT_HEADER_BYTES as u64 => {
            if torn > 0 {
                info!(segment = number, bytes = torn, "cut the unfinished tail of the last segment");
                file.set_len(end as u64).and_then(|()| disk.sync(&file)).map_err(|e| fail("cut segment", e))?;
                opened.torn_bytes = torn;
                bytes = end as u64;
            }
            if damages > 0 {
                warn!(segment = number, damages, "segment is damaged");
                opened.damages += damages;
            }
            take(&mut opened.state, number, salt, bytes, &entries);
            if bytes < segment_bytes {
                opened.active = Some((number, entries));
            } else {
                seal(files, number, salt, bytes, &entries, &mut opened.state)?;
            }
        }
        _ => {
            let damages = damages + tail_damages;
            if damages > 0 || unreadable {
                warn!(segment = number, damages, unreadable, "segment is damaged");
                opened.damages += damages.max(1);
            }
            take(&mut opened.state, number, salt, bytes, &entries);
            opened.state.segment_mut(number).sealed = true;
            if !unreadable {
                seal(files, number, salt, bytes, &entries, &mut opened.state)?;
            }
        }
    }
    opened.damaged.extend(damaged);
    Ok(())
}

fn seal(
    files: &Files,
    number: u32,
    salt: u64,
    bytes: u64,
    entries: &[Entry],
    state: &mut State,
) -> Result<(), StoreError> {
    state.segment_mut(number).sealed = true;
    files.write_index(number, salt, bytes, entries).or_else(|error| {
        // Only start-up is slower without it, and a full disk must not keep the store shut.
        warn!(segment = number, %error, "could not write the index of a segment");
        Ok(())
    })
}

fn take(state: &mut State, number: u32, salt: u64, bytes: u64, entries: &[Entry]) {
    let segment = state.segment_mut(number);
    segment.salt = salt;
    segment.bytes = bytes;
    for entry in entries {
        state.replay(number, entry);
    }
}

/// Numbers of all segments, ascending. Leftovers of a crash are removed on the way.
fn list(files: &Files) -> io::Result<BTreeSet<u32>> {
    let mut numbers = BTreeSet::new();
    let mut indexes = BTreeSet::new();
    for item in fs::read_dir(&files.dir)? {
        let name = item?.file_name();
        let Some((stem, extension)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
        let Ok(number) = stem.parse::<u32>() else { continue };
        match extension {
            "seg" => _ = numbers.insert(number),
            "idx" => _ = indexes.insert(number),
            "tmp" => remove_if_there(&files.dir.join(&name))?,
            _ => {}
        }
    }
    for orphan in indexes.difference(&numbers) {
        remove_if_there(&files.index_path(*orphan))?;
    }
    Ok(numbers)
}

/// The first `bytes` bytes of a segment, and whether some could not be read (they are zero then).
fn read_segment(file: &File, bytes: u64) -> io::Result<(Vec<u8>, bool)> {
    /// What one bad sector may hide at most.
    const PIECE: usize = 64 << 10;
    let mut content = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
    if file.read_exact_at(&mut content, 0).is_ok() {
        return Ok((content, false));
    }
    let mut unreadable = false;
    for (piece, at) in content.chunks_mut(PIECE).zip((0u64..).step_by(PIECE)) {
        if file.read_exact_at(piece, at).is_err() {
            unreadable = true;
            piece.fill(0);
        }
    }
    Ok((content, unreadable))
}

pub fn write_all(disk: &dyn Disk, file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match disk.write(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(len) => {
                bytes = &bytes[len..];
                offset += len as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
