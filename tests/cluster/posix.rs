//! What POSIX and Linux say, judged by test programs of others, by models and by a local file system.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, PermissionsExt},
    },
    path::Path,
    process::Command,
    time::Duration,
};

use crate::{
    support::Cluster,
    tools::{run, script, setting, tool, try_run},
};

/// Tests of pjdfstest that are skipped, each with its reason.
const PJDFSTEST_SKIPPED: [(&str, &str); 1] =
    [("link::link_count_max", "asks pathconf for LINK_MAX, which libc answers by a list of file system types")];

const PJDFSTEST_CONFIG: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
allow_remount = REMOUNT
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// Another file system for the tests of EXDEV.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        assert!(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(dir.path()).status().unwrap().success());
        Self(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.0.path()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.path().display());
        }
    }
}

/// Runs pjdfstest and returns how each test ended.
fn pjdfstest(on: &Path, other: &Path, allow_remount: bool, filter: &str) -> BTreeMap<String, String> {
    let config = tempfile::NamedTempFile::new().unwrap();
    fs::write(config.path(), PJDFSTEST_CONFIG.replace("REMOUNT", &allow_remount.to_string())).unwrap();
    // Where the package of FUSE is installed mount(8) has its helper remount, which starts file systems
    // and knows nothing of one that is mounted.
    let bin = tempfile::tempdir().unwrap();
    fs::write(bin.path().join("mount"), "#!/bin/sh\nPATH=${PATH#*:} exec mount -i \"$@\"\n").unwrap();
    fs::set_permissions(bin.path().join("mount"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("PATH={}:$PATH", bin.path().display());
    let line = format!("{path} {} -c {} -p {} -s {} {filter}", tool("pjdfstest"), config.path().display(), on.display(), other.display());
    let (said, succeeded) = try_run(Duration::from_secs(200), &line);
    let ended = |line: &str| match line.split_whitespace().collect::<Vec<_>>()[..] {
        [name, how] if name.contains("::") => Some((name.to_owned(), how.to_owned())),
        _ => None,
    };
    assert!(succeeded && said.contains("Summary: 0 failed"), "{said}");
    said.lines().filter_map(ended).collect()
}

fn passes_pjdfstest(cluster: &Cluster, server: usize) {
    let (other, on) = (Tmpfs::mount(), cluster.mnt(server).join("p"));
    fs::create_dir(&on).unwrap();
    cluster.sh(server, "chmod 777 $MNT/p");
    let mut ends = pjdfstest(&on, other.0.path(), false, "");
    // These remount the file system for reading, which the suite can do only at the start of a
    // process: later ones find a descriptor that it has left open, on any file system.
    let read_only = pjdfstest(&on, other.0.path(), true, "erofs");
    assert_eq!(read_only.len(), 13, "{read_only:?}");
    ends.extend(read_only);
    assert!(ends.len() >= 398, "pjdfstest ran only {} tests", ends.len());
    let not_ok: Vec<_> = ends.iter().filter(|(_, how)| *how != "ok").map(|(name, how)| (name.as_str(), how.as_str())).collect();
    assert_eq!(not_ok, PJDFSTEST_SKIPPED.map(|(name, _)| (name, "skipped")));
}

#[test]
fn pjdfstest_passes_on_the_second_of_three_servers_and_on_one_alone() {
    // It mostly sleeps, so that times differ.
    std::thread::scope(|scope| {
        scope.spawn(|| passes_pjdfstest(&Cluster::start("pjd", 3), 2));
        scope.spawn(|| passes_pjdfstest(&Cluster::start("pjd1", 1), 1));
    });
}

const FSX_CONFIG: &str = "
flen = 262144
[opsize]
max = 131072
[weights]
close_open = 1
read = 10
write = 10
mapread = 10
mapwrite = 10
truncate = 5
invalidate = 1
fsync = 1
fdatasync = 1
posix_fallocate = 3
punch_hole = 5
sendfile = 3
posix_fadvise = 1
copy_file_range = 5
";

#[test]
fn random_operations_buffered_mapped_and_direct_read_back_what_was_written() {
    let cluster = Cluster::start("fsx", 3);
    let scratch = tempfile::tempdir_in("/var/tmp").unwrap();
    let config = scratch.path().join("fsx.toml");
    fs::write(&config, FSX_CONFIG).unwrap();
    let (seeds, operations) = (setting("CTFS_TEST_SEEDS", 3), setting("CTFS_TEST_OPERATIONS", 10_000));
    let limit = Duration::from_secs(setting("CTFS_TEST_LIMIT", 240));
    std::thread::scope(|scope| {
        for server in 1..=3 {
            let (cluster, config, scratch) = (&cluster, &config, scratch.path());
            scope.spawn(move || {
                for seed in (server..=seeds).step_by(3) {
                    let mnt = cluster.mnt(server as usize);
                    let (mnt, config, scratch) = (mnt.display(), config.display(), scratch.display());
                    let fsx = format!("{} -f {config} -N {operations} -P {scratch} -S {seed} {mnt}/fsx{seed}", tool("fsx"));
                    let said = run(limit, &fsx);
                    assert!(said.contains("All operations completed A-OK!"), "seed {seed}: {said}");
                    run(limit, &format!("python3 {} {mnt}/direct{seed} {seed} 2000", script("direct.py")));
                }
            });
        }
    });
}

/// Where CTFS answers differently from a local file system, each with its reason.
const RULES_DIFFERENT: [(&str, &str, &str); 2] = [
    (
        "setuid_and_setgid_go_when_somebody_else_changes_the_file",
        "2767",
        "FUSE leaves setgid without group execution alone: it does not say whether the writer is in the group",
    ),
    (
        "setuid_and_setgid_when_root_changes_the_file",
        "copy_file_range 6777",
        "FUSE does not say of a copy whether the writer may keep the bits, so they go",
    ),
];

#[test]
fn rights_times_names_and_errors_are_those_of_a_local_file_system() {
    let cluster = Cluster::start("rules", 3);
    let local = tempfile::tempdir_in("/var/tmp").unwrap();
    cluster.sh(1, &format!("chmod 755 {}", local.path().display()));
    let ask = |dir: &Path| -> BTreeMap<String, serde_json::Value> {
        let said = run(Duration::from_secs(200), &format!("python3 {} {}/rules", script("rules.py"), dir.display()));
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("rules.py: {error}\n{said}"))
    };
    let (here, there) = (ask(local.path()), ask(&cluster.mnt(2)));
    assert!(here.len() >= 25 && here.keys().eq(there.keys()), "{:?}\n{:?}", here.keys(), there.keys());
    let mut wrong = String::new();
    for (rule, wanted) in &here {
        let (Some(wanted), Some(found)) = (wanted.as_object(), there[rule].as_object()) else {
            panic!("{rule} broke off: here {wanted}, on the mount {}", there[rule])
        };
        for (case, wanted) in wanted {
            let excused = RULES_DIFFERENT.iter().any(|(r, c, _)| r == rule && case.ends_with(c));
            if found.get(case) != Some(wanted) && !excused {
                wrong += &format!("{rule}, {case}: {wanted} here, {} on the mount\n", found[case]);
            }
        }
    }
    assert_eq!(wrong, "");
}

const TIB: u64 = 1 << 40;

/// Ranges of a file that hold data, as SEEK_DATA and SEEK_HOLE tell.
fn data_ranges(file: &File) -> Vec<(u64, u64)> {
    // SAFETY: lseek touches no memory.
    let seek = |from: u64, whence| u64::try_from(unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) }).ok();
    let (mut ranges, mut at) = (Vec::new(), 0);
    while let Some(start) = seek(at, libc::SEEK_DATA) {
        at = seek(start, libc::SEEK_HOLE).expect("a hole stands at the end of each file");
        assert!(start < at, "data from {start} to {at}");
        ranges.push((start, at));
    }
    ranges
}

fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> Result<(), i32> {
    // SAFETY: fallocate touches no memory.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
    }
}

#[test]
fn a_sparse_file_of_a_tebibyte_costs_what_was_written_and_shows_its_holes() {
    let cluster = Cluster::start("sparse", 3);
    // How much is allocated is known exactly when the chunks are made, which is what fsync waits for so.
    cluster.ctfs(2, &["policy", "set", cluster.mnt(2).to_str().unwrap(), "--durability", "quorum"]);
    let path = cluster.mnt(2).join("sparse");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(TIB).unwrap();
    assert_eq!((file.metadata().unwrap().len(), file.metadata().unwrap().blocks()), (TIB, 0));
    assert_eq!(data_ranges(&file), []);

    let (piece, places) = ([7; 8192], [0, 5_000_000, TIB / 2 + 3, TIB - 8192]);
    for at in places {
        file.write_all_at(&piece, at).unwrap();
    }
    let holds_exactly = |file: &File| {
        let ranges = data_ranges(file);
        for at in places {
            assert!(ranges.iter().any(|(start, end)| *start <= at && at + 8192 <= *end), "{at} is in none of {ranges:?}");
        }
        // Data begins and ends within a page of what was written.
        let total: u64 = ranges.iter().map(|(start, end)| end - start).sum();
        assert!(total <= 4 * (8192 + 2 * 4096), "{ranges:?}");
        let mut middle = vec![1; 65536];
        file.read_exact_at(&mut middle, TIB / 3).unwrap();
        assert!(middle.iter().all(|byte| *byte == 0));
        file.read_exact_at(&mut middle[..8195], TIB / 2).unwrap();
        assert!(middle[..3] == [0; 3] && middle[3..8195].iter().all(|byte| *byte == 7));
    };
    holds_exactly(&file);
    file.sync_all().unwrap();
    holds_exactly(&file);
    let allocated = |server: usize| fs::metadata(cluster.mnt(server).join("sparse")).unwrap().blocks() * 512;
    assert!((4 * 8192..=4 * (8192 + 2 * 4096)).contains(&allocated(2)), "{} bytes are allocated", allocated(2));
    for server in [1, 3] {
        assert_eq!(allocated(server), allocated(2));
        holds_exactly(&File::open(cluster.mnt(server).join("sparse")).unwrap());
    }

    let before = allocated(2);
    fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, TIB / 2, 1 << 30).unwrap();
    file.sync_all().unwrap();
    assert!(allocated(2) < before && data_ranges(&file).iter().all(|(start, _)| !(TIB / 2..TIB / 2 + (1 << 30)).contains(start)));
    for mode in [libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE] {
        assert_eq!(fallocate(&file, mode, 0, 1 << 20), Err(libc::EOPNOTSUPP));
    }
    assert_eq!(file.metadata().unwrap().len(), TIB);
}

/// A shared mapping of the first bytes of a file.
struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(file: &File, len: usize) -> Self {
        // SAFETY: a new mapping, nowhere near anything of ours.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { start: start.cast(), len }
    }

    fn load(&self, at: usize) -> u8 {
        assert!(at < self.len);
        // SAFETY: inside the mapping; volatile, as others write these bytes.
        unsafe { self.start.add(at).read_volatile() }
    }

    fn store(&self, at: usize, byte: u8) {
        assert!(at < self.len);
        // SAFETY: inside the mapping.
        unsafe { self.start.add(at).write_volatile(byte) }
    }

    fn sync(&self) {
        // SAFETY: exactly the mapping.
        assert_eq!(unsafe { libc::msync(self.start.cast(), self.len, libc::MS_SYNC) }, 0, "{}", std::io::Error::last_os_error());
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping, which nobody uses any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

#[test]
fn a_shared_mapping_and_reads_and_writes_of_one_server_see_each_other() {
    let cluster = Cluster::start("mapping", 3);
    let path = cluster.mnt(2).join("mapped");
    fs::write(&path, vec![0; 65536]).unwrap();
    let open = || OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let (one, two) = (open(), open());
    let (first, second) = (Mapping::new(&one, 65536), Mapping::new(&two, 65536));
    let read = |file: &File, at: usize| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64).unwrap();
        byte[0]
    };
    for round in 0..200 {
        let (at, byte) = ((round * 7919) % 65536, (round % 250 + 1) as u8);
        if round % 2 == 0 { first.store(at, byte) } else { two.write_all_at(&[byte], at as u64).unwrap() };
        assert_eq!([first.load(at), second.load(at), read(&one, at), read(&two, at)], [byte; 4], "round {round}");
        if round % 50 == 49 {
            first.sync();
            assert_eq!([first.load(at), second.load(at), read(&one, at)], [byte; 3], "round {round}, synced");
        }
    }
    first.sync();
    let here: Vec<u8> = (0..65536).map(|at| first.load(at)).collect();
    drop((first, second, one, two));
    for server in 1..=3 {
        assert!(fs::read(cluster.mnt(server).join("mapped")).unwrap() == here, "s{server} reads something else");
    }
}
