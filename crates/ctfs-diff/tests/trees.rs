//! Real trees on a real file system. Most of what they hold only root can make.

use std::{
    fs,
    num::NonZeroUsize,
    ops::ControlFlow,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use ctfs_diff::{Event, Finding, Progress, Settings, compare};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps};

fn settings() -> Settings {
    Settings { threads: NonZeroUsize::new(3).unwrap(), ..Settings::default() }
}

/// Every finding as a line: differences as people see them, others with a mark before.
fn findings_with(source: &Path, target: &Path, settings: &Settings) -> (Vec<String>, Progress) {
    let mut lines = Vec::new();
    let progress = compare(source, target, settings, &mut |event| {
        match event {
            Event::Found(Finding::Difference(difference)) => lines.push(difference.to_string()),
            Event::Found(Finding::Trouble(trouble)) => lines.push(format!("! {trouble}")),
            Event::Found(Finding::NotEntered { path }) => lines.push(format!("# {}", ctfs_diff::escape(&path))),
            Event::Progress(_) => {}
        }
        ControlFlow::Continue(())
    });
    (lines, progress.unwrap())
}

fn findings(source: &Path, target: &Path) -> Vec<String> {
    findings_with(source, target, &settings()).0
}

/// Runs a script in `dir`; `$SRC` is the other tree. `keep OBJECT COMMAND` gives OBJECT its time back.
fn sh(dir: &Path, source: &Path, script: &str) {
    let prelude = r#"set -euo pipefail
keep() { local object=$1 ref; shift; ref=$(mktemp); touch -h -r "$object" "$ref"; "$@"; touch -h -r "$ref" "$object"; rm "$ref"; }
"#;
    let output = Command::new("bash").arg("-c").arg(format!("{prelude}{script}")).current_dir(dir).env("SRC", source).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Every kind of object, and every kind of thing that can be set on one.
fn make(root: &Path) {
    fs::create_dir(root).unwrap();
    sh(
        root,
        root,
        r#"
umask 022
printf 'some bytes' > plain; chown 1000:1001 plain
head -c 300000 /dev/urandom > large; : > empty
printf one > a; ln a b; mkdir d; ln a d/c; printf two > e; ln e d/f
ln -s plain symlink; ln -s /nowhere dangling; ln -s "$(printf 'x%.0s' $(seq 3000))" long-symlink; chown -h 5:6 symlink
mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
mknod char c 1 3; mknod block b 7 200
printf s > setuid; chmod 6755 setuid; mkdir sticky; chmod 1777 sticky; mkdir closed; chmod 000 closed; printf z > unreadable; chmod 000 unreadable
mkdir -p full/of/things; printf t > full/of/things/thing
printf x > x; setfattr -n user.text -v 'a value' x; setfattr -n user.binary -v 0x00ff x; setfattr -n trusted.t -v 0x0102 x; setfattr -n security.ctfs-test -v seven x
setfattr -h -n trusted.on-link -v yes symlink; setfattr -n user.on-dir -v dir d; setfattr -n trusted.on-fifo -v yes fifo
printf acl > acl; setfacl -m u:1234:rw-,g:99:r-- acl; mkdir acl-dir; setfacl -m u:77:rwx acl-dir; setfacl -d -m u:1000:rwx,g::r-x,o::--- acl-dir
truncate -s 10M sparse; printf middle | dd of=sparse bs=1 seek=5000000 conv=notrunc status=none
head -c 1048576 /dev/zero > zeros; truncate -s 3M only-hole
touch -- "$(printf 'not-utf8-\xff')" "$(printf 'new\nline')" ' leading space' "$(printf 'n%.0s' $(seq 255))"
find . -depth -exec touch -h -d '2001-02-03 04:05:06.123456789' {} +
touch -d '1960-01-02 03:04:05.123456789' empty; touch -d '2100-12-31 23:59:59.999999999' large
"#,
    );
}

fn copy(source: &Path, target: &Path) {
    let status = Command::new("cp").args(["-a", "--sparse=auto"]).args([source, target]).status().unwrap();
    assert!(status.success());
}

/// Adds one nanosecond to the mtime.
fn one_ns_later(path: &Path) {
    let meta = fs::symlink_metadata(path).unwrap();
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time(meta.atime(), meta.atime_nsec()), last_modification: time(meta.mtime(), meta.mtime_nsec() + 1) };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

#[test]
fn a_copy_that_is_right_has_no_difference_whatever_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    make(&source);
    copy(&source, &target);
    let (lines, progress) = findings_with(&source, &target, &settings());
    assert_eq!(lines, Vec::<String>::new());
    let count = Command::new("find").arg(&source).args(["-printf", "x"]).output().unwrap().stdout.len();
    assert_eq!(progress.entries, count as u64, "each name was looked at");
    assert_eq!(findings(&source.join("large"), &target.join("large")), Vec::<String>::new(), "two single files");
}

#[test]
fn one_thing_changed_is_exactly_that_one_difference() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    make(&source);
    copy(&source, &target);
    let time = "2001-02-03T04:05:06.12345678";
    let mut table: Vec<(String, String)> = vec![
        ("chmod 0700 d", "mode     d: 0755 -> 0700"),
        ("chmod 6755 $SRC/setuid; chmod 0755 setuid", "mode     setuid: 6755 -> 0755"),
        ("chmod 0600 fifo", "mode     fifo: 0644 -> 0600"),
        ("chown 7 plain", "owner    plain: 1000 -> 7"),
        ("chown 7 d", "owner    d: 0 -> 7"),
        ("chown -h 4000000000 symlink", "owner    symlink: 5 -> 4000000000"),
        ("chgrp 7 plain", "group    plain: 1001 -> 7"),
        ("chgrp -h 7 dangling", "group    dangling: 0 -> 7"),
        ("keep large truncate -s 300001 large", "size     large: 300000 -> 300001"),
        ("keep . bash -c 'cp -a b x1; mv x1 b'", "links    b: same file as a -> a file of its own"),
        ("keep . bash -c 'cp -a a x1; mv x1 a'", "links    b: same file as a -> a file of its own"),
        ("keep d bash -c 'cp -a d/c d/x1; mv d/x1 d/c'", "links    d/c: same file as a -> a file of its own"),
        ("chmod 0666 empty", "mode     empty: 0644 -> 0666"),
        ("keep . bash -c 'rm char; mknod char c 1 5; touch -r $SRC/char char'", "device   char: 1:3 -> 1:5"),
        ("keep . bash -c 'rm block; mknod block b 8 200; touch -r $SRC/block block'", "device   block: 7:200 -> 8:200"),
        ("keep . bash -c 'ln -sfn /elsewhere dangling; touch -h -r $SRC/dangling dangling'", "symlink  dangling: /nowhere -> /elsewhere"),
        ("keep . bash -c 'rm plain; ln -s x plain'", "type     plain: file -> symlink"),
        ("keep . bash -c 'rm fifo; mknod fifo c 1 3'", "type     fifo: fifo -> character device"),
        ("keep . bash -c 'rm -r full; touch full'", "type     full: directory -> file"),
        ("keep . touch zzz", "extra    zzz: nothing -> file"),
        ("keep d mkdir d/new", "extra    d/new: nothing -> directory"),
        ("keep . bash -c 'mkdir new; touch new/1 new/2'", "extra    new: nothing -> directory"),
        ("keep . mkfifo -- -pipe", "extra    -pipe: nothing -> fifo"),
        ("keep . rm socket", "missing  socket: socket -> nothing"),
        ("keep . rm -r full", "missing  full: directory -> nothing"),
        ("keep full/of/things rm full/of/things/thing", "missing  full/of/things/thing: file -> nothing"),
        ("keep . rm \"$(printf 'not-utf8-\\xff')\"", "missing  not-utf8-\\xff: file -> nothing"),
        ("keep . rm \"$(printf 'new\\nline')\"", "missing  new\\nline: file -> nothing"),
        ("setfattr -n user.text -v other x", "xattr    x: user.text: \"a value\" -> \"other\""),
        ("setfattr -x user.binary x", "xattr    x: user.binary: 0x00ff -> none"),
        ("setfattr -n user.more -v 1 empty", "xattr    empty: user.more: none -> \"1\""),
        ("setfattr -n user.on-dir -v x d", "xattr    d: user.on-dir: \"dir\" -> \"x\""),
        ("setfattr -n trusted.t -v 0x0103 x", "xattr    x: trusted.t: 0x0102 -> 0x0103"),
        ("setfattr -h -n trusted.on-link -v no symlink", "xattr    symlink: trusted.on-link: \"yes\" -> \"no\""),
        ("setfattr -x trusted.on-fifo fifo", "xattr    fifo: trusted.on-fifo: \"yes\" -> none"),
        ("setfattr -n security.ctfs-test -v eight x", "xattr    x: security.ctfs-test: \"seven\" -> \"eight\""),
        ("setfacl -n -m u:1234:r-- acl", "acl      acl: access: user:1234:rw- -> user:1234:r--"),
        ("setfacl -n -x g:99 acl", "acl      acl: access: group:99:r-- -> no such entry"),
        ("setfacl -d -n -m u:1000:r-x acl-dir", "acl      acl-dir: default: user:1000:rwx -> user:1000:r-x"),
        ("setfacl -k acl-dir", "acl      acl-dir: default: user::rwx,user:1000:rwx,group::r-x,mask::rwx,other::--- -> none"),
        ("keep sparse dd if=/dev/zero of=sparse bs=64K count=2 seek=1 conv=notrunc status=none", "holes    sparse: 131072 bytes of hole from 65536 -> stored zeros"),
        ("keep only-hole bash -c 'dd if=/dev/zero of=only-hole bs=1M count=3 conv=notrunc status=none'", "holes    only-hole: 3145728 bytes of hole from 0 -> stored zeros"),
        ("keep zeros truncate -s 0 zeros; keep zeros truncate -s 1M zeros", "holes    zeros: stored zeros -> 1048576 bytes of hole from 0"),
        ("keep plain bash -c \"printf 'some bites' > plain\"", "content  plain: 10 bytes -> 1 byte different, first at 6"),
    ]
    .into_iter()
    .map(|(script, line)| (script.to_owned(), line.to_owned()))
    .collect();
    for bit in 0..12 {
        let mode = 0o644 ^ (1 << bit);
        table.push((format!("chmod {mode:04o} plain"), format!("mode     plain: 0644 -> {mode:04o}")));
    }
    for name in ["plain", "d", "symlink", "char", "fifo", "."] {
        table.push((format!("1ns {name}"), format!("mtime    {name}: {time}9Z -> {}Z", time.replace("12345678", "123456790"))));
    }
    for offset in [0, 65535, 299_999] {
        table.push((format!("bit {offset}"), format!("content  large: 300000 bytes -> 1 byte different, first at {offset}")));
    }
    for (script, line) in table {
        let changed = dir.path().join("changed");
        copy(&source, &changed);
        if let Some(name) = script.strip_prefix("1ns ") {
            one_ns_later(&changed.join(name));
        } else if let Some(offset) = script.strip_prefix("bit ") {
            let program = format!("import os; f = os.open('large', os.O_RDWR); b = os.pread(f, 1, {offset}); os.pwrite(f, bytes([b[0] ^ 16]), {offset})");
            sh(&changed, &source, &format!("keep large python3 -c \"{program}\""));
        } else {
            sh(&changed, &source, &script);
        }
        assert_eq!(findings(&source, &changed), [line], "{script}");
        fs::remove_dir_all(&changed).unwrap();
    }
}

#[test]
fn access_times_are_compared_on_request_and_never_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir(&source).unwrap();
    sh(&source, &source, "mkdir d; printf x > d/f");
    copy(&source, &target);
    // Older than the mtime, so that any ordinary read would bring it up to date.
    sh(&source, &source, "touch -a -d 2000-01-01 d/f d .");
    sh(&target, &source, "touch -a -d 2000-01-01 d . ; touch -a -d 2000-01-01T00:00:01Z d/f");
    assert_eq!(findings(&source, &target), Vec::<String>::new());
    let lines = findings_with(&source, &target, &Settings { atime: true, ..settings() }).0;
    assert_eq!(lines, ["atime    d/f: 2000-01-01T00:00:00.000000000Z -> 2000-01-01T00:00:01.000000000Z"], "two comparisons did not change them");
}

#[test]
fn findings_come_in_the_order_of_the_walk_however_many_threads_read() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir(&source).unwrap();
    sh(&source, &source, "for i in $(seq 100 199); do mkdir d$i; head -c $((i * 3000 % 70001)) /dev/zero > d$i/f; done");
    copy(&source, &target);
    sh(&target, &source, "for d in d*; do keep $d/f bash -c \"printf x >> $d/f\"; chmod 700 $d; done");
    let lines = findings_with(&source, &target, &Settings { threads: NonZeroUsize::new(8).unwrap(), ..settings() }).0;
    assert_eq!(lines.len(), 200);
    let paths: Vec<_> = lines.iter().map(|line| line.split(' ').filter(|word| !word.is_empty()).nth(1).unwrap().trim_end_matches(':').to_owned()).collect();
    assert!(paths.is_sorted(), "{paths:?}");
}

#[test]
fn a_tree_deeper_than_any_path_is_walked_to_its_end_and_back() {
    const DEPTH: usize = 1500;
    let dir = tempfile::tempdir().unwrap();
    let name = "a-directory";
    for side in ["source", "target"] {
        let root = dir.path().join(side);
        fs::create_dir(&root).unwrap();
        let open = |at: &rustix::fd::OwnedFd, name: &str| rustix::fs::openat(at, name, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let mut at = rustix::fs::openat(CWD, &root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        for level in 0..=DEPTH {
            // What comes after the long way down, at the bottom, in the middle and at the top.
            if side == "source" && [0, DEPTH / 2, DEPTH].contains(&level) {
                rustix::fs::openat(&at, "z", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU).unwrap();
            }
            let time = Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
            if level < DEPTH {
                rustix::fs::mkdirat(&at, name, Mode::RWXU).unwrap();
                let below = open(&at, name);
                rustix::fs::utimensat(&at, ".", &Timestamps { last_access: time, last_modification: time }, AtFlags::empty()).unwrap();
                at = below;
            } else {
                rustix::fs::utimensat(&at, ".", &Timestamps { last_access: time, last_modification: time }, AtFlags::empty()).unwrap();
            }
        }
    }
    let lines = findings(&dir.path().join("source"), &dir.path().join("target"));
    let at = |level: usize| format!("missing  {}z: file -> nothing", format!("{name}/").repeat(level));
    assert_eq!(lines, [at(DEPTH), at(DEPTH / 2), at(0)]);
    // The standard library would open a descriptor a level.
    assert!(Command::new("rm").arg("-rf").arg(dir.path()).status().unwrap().success());
}

#[test]
fn symlinks_below_are_not_followed_and_the_two_named_are() {
    let dir = tempfile::tempdir().unwrap();
    sh(dir.path(), dir.path(), "mkdir s t out; touch out/file; ln -s ../out s/l; cp -a s/l t/l; touch -r s t; ln -s s named");
    assert_eq!(findings(&dir.path().join("named"), &dir.path().join("t")), Vec::<String>::new());
    let error = compare(&dir.path().join("none"), &dir.path().join("t"), &settings(), &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().starts_with("open ") && error.to_string().contains("none: No such file"), "{error}");
}

#[test]
fn a_file_and_a_directory_differ_in_type_and_in_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    sh(dir.path(), dir.path(), "mkdir d; touch f");
    assert_eq!(findings(&dir.path().join("d"), &dir.path().join("f")), ["type     .: directory -> file"]);
}

#[test]
fn what_is_mounted_below_is_told_and_entered_on_request_only() {
    let dir = tempfile::tempdir().unwrap();
    sh(dir.path(), dir.path(), "mkdir -p s/m t/m; touch -d 2001-01-01 s/m t/m s t");
    // The mounts are those of this thread and of what it starts.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: only the mounts and the working directory stop being shared; no memory, no descriptors.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS | rustix::thread::UnshareFlags::FS) }.unwrap();
            let private = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            let target = dir.path().join("t/m");
            rustix::mount::mount("tmpfs", &target, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
            sh(&target, &target, "touch file; chmod 755 . ; touch -d 2001-01-01 .");
            let (s, t) = (dir.path().join("s"), dir.path().join("t"));
            assert_eq!(findings(&s, &t), ["# m"]);
            let lines = findings_with(&s, &t, &Settings { cross_mounts: true, ..settings() }).0;
            assert_eq!(lines, ["extra    m/file: nothing -> file"]);
            rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH).unwrap();
        });
    });
}

#[test]
fn what_may_not_be_read_is_one_trouble_each_and_the_rest_is_compared() {
    let dir = tempfile::tempdir().unwrap();
    sh(dir.path(), dir.path(), "chmod 755 . ; mkdir -p s/closed; printf x > s/file; printf y > s/other; touch s/closed/in; chmod 000 s/closed s/file; cp -a s t; chmod 600 t/other; chmod 600 s/other; chown 65534 t/other");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let nobody = rustix::fs::Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            let lines = findings(&dir.path().join("s"), &dir.path().join("t"));
            let denied = "Permission denied (os error 13)";
            assert_eq!(
                lines,
                [
                    format!("! closed: source: open directory: {denied}"),
                    format!("! closed: target: open directory: {denied}"),
                    format!("! file: source: open: {denied}"),
                    format!("! file: target: open: {denied}"),
                    "owner    other: 0 -> 65534".to_owned(),
                    format!("! other: source: open: {denied}"),
                ]
            );
        });
    });
}

#[test]
fn a_tree_that_changes_meanwhile_is_told_about_and_what_stands_still_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir(&source).unwrap();
    sh(&source, &source, "mkdir moving still; for i in $(seq 200); do printf $i > still/$i; printf $i > moving/$i; done");
    copy(&source, &target);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0u64.. {
                if done.load(Relaxed) {
                    break;
                }
                let file = target.join(format!("moving/{}", round % 200 + 1));
                let _ = match round % 4 {
                    0 => fs::remove_file(&file),
                    1 => fs::create_dir(file.with_extension("d")),
                    2 => fs::write(&file, b"other bytes"),
                    _ => fs::rename(&file, file.with_extension("renamed")),
                };
            }
        });
        for _ in 0..20 {
            let lines = findings(&source, &target);
            assert!(lines.iter().any(|line| line.contains("moving")), "{lines:?}");
            assert!(!lines.iter().any(|line| line.contains("still")), "{lines:?}");
        }
        done.store(true, Relaxed);
    });
}

#[test]
fn the_caller_may_stop_at_any_finding() {
    let dir = tempfile::tempdir().unwrap();
    sh(dir.path(), dir.path(), "mkdir s t; cd s; for i in $(seq 3000); do printf $i > $i; done; cp -a . ../t; chmod 600 ../t/*");
    let mut found = 0;
    compare(&dir.path().join("s"), &dir.path().join("t"), &settings(), &mut |event| {
        found += usize::from(matches!(event, Event::Found(_)));
        if found == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert_eq!(found, 5);
}

#[test]
fn descriptors_are_given_back() {
    let dir = tempfile::tempdir().unwrap();
    sh(dir.path(), dir.path(), "mkdir -p s/a/b/c; touch s/a/1 s/a/b/2; cp -a s t");
    let (s, t) = (dir.path().join("s"), dir.path().join("t"));
    let open_below = || {
        let prefix = dir.path().as_os_str().as_bytes();
        fs::read_dir("/proc/self/fd").unwrap().filter(|fd| fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to.as_os_str().as_bytes().starts_with(prefix))).count()
    };
    findings(&s, &t);
    assert_eq!(open_below(), 0);
}
