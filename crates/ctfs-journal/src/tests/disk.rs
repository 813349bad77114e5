//! A disk in memory that tells written from durable, and loses or tears the difference.

use std::{collections::BTreeMap, io, path::Path, sync::Arc};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{Disk, DiskFile};

/// What a disk writes as a whole.
const SECTOR: usize = 512;

type Number = usize;

#[derive(Clone)]
enum Node {
    File(Content),
    Dir(Names),
}

/// The bytes of a file: as programs see them, as they are for sure, and what was written between.
#[derive(Clone, Default)]
struct Content {
    seen: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
}

#[derive(Clone, Default)]
struct Names {
    seen: BTreeMap<String, Number>,
    durable: BTreeMap<String, Number>,
    unsynced: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Link(String, Number),
    Unlink(String),
    Rename(String, String),
}

impl Change {
    fn apply(&self, names: &mut BTreeMap<String, Number>) {
        match self {
            Self::Link(name, number) => drop(names.insert(name.clone(), *number)),
            Self::Unlink(name) => drop(names.remove(name)),
            Self::Rename(from, to) => {
                if let Some(number) = names.remove(from) {
                    names.insert(to.clone(), number);
                }
            }
        }
    }
}

struct State {
    nodes: Vec<Node>,
    /// Changes and syncs so far.
    steps: u64,
    /// After this many steps the power is gone: everything fails.
    power_until: u64,
    /// This step alone fails, with this error.
    fail: Option<(u64, i32)>,
    /// Files cannot be allocated.
    full: bool,
}

#[derive(Clone)]
pub(crate) struct CrashDisk(Arc<Mutex<State>>);

struct CrashFile {
    disk: CrashDisk,
    number: Number,
}

const TOP: Number = 0;

impl CrashDisk {
    pub fn new() -> Self {
        Self::of(vec![Node::Dir(Names::default())])
    }

    fn of(nodes: Vec<Node>) -> Self {
        let state = State { nodes, steps: 0, power_until: u64::MAX, fail: None, full: false };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Changes and syncs that were asked for so far.
    pub fn steps(&self) -> u64 {
        self.0.lock().steps
    }

    /// Lets `steps` more happen.
    pub fn cut_power_after(&self, steps: u64) {
        let mut state = self.0.lock();
        state.power_until = state.steps.saturating_add(steps);
    }

    /// Lets the `nth` step from now on fail, counted from 1, and no other.
    pub fn fail_nth(&self, nth: u64) {
        let mut state = self.0.lock();
        state.fail = Some((state.steps + nth, rustix::io::Errno::IO.raw_os_error()));
    }

    pub fn set_full(&self, full: bool) {
        self.0.lock().full = full;
    }

    /// The disk as it is found after the loss of power: unsynced sectors are there or not, some in
    /// part; of the unsynced changes to names those up to some one.
    pub fn after_crash(&self, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut nodes = self.0.lock().nodes.clone();
        for node in &mut nodes {
            match node {
                Node::File(content) => content.lose(&mut random),
                Node::Dir(names) => {
                    let kept = random.random_range(0..=names.unsynced.len());
                    for change in names.unsynced.drain(..).take(kept) {
                        change.apply(&mut names.durable);
                    }
                    names.seen = names.durable.clone();
                }
            }
        }
        Self::of(nodes)
    }

    /// The same disk, with everything that was written, for another program.
    pub fn after_kill(&self) -> Self {
        Self::of(self.0.lock().nodes.clone())
    }

    /// Changes a byte of a file behind everybody's back.
    pub fn rot(&self, path: &Path, offset: usize, with: u8) {
        let mut state = self.0.lock();
        let number = state.find(path).expect("the file is there");
        let Node::File(content) = &mut state.nodes[number] else { panic!("no file") };
        for bytes in [&mut content.seen, &mut content.durable] {
            if let Some(byte) = bytes.get_mut(offset) {
                *byte ^= with;
            }
        }
    }

    pub fn set(&self, path: &Path, bytes: Vec<u8>) {
        let file = self.create(path).unwrap();
        file.write_at(&bytes, 0).unwrap();
    }

    pub fn get(&self, path: &Path) -> Vec<u8> {
        let state = self.0.lock();
        match &state.nodes[state.find(path).expect("the file is there")] {
            Node::File(content) => content.seen.clone(),
            Node::Dir(_) => panic!("no file"),
        }
    }
}

impl Content {
    fn lose(&mut self, random: &mut StdRng) {
        let chance = [0.0, 0.1, 0.5, 0.9, 1.0][random.random_range(0..5)];
        for (offset, bytes) in std::mem::take(&mut self.unsynced) {
            let mut at = 0;
            while at < bytes.len() {
                let sector = (SECTOR - (offset + at) % SECTOR).min(bytes.len() - at);
                if random.random_bool(chance) {
                    let kept = if random.random_bool(0.1) { random.random_range(0..=sector) } else { sector };
                    put(&mut self.durable, offset + at, &bytes[at..at + kept]);
                }
                at += sector;
            }
        }
        self.seen = self.durable.clone();
    }
}

fn put(into: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if into.len() < offset + bytes.len() {
        into.resize(offset + bytes.len(), 0);
    }
    into[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn gone() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl State {
    fn find(&self, path: &Path) -> io::Result<Number> {
        let names = path.components().filter_map(|part| match part {
            std::path::Component::Normal(name) => name.to_str(),
            _ => None,
        });
        names.into_iter().try_fold(TOP, |dir, name| match &self.nodes[dir] {
            Node::Dir(names) => names.seen.get(name).copied().ok_or_else(gone),
            Node::File(_) => Err(gone()),
        })
    }

    fn dir(&mut self, path: &Path) -> io::Result<&mut Names> {
        let number = self.find(path)?;
        match &mut self.nodes[number] {
            Node::Dir(names) => Ok(names),
            Node::File(_) => Err(gone()),
        }
    }

    fn file(&mut self, number: Number) -> &mut Content {
        match &mut self.nodes[number] {
            Node::File(content) => content,
            Node::Dir(_) => panic!("a directory was opened as a file"),
        }
    }

    fn change(&mut self, dir: &Path, change: Change) -> io::Result<()> {
        let names = self.dir(dir)?;
        change.apply(&mut names.seen);
        names.unsynced.push(change);
        Ok(())
    }

    fn step(&mut self) -> io::Result<()> {
        self.steps += 1;
        match self.fail {
            Some((step, error)) if step == self.steps => Err(io::Error::from_raw_os_error(error)),
            _ if self.steps > self.power_until => Err(io::Error::other("the power is gone")),
            _ => Ok(()),
        }
    }
}

fn split(path: &Path) -> (&Path, String) {
    let name = path.file_name().and_then(|name| name.to_str()).expect("tests use names that are text");
    (path.parent().expect("it has a name"), name.to_owned())
}

impl Disk for CrashDisk {
    /// Durable at once, as the trait asks.
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.step()?;
        let mut path = std::path::PathBuf::new();
        for part in dir.components() {
            let parent = path.clone();
            path.push(part);
            if state.find(&path).is_err() {
                let number = state.nodes.len();
                state.nodes.push(Node::Dir(Names::default()));
                state.change(&parent, Change::Link(split(&path).1, number))?;
                let names = state.dir(&parent)?;
                for change in std::mem::take(&mut names.unsynced) {
                    change.apply(&mut names.durable);
                }
            }
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut state = self.0.lock();
        Ok(state.dir(dir).map(|names| names.seen.keys().cloned().collect()).unwrap_or_default())
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let number = self.0.lock().find(path)?;
        Ok(Arc::new(CrashFile { disk: self.clone(), number }))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.0.lock();
        state.step()?;
        let number = state.nodes.len();
        state.nodes.push(Node::File(Content::default()));
        let (dir, name) = split(path);
        state.change(dir, Change::Link(name, number))?;
        Ok(Arc::new(CrashFile { disk: self.clone(), number }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.step()?;
        state.find(from)?;
        let ((dir, from), (same, to)) = (split(from), split(to));
        assert_eq!(dir, same);
        state.change(dir, Change::Rename(from, to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.step()?;
        state.find(path)?;
        let (dir, name) = split(path);
        state.change(dir, Change::Unlink(name))
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.step()?;
        if state.find(dir).is_err() {
            return Ok(());
        }
        let names: Vec<String> = state.dir(dir)?.seen.keys().cloned().collect();
        for name in names {
            state.change(dir, Change::Unlink(name))?;
        }
        let (parent, name) = split(dir);
        state.change(parent, Change::Unlink(name))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.step()?;
        let names = state.dir(dir)?;
        for change in std::mem::take(&mut names.unsynced) {
            change.apply(&mut names.durable);
        }
        Ok(())
    }
}

impl DiskFile for CrashFile {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().file(self.number).seen.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.0.lock();
        let seen = &state.file(self.number).seen;
        let start = (offset as usize).min(seen.len());
        let count = buffer.len().min(seen.len() - start);
        buffer[..count].copy_from_slice(&seen[start..start + count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let allowed = state.step();
        // A write that fails has happened in part.
        let done = if allowed.is_ok() { bytes.len() } else { bytes.len() / 2 };
        let content = state.file(self.number);
        put(&mut content.seen, offset as usize, &bytes[..done]);
        content.unsynced.push((offset as usize, bytes[..done].to_vec()));
        allowed
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        if self.disk.0.lock().full {
            return Err(rustix::io::Errno::NOSPC.into());
        }
        self.write_at(&vec![0; bytes as usize], 0)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.step()?;
        let content = state.file(self.number);
        content.durable = content.seen.clone();
        content.unsynced.clear();
        Ok(())
    }
}
