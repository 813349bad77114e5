//! One file used on several servers at the same time.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use crate::{
    support::{Cluster, noise, wait_for},
    tools::{run, script, setting, try_run},
};

#[derive(Debug, Clone, Copy)]
enum LockKind {
    Flock,
    Record,
}

/// Takes or frees an exclusive lock; waits for it.
fn lock(file: &File, kind: LockKind, take: bool) {
    let done = match kind {
        // SAFETY: flock touches no memory.
        LockKind::Flock => unsafe { libc::flock(file.as_raw_fd(), if take { libc::LOCK_EX } else { libc::LOCK_UN }) },
        LockKind::Record => {
            let wish = libc::flock {
                l_type: (if take { libc::F_WRLCK } else { libc::F_UNLCK }) as _,
                l_whence: libc::SEEK_SET as _,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            };
            // SAFETY: the kernel reads one `flock`.
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLKW, &wish) }
        }
    };
    assert_eq!(done, 0, "{kind:?}: {}", std::io::Error::last_os_error());
}

/// Three servers add one to a number in a file, again and again, each time under a lock.
fn counts_right(cluster: &Cluster, kind: LockKind) {
    let (name, each) = (format!("counter-{kind:?}"), setting("CTFS_TEST_COUNTS", 200));
    fs::write(cluster.mnt(1).join(&name), format!("{:020}", 0)).unwrap();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for server in 1..=3 {
            let path = cluster.mnt(server).join(&name);
            scope.spawn(move || {
                let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
                let mut number = [0; 20];
                for _ in 0..each {
                    lock(&file, kind, true);
                    file.read_exact_at(&mut number, 0).unwrap();
                    let next: u64 = std::str::from_utf8(&number).unwrap().parse::<u64>().unwrap() + 1;
                    file.write_all_at(format!("{next:020}").as_bytes(), 0).unwrap();
                    lock(&file, kind, false);
                }
            });
        }
    });
    println!("{} locked increments under {kind:?} in {:?}", 3 * each, start.elapsed());
    for server in 1..=3 {
        assert_eq!(fs::read_to_string(cluster.mnt(server).join(&name)).unwrap(), format!("{:020}", 3 * each), "{kind:?} on s{server}");
    }
}

fn appends_all_arrive(cluster: &Cluster) {
    let each = setting("CTFS_TEST_APPENDS", 300);
    let line = |server: usize, n: u64| format!("s{server} {n:08} {}\n", "x".repeat(20 + (n % 50) as usize));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for server in 1..=3 {
            let path = cluster.mnt(server).join("log");
            scope.spawn(move || {
                let mut log = OpenOptions::new().append(true).create(true).open(path).unwrap();
                for n in 0..each {
                    assert_eq!(log.write(line(server, n).as_bytes()).unwrap(), line(server, n).len());
                }
            });
        }
    });
    println!("{} appended lines in {:?}", 3 * each, start.elapsed());
    for reader in 1..=3 {
        let mut next = BTreeMap::from([("s1", 0), ("s2", 0), ("s3", 0)]);
        let log = fs::read_to_string(cluster.mnt(reader).join("log")).unwrap();
        for found in log.lines() {
            let name = found.split(' ').next().unwrap();
            let n = next.get_mut(name).unwrap_or_else(|| panic!("a torn line: {found:?}"));
            assert_eq!(format!("{found}\n"), line(name[1..].parse().unwrap(), *n), "on s{reader}");
            *n += 1;
        }
        assert!(next.values().all(|n| *n == each), "s{reader} has {next:?} lines");
    }
}

/// A writer says after each write that it is done; whoever reads then must see it.
fn reads_see_completed_writes(cluster: &Cluster) {
    let rounds = setting("CTFS_TEST_ROUNDS", 200);
    fs::write(cluster.mnt(1).join("number"), "").unwrap();
    fs::write(cluster.mnt(1).join("tailed"), "").unwrap();
    let number = File::open(cluster.mnt(2).join("number")).unwrap();
    let mut tail = File::open(cluster.mnt(3).join("tailed")).unwrap();
    let (written, to_read) = mpsc::channel();
    let (seen, to_write) = mpsc::channel();
    let on = cluster.mnt(1);
    let writer = std::thread::spawn(move || {
        let number = OpenOptions::new().write(true).open(on.join("number")).unwrap();
        let mut log = OpenOptions::new().append(true).open(on.join("tailed")).unwrap();
        for n in 0..rounds {
            number.write_all_at(format!("{n:010}").as_bytes(), 0).unwrap();
            number.write_all_at(b"end", 10 + n * 100).unwrap();
            log.write_all(format!("line {n}\n").as_bytes()).unwrap();
            written.send(n).unwrap();
            to_write.recv().unwrap();
        }
    });
    for n in to_read {
        let mut found = [0; 10];
        number.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(std::str::from_utf8(&found).unwrap(), format!("{n:010}"));
        for server in [2, 3] {
            assert_eq!(fs::metadata(cluster.mnt(server).join("number")).unwrap().len(), 13 + n * 100, "size on s{server}");
        }
        assert_eq!(number.metadata().unwrap().len(), 13 + n * 100, "size of the open file");
        let mut more = String::new();
        tail.read_to_string(&mut more).unwrap();
        assert_eq!(more, format!("line {n}\n"));
        seen.send(()).unwrap();
    }
    writer.join().unwrap();
}

/// Chunks that the metadata know, as a server sees it; their space counts until they are forgotten.
fn chunks(cluster: &Cluster, server: usize) -> u64 {
    cluster.json(server, &["status"])["chunks"]["total"].as_u64().unwrap()
}

/// Waits until the chunks of what nobody has any more are forgotten. That takes the grace time.
fn wait_for_chunks(cluster: &Cluster, server: usize, most: u64) {
    wait_for("end of the chunks of deleted files", Duration::from_secs(150), || (chunks(cluster, server) <= most).then_some(()));
}

fn read_all(file: &File, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A handle with O_DIRECT goes past the kernel's pages, not past the other servers.
fn direct_reads_see_completed_writes(cluster: &Cluster) {
    fs::write(cluster.mnt(1).join("direct"), vec![0; 8192]).unwrap();
    let writer = OpenOptions::new().write(true).open(cluster.mnt(1).join("direct")).unwrap();
    let reader = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(cluster.mnt(2).join("direct")).unwrap();
    let mut memory = vec![0_u8; 8192];
    let aligned = memory.as_ptr().align_offset(4096);
    for n in 0..50_u8 {
        writer.write_all_at(&[n; 4096], 0).unwrap();
        reader.read_exact_at(&mut memory[aligned..aligned + 4096], 0).unwrap();
        assert!(memory[aligned..aligned + 4096].iter().all(|byte| *byte == n), "round {n}");
    }
}

const LEN: usize = 3 << 20;

/// Files that one server deletes and replaces while another has them open.
fn lives_while_open_elsewhere(cluster: &Cluster) {
    let (opener, remover) = (2, 1);
    let open = |name: &str| OpenOptions::new().read(true).write(true).open(cluster.mnt(opener).join(name)).unwrap();
    for (seed, name) in ["unlinked", "replaced"].into_iter().enumerate() {
        fs::write(cluster.mnt(remover).join(name), noise(seed as u64, LEN)).unwrap();
    }
    fs::write(cluster.mnt(remover).join("other"), "other").unwrap();
    let (unlinked, replaced) = (open("unlinked"), open("replaced"));
    fs::remove_file(cluster.mnt(remover).join("unlinked")).unwrap();
    fs::rename(cluster.mnt(remover).join("other"), cluster.mnt(remover).join("replaced")).unwrap();
    assert_eq!(fs::read_to_string(cluster.mnt(opener).join("replaced")).unwrap(), "other");
    for (seed, file) in [&unlinked, &replaced].into_iter().enumerate() {
        let mut expected = noise(seed as u64, LEN);
        assert!(read_all(file, LEN) == expected, "file {seed} has other bytes");
        file.write_all_at(b"written later", 1_000_000).unwrap();
        file.write_all_at(b"and longer", LEN as u64).unwrap();
        file.sync_all().unwrap();
        cluster.drop_caches(opener);
        expected[1_000_000..1_000_013].copy_from_slice(b"written later");
        expected.extend_from_slice(b"and longer");
        assert!(read_all(file, LEN + 10) == expected, "file {seed} has other bytes later");
    }
}

#[test]
fn three_servers_use_one_file_at_once_and_lose_nothing_and_a_deleted_one_lives_while_it_is_open() {
    let cluster = Cluster::start("sharing", 3);
    lives_while_open_elsewhere(&cluster);
    counts_right(&cluster, LockKind::Flock);
    counts_right(&cluster, LockKind::Record);
    appends_all_arrive(&cluster);
    reads_see_completed_writes(&cluster);
    direct_reads_see_completed_writes(&cluster);
}

#[test]
#[ignore = "waits twice for the grace time of chunks, a minute; scripts/nightly runs it"]
fn the_space_of_a_deleted_file_comes_back_after_the_last_close_and_when_the_server_that_had_it_open_dies() {
    // Keeps chunks without references as shortly as it can.
    let config = tempfile::NamedTempFile::new().unwrap();
    fs::write(config.path(), "[data]\ngc_grace = \"1m\"\n").unwrap();
    let args = format!("--cache-size 256MiB --config {}", config.path().display());
    let cluster = Cluster::start_with("space", 3, &args, "");
    lives_while_open_elsewhere(&cluster);
    wait_for_chunks(&cluster, 3, 0);

    let lead = cluster.leader(1);
    let opener = lead % 3 + 1;
    fs::write(cluster.mnt(lead).join("file"), noise(1, LEN)).unwrap();
    let held = File::open(cluster.mnt(opener).join("file")).unwrap();
    fs::remove_file(cluster.mnt(lead).join("file")).unwrap();
    assert!(read_all(&held, LEN) == noise(1, LEN));
    wait_for("figures", Duration::from_secs(20), || (chunks(&cluster, lead) >= 3).then_some(()));
    // Nobody can have open any more what a server had open whose life was ended.
    cluster.kill(opener);
    wait_for_chunks(&cluster, lead, 0);
}

/// A process, ended with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that takes an exclusive lock on a file, says `locked`, and keeps it.
fn locker(path: &Path, kind: &str) -> (Process, BufReader<std::process::ChildStdout>) {
    const PROGRAM: &str = "import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
print('waiting', flush=True)
{'flock': fcntl.flock, 'fcntl': fcntl.lockf}[sys.argv[2]](fd, fcntl.LOCK_EX)
print('locked', flush=True)
time.sleep(600)";
    let mut child = Command::new("python3").args(["-c", PROGRAM]).arg(path).arg(kind).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert_eq!(line, "waiting\n");
    (Process(child), said)
}

/// Whether a process waits in the kernel for the answer to a request.
fn waits(process: &Process) -> bool {
    let what = fs::read_to_string(format!("/proc/{}/syscall", process.0.id())).unwrap_or_default();
    [libc::SYS_flock, libc::SYS_fcntl].iter().any(|call| what.starts_with(&format!("{call} ")))
}

#[test]
fn a_process_killed_while_it_waits_for_a_lock_ends_and_leaves_no_lock() {
    let cluster = Cluster::start("lock-wait", 3);
    for kind in ["flock", "fcntl"] {
        let file = |server: usize| -> PathBuf { cluster.mnt(server).join(kind) };
        fs::write(file(1), "").unwrap();
        let (holder, mut said) = locker(&file(1), kind);
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "locked\n");
        let (mut waiter, _said) = locker(&file(2), kind);
        wait_for("process that waits for the lock", Duration::from_secs(20), || waits(&waiter).then_some(()));
        waiter.0.kill().unwrap();
        let start = Instant::now();
        wait_for("end of the killed process", Duration::from_secs(5), || waiter.0.try_wait().unwrap());
        println!("{kind}: it ended {:?} after kill -9", start.elapsed());
        drop(holder);
        let (_next, mut said) = locker(&file(3), kind);
        line.clear();
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "locked\n", "the lock is free again");
    }
}

#[test]
fn sqlite_is_written_by_two_servers_at_once_and_refuses_wal_where_it_cannot_work() {
    let cluster = Cluster::start("sqlite", 3);
    let database = |server: usize| cluster.mnt(server).join("shared.sqlite").display().to_string();
    let limit = Duration::from_secs(120);
    run(limit, &format!("sqlite3 {} 'pragma journal_mode=delete; create table t(who, i)'", database(1)));
    let each = setting("CTFS_TEST_TRANSACTIONS", 30);
    std::thread::scope(|scope| {
        for server in [1, 2] {
            let line = format!("python3 {} {} {server} {each}", script("sqlite.py"), database(server));
            scope.spawn(move || println!("{}", run(limit, &line)));
        }
    });
    let question = "pragma integrity_check; select who, count(*), count(distinct i) from t group by who";
    let all = run(limit, &format!("sqlite3 {} '{question}'", database(3)));
    assert_eq!(all, format!("ok\n1|{each}|{each}\n2|{each}|{each}\n"));

    // WAL keeps an index in memory that processes share: two servers cannot.
    let wal = |server: usize| cluster.mnt(server).join("wal.sqlite").display().to_string();
    let mut first = Process(
        Command::new("sqlite3").arg(wal(1)).current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap(),
    );
    let (mut ask, mut answers) = (first.0.stdin.take().unwrap(), BufReader::new(first.0.stdout.take().unwrap()));
    let mut tell = |line: &str| {
        ask.write_all(format!("{line}; select 'done';\n").as_bytes()).unwrap();
        let (mut all, mut answer) = (String::new(), String::new());
        while answer != "done\n" {
            answer.clear();
            assert_ne!(answers.read_line(&mut answer).unwrap(), 0, "sqlite3 ended: {all}");
            all += &answer;
        }
        all
    };
    assert_eq!(tell("pragma journal_mode=wal; create table t(i); insert into t values(1)"), "wal\ndone\n");
    let (said, succeeded) = try_run(limit, &format!("sqlite3 {} 'insert into t values(99)'", wal(2)));
    assert!(!succeeded, "a second server wrote to a database in WAL mode: {said}");
    println!("WAL on a second server: {said}");
    assert_eq!(tell("insert into t values(2); select group_concat(i) from t; pragma integrity_check"), "1,2\nok\ndone\n");
    drop((ask, answers));
    first.0.wait().unwrap();
    let after = run(limit, &format!("sqlite3 {} 'select group_concat(i) from t; pragma integrity_check'", wal(2)));
    assert_eq!(after, "1,2\nok\n");
}

