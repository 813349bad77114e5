//! The state at one log index, as one file.
//!
//! ```text
//! file:   "CTFSSNAP"  version u32  block...
//! block:  kind u8  length u32  CRC-32C (of kind, length and payload) u32  payload
//! ```
//!
//! The first block is the header, the last one the trailer, those between hold records in key
//! order. The trailer counts the records, repeats the state hash and has the BLAKE3 of every byte
//! before it; nothing follows it. A file is verified from end to end before the first of its
//! records is believed.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use ctfs_types::{
    LogIndex,
    codec::{self, CodecError},
};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{durable, raft_types::RaftSnapshotMeta, sled_store::Record};

const MAGIC: [u8; 8] = *b"CTFSSNAP";
/// 2: records of the state of that version.
const VERSION: u32 = 2;
const RECORD_VERSION: u8 = 1;
const BLOCK_HEADER_BYTES: usize = 9;
/// Largest block; the writer makes them of about [`SLICE_BYTES`] plus one record.
const BLOCK_BYTES_MAX: usize = 32 << 20;
/// Records and bytes read from the store at a time, while writes wait.
pub(crate) const SLICE_RECORDS: usize = 1000;
pub(crate) const SLICE_BYTES: usize = 1 << 20;

const HEADER: u8 = 1;
const RECORDS: u8 = 2;
const TRAILER: u8 = 3;

/// Why a snapshot file cannot be written or is not believed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("snapshot file: {0}")]
    Io(#[from] io::Error),
    #[error("snapshot file is damaged: {0}")]
    Damaged(String),
    #[error("snapshot file has version {found}, this program reads version {VERSION}")]
    Version { found: u32 },
}

impl From<CodecError> for SnapshotError {
    fn from(error: CodecError) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// What the file begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub meta: RaftSnapshotMeta,
    /// [`ctfs_meta::Namespace::applied`] of the state inside.
    pub applied: LogIndex,
    /// [`ctfs_meta::Namespace::state_hash`] of the state inside.
    pub state_hash: [u8; 16],
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Trailer {
    records: u64,
    state_hash: [u8; 16],
    blake3: [u8; 32],
}

/// Writes one snapshot file.
pub(crate) struct Writer {
    file: io::BufWriter<File>,
    hash: blake3::Hasher,
    records: u64,
    state_hash: [u8; 16],
}

impl Writer {
    pub fn new(file: File, header: &Header) -> Result<Self, SnapshotError> {
        let mut writer = Self {
            file: io::BufWriter::with_capacity(1 << 20, file),
            hash: blake3::Hasher::new(),
            records: 0,
            state_hash: header.state_hash,
        };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        writer.block(HEADER, &codec::encode(RECORD_VERSION, header))?;
        Ok(writer)
    }

    pub fn records(&mut self, records: &Vec<Record>) -> Result<(), SnapshotError> {
        self.records += records.len() as u64;
        self.block(RECORDS, &codec::encode(RECORD_VERSION, records))
    }

    /// Ends the file and returns when it is durable. Its name is the caller's business.
    pub fn finish(mut self) -> Result<File, SnapshotError> {
        let blake3 = *self.hash.finalize().as_bytes();
        let trailer = Trailer { records: self.records, state_hash: self.state_hash, blake3 };
        self.block(TRAILER, &codec::encode(RECORD_VERSION, &trailer))?;
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok(file)
    }

    fn block(&mut self, kind: u8, payload: &[u8]) -> Result<(), SnapshotError> {
        if payload.len() > BLOCK_BYTES_MAX {
            return Err(SnapshotError::Damaged(format!("block of {} bytes is too long to write", payload.len())));
        }
        let mut header = [0; BLOCK_HEADER_BYTES];
        header[0] = kind;
        header[1..5].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        let sum = crc32c::crc32c_append(crc32c::crc32c(&header[..5]), payload);
        header[5..].copy_from_slice(&sum.to_le_bytes());
        self.put(&header)?;
        self.put(payload)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        self.hash.update(bytes);
        Ok(self.file.write_all(bytes)?)
    }
}

/// Reads the header alone: enough to know where a file stands, not that it is whole.
pub fn read_header(file: &File) -> Result<Header, SnapshotError> {
    let mut reader = Reader::new(file)?;
    match reader.block()? {
        (HEADER, payload) => Ok(codec::decode(RECORD_VERSION, &payload, BLOCK_BYTES_MAX)?),
        _ => Err(SnapshotError::Damaged("no header".into())),
    }
}

/// Checks the whole file: every checksum, the count, the hash, and that nothing follows.
pub fn verify(file: &File) -> Result<Header, SnapshotError> {
    read(file, |_| Ok(()))
}

/// Checks the whole file while handing out its records, of which none is to be believed before
/// this has returned `Ok`.
pub(crate) fn read<E: From<SnapshotError>>(file: &File, mut each: impl FnMut(Vec<Record>) -> Result<(), E>) -> Result<Header, E> {
    let damaged = |why: &str| E::from(SnapshotError::Damaged(why.into()));
    let mut reader = Reader::new(file)?;
    let (HEADER, payload) = reader.block()? else { return Err(damaged("no header")) };
    let header: Header = codec::decode(RECORD_VERSION, &payload, BLOCK_BYTES_MAX).map_err(SnapshotError::from)?;
    let mut count = 0;
    let mut last_key = None;
    let trailer: Trailer = loop {
        let hash_before = *reader.hash.finalize().as_bytes();
        let (kind, payload) = reader.block()?;
        match kind {
            RECORDS => {
                let records: Vec<Record> =
                    codec::decode(RECORD_VERSION, &payload, BLOCK_BYTES_MAX).map_err(SnapshotError::from)?;
                count += records.len() as u64;
                for (key, _) in &records {
                    if last_key.as_ref() >= Some(key) {
                        return Err(damaged("records are out of order"));
                    }
                    last_key = Some(key.clone());
                }
                each(records)?;
            }
            TRAILER => {
                let trailer: Trailer =
                    codec::decode(RECORD_VERSION, &payload, BLOCK_BYTES_MAX).map_err(SnapshotError::from)?;
                if trailer.blake3 != hash_before {
                    return Err(damaged("hash does not match"));
                }
                break trailer;
            }
            _ => return Err(damaged("unknown kind of block")),
        }
    };
    if trailer.records != count || trailer.state_hash != header.state_hash {
        return Err(damaged("header, records and trailer disagree"));
    }
    if reader.file.read(&mut [0]).map_err(SnapshotError::from)? != 0 {
        return Err(damaged("bytes follow the trailer"));
    }
    Ok(header)
}

struct Reader<'a> {
    file: BufReader<&'a File>,
    hash: blake3::Hasher,
}

impl<'a> Reader<'a> {
    fn new(mut file: &'a File) -> Result<Self, SnapshotError> {
        file.seek(SeekFrom::Start(0))?;
        let mut reader = Self { file: BufReader::with_capacity(1 << 20, file), hash: blake3::Hasher::new() };
        if reader.take(MAGIC.len())? != MAGIC {
            return Err(SnapshotError::Damaged("not a snapshot".into()));
        }
        let version = reader.take(4)?;
        let found = u32::from_le_bytes([version[0], version[1], version[2], version[3]]);
        if found != VERSION {
            return Err(SnapshotError::Version { found });
        }
        Ok(reader)
    }

    fn block(&mut self) -> Result<(u8, Vec<u8>), SnapshotError> {
        let header = self.take(BLOCK_HEADER_BYTES)?;
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if length > BLOCK_BYTES_MAX {
            return Err(SnapshotError::Damaged("block is too long".into()));
        }
        let payload = self.take(length)?;
        let sum = crc32c::crc32c_append(crc32c::crc32c(&header[..5]), &payload);
        if sum.to_le_bytes() != header[5..] {
            return Err(SnapshotError::Damaged("checksum of a block does not match".into()));
        }
        Ok((header[0], payload))
    }

    fn take(&mut self, bytes: usize) -> Result<Vec<u8>, SnapshotError> {
        let mut taken = vec![0; bytes];
        match self.file.read_exact(&mut taken) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(SnapshotError::Damaged("file ends early".into()));
            }
            other => other?,
        }
        self.hash.update(&taken);
        Ok(taken)
    }
}

/// The directory of snapshot files: the current one, and those being written or received.
#[derive(Debug)]
pub(crate) struct SnapshotDir {
    dir: PathBuf,
    fresh: AtomicU64,
}

impl SnapshotDir {
    /// Opens the directory and removes what was never finished.
    pub fn open(dir: &Path) -> Result<Self, SnapshotError> {
        durable::create_dir(dir)?;
        for file in fs::read_dir(dir)? {
            let path = file?.path();
            if path.extension().is_some_and(|extension| extension == "part") {
                fs::remove_file(&path)?;
            }
        }
        // The name of the current one may be younger than the last sync, and the log relies on it.
        durable::sync_dir(dir)?;
        Ok(Self { dir: dir.to_owned(), fresh: AtomicU64::new(0) })
    }

    fn current_path(&self) -> PathBuf {
        self.dir.join("current.snap")
    }

    /// The current snapshot, opened for reading.
    pub fn current(&self) -> Result<Option<File>, SnapshotError> {
        match File::open(self.current_path()) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts a damaged current snapshot out of the way, for people to look at.
    pub fn set_aside(&self) -> Result<(), SnapshotError> {
        let aside = self.dir.join("damaged.snap");
        warn!(path = %aside.display(), "setting a damaged snapshot aside");
        fs::rename(self.current_path(), &aside)?;
        Ok(durable::sync_dir(&self.dir)?)
    }

    /// A new file of this directory, to be written and then [`Self::adopt`]ed.
    pub fn create(&self) -> Result<(PathBuf, File), SnapshotError> {
        let path = self.dir.join(format!("{}.part", self.fresh.fetch_add(1, Ordering::Relaxed)));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
        Ok((path, file))
    }

    /// The name in this directory of an open file made by [`Self::create`], unless it is gone.
    pub fn path_of(&self, file: &File) -> Result<Option<PathBuf>, SnapshotError> {
        let wanted = file.metadata()?;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "part")
                && let Ok(found) = fs::metadata(&path)
                && (found.dev(), found.ino()) == (wanted.dev(), wanted.ino())
            {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Copies a file from elsewhere into a new one here.
    pub fn copy_in(&self, mut from: &File) -> Result<PathBuf, SnapshotError> {
        let (path, mut to) = self.create()?;
        from.seek(SeekFrom::Start(0))?;
        io::copy(&mut from, &mut to)?;
        to.sync_all()?;
        Ok(path)
    }

    /// Makes the durable file at `path` the current snapshot, durably.
    pub fn adopt(&self, path: &Path) -> Result<(), SnapshotError> {
        fs::rename(path, self.current_path())?;
        Ok(durable::sync_dir(&self.dir)?)
    }

    pub fn discard(&self, path: &Path) {
        if let Err(error) = fs::remove_file(path) {
            warn!(path = %path.display(), %error, "an unfinished snapshot stays until the next start");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(records: &[Vec<Record>]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = SnapshotDir::open(dir.path()).unwrap();
        let (path, file) = snapshots.create().unwrap();
        let header = Header { meta: RaftSnapshotMeta::default(), applied: LogIndex(3), state_hash: [7; 16] };
        let mut writer = Writer::new(file, &header).unwrap();
        for block in records {
            writer.records(block).unwrap();
        }
        writer.finish().unwrap();
        snapshots.adopt(&path).unwrap();
        let path = snapshots.current_path();
        (dir, path)
    }

    #[test]
    fn what_was_written_reads_back() {
        let records = vec![vec![(b"a".to_vec(), b"1".to_vec())], vec![(b"b".to_vec(), vec![]), (b"c".to_vec(), vec![9; 99])]];
        let (_dir, path) = write(&records);
        let mut read_back = Vec::new();
        let header = read(&File::open(path).unwrap(), |block| {
            read_back.push(block);
            Ok::<_, SnapshotError>(())
        })
        .unwrap();
        assert_eq!(read_back, records);
        assert_eq!((header.applied, header.state_hash), (LogIndex(3), [7; 16]));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let (_dir, path) = write(&[vec![(b"key".to_vec(), b"value".to_vec())]]);
        let good = fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &bad).unwrap();
            assert!(verify(&File::open(&path).unwrap()).is_err(), "bit {bit}");
        }
        for cut in 0..good.len() {
            fs::write(&path, &good[..cut]).unwrap();
            assert!(verify(&File::open(&path).unwrap()).is_err(), "cut at {cut}");
        }
        fs::write(&path, [&good[..], b"x"].concat()).unwrap();
        assert!(verify(&File::open(&path).unwrap()).is_err(), "a byte more");
        fs::write(&path, &good).unwrap();
        assert!(verify(&File::open(&path).unwrap()).is_ok());
    }

    #[test]
    fn a_block_left_out_is_refused() {
        let block = |byte: u8| vec![(vec![byte], vec![byte])];
        let (_dir, path) = write(&[block(1), block(2), block(3)]);
        let (_dir2, without) = write(&[block(1), block(3)]);
        let whole = fs::read(&path).unwrap();
        let lacking = fs::read(&without).unwrap();
        let mut forged = whole.clone();
        let one = whole.len() - lacking.len();
        let first_block = first_records_block(&whole);
        forged.drain(first_block..first_block + one);
        fs::write(&path, forged).unwrap();
        assert!(verify(&File::open(&path).unwrap()).is_err());
    }

    fn first_records_block(file: &[u8]) -> usize {
        let header = MAGIC.len() + 4;
        let length = u32::from_le_bytes(file[header + 1..header + 5].try_into().unwrap()) as usize;
        header + BLOCK_HEADER_BYTES + length
    }
}
