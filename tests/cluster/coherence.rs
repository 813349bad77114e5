//! One truth on every server, also in the moments in which it changes.

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

use crate::support::Cluster;

/// What a program that looks at `mnt` sees of the three things that change: a name that is replaced,
/// a time that is set, a directory that grows.
fn look(mnt: &Path) -> [u64; 3] {
    let latest = fs::read_link(mnt.join("d/latest")).expect("read the name");
    let latest = latest.to_str().and_then(|text| text.parse().ok()).expect("a number");
    let time = fs::metadata(mnt.join("d/time")).expect("stat").mtime();
    let links = fs::metadata(mnt.join("d/grows")).expect("stat").nlink();
    [latest, time.unsigned_abs(), links]
}

#[test]
fn what_was_seen_on_one_server_is_never_unseen_on_another() {
    let cluster = Cluster::start("unseen", 3);
    let dir = cluster.mnt(3).join("d");
    fs::create_dir_all(dir.join("grows")).unwrap();
    fs::write(dir.join("time"), b"").unwrap();
    symlink("0", dir.join("latest")).unwrap();
    let stop = AtomicBool::new(false);
    let (handed, seen) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let file = fs::File::open(dir.join("time")).unwrap();
            for number in 1..=200u32 {
                symlink(number.to_string(), dir.join("next")).unwrap();
                fs::rename(dir.join("next"), dir.join("latest")).unwrap();
                file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs((1 << 32) + u64::from(number))).unwrap();
                fs::create_dir(dir.join("grows").join(number.to_string())).unwrap();
            }
            stop.store(true, SeqCst);
        });
        // The token is in the hands of a program on one server, then on the other.
        let (mut last, mut handed, mut changes) = ([0; 3], 0u64, 0u64);
        while !stop.load(SeqCst) {
            let server = 1 + (handed % 2) as usize;
            let now = look(&cluster.mnt(server));
            let unseen = (0..3).find(|&thing| now[thing] < last[thing]);
            assert_eq!(unseen, None, "s{server} shows {now:?} after the other showed {last:?}");
            changes += u64::from(now != last);
            (last, handed) = (now, handed + 1);
        }
        writer.join().unwrap();
        (handed, changes)
    });
    eprintln!("handed over {handed} times, {seen} times with news");
    assert!(seen > 20, "hardly anything was seen while it changed: {seen} of {handed}");
    assert_eq!(look(&cluster.mnt(1)), [200, (1 << 32) + 200, 202]);
}

/// Lines in the logs of all servers that say so.
fn told(cluster: &Cluster, servers: usize, what: &str) -> Vec<String> {
    let log = |server| fs::read_to_string(cluster.state(server).join("ctfs.log")).expect("a log");
    (1..=servers).flat_map(|server| {
        log(server).lines().filter(|line| line.contains(what)).map(|line| format!("s{server}: {line}")).collect::<Vec<_>>()
    }).collect()
}

#[test]
fn two_servers_that_make_directories_in_one_directory_never_wait_for_each_others_leases() {
    let cluster = Cluster::start("two-make", 3);
    fs::create_dir(cluster.mnt(1).join("d")).unwrap();
    let lapses = || told(&cluster, 3, "read lease lapsed").len();
    let before = lapses();
    std::thread::scope(|scope| {
        for server in [1, 2] {
            let dir = cluster.mnt(server).join("d");
            scope.spawn(move || {
                for number in 0..150 {
                    fs::create_dir(dir.join(format!("{server}-{number}"))).unwrap();
                    // What the other makes is looked at, and names that are not there.
                    let _ = fs::metadata(dir.join(format!("{}-{number}", 3 - server)));
                    let _ = fs::metadata(dir.join("none"));
                }
            });
        }
    });
    for server in 1..=3 {
        assert_eq!(fs::read_dir(cluster.mnt(server).join("d")).unwrap().count(), 300);
    }
    assert_eq!(told(&cluster, 3, "only after the kernel's timeouts ran out"), [] as [String; 0]);
    assert_eq!(lapses(), before, "nobody was let go");
}
