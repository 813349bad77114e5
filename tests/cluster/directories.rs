//! Directories that many servers change at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{CStr, CString},
    fs,
    io::ErrorKind,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    support::{Cluster, wait_for},
    tools::setting,
};

/// An open directory, read as the C library reads it.
struct Listing(*mut libc::DIR);

impl Listing {
    fn open(path: &Path) -> Self {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the path is a C string.
        let dir = unsafe { libc::opendir(path.as_ptr()) };
        assert!(!dir.is_null(), "{}", std::io::Error::last_os_error());
        Self(dir)
    }

    fn next(&mut self) -> Option<String> {
        // SAFETY: the directory is open, and nobody else reads it; readdir tells an error by errno alone.
        let entry = unsafe {
            *libc::__errno_location() = 0;
            libc::readdir(self.0)
        };
        if entry.is_null() {
            let error = std::io::Error::last_os_error();
            assert_eq!(error.raw_os_error(), Some(0), "{error}");
            return None;
        }
        // SAFETY: the entry is valid until the next call, and its name is a C string.
        Some(unsafe { CStr::from_ptr((*entry).d_name.as_ptr()) }.to_str().unwrap().to_owned())
    }

    fn tell(&self) -> libc::c_long {
        // SAFETY: the directory is open.
        unsafe { libc::telldir(self.0) }
    }

    fn seek(&mut self, place: libc::c_long) {
        // SAFETY: the directory is open, and the place comes from `tell`.
        unsafe { libc::seekdir(self.0, place) };
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        // SAFETY: opened by us, closed once.
        unsafe { libc::closedir(self.0) };
    }
}

fn make_all(cluster: &Cluster, dir: &str, names: &[String]) {
    std::thread::scope(|scope| {
        // More hands than servers: each waits for a majority most of the time.
        for (hand, part) in names.chunks(names.len().div_ceil(12)).enumerate() {
            let dir = cluster.mnt(hand % 3 + 1).join(dir);
            scope.spawn(move || part.iter().for_each(|name| drop(fs::File::create(dir.join(name)).unwrap())));
        }
    });
}

#[test]
fn a_listing_shows_each_staying_entry_once_while_other_servers_make_and_remove_entries() {
    let cluster = Cluster::start("listing", 3);
    let staying: Vec<String> = (0..setting("CTFS_TEST_ENTRIES", 5_000)).map(|n| format!("staying-{n}")).collect();
    fs::create_dir(cluster.mnt(1).join("large")).unwrap();
    make_all(&cluster, "large", &staying);
    let expected: BTreeSet<&str> = staying.iter().map(String::as_str).collect();
    let large = cluster.mnt(2).join("large");

    let (stop, changes) = (AtomicBool::new(false), AtomicU64::new(0));
    let wait_for_a_change = || {
        let before = changes.load(Relaxed);
        wait_for("change by the other servers", Duration::from_secs(20), || (changes.load(Relaxed) > before).then_some(()));
    };
    std::thread::scope(|scope| {
        for server in [1, 3] {
            let (dir, stop, changes) = (cluster.mnt(server).join("large"), &stop, &changes);
            scope.spawn(move || {
                for n in 0.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    fs::File::create(dir.join(format!("passing-{server}-{n}"))).unwrap();
                    if n >= 20 {
                        fs::remove_file(dir.join(format!("passing-{server}-{}", n - 20))).unwrap();
                    }
                    changes.fetch_add(1, Relaxed);
                }
            });
        }
        let _stop = StopAtEnd(&stop);
        for round in 0..4 {
            let mut listing = Listing::open(&large);
            let (mut seen, mut count) = (BTreeMap::new(), 0);
            while let Some(name) = listing.next() {
                *seen.entry(name).or_insert(0) += 1;
                count += 1;
                // The C library asks for some hundred entries at a time.
                if count % 400 == 0 {
                    wait_for_a_change();
                }
            }
            let found: BTreeSet<&str> = seen.keys().map(String::as_str).filter(|name| name.starts_with("staying")).collect();
            assert_eq!(expected.difference(&found).collect::<Vec<_>>(), Vec::<&&str>::new(), "missing in round {round}");
            assert_eq!(found.len(), expected.len());
            let twice: Vec<_> = seen.iter().filter(|(_, times)| **times != 1).collect();
            assert!(twice.is_empty(), "round {round}: {twice:?}");
        }

        // Back to places told before: what comes next is what came next.
        let mut listing = Listing::open(&large);
        let mut places = vec![];
        let mut place = listing.tell();
        while let Some(name) = listing.next() {
            if name.starts_with("staying") {
                places.push((place, name));
            }
            place = listing.tell();
        }
        let mut chance = StdRng::seed_from_u64(1);
        for _ in 0..100 {
            let (place, expected) = &places[chance.random_range(0..places.len())];
            listing.seek(*place);
            let next = std::iter::from_fn(|| listing.next()).find(|name| name.starts_with("staying"));
            assert_eq!(next.as_ref(), Some(expected));
        }
    });
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn rename_no_replace(old: &Path, new: &Path) -> std::io::Result<()> {
    Ok(rustix::fs::renameat_with(rustix::fs::CWD, old, rustix::fs::CWD, new, rustix::fs::RenameFlags::NOREPLACE)?)
}

/// Every file below `dir`, with its name and content.
fn files_below(dir: &Path) -> Vec<(PathBuf, String)> {
    let mut found = vec![];
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(files_below(&entry.path())),
            false => found.push((entry.path(), fs::read_to_string(entry.path()).unwrap())),
        }
    }
    found
}

#[test]
fn renames_by_three_servers_at_once_lose_and_double_no_name() {
    const FILES: u64 = 40;
    const PLACES: u64 = 80;
    let cluster = Cluster::start("renames", 3);
    let dir = |server: usize| cluster.mnt(server).join("storm");
    let place = |n: u64| format!("d{}/p{n}", n % 5);
    for n in 0..5 {
        fs::create_dir_all(dir(1).join(format!("d{n}"))).unwrap();
    }
    for n in 0..FILES {
        fs::write(dir(1).join(place(n)), format!("file {n}")).unwrap();
    }
    let each = setting("CTFS_TEST_RENAMES", 400);
    let moved = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for hand in 0..6 {
            let (dir, moved) = (dir(hand % 3 + 1), &moved);
            scope.spawn(move || {
                let mut chance = StdRng::seed_from_u64(hand as u64);
                for _ in 0..each / 2 {
                    let (old, new) = (dir.join(place(chance.random_range(0..PLACES))), dir.join(place(chance.random_range(0..PLACES))));
                    match rename_no_replace(&old, &new) {
                        Ok(()) => _ = moved.fetch_add(1, Relaxed),
                        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists) => {}
                        Err(error) => panic!("{} to {}: {error}", old.display(), new.display()),
                    }
                }
            });
        }
    });
    println!("{} renames succeeded", moved.load(Relaxed));
    assert!(moved.load(Relaxed) > each / 4);
    let wanted: BTreeSet<String> = (0..FILES).map(|n| format!("file {n}")).collect();
    let relative = |server: usize| -> BTreeMap<PathBuf, String> {
        files_below(&dir(server)).into_iter().map(|(path, content)| (path.strip_prefix(dir(server)).unwrap().to_owned(), content)).collect()
    };
    let names = relative(1);
    assert_eq!(names.len() as u64, FILES);
    assert_eq!(names.values().cloned().collect::<BTreeSet<_>>(), wanted);
    for server in [2, 3] {
        assert_eq!(relative(server), names, "s{server}");
    }
    for (name, _) in &names {
        assert_eq!(fs::metadata(dir(2).join(name)).unwrap().nlink(), 1);
    }
}

#[test]
fn two_servers_that_move_directories_under_each_other_make_no_cycle() {
    let cluster = Cluster::start("cycles", 3);
    let root = |server: usize| cluster.mnt(server).join("cycle");
    fs::create_dir_all(root(1).join("a/x/y")).unwrap();
    fs::create_dir_all(root(1).join("b/x/y")).unwrap();
    let both = Barrier::new(2);
    for round in 0..setting("CTFS_TEST_ROUNDS", 100) {
        let attempt = |server: usize, from: &str, to: &str| {
            both.wait();
            fs::rename(root(server).join(from), root(server).join(to))
        };
        let (one, two) = std::thread::scope(|scope| {
            let one = scope.spawn(|| attempt(1, "a", "b/x/y/a"));
            let two = scope.spawn(|| attempt(2, "b", "a/x/y/b"));
            (one.join().unwrap(), two.join().unwrap())
        });
        // The first to happen wins; the other finds its target gone, or below itself.
        let (lost, undo) = match (one, two) {
            (Ok(()), Err(lost)) => (lost, ["b/x/y/a", "a"]),
            (Err(lost), Ok(())) => (lost, ["a/x/y/b", "b"]),
            both => panic!("round {round}: {both:?}"),
        };
        // ESTALE: the kernel finds a directory in a new place while it holds the lock of a rename.
        let known = [libc::ENOENT, libc::EINVAL, libc::ESTALE];
        assert!(known.contains(&lost.raw_os_error().unwrap()), "round {round}: {lost}");
        for server in 1..=3 {
            assert_eq!(directories_below(&root(server), 8), 6, "round {round}: s{server} lost a directory");
        }
        fs::rename(root(3).join(undo[0]), root(3).join(undo[1])).unwrap();
    }
}

/// Number of directories below `dir`, which are no deeper than `depth`.
fn directories_below(dir: &Path, depth: u32) -> usize {
    assert!(depth > 0, "{} is too deep", dir.display());
    fs::read_dir(dir).unwrap().map(|entry| 1 + directories_below(&entry.unwrap().path(), depth - 1)).sum()
}
