//! Random system calls of several users on three mounts, and the same ones on a local file system.
//!
//! Each call must end alike: same errno, same bytes, same numbers; and every so often the whole trees
//! are compared, as one of the servers shows it. A failure prints its seed and the calls before it.
//! `CTFS_TEST_SEED` runs another seed (`scripts/nightly` takes a new one each time), `CTFS_TEST_STEPS` asks for more calls or fewer than fill
//! some 20 s.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::{CString, OsStr},
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, FileTypeExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::support::Cluster;

const SERVERS: usize = 3;
const SLOTS: usize = 8;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const XATTRS: [&str; 2] = ["user.one", "user.two"];
/// Root, and two users without a common group.
const USERS: [u32; 3] = [0, 4001, 4002];
/// Calls between comparisons of everything.
const COMPARE_EVERY: usize = 40;
/// Times set by a call are before this; those of the day are later.
const SET_BEFORE: i64 = 1_000_000_000;

/// What a call answered, numbers in decimal.
type Outcome = Result<Vec<u8>, i32>;

#[derive(Debug, Clone)]
enum Call {
    Open { path: String, flags: i32, mode: u32, slot: usize },
    Close { slot: usize },
    Read { slot: usize, offset: u64, len: usize },
    Write { slot: usize, offset: u64, len: usize, seed: u8 },
    SetLen { slot: usize, len: u64 },
    Allocate { slot: usize, mode: i32, offset: u64, len: u64 },
    Copy { from: usize, to: usize, read_at: i64, write_at: i64, len: usize },
    Sync { slot: usize },
    StatOpen { slot: usize },
    ChmodOpen { slot: usize, mode: u32 },
    Mkdir { path: String, mode: u32 },
    Rmdir { path: String },
    Unlink { path: String },
    Rename { from: String, to: String, flags: u32 },
    Link { from: String, to: String },
    Symlink { target: String, path: String },
    Mkfifo { path: String, mode: u32 },
    Chmod { path: String, mode: u32 },
    Chown { path: String, uid: u32, gid: u32 },
    Truncate { path: String, len: i64 },
    Times { path: String, mtime: i64 },
    SetXattr { path: String, name: &'static str, value: u8, flags: i32 },
    RemoveXattr { path: String, name: &'static str },
    Stat { path: String },
    List { path: String },
}

/// A file system and the files open on it.
struct Side {
    open: BTreeMap<usize, File>,
}

fn checked(result: i64) -> Result<i64, i32> {
    if result < 0 { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { Ok(result) }
}

fn done(result: i64) -> Outcome {
    checked(result).map(|number| number.to_string().into_bytes())
}

fn path_of(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("no NUL")
}

fn failed(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(-1)
}

/// Runs `call` with the rights of a user; of this thread only, and as fsuid, which both the kernel's
/// checks and FUSE go by.
fn as_user<T>(uid: u32, call: impl FnOnce() -> T) -> T {
    // SAFETY: these change nothing but the credentials of this thread.
    unsafe {
        libc::setfsgid(uid);
        libc::setfsuid(uid);
    }
    let result = call();
    // SAFETY: as above.
    unsafe {
        libc::setfsuid(0);
        libc::setfsgid(0);
    }
    result
}

/// What `stat` says that both file systems must say alike.
fn told(meta: &fs::Metadata) -> String {
    // A directory's size is the file system's own affair, and so is the time of day.
    let size = if meta.is_dir() { 0 } else { meta.size() };
    let mtime = if meta.mtime() < SET_BEFORE { meta.mtime() } else { 0 };
    let links = if meta.is_dir() { 0 } else { meta.nlink() };
    format!("mode {:o}, owner {}:{}, size {size}, links {links}, mtime {mtime}", meta.mode(), meta.uid(), meta.gid())
}

/// Bytes that tell which write they are of.
fn data(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|n| seed.wrapping_mul(29).wrapping_add((n / 5) as u8) | 1).collect()
}

impl Call {
    // SAFETY of every block below: paths end in NUL, descriptors are open, buffers outlive the call.
    fn run(&self, root: &Path, side: &mut Side) -> Outcome {
        let at = |path: &str| path_of(&root.join(path));
        let fd = |slot: &usize| side.open.get(slot).map(AsRawFd::as_raw_fd).ok_or(libc::EBADF);
        match self {
            Self::Open { path, flags, mode, slot } => {
                // SAFETY: see above.
                let opened = checked(unsafe { libc::open(at(path).as_ptr(), flags | libc::O_NONBLOCK | libc::O_CLOEXEC, *mode) }.into())?;
                // SAFETY: just opened, owned by nobody else.
                let file = unsafe { File::from_raw_fd(opened as i32) };
                side.open.insert(*slot, file);
                Ok(vec![])
            }
            Self::Close { slot } => {
                side.open.remove(slot);
                Ok(vec![])
            }
            Self::Read { slot, offset, len } => {
                let file = side.open.get(slot).ok_or(libc::EBADF)?;
                let mut bytes = vec![0; *len];
                let mut got = 0;
                while got < *len {
                    match file.read_at(&mut bytes[got..], offset + got as u64) {
                        Ok(0) => break,
                        Ok(more) => got += more,
                        Err(error) => return Err(failed(&error)),
                    }
                }
                bytes.truncate(got);
                Ok(bytes)
            }
            Self::Write { slot, offset, len, seed } => {
                let file = side.open.get(slot).ok_or(libc::EBADF)?;
                let written = file.write_at(&data(*seed, *len), *offset).map_err(|error| failed(&error))?;
                Ok(written.to_string().into_bytes())
            }
            // SAFETY: see above; so for all that follow.
            Self::SetLen { slot, len } => done(unsafe { libc::ftruncate(fd(slot)?, *len as i64) }.into()),
            Self::Allocate { slot, mode, offset, len } => {
                done(unsafe { libc::fallocate(fd(slot)?, *mode, *offset as i64, *len as i64) }.into())
            }
            Self::Copy { from, to, read_at, write_at, len } => {
                let (mut read_at, mut write_at) = (*read_at, *write_at);
                done(unsafe { libc::copy_file_range(fd(from)?, &mut read_at, fd(to)?, &mut write_at, *len, 0) } as i64)
            }
            Self::Sync { slot } => done(unsafe { libc::fsync(fd(slot)?) }.into()),
            Self::StatOpen { slot } => {
                let meta = side.open.get(slot).ok_or(libc::EBADF)?.metadata().map_err(|error| failed(&error))?;
                Ok(told(&meta).into_bytes())
            }
            Self::ChmodOpen { slot, mode } => done(unsafe { libc::fchmod(fd(slot)?, *mode) }.into()),
            Self::Mkdir { path, mode } => done(unsafe { libc::mkdir(at(path).as_ptr(), *mode) }.into()),
            Self::Rmdir { path } => done(unsafe { libc::rmdir(at(path).as_ptr()) }.into()),
            Self::Unlink { path } => done(unsafe { libc::unlink(at(path).as_ptr()) }.into()),
            Self::Rename { from, to, flags } => done(
                unsafe { libc::renameat2(libc::AT_FDCWD, at(from).as_ptr(), libc::AT_FDCWD, at(to).as_ptr(), *flags) }.into(),
            ),
            Self::Link { from, to } => done(unsafe { libc::link(at(from).as_ptr(), at(to).as_ptr()) }.into()),
            Self::Symlink { target, path } => {
                let target = path_of(Path::new(target));
                done(unsafe { libc::symlink(target.as_ptr(), at(path).as_ptr()) }.into())
            }
            Self::Mkfifo { path, mode } => done(unsafe { libc::mkfifo(at(path).as_ptr(), *mode) }.into()),
            Self::Chmod { path, mode } => done(unsafe { libc::chmod(at(path).as_ptr(), *mode) }.into()),
            Self::Chown { path, uid, gid } => done(unsafe { libc::lchown(at(path).as_ptr(), *uid, *gid) }.into()),
            Self::Truncate { path, len } => done(unsafe { libc::truncate(at(path).as_ptr(), *len) }.into()),
            Self::Times { path, mtime } => {
                let time = libc::timespec { tv_sec: *mtime, tv_nsec: 987_654_321 };
                let times = [time, time];
                done(unsafe { libc::utimensat(libc::AT_FDCWD, at(path).as_ptr(), times.as_ptr(), libc::AT_SYMLINK_NOFOLLOW) }.into())
            }
            Self::SetXattr { path, name, value, flags } => {
                let (name, value) = (CString::new(*name).expect("no NUL"), [*value; 9]);
                done(unsafe { libc::lsetxattr(at(path).as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), *flags) }.into())
            }
            Self::RemoveXattr { path, name } => {
                let name = CString::new(*name).expect("no NUL");
                done(unsafe { libc::lremovexattr(at(path).as_ptr(), name.as_ptr()) }.into())
            }
            Self::Stat { path } => {
                let meta = fs::symlink_metadata(root.join(path)).map_err(|error| failed(&error))?;
                Ok(told(&meta).into_bytes())
            }
            Self::List { path } => {
                let mut names = Vec::new();
                for entry in fs::read_dir(root.join(path)).map_err(|error| failed(&error))? {
                    names.push(entry.map_err(|error| failed(&error))?.file_name().into_string().unwrap_or_default());
                }
                names.sort();
                Ok(names.join(" ").into_bytes())
            }
        }
    }
}

fn any<T: Copy>(random: &mut StdRng, all: &[T]) -> T {
    all[random.random_range(0..all.len())]
}

fn any_path(random: &mut StdRng) -> String {
    let depth = any(random, &[1, 1, 1, 2, 2, 3]);
    (0..depth).map(|_| any(random, &NAMES)).collect::<Vec<_>>().join("/")
}

fn any_mode(random: &mut StdRng) -> u32 {
    let set = [0o644, 0o755, 0o777, 0o666, 0o6777, 0o2775, 0o4711, 0o1777, 0o700];
    let mode = if random.random_ratio(1, 8) { random.random_range(0..0o10000) } else { any(random, &set) };
    // Setgid on a file that its group may not execute: Linux takes it away when somebody outside the
    // group writes, here it stays.
    if mode & 0o010 == 0 { mode & !0o2000 } else { mode }
}

fn any_offset(random: &mut StdRng) -> u64 {
    match random.random_range(0..8) {
        0..4 => random.random_range(0..9000),
        4..6 => (random.random_range(0..3u64) << 20) + random.random_range(0..3) * 4096,
        6 => random.random_range(0..500) * 4096,
        _ => random.random_range(0..2_200_000),
    }
}

fn any_len(random: &mut StdRng) -> usize {
    match random.random_range(0..8) {
        0..5 => random.random_range(1..5000),
        5..7 => random.random_range(1..60_000),
        _ => random.random_range(1..1_500_000),
    }
}

/// A slot with something open, mostly.
fn any_slot(random: &mut StdRng, open: &BTreeMap<usize, File>) -> usize {
    let open: Vec<usize> = open.keys().copied().collect();
    if open.is_empty() || random.random_ratio(1, 20) { random.random_range(0..SLOTS) } else { any(random, &open) }
}

fn any_call(random: &mut StdRng, open: &BTreeMap<usize, File>) -> Call {
    let slot = any_slot(random, open);
    let (path, mode, offset, len) = (any_path(random), any_mode(random), any_offset(random), any_len(random));
    match random.random_range(0..100) {
        0..14 => {
            let mut flags = any(random, &[libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR]);
            for (flag, of) in [(libc::O_APPEND, 5), (libc::O_TRUNC, 10), (libc::O_EXCL, 12), (libc::O_DIRECTORY, 40)] {
                flags |= if random.random_ratio(1, of) { flag } else { 0 };
            }
            // What O_EXCL and O_DIRECTORY mean with or without O_CREAT is another story.
            let plain = flags & (libc::O_DIRECTORY | libc::O_EXCL) == 0 && random.random_ratio(4, 5);
            flags |= if plain || flags & libc::O_EXCL != 0 && flags & libc::O_DIRECTORY == 0 { libc::O_CREAT } else { 0 };
            if flags & libc::O_CREAT == 0 {
                flags &= !libc::O_EXCL;
            }
            Call::Open { path, flags, mode: mode & 0o777, slot: random.random_range(0..SLOTS) }
        }
        14..18 => Call::Close { slot },
        18..28 => Call::Read { slot, offset, len },
        28..46 => Call::Write { slot, offset, len, seed: random.random() },
        46..49 => Call::SetLen { slot, len: offset },
        49..53 => {
            let keep = libc::FALLOC_FL_KEEP_SIZE;
            let mode = any(random, &[0, keep, keep | libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE, keep | libc::FALLOC_FL_ZERO_RANGE]);
            Call::Allocate { slot, mode, offset, len: len as u64 }
        }
        53..56 => {
            let (to, write_at) = (any_slot(random, open), any_offset(random) as i64);
            Call::Copy { from: slot, to, read_at: offset as i64, write_at, len }
        }
        56..59 => Call::Sync { slot },
        59..62 => Call::StatOpen { slot },
        62..64 => Call::ChmodOpen { slot, mode },
        64..69 => Call::Mkdir { path, mode },
        69..71 => Call::Rmdir { path },
        71..75 => Call::Unlink { path },
        75..81 => {
            let flags = any(random, &[0, 0, 0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE]);
            Call::Rename { from: path, to: any_path(random), flags }
        }
        81..83 => Call::Link { from: path, to: any_path(random) },
        83..84 => Call::Symlink { target: any(random, &NAMES).to_owned(), path },
        84..85 => Call::Mkfifo { path, mode: mode & 0o777 },
        85..88 => Call::Chmod { path, mode },
        // Never both left alone: the kernel asks the same before it writes, and who may then differs.
        88..90 => Call::Chown { path, uid: any(random, &[0, 4001, 4002, u32::MAX]), gid: any(random, &[0, 4001, 4002]) },
        90..93 => Call::Truncate { path, len: offset as i64 },
        93..94 => Call::Times { path, mtime: random.random_range(0..SET_BEFORE) },
        94..96 => {
            let flags = any(random, &[0, 0, libc::XATTR_CREATE, libc::XATTR_REPLACE]);
            Call::SetXattr { path, name: any(random, &XATTRS), value: random.random(), flags }
        }
        96..97 => Call::RemoveXattr { path, name: any(random, &XATTRS) },
        97..99 => Call::Stat { path },
        _ => Call::List { path },
    }
}

/// Everything below `root`, a line for each thing.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).expect("stat what was listed");
        let mut line = told(&meta);
        if meta.is_dir() {
            for entry in fs::read_dir(&path).expect("list a directory") {
                todo.push(entry.expect("an entry").path());
            }
        } else if meta.is_symlink() {
            line += &format!(", to {:?}", fs::read_link(&path).expect("read a symlink"));
        } else if meta.is_file() {
            line += &format!(", content {}", blake3::hash(&fs::read(&path).expect("read a file")).to_hex());
        }
        for name in XATTRS {
            let mut value = [0u8; 64];
            let name = CString::new(name).expect("no NUL");
            // SAFETY: path and name end in NUL, the buffer is as long as said.
            let len = unsafe { libc::lgetxattr(path_of(&path).as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
            if len >= 0 {
                line += &format!(", {name:?} {:?}", &value[..len as usize]);
            }
        }
        all.insert(path.strip_prefix(root).expect("below the root").to_owned(), line);
    }
    all
}

fn difference(ours: &BTreeMap<PathBuf, String>, theirs: &BTreeMap<PathBuf, String>) -> Option<String> {
    let mut lines = Vec::new();
    let mut paths: Vec<&PathBuf> = ours.keys().chain(theirs.keys()).collect();
    paths.sort();
    paths.dedup();
    for path in paths {
        let (a, b) = (ours.get(path), theirs.get(path));
        if a != b {
            lines.push(format!("{}:\n  ctfs  {a:?}\n  local {b:?}", path.display()));
        }
    }
    (!lines.is_empty()).then(|| lines.join("\n"))
}

fn shown(outcome: &Outcome) -> String {
    match outcome {
        Ok(bytes) if bytes.len() > 200 => format!("{} bytes, {}", bytes.len(), blake3::hash(bytes).to_hex()),
        Ok(bytes) => format!("{:?}", OsStr::from_bytes(bytes)),
        Err(errno) => io::Error::from_raw_os_error(*errno).to_string(),
    }
}

#[test]
fn three_mounts_under_random_calls_of_several_users_are_one_file_system() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seed = number("CTFS_TEST_SEED").unwrap_or(20_261);
    let steps = number("CTFS_TEST_STEPS").unwrap_or(4500) as usize;
    println!("CTFS_TEST_SEED={seed} CTFS_TEST_STEPS={steps}");
    let cluster = Cluster::start("model", SERVERS);
    let local = tempfile::tempdir_in("/var/tmp").expect("make a directory");
    let local = local.path().join("tree");
    let mounts: Vec<PathBuf> = (1..=SERVERS).map(|server| cluster.mnt(server).join("tree")).collect();
    // So that users can reach both trees and make things in them.
    for root in [&local, &mounts[0]] {
        fs::create_dir(root).expect("make the tree");
        fs::set_permissions(root, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("open it to all");
    }
    fs::set_permissions(local.parent().expect("it was joined"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("open it to all");
    let mut random = StdRng::seed_from_u64(seed);
    let (mut ctfs, mut reference) = (Side { open: BTreeMap::new() }, Side { open: BTreeMap::new() });
    let mut homes = [0; SLOTS];
    let mut history: VecDeque<String> = VecDeque::new();
    for step in 0..steps {
        let (server, uid, call) = (random.random_range(0..SERVERS), any(&mut random, &USERS), any_call(&mut random, &reference.open));
        if let Call::Copy { from, to, .. } = call
            && homes[from] != homes[to]
        {
            // Two mounts are two file systems to the kernel; one local one is not.
            continue;
        }
        if let Call::Open { path, .. } = &call
            && fs::metadata(local.join(path)).is_ok_and(|meta| meta.file_type().is_fifo())
        {
            // Who has the other end open is known to one kernel, and for each mount apart.
            continue;
        }
        let mut ours = as_user(uid, || call.run(&mounts[server], &mut ctfs));
        if let (Err(libc::ESTALE), Call::Rename { from, to, .. }) = (&ours, &call) {
            // While it renames, Linux cannot move a directory in its cache that was moved elsewhere and
            // has files open in it; having looked, it can.
            for path in [from, to] {
                let _ = as_user(uid, || fs::symlink_metadata(mounts[server].join(path)));
            }
            ours = as_user(uid, || call.run(&mounts[server], &mut ctfs));
        }
        let theirs = as_user(uid, || call.run(&local, &mut reference));
        history.push_back(format!("{step:5} s{} uid {uid} {call:?} -> {}", server + 1, shown(&theirs)));
        if history.len() > 60 {
            history.pop_front();
        }
        let story = || history.iter().cloned().collect::<Vec<_>>().join("\n");
        if let (Call::Open { slot, .. }, Ok(_)) = (&call, &ours) {
            homes[*slot] = server;
        }
        assert!(ours == theirs, "seed {seed}\n{}\nanswers here {}", story(), shown(&ours));
        if step % COMPARE_EVERY == 0 || step + 1 == steps {
            let reader = random.random_range(0..SERVERS);
            let different = difference(&tree(&mounts[reader]), &tree(&local));
            assert!(different.is_none(), "seed {seed}\n{}\nthe trees differ on s{}:\n{}", story(), reader + 1, different.unwrap_or_default());
        }
    }
}
