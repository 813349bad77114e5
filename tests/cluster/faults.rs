//! Servers die; nothing that was acknowledged is lost.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, atomic::{AtomicBool, Ordering::Relaxed}},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::support::{Cluster, noise, wait_for, write_synced};

/// Writes and fsyncs small and large files, and remembers what was acknowledged and the longest pause.
struct Writer {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<Mutex<Vec<(String, u64, usize)>>>,
    thread: Option<JoinHandle<Duration>>,
}

impl Writer {
    fn start(dir: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(Mutex::new(Vec::new()));
        let (stopped, done) = (stop.clone(), acknowledged.clone());
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            for seed in 0.. {
                if stopped.load(Relaxed) {
                    break;
                }
                let name = format!("f{seed}");
                let len = if seed % 5 == 0 { 1_500_000 } else { 1 + (seed as usize * 977) % 9000 };
                let start = Instant::now();
                // An error is no acknowledgement; what counts is that success is never taken back.
                if write_synced(&dir.join(&name), &noise(seed, len)).is_ok() {
                    done.lock().unwrap().push((name, seed, len));
                }
                longest = longest.max(start.elapsed());
            }
            longest
        });
        Self { stop, acknowledged, thread: Some(thread) }
    }

    fn count(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    fn wait_for_more(&self, more: usize, limit: Duration) -> Duration {
        let (start, target) = (Instant::now(), self.count() + more);
        while self.count() < target {
            assert!(start.elapsed() < limit, "no {more} more files were written within {limit:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        start.elapsed()
    }

    fn finish(mut self) -> (Vec<(String, u64, usize)>, Duration) {
        self.stop.store(true, Relaxed);
        let longest = self.thread.take().unwrap().join().unwrap();
        let acknowledged = self.acknowledged.lock().unwrap().clone();
        (acknowledged, longest)
    }
}

/// A test that fails must not leave it writing below a mount that is gone.
impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn check(cluster: &Cluster, server: usize, acknowledged: &[(String, u64, usize)]) {
    cluster.drop_caches(server);
    for (name, seed, len) in acknowledged {
        let found = fs::read(cluster.mnt(server).join(name)).unwrap_or_else(|e| panic!("s{server}: {name}: {e}"));
        assert!(found == noise(*seed, *len), "s{server}: {name} has other bytes");
    }
}

fn survives_the_loss_of(leader: bool) {
    let cluster = Cluster::start(if leader { "kill-leader" } else { "kill-follower" }, 3);
    let lead = cluster.leader(1);
    let victim = if leader { lead } else { (1..=3).find(|s| *s != lead).unwrap() };
    let writing = (1..=3).find(|s| *s != victim && (leader || *s != lead)).unwrap();
    let writer = Writer::start(cluster.mnt(writing));
    writer.wait_for_more(20, Duration::from_secs(30));

    cluster.kill(victim);
    let resumed = writer.wait_for_more(3, Duration::from_secs(20));
    // Writing may go on without a pause, before anybody has missed the victim.
    wait_for("status that names the dead server", Duration::from_secs(20), || {
        let names_it = cluster.json(writing, &["status"])["why"].to_string().contains(&format!("s{victim}"));
        (names_it && cluster.try_ctfs(writing, &["status"]).status.code() == Some(4)).then_some(())
    });
    writer.wait_for_more(20, Duration::from_secs(30));
    cluster.restart(victim);
    cluster.wait_healthy(writing);
    writer.wait_for_more(5, Duration::from_secs(30));

    let (acknowledged, longest) = writer.finish();
    println!("{} files acknowledged, writing went on after {resumed:?}, longest pause {longest:?}", acknowledged.len());
    assert!(longest < Duration::from_secs(10), "a write stood still for {longest:?}");
    for server in 1..=3 {
        check(&cluster, server, &acknowledged);
    }
}

#[test]
fn writing_goes_on_when_a_follower_is_killed_and_nothing_is_lost() {
    survives_the_loss_of(false);
}

#[test]
fn writing_goes_on_when_the_leader_is_killed_and_nothing_is_lost() {
    survives_the_loss_of(true);
}

#[test]
fn a_killed_server_starts_again_on_the_same_directory_at_once() {
    let cluster = Cluster::start("again", 1);
    write_synced(&cluster.mnt(1).join("f"), b"kept").unwrap();
    // The kernel remembers the root for as long as the lease, and answers from that although nobody serves it.
    fs::metadata(cluster.mnt(1)).unwrap();
    cluster.daemon(1).kill();
    cluster.restart(1);
    assert_eq!(fs::read(cluster.mnt(1).join("f")).unwrap(), b"kept");
}

#[test]
fn all_servers_killed_at_once_recover_by_themselves() {
    let cluster = Cluster::start("kill-all", 3);
    let writer = Writer::start(cluster.mnt(2));
    writer.wait_for_more(25, Duration::from_secs(30));
    for server in 1..=3 {
        cluster.kill(server);
    }
    let (acknowledged, _) = writer.finish();
    let starts: Vec<_> = (1..=3).map(|server| {
        let server = server.to_string();
        let cluster = &cluster;
        move || cluster.script(&["start", &server])
    }).collect();
    std::thread::scope(|scope| {
        for start in starts {
            scope.spawn(start);
        }
    });
    cluster.wait_healthy(1);
    for server in 1..=3 {
        check(&cluster, server, &acknowledged);
    }
}

#[test]
fn a_server_cut_off_from_the_majority_fails_writes_in_bounded_time_and_nothing_forks() {
    let cluster = Cluster::start("cut", 3);
    let lead = cluster.leader(1);
    write_synced(&cluster.mnt(lead).join("before"), b"before").unwrap();
    cluster.script(&["cut", &lead.to_string()]);
    let other = (1..=3).find(|s| *s != lead).unwrap();
    let start = Instant::now();
    let mine = fs::write(cluster.mnt(lead).join("minority"), b"minority");
    assert!(mine.is_err(), "a write without a majority was acknowledged");
    assert!(start.elapsed() < Duration::from_secs(30), "it failed after {:?}", start.elapsed());
    let start = Instant::now();
    while write_synced(&cluster.mnt(other).join("majority"), b"majority").is_err() {
        assert!(start.elapsed() < Duration::from_secs(20), "the majority does not write");
    }
    cluster.script(&["heal", &lead.to_string()]);
    cluster.wait_healthy(other);
    for server in 1..=3 {
        cluster.wait_healthy(server);
        assert_eq!(fs::read(cluster.mnt(server).join("before")).unwrap(), b"before");
        assert_eq!(fs::read(cluster.mnt(server).join("majority")).unwrap(), b"majority");
    }
}

#[test]
fn a_server_that_is_cut_off_reads_as_the_policy_of_each_directory_says() {
    let cluster = Cluster::start("partition", 3);
    let mnt = cluster.mnt(1);
    for (dir, choice) in [("stale", "stale"), ("error", "error"), ("block", "block")] {
        fs::create_dir(mnt.join(dir)).unwrap();
        write_synced(&mnt.join(dir).join("f"), b"before").unwrap();
        cluster.ctfs(1, &["policy", "set", mnt.join(dir).to_str().unwrap(), "--on-partition", choice]);
    }
    let cut_off = (1..=3).rev().find(|server| *server != cluster.leader(1)).unwrap();
    let (here, there) = (cluster.mnt(cut_off), cluster.mnt(cluster.leader(1)));
    let read = |dir: &str| fs::read(here.join(dir).join("f"));
    for dir in ["stale", "error", "block"] {
        assert_eq!(read(dir).unwrap(), b"before");
    }
    cluster.script(&["cut", &cut_off.to_string()]);
    let start = Instant::now();
    // Once nobody waits for this server any more.
    while write_synced(&there.join("stale/f"), b"after!").is_err() {
        assert!(start.elapsed() < Duration::from_secs(30), "the majority does not write");
    }
    wait_for("reads that fail", Duration::from_secs(30), || read("error").is_err().then_some(()));
    assert_eq!(read("stale").unwrap(), b"before", "what it knew last");
    let start = Instant::now();
    for _ in 0..100 {
        assert_eq!(read("stale").unwrap(), b"before");
        assert!(read("error").is_err());
    }
    assert!(start.elapsed() < Duration::from_secs(3), "each of them waits: {:?}", start.elapsed());
    assert!(fs::write(here.join("stale/new"), b"").is_err());
    let reads = cluster.json(cut_off, &["status"])["reads"].clone();
    assert!(reads["cut_off"].as_bool().unwrap() && reads["stale"].as_u64().unwrap() >= 100, "{reads}");
    let blocked = std::thread::spawn({
        let path = here.join("block/f");
        move || fs::read(path)
    });
    std::thread::sleep(Duration::from_secs(1));
    assert!(!blocked.is_finished(), "it does not wait");
    cluster.script(&["heal", &cut_off.to_string()]);
    assert_eq!(blocked.join().unwrap().unwrap(), b"before");
    cluster.wait_healthy(cut_off);
    wait_for("the present", Duration::from_secs(10), || (read("stale").unwrap() == b"after!").then_some(()));
    assert_eq!(read("error").unwrap(), b"before");
}
