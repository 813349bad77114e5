//! One mount: what programs on one server see.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    process::Command,
};

use super::*;
use crate::MountError;

#[test]
fn files_are_made_written_read_renamed_and_removed() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let dir = &paths[0];
        fs::write(dir.join("a"), b"hello").unwrap();
        assert_eq!(fs::read(dir.join("a")).unwrap(), b"hello");
        let big: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
        fs::write(dir.join("big"), &big).unwrap();
        assert_eq!(fs::read(dir.join("big")).unwrap(), big);
        fs::rename(dir.join("a"), dir.join("b")).unwrap();
        assert_eq!(fs::metadata(dir.join("a")).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(fs::read(dir.join("b")).unwrap(), b"hello");

        let file = OpenOptions::new().read(true).write(true).open(dir.join("b")).unwrap();
        file.write_all_at(b"J", 0).unwrap();
        file.set_len(3).unwrap();
        file.sync_all().unwrap();
        assert_eq!(fs::read(dir.join("b")).unwrap(), b"Jel");
        fs::remove_file(dir.join("b")).unwrap();
        let mut rest = String::new();
        (&file).seek(SeekFrom::Start(1)).unwrap();
        (&file).read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "el", "open and unlinked");

        fs::create_dir_all(dir.join("x/y/z")).unwrap();
        assert_eq!(fs::remove_dir(dir.join("x")).unwrap_err().raw_os_error(), Some(libc::ENOTEMPTY));
        fs::remove_dir_all(dir.join("x")).unwrap();
    });
}

#[test]
fn ten_thousand_entries_are_listed_each_once() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let dir = paths[0].join("d");
        fs::create_dir(&dir).unwrap();
        for n in 0..10_000 {
            File::create(dir.join(format!("file-{n}"))).unwrap();
        }
        let names: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 10_000);
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), 10_000);
        assert_eq!(shell(&dir, "ls -l \"$D\" | wc -l").trim(), "10001");
        // A directory emptied while it is listed.
        for entry in fs::read_dir(&dir).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    });
}

#[test]
fn attributes_of_every_kind_are_kept_exactly() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let dir = &paths[0];
        let printed = shell(
            dir,
            r#"cd "$D"; umask 022
            touch f; chmod 4751 f; chown 12:34 f; stat -c '%a %u %g' f; chmod 6755 f; stat -c %a f
            touch -d '1960-02-03 04:05:06.789' f; stat -c '%y' f | cut -c1-23
            touch -d '2100-01-01 00:00:00.000000001' f; stat -c %.Y f
            mkfifo p; mknod c c 1 5; mknod b b 259 70000; ln -s target l; ln f h
            stat -c '%F %t:%T' p c b; readlink l; stat -c %h f
            head -c 3 c | od -An -tx1 -N3; df --output=fstype,avail -B1 . | tail -1"#,
        );
        let lines: Vec<&str> = printed.lines().map(str::trim).collect();
        assert_eq!(
            lines,
            [
                "751 12 34", // chown takes setuid away
                "6755",
                "1960-02-03 04:05:06.789",
                "4102444800.000000001",
                "fifo 0:0",
                "character special file 1:5",
                "block special file 103:11170",
                "target",
                "2",
                "00 00 00",
                "fuse.ctfs 53687091200",
            ]
        );
    });
}

/// fuser 0.18 negates the seconds of a time before 1970; for the smallest number that overflows, and
/// with overflow checks the reading thread panics. Built without them for fuser it means what it says.
#[test]
fn no_time_a_program_can_name_takes_a_thread_of_the_mount_away() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let file = File::create(paths[0].join("f")).unwrap();
        for secs in [i64::MIN, i64::MIN + 1, i64::MAX, 0] {
            for nanos in [0, 999_999_999] {
                let time = rustix::fs::Timespec { tv_sec: secs, tv_nsec: nanos };
                let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
                let _ = rustix::fs::futimens(&file, &times);
                file.metadata().unwrap();
            }
        }
    });
}

#[test]
fn extended_attributes_and_access_control_lists_work() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let file = paths[0].join("f");
        fs::write(&file, b"x").unwrap();
        let set = |name: &str, value: &[u8], flags| rustix::fs::setxattr(&file, name, value, flags);
        let none = rustix::fs::XattrFlags::empty();
        set("user.a", b"1", none).unwrap();
        set("trusted.b", &[7; 4000], none).unwrap();
        assert_eq!(set("user.a", b"", rustix::fs::XattrFlags::CREATE), Err(rustix::io::Errno::EXIST));
        assert_eq!(set("other.a", b"", none), Err(rustix::io::Errno::OPNOTSUPP));
        let mut room = [0u8; 4096];
        assert_eq!(rustix::fs::getxattr_query(&file, "trusted.b").unwrap(), 4000);
        assert_eq!(rustix::fs::getxattr(&file, "trusted.b", &mut room[..10]), Err(rustix::io::Errno::RANGE));
        assert_eq!(rustix::fs::getxattr(&file, "trusted.b", &mut room[..]).unwrap(), 4000);
        let listed = rustix::fs::listxattr(&file, &mut room[..]).unwrap();
        assert_eq!(room[..listed].iter().filter(|&&b| b == 0).count(), 2);
        rustix::fs::removexattr(&file, "user.a").unwrap();
        assert_eq!(rustix::fs::getxattr(&file, "user.a", &mut room[..]), Err(rustix::io::Errno::NODATA));

        // u::rw-, u:1000:r--, g::---, m::r--, o::---
        let mut acl = vec![2, 0, 0, 0];
        for (tag, perm, id) in [(1u16, 6u16, -1i32), (2, 4, 1000), (4, 0, -1), (16, 4, -1), (32, 0, -1)] {
            acl.extend(tag.to_le_bytes());
            acl.extend(perm.to_le_bytes());
            acl.extend(id.to_le_bytes());
        }
        set("system.posix_acl_access", &acl, none).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o640, "the mask shows as the group's rights");
        let as_user = |uid: u32| {
            let status = Command::new("setpriv")
                .args([&format!("--reuid={uid}"), "--regid=999", "--clear-groups", "cat"])
                .arg(&file)
                .output()
                .unwrap();
            status.status.success()
        };
        assert!(reachable_by_all(&file), "the way to the mount is open");
        assert!(as_user(1000) && !as_user(1001));
    });
}

/// Opens the test's directory, which is made for its owner alone.
fn reachable_by_all(file: &Path) -> bool {
    let dir = file.parent().and_then(Path::parent).unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).is_ok()
}

#[test]
fn a_write_by_another_user_takes_setuid_away() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let file = paths[0].join("f");
        fs::write(&file, b"x").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o4777)).unwrap();
        assert!(reachable_by_all(&file));
        fs::write(&file, b"by root").unwrap();
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o4777);
        let script = r#"setpriv --reuid=1000 --regid=1000 --clear-groups sh -c 'printf y >> "$1"' sh "$D""#;
        shell(&file, script);
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o777);
        assert_eq!(fs::read(&file).unwrap(), b"by rooty");
    });
}

#[test]
fn a_mapped_file_reads_and_writes() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let printed = shell(
            &paths[0].join("f"),
            r#"python3 - "$D" <<'EOF'
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.write(fd, b"0123456789" * 1000)
m = mmap.mmap(fd, 0)
assert m[9990:] == b"0123456789"
m[5:8] = b"abc"
m.flush()
assert os.pread(fd, 10, 0) == b"01234abc89"
m[100:103] = b"xyz"
m.close(); os.close(fd)
print(open(sys.argv[1], "rb").read()[100:103].decode())
EOF"#,
        );
        assert_eq!(printed.trim(), "xyz");
    });
}

#[test]
fn a_program_that_runs_is_not_emptied() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let program = paths[0].join("program");
        let bytes = fs::read("/bin/sleep").unwrap();
        fs::write(&program, &bytes).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut running = Command::new(&program).arg("60").spawn().unwrap();
        let emptied = OpenOptions::new().read(true).custom_flags(libc::O_TRUNC).open(&program);
        let ended = running.try_wait().unwrap();
        running.kill().unwrap();
        running.wait().unwrap();
        assert_eq!(emptied.unwrap_err().raw_os_error(), Some(libc::ETXTBSY));
        assert_eq!(ended, None);
        assert!(fs::read(&program).unwrap() == bytes);
    });
}

#[test]
fn a_lock_through_a_descriptor_for_reading_ends_with_it() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        fs::write(paths[0].join("read"), "bytes").unwrap();
        let printed = shell(
            &paths[0].join("read"),
            r#"timeout 20 python3 - "$D" <<'EOF'
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.lockf(fd, fcntl.LOCK_SH)
def may():
    if os.fork() == 0:
        other = os.open(sys.argv[1], os.O_RDWR)
        try:
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.wait()[1]) == 0
print(may())
os.close(fd)
print(may())
EOF"#,
        );
        assert_eq!(printed.lines().collect::<Vec<_>>(), ["False", "True"]);
    });
}

#[test]
fn locks_exclude_processes_and_a_killed_waiter_ends_at_once() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let printed = shell(
            &paths[0].join("lock"),
            r#"touch "$D"
            exec 9>"$D"; flock -x 9
            if timeout 5 flock -n "$D" true; then echo both; else echo excluded; fi
            flock -x "$D" sh -c 'echo got it' & waiter=$!
            flock -x "$D" sh -c 'echo never' & killed=$!
            sleep 0.3
            kill -KILL $killed; wait $killed || echo killed
            flock -u 9; wait $waiter; echo end"#,
        );
        let mut lines: Vec<&str> = printed.lines().collect();
        assert_eq!(lines.remove(0), "excluded");
        assert!(lines.contains(&"got it") && lines.contains(&"killed") && !lines.contains(&"never"), "{printed}");

        let printed = shell(
            &paths[0].join("record"),
            r#"python3 - "$D" <<'EOF'
import fcntl, os, signal, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)
def child():
    other = os.open(sys.argv[1], os.O_RDWR)
    try:
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 5)
        print("both")
    except BlockingIOError:
        print("excluded")
    fcntl.lockf(other, fcntl.LOCK_EX, 5, 10)
    class Alarm(Exception): pass
    def ring(*_): raise Alarm
    signal.signal(signal.SIGALRM, ring); signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        fcntl.lockf(other, fcntl.LOCK_EX, 10, 0)
    except Alarm:
        print("interrupted")
pid = os.fork()
if pid == 0:
    child(); sys.stdout.flush(); os._exit(0)
os.waitpid(pid, 0)
EOF"#,
        );
        assert_eq!(printed.lines().collect::<Vec<_>>(), ["excluded", "interrupted"]);
    });
}

#[test]
fn holes_are_found_and_ranges_copied() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let dir = &paths[0];
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(dir.join("f")).unwrap();
        file.write_all_at(b"end", 8 << 20).unwrap();
        file.sync_all().unwrap();
        assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)).unwrap(), 8 << 20);
        assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).unwrap(), 0);
        assert!(file.metadata().unwrap().blocks() < 100);
        let copy = File::create(dir.join("copy")).unwrap();
        let mut at = 0;
        loop {
            let copied = rustix::fs::copy_file_range(&file, Some(&mut at), &copy, None, 16 << 20).unwrap();
            if copied == 0 {
                break;
            }
        }
        let bytes = fs::read(dir.join("copy")).unwrap();
        assert_eq!((bytes.len(), &bytes[8 << 20..]), ((8 << 20) + 3, &b"end"[..]));
    });
}

#[test]
fn direct_reads_and_appends_work() {
    let Some(mounts) = Mounts::new(1) else { return };
    mounts.run(|paths| {
        let path = paths[0].join("log");
        let mut log = OpenOptions::new().append(true).create(true).open(&path).unwrap();
        for n in 0..100 {
            writeln!(log, "line {n}").unwrap();
        }
        drop(log);
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 100);
        fs::write(&path, vec![7; 1 << 20]).unwrap();
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
        let mut bytes = vec![0; 65536];
        direct.read_exact_at(&mut bytes, 512 << 10).unwrap();
        assert_eq!(bytes, vec![7; 65536]);
    });
}

#[test]
fn a_mountpoint_that_cannot_be_used_is_refused_with_the_reason() {
    let Some(mounts) = Mounts::new(1) else { return };
    let start = |mountpoint: PathBuf| {
        let settings = MountSettings { mountpoint, ..MountSettings::default() };
        Mount::start(mounts.servers[0].vfs.clone(), mounts.runtime.handle().clone(), settings).err().unwrap()
    };
    let dir = mounts.dir.path();
    fs::write(dir.join("file"), b"").unwrap();
    fs::create_dir_all(dir.join("full/inner")).unwrap();
    assert!(matches!(start(dir.join("none")), MountError::Unreachable { .. }));
    assert!(matches!(start(dir.join("file")), MountError::NotDirectory(_)));
    assert!(matches!(start(dir.join("full")), MountError::NotEmpty(_)));
    assert!(matches!(start(mounts.path(0)), MountError::AlreadyMounted { .. }));
}

#[test]
fn an_unmount_from_outside_is_noticed_and_the_place_can_be_mounted_again() {
    let Some(mounts) = Mounts::new(1) else { return };
    let path = mounts.path(0);
    fs::write(path.join("f"), b"kept").unwrap();
    shell(&path, "umount \"$D\"");
    mounts.runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(10), mounts.mounts[0].ended()).await.expect("noticed");
    });
    let settings = MountSettings { mountpoint: path.clone(), ..MountSettings::default() };
    let again = Mount::start(mounts.servers[0].vfs.clone(), mounts.runtime.handle().clone(), settings).unwrap();
    assert_eq!(fs::read(path.join("f")).unwrap(), b"kept");
    again.unmount().unwrap();
    assert!(again.has_ended());
}

#[test]
fn an_aborted_mount_gives_errors_and_a_dead_one_is_cleared_away() {
    let Some(mounts) = Mounts::new(1) else { return };
    let path = mounts.path(0);
    mounts.mounts[0].abort();
    let inside = path.clone();
    assert!(mounts.run(move |_| fs::read_dir(inside)).is_err());
    let settings = MountSettings { mountpoint: path.clone(), ..MountSettings::default() };
    let again = Mount::start(mounts.servers[0].vfs.clone(), mounts.runtime.handle().clone(), settings).unwrap();
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    drop(again);
}

#[test]
fn an_aborted_mount_does_not_stay_in_the_tree() {
    let Some(mounts) = Mounts::new(1) else { return };
    let path = mounts.path(0);
    mounts.mounts[0].abort();
    mounts.runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(10), mounts.mounts[0].ended()).await.expect("ended");
    });
    mounts.mounts[0].unmount().unwrap();
    assert!(crate::mountinfo::mounted_on(&path).unwrap().is_none());
}

#[test]
fn a_busy_mount_is_detached_and_then_aborted() {
    let Some(mounts) = Mounts::new(1) else { return };
    let file = File::create(mounts.path(0).join("f")).unwrap();
    mounts.mounts[0].unmount().unwrap();
    assert!(mounts.mounts[0].has_ended());
    assert!(file.write_at(b"x", 0).is_err());
}
