//! Two mounts of one cluster on this machine: what one server's programs see of the other's.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        },
    },
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use ctfs_meta::{Op, Quota};
use ctfs_types::{FileName, Ino, LogIndex};
use ctfs_vfs::Metadata;
use rustix::fs::Dir;
use tokio::sync::watch;

use super::*;

#[test]
fn a_name_made_changed_or_removed_elsewhere_is_seen_at_once() {
    let Some(mounts) = Mounts::new(2) else { return };
    mounts.run(|paths| {
        let (here, there) = (paths[0].join("d"), paths[1].join("d"));
        fs::create_dir(&here).unwrap();
        for n in 0..50 {
            let name = format!("f{n}");
            // The absence is remembered by the kernel, then the presence, then the mode.
            assert_eq!(fs::metadata(there.join(&name)).unwrap_err().kind(), ErrorKind::NotFound);
            fs::write(here.join(&name), b"x").unwrap();
            assert_eq!(fs::metadata(there.join(&name)).unwrap().mode() & 0o777, 0o644);
            fs::set_permissions(here.join(&name), fs::Permissions::from_mode(0o600)).unwrap();
            assert_eq!(fs::metadata(there.join(&name)).unwrap().mode() & 0o777, 0o600);
            fs::rename(here.join(&name), here.join("renamed")).unwrap();
            assert!(fs::metadata(there.join(&name)).is_err());
            assert!(fs::metadata(there.join("renamed")).is_ok());
            fs::remove_file(here.join("renamed")).unwrap();
            assert!(fs::metadata(there.join("renamed")).is_err());
        }
    });
}

#[test]
fn a_listing_that_the_kernel_keeps_goes_when_a_name_changes_elsewhere() {
    let Some(mounts) = Mounts::new(2) else { return };
    mounts.run(|paths| {
        let list = |dir: &Path| -> BTreeSet<OsString> {
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect()
        };
        let again = |dir: &mut Dir| -> BTreeSet<OsString> {
            dir.rewind();
            let names = dir.map(|entry| OsStr::from_bytes(entry.unwrap().file_name().to_bytes()).to_owned());
            names.filter(|name| name != "." && name != "..").collect()
        };
        for round in 0..20 {
            // A new one each time: where names change elsewhere, the kernel keeps nothing for a minute.
            let dirs = [0, 1].map(|server: usize| paths[server].join(format!("d{round}")));
            fs::create_dir(&dirs[0]).unwrap();
            let mut names = BTreeSet::new();
            for n in 0..40 * round {
                let name = OsString::from(format!("name-{n}"));
                fs::create_dir(dirs[0].join(&name)).unwrap();
                names.insert(name);
            }
            let mut open = Dir::new(File::open(&dirs[1]).unwrap()).unwrap();
            for _ in 0..3 {
                assert_eq!(list(&dirs[1]), names);
                assert_eq!(again(&mut open), names);
            }
            // Changed by programs of the same server: their kernel does not ask.
            fs::create_dir(dirs[1].join("own")).unwrap();
            names.insert("own".into());
            assert_eq!(list(&dirs[1]), names);
            assert_eq!(again(&mut open), names);
            // While somebody lists it without end.
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                scope.spawn(|| while !stop.load(Relaxed) { list(&dirs[1]); });
                for n in 0..5 {
                    let name = OsString::from(format!("other-{n}"));
                    fs::create_dir(dirs[0].join(&name)).unwrap();
                    names.insert(name);
                    assert_eq!(again(&mut open), names, "round {round}");
                    assert_eq!(list(&dirs[1]), names, "round {round}");
                }
                stop.store(true, Relaxed);
            });
            fs::remove_dir(dirs[0].join("own")).unwrap();
            names.remove(OsStr::new("own"));
            assert_eq!(again(&mut open), names);
            assert_eq!(list(&dirs[1]), names);
        }
    });
}

#[test]
fn close_then_open_elsewhere_sees_the_bytes_and_so_does_a_read_after_fsync() {
    let Some(mounts) = Mounts::new(2) else { return };
    mounts.run(|paths| {
        fs::write(paths[0].join("f"), b"first").unwrap();
        let mut reader = File::open(paths[1].join("f")).unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first");
        for n in 0..30 {
            let writer = OpenOptions::new().write(true).open(paths[0].join("f")).unwrap();
            let bytes = format!("round {n:03}");
            writer.write_all_at(bytes.as_bytes(), 0).unwrap();
            if n % 2 == 0 {
                writer.sync_all().unwrap();
            } else {
                drop(writer);
            }
            // Through the handle that was open all the time, whose pages were dropped.
            let mut seen = vec![0; bytes.len()];
            reader.read_exact_at(&mut seen, 0).unwrap();
            assert_eq!(String::from_utf8(seen).unwrap(), bytes);
            assert_eq!(fs::read_to_string(paths[1].join("f")).unwrap(), bytes);
        }
    });
}

#[test]
fn two_servers_making_names_in_one_directory_do_not_wait_for_each_other() {
    let Some(mounts) = Mounts::new(2) else { return };
    mounts.run(|paths| {
        fs::create_dir(paths[0].join("d")).unwrap();
        let workers: Vec<_> = (0..2)
            .map(|server| {
                let dir = paths[server].join("d");
                thread::spawn(move || {
                    for n in 0..100 {
                        fs::create_dir(dir.join(format!("{server}-{n}"))).unwrap();
                        fs::metadata(dir.join(format!("{}-{n}", 1 - server))).map(drop).unwrap_or(());
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!(fs::read_dir(paths[1].join("d")).unwrap().count(), 200);
    });
    // A conflict is neither waited out nor swept away each time.
    for mount in &mounts.mounts {
        assert_eq!(mount.notifier().last_resorts(), 0);
        assert!(mount.notifier().sweeps() <= 100, "{} sweeps", mount.notifier().sweeps());
    }
}

/// The kernel holds the directory's lock for a `mkdir` that waits for a third server; the change that
/// comes from elsewhere meanwhile cannot take it.
#[test]
fn a_change_is_acknowledged_while_a_local_request_holds_its_directory() {
    let Some(mounts) = Mounts::new(2) else { return };
    let (dir, notifier) = (mounts.path(0).join("d"), mounts.mounts[0].notifier());
    let parent = mounts.run(move |paths| {
        fs::create_dir_all(paths[0].join("d/gone")).unwrap();
        fs::metadata(paths[0].join("d/gone")).unwrap();
        Ino(fs::metadata(paths[0].join("d")).unwrap().ino())
    });
    let ns = mounts.servers[0].meta.replica().clone();
    let before = ns.read().applied();
    let third = watch::Sender::new(LogIndex(0));
    mounts.cluster.wait_for(third.subscribe());
    let made = {
        let dir = dir.clone();
        thread::spawn(move || fs::create_dir(dir.join("here")))
    };
    let other = mounts.servers[1].meta.clone();
    while ns.read().applied() == before {
        thread::yield_now();
    }
    // Applied, so the kernel is inside the request. A program on the other server could not come near
    // the directory before everybody shows what happened to it.
    let removed = mounts.runtime.spawn(async move {
        let name = FileName::new(b"gone").unwrap();
        other.propose_op(Op::Rmdir { parent, name }).await
    });
    while ns.read().applied().0 < before.0 + 2 {
        thread::yield_now();
    }
    let index = ns.read().applied();
    let mut told = notifier.invalidated();
    let acknowledged = mounts.runtime.block_on(async { told.wait_for(|told| *told >= index).await.map(|_| ()) });
    assert!(acknowledged.is_ok() && !made.is_finished() && !removed.is_finished());
    assert_eq!((notifier.last_resorts(), notifier.sweeps()), (0, 1));
    third.send_replace(LogIndex(u64::MAX));
    made.join().unwrap().unwrap();
    mounts.runtime.block_on(removed).unwrap().unwrap();
    mounts.run(move |_| {
        assert!(fs::metadata(dir.join("gone")).is_err(), "the kernel kept a name that it was to forget");
        assert_eq!(fs::read_dir(dir).unwrap().count(), 1);
    });
}

/// What was mounted on a name would go with it.
#[test]
fn a_mount_inside_survives_changes_of_two_servers_around_it() {
    let Some(mounts) = Mounts::new(2) else { return };
    mounts.run(|paths| {
        fs::create_dir_all(paths[0].join("d/inside")).unwrap();
        let inside = paths[0].join("d/inside");
        shell(&inside, "mount -t tmpfs none \"$D\"; touch \"$D/x\"");
        let workers: Vec<_> = (0..2)
            .map(|server| {
                let dir = paths[server].join("d");
                thread::spawn(move || (0..20).for_each(|n| fs::create_dir(dir.join(format!("{server}-{n}"))).unwrap()))
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        let there = inside.join("x").exists();
        shell(&inside, "umount \"$D\"");
        assert!(there, "detached");
    });
    assert_eq!(mounts.mounts[0].notifier().sweeps(), 0);
}

#[test]
fn when_the_lease_is_lost_the_kernel_shows_nothing_that_it_has_kept() {
    let Some(mounts) = Mounts::new(1) else { return };
    let (meta, notifier) = (mounts.servers[0].meta.clone(), mounts.mounts[0].notifier());
    mounts.run(move |paths| {
        fs::write(paths[0].join("f"), b"kept").unwrap();
        let file = File::open(paths[0].join("f")).unwrap();
        let read = || file.read_at(&mut [0; 4], 0);
        assert_eq!(read().unwrap(), 4);
        refuse_when_cut_off(&paths[0]);
        meta.cut_off();
        assert_eq!(read().unwrap(), 4, "from the kernel's pages; nobody has told it anything");
        notifier.forget_everything();
        // Its threads do that.
        while read().is_ok() {
            thread::yield_now();
        }
        assert!(fs::metadata(paths[0].join("f")).is_err());
    });
}

/// Has a server fail to read when it is cut off.
fn refuse_when_cut_off(mountpoint: &Path) {
    rustix::fs::setxattr(mountpoint, "ctfs.on-partition", b"error", rustix::fs::XattrFlags::empty()).unwrap();
}

/// `mv` asks for a rename before it looks. A directory that the kernel still had in its old place
/// could not be taken up in the new one in the middle of a rename: ESTALE, again and again.
#[test]
fn a_directory_moved_elsewhere_is_renamed_here_without_being_looked_at() {
    let Some(mounts) = Mounts::new(2) else { return };
    mounts.run(|paths| {
        fs::create_dir_all(paths[0].join("a/below/deeper")).unwrap();
        fs::create_dir_all(paths[0].join("b/below")).unwrap();
        for path in &paths {
            fs::metadata(path.join("a/below/deeper")).unwrap();
            fs::metadata(path.join("b/below")).unwrap();
        }
        for _ in 0..5 {
            fs::rename(paths[0].join("a"), paths[0].join("b/below/a")).unwrap();
            fs::rename(paths[1].join("b/below/a"), paths[1].join("a")).unwrap();
        }
    });
}

/// The kernel takes a directory up in its new place only if the lock of the old one is free, and nobody waits for
/// that lock either: ESTALE.
#[test]
fn a_directory_moved_elsewhere_is_found_while_programs_here_are_busy_in_its_old_place() {
    let Some(mounts) = Mounts::new(2) else { return };
    mounts.run(|paths| {
        fs::create_dir_all(paths[0].join("busy/d/below")).unwrap();
        fs::create_dir(paths[0].join("calm")).unwrap();
        let (done, made) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    fs::create_dir(paths[1].join("busy/other")).unwrap();
                    fs::remove_dir(paths[1].join("busy/other")).unwrap();
                    made.fetch_add(1, Relaxed);
                }
            });
            let found: std::io::Result<()> = (0..200).try_for_each(|_| {
                for [from, to] in [["busy/d", "calm/d"], ["calm/d", "busy/d"]] {
                    fs::rename(paths[0].join(from), paths[0].join(to)).unwrap();
                    fs::metadata(paths[1].join(to).join("below"))?;
                }
                Ok(())
            });
            done.store(true, Relaxed);
            found.unwrap();
        });
        assert!(made.into_inner() > 10);
    });
}

#[test]
fn a_working_directory_survives_changes_around_it() {
    let Some(mounts) = Mounts::new(2) else { return };
    mounts.run(|paths| {
        fs::create_dir_all(paths[0].join("a/b")).unwrap();
        let script = format!("cd \"$D/a/b\"; touch {}/a/x; mv {0}/a/x {0}/a/y; pwd -P; ls ..", paths[1].display());
        let printed = shell(&paths[0], &script);
        assert_eq!(printed.lines().skip(1).collect::<Vec<_>>(), ["b", "y"]);
        assert!(printed.lines().next().unwrap().ends_with("/a/b"));
    });
}

#[test]
fn a_lock_held_elsewhere_is_waited_for() {
    let Some(mounts) = Mounts::new(2) else { return };
    mounts.run(|paths| {
        fs::write(paths[0].join("f"), b"").unwrap();
        let script = format!(
            r#"exec 9>"$D/f"; flock -x 9
            (flock -x {}/f echo second) & sleep 0.3; echo first; flock -u 9; wait"#,
            paths[1].display()
        );
        assert_eq!(shell(&paths[0], &script), "first\nsecond\n");
    });
}

#[test]
fn lines_appended_on_two_servers_in_turn_are_all_there() {
    let Some(mounts) = Mounts::new(2) else { return };
    mounts.run(|paths| {
        for n in 0..40 {
            let mut log = OpenOptions::new().append(true).create(true).open(paths[n % 2].join("log")).unwrap();
            writeln!(log, "line {n}").unwrap();
        }
        let expected: String = (0..40).map(|n| format!("line {n}\n")).collect();
        assert_eq!(fs::read_to_string(paths[0].join("log")).unwrap(), expected);
        assert_eq!(fs::read_to_string(paths[1].join("log")).unwrap(), expected);
    });
}

#[test]
fn a_cut_off_server_gives_errors_and_does_not_hang() {
    let Some(mounts) = Mounts::new(2) else { return };
    let meta = mounts.servers[1].meta.clone();
    mounts.run(move |paths| {
        fs::write(paths[0].join("f"), b"x").unwrap();
        assert!(fs::metadata(paths[1].join("f")).is_ok());
        refuse_when_cut_off(&paths[1]);
        meta.cut_off();
        // Until what the kernel was told before has run out.
        let error = loop {
            match fs::metadata(paths[1].join("f")) {
                Ok(_) => thread::yield_now(),
                Err(error) => break error,
            }
        };
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert_eq!(fs::write(paths[1].join("g"), b"").unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(fs::metadata(&paths[1]).is_ok(), "stat of the mountpoint still answers");
    });
}

/// A kernel cuts a file off at what it takes for its end when a direct write beyond fails, and what
/// it takes for the end may be older than what others appended and synced.
#[test]
fn a_direct_write_that_fails_takes_nothing_of_what_others_appended() {
    for when in [When::Opened, When::Later] {
        direct_write_fails(when);
    }
}

/// When a handle was made direct; the kernel takes other ways then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Opened,
    Later,
}

fn direct_write_fails(when: When) {
    let Some(mounts) = Mounts::new(2) else { return };
    let dir = mounts.path(0).join("d");
    fs::create_dir(&dir).unwrap();
    let quota = Op::SetQuota { ino: Ino(fs::metadata(&dir).unwrap().ino()), quota: Quota { bytes: Some(16 << 10), files: None } };
    mounts.runtime.block_on(mounts.servers[0].meta.propose(quota)).unwrap();
    mounts.run(move |paths| {
        let (here, there) = (paths[0].join("d/f"), paths[1].join("d/f"));
        let mut memory = vec![1; 64 << 10];
        let aligned = memory.as_ptr().align_offset(4096);
        let block = &mut memory[aligned..aligned + (32 << 10)];
        let flags = if when == When::Opened { libc::O_DIRECT } else { 0 };
        let direct = OpenOptions::new().write(true).create_new(true).custom_flags(flags).open(&here).unwrap();
        direct.write_all_at(&block[..4096], 0).unwrap();
        direct.sync_all().unwrap();
        if when == When::Later {
            // SAFETY: fcntl with a number touches no memory.
            assert_eq!(unsafe { libc::fcntl(direct.as_raw_fd(), libc::F_SETFL, libc::O_DIRECT) }, 0);
        }
        let mut appender = OpenOptions::new().append(true).open(&there).unwrap();
        appender.write_all(&[2; 12 << 10]).unwrap();
        appender.sync_all().unwrap();

        // Past what the kernel here knows, also within what there is.
        for at in [8 << 10, 16 << 10] {
            let written = direct.write_at(block, at);
            if at < 16 << 10 && when == When::Later {
                // The kernel knows no short writes here, and says so; what fits is there all the same.
                assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EIO));
            } else if at < 16 << 10 {
                assert_eq!(written.unwrap(), 8 << 10, "what fits");
            } else {
                assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EDQUOT));
            }
            direct.sync_all().unwrap();
            let wanted = [vec![1; 4096], vec![2; 4096], vec![1; 8192]].concat();
            assert!(fs::read(&there).unwrap() == wanted, "after a write at {at}, {when:?}");
            assert!(fs::read(&here).unwrap() == wanted, "after a write at {at}, {when:?}");
        }
    });
}
