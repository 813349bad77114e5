//! Bad input gives one clear error and loses nothing.

use std::{fs, path::Path, process::Command, time::Duration};

use crate::support::{CTFS, Cluster, noise, text, wait_for, write_synced};

/// Runs `ctfs up` for a server that does not exist yet, in the namespace of server 1.
fn up(cluster: &Cluster, args: &str) -> (i32, String) {
    let output = cluster.sh(1, &format!("unset CTFS_STATE; {CTFS} {args} 2>&1 || echo exit=$?"));
    let code = output.lines().rev().find_map(|line| line.strip_prefix("exit=")).map_or(0, |code| code.parse().unwrap());
    (code, output)
}

#[test]
fn each_bad_input_gives_one_clear_error_and_loses_nothing() {
    let cluster = Cluster::start("input", 1);
    fs::write(cluster.mnt(1).join("kept"), "kept").unwrap();
    let scratch = cluster.beside("scratch");
    let (dir, state) = (scratch.join("mnt"), scratch.join("state"));
    let (dir_s, state_s) = (dir.display(), state.display());
    let own = cluster.json(1, &["status"])["servers"][0]["addresses"][0].as_str().unwrap().to_owned();
    let host = own.rsplit_once(':').unwrap().0.to_owned();
    let token = |ttl: &str| cluster.json(1, &["token", "--ttl", ttl])["token"].as_str().unwrap().to_owned();

    let good = token("10m");
    let mut mistyped = good.clone();
    let last = if mistyped.pop() == Some('a') { 'b' } else { 'a' };
    mistyped.push(last);
    let mut cases: Vec<(&str, String, &str)> = vec![
        ("not a directory", format!("up {CTFS} --state {state_s}"), "E0101"),
        ("not empty", format!("up {} --state {state_s}", scratch.display()), "E0102"),
        ("already mounted", format!("up {} --state {state_s}", cluster.mnt(1).display()), "E0103"),
        ("port in use", format!("up {dir_s} --state {state_s} --listen {own}"), "E0104"),
        ("mistyped token", format!("up {dir_s} --state {state_s} --listen {host}:7555 --join {mistyped}"), "E0110"),
        ("not a token", format!("up {dir_s} --state {state_s} --listen {host}:7555 --join hello"), "E0110"),
    ];
    let expired = token("1s");
    cases.push(("expired token", format!("up {dir_s} --state {state_s} --listen {host}:7555 --join {expired}"), "E0108"));
    std::thread::sleep(std::time::Duration::from_millis(1100));
    for (case, args, code) in cases {
        let (exit, said) = up(&cluster, &args);
        assert_ne!(exit, 0, "{case}: {said}");
        assert!(said.contains(&format!("error[{code}]")), "{case}: {said}");
        assert!(said.contains("  try   "), "{case} says no next step: {said}");
    }
    let config = scratch.join("bad.toml");
    fs::write(&config, "[cache]\nsizee = \"1GiB\"\n").unwrap();
    let (exit, said) = up(&cluster, &format!("up {dir_s} --state {state_s} --config {}", config.display()));
    assert_eq!(exit, 2, "{said}");
    assert!(said.contains("E0116") && said.contains("size") && said.contains('2'), "{said}");

    assert_eq!(fs::read_to_string(cluster.mnt(1).join("kept")).unwrap(), "kept");
    // The good token is still good: none of the above used it up.
    let joined = cluster.script(&["add"]);
    assert!(joined.contains("joined"), "{joined}");
}

#[test]
fn a_used_token_and_a_foreign_cluster_are_refused() {
    let cluster = Cluster::start("tokens", 1);
    let token = cluster.json(1, &["token"])["token"].as_str().unwrap().to_owned();
    let own = cluster.json(1, &["status"])["servers"][0]["addresses"][0].as_str().unwrap().to_owned();
    let host = own.rsplit_once(':').unwrap().0;
    let place = |name: &str| format!("up {0}/mnt --state {0}/state --name {name} --cache-size 64MiB", cluster.beside(name).display());
    let down = |name: &str| format!("--state {}/state down", cluster.beside(name).display());
    let (exit, said) = up(&cluster, &format!("{} --listen {host}:7501 --join {token}", place("one")));
    assert_eq!(exit, 0, "{said}");
    let (exit, said) = up(&cluster, &format!("{} --listen {host}:7502 --join {token}", place("two")));
    assert_ne!(exit, 0, "{said}");
    assert!(said.contains("E0109") || said.contains("E0107"), "{said}");

    let (exit, said) = up(&cluster, &format!("{} --listen {host}:7503", place("lone")));
    assert_eq!(exit, 0, "{said}");
    let (exit, said) = up(&cluster, &format!("{} && {CTFS} {} --listen {host}:7503 --join {token}", down("lone"), place("lone")));
    assert_ne!(exit, 0, "{said}");
    assert!(said.contains("E0106"), "{said}");

    // The same line again, as an impatient operator types it.
    let again = format!("{} --listen {host}:7501 --join {token}", place("one"));
    let (exit, said) = up(&cluster, &again);
    assert_eq!(exit, 0, "{said}");
    assert!(said.contains("already up") && said.contains("it is a member already"), "{said}");
    let (exit, said) = up(&cluster, &format!("{} && {CTFS} {again}", down("one")));
    assert_eq!(exit, 0, "{said}");
    assert!(said.contains("was already a member") && !said.contains("created"), "{said}");
    let (exit, said) = up(&cluster, &format!("{again} --zone elsewhere"));
    assert_eq!(exit, 2, "{said}");
    assert!(said.contains("E0121") && said.contains("join as a new server"), "{said}");
}

#[test]
fn a_join_that_was_killed_is_finished_by_the_same_command() {
    let cluster = Cluster::start("join-killed", 1);
    let own = cluster.json(1, &["status"])["servers"][0]["addresses"][0].as_str().unwrap().to_owned();
    let host = own.rsplit_once(':').unwrap().0;
    for (n, after) in ["0.03", "0.1", "0.2"].into_iter().enumerate() {
        let dir = cluster.beside(&n.to_string());
        let token = cluster.json(1, &["token"])["token"].as_str().unwrap().to_owned();
        let join = format!(
            "up {0}/mnt --state {0}/state --name j{n} --cache-size 64MiB --listen {host}:{1} --join {token}",
            dir.display(),
            7600 + n
        );
        // In the foreground, so that the daemon itself is killed.
        up(&cluster, &format!("{join} --foreground & p=$!; sleep {after}; kill -KILL $p; wait $p || true; true"));
        let (exit, said) = up(&cluster, &join);
        let status = cluster.json(1, &["status"]);
        assert_eq!(exit, 0, "killed after {after} s: {said}\n{status}");
        assert!(status["servers"].to_string().contains(&format!("\"j{n}\"")), "{status}");
        let removed = cluster.try_ctfs(1, &["node", "remove", &format!("j{n}"), "--yes"]);
        let (_, down) = up(&cluster, &format!("--state {}/state down", dir.display()));
        assert!(removed.status.success(), "{}{down}", text(&removed.stderr));
    }
}

#[test]
fn a_full_disk_is_an_error_and_loses_nothing() {
    let image = tempfile::tempdir_in("/var/tmp").unwrap();
    let disk = image.path().join("disk");
    let name = "t-full";
    let unmount = loop_disk(&disk, "700M");
    {
        let cluster = Cluster::start_in("full", 1, "--cache-size 64MiB", "", &disk.join(name));
        let mnt = cluster.mnt(1);
        let kept = noise(1, 3_000_000);
        write_synced(&mnt.join("kept"), &kept).unwrap();
        let mut written = Vec::new();
        let error = loop {
            let n = written.len() as u64;
            match write_synced(&mnt.join(format!("f{n}")), &noise(100 + n, 8 << 20)) {
                Ok(()) => written.push(n),
                Err(error) => break error,
            }
            assert!(n < 200, "the disk never fills");
        };
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
        assert!(written.len() > 5, "{} files", written.len());
        assert!(fs::read(mnt.join("kept")).unwrap() == kept);
        for n in &written {
            assert!(fs::read(mnt.join(format!("f{n}"))).unwrap() == noise(100 + n, 8 << 20), "f{n}");
        }
        // Deleting works on a full disk, and so does everything that needs little room.
        fs::remove_file(mnt.join("f0")).unwrap();
        fs::create_dir(mnt.join("still-works")).unwrap();
        fs::write(mnt.join("small"), "small").unwrap();
    }
    drop(unmount);
}

#[test]
fn a_cache_gives_way_to_whatever_else_fills_its_disk_and_a_full_disk_does_not_keep_a_server_down() {
    let image = tempfile::tempdir_in("/var/tmp").unwrap();
    let disk = image.path().join("disk");
    let unmount = loop_disk(&disk, "1500M");
    {
        let cluster = Cluster::start_in("giveway", 1, "--cache-size 300MiB", "", &disk.join("t-giveway"));
        let (mnt, cache) = (cluster.mnt(1), cluster.state(1).join("cache"));
        let name = |n: u64| mnt.join(format!("f{n}"));
        let mut written = 0..0;
        let mut write = |more: u64| {
            for n in written.end..written.end + more {
                write_synced(&name(n), &noise(n, 8 << 20)).unwrap();
            }
            written.end += more;
            written.clone()
        };
        let check = |files: std::ops::Range<u64>| {
            for n in files {
                assert!(fs::read(name(n)).unwrap() == noise(n, 8 << 20), "f{n}");
            }
        };
        write(12);
        assert!(taken(&cache) > 40 << 20, "{} bytes cached", taken(&cache));

        // Somebody else takes so much that the reserve is not free even without the cache.
        let filler = disk.join("filler");
        let take = (free(&disk) - (200 << 20)).to_string();
        assert!(Command::new("fallocate").args(["-l", &take]).arg(&filler).status().unwrap().success());
        wait_for("the cache to give way", Duration::from_secs(20), || (taken(&cache) < 4 << 20).then_some(()));
        wait_for("df to say that nothing can be written", Duration::from_secs(20), || (free(&mnt) == 0).then_some(()));
        let refused = write_synced(&mnt.join("more"), &noise(99, 8 << 20)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC), "{refused}");
        fs::create_dir(mnt.join("names-still-work")).unwrap();
        fs::write(mnt.join("small"), "small").unwrap();
        fs::remove_file(&filler).unwrap();
        wait_for("df to show the room", Duration::from_secs(20), || (free(&mnt) > 0).then_some(()));
        let files = write(6);
        check(files.clone());

        // Killed, and the disk filled to the last block: the cache starts empty, which is room.
        assert!(taken(&cache) > 40 << 20, "{} bytes cached", taken(&cache));
        cluster.kill(1);
        let full = Command::new("dd").args(["if=/dev/zero", "bs=1M", "status=none"]).arg(format!("of={}", filler.display())).status().unwrap();
        assert!(!full.success(), "dd goes on until the disk is full");
        // Not healthy, as it says itself, but up.
        cluster.restart(1);
        check(files);
        fs::remove_file(name(0)).unwrap();
        fs::remove_file(&filler).unwrap();
        wait_for("changes to be taken again", Duration::from_secs(20), || fs::create_dir(mnt.join("up-again")).ok());
        assert_eq!(fs::read_to_string(mnt.join("small")).unwrap(), "small");
    }
    drop(unmount);
}

/// Bytes that programs may still write where `path` is.
fn free(path: &Path) -> u64 {
    let stat = rustix::fs::statvfs(path).unwrap();
    stat.f_bavail * stat.f_frsize
}

/// Bytes on disk under `dir`.
fn taken(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let of = |path: &Path| fs::symlink_metadata(path).map_or(0, |meta| meta.blocks() * 512);
    entries.flatten().map(|e| if e.path().is_dir() { taken(&e.path()) } else { of(&e.path()) }).sum()
}

/// Mounts a file system of its own on `disk`.
fn loop_disk(disk: &Path, size: &str) -> Unmount {
    fs::create_dir(disk).unwrap();
    let line = format!("truncate -s {size} {0}.img; mkfs.ext4 -q {0}.img; mount -o loop {0}.img {0}", disk.display());
    assert!(Command::new("bash").args(["-euc", &line]).status().unwrap().success());
    Unmount(disk.to_owned())
}

/// Takes a loop mount away, also when the test fails.
struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(done.is_ok_and(|status| status.success()) || std::thread::panicking(), "umount {}", self.0.display());
    }
}

#[test]
fn a_second_up_says_already_up() {
    let cluster = Cluster::start("again", 1);
    let again = cluster.command_start(1);
    assert!(again.contains("already up"), "{again}");
}

#[test]
fn without_a_daemon_status_says_so_and_exits_with_3() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let output = Command::new(CTFS).arg("--state").arg(dir.path()).arg("status").output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("E0117"));
}
