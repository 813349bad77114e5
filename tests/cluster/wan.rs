//! Servers far from each other.

use std::{sync::atomic::{AtomicU64, Ordering::Relaxed}, time::{Duration, Instant}};

use crate::{support::{Cluster, noise, wait_for, write_synced}, tools::setting};

/// Writes on all servers at once for a while; nobody may stand for election meanwhile.
fn keep_their_leader(test: &str, rtt: &str) {
    let cluster = Cluster::start_apart(test, 3, rtt);
    let leader = |server: usize| {
        let status = cluster.json(server, &["status"]);
        (status["leader"].clone(), status["term"].clone())
    };
    let first = leader(1);
    assert!(first.0.is_string(), "{first:?}");
    for server in 2..=3 {
        wait_for("agreement on the leader", Duration::from_secs(10), || (leader(server) == first).then_some(()));
    }

    let (written, end) = (AtomicU64::new(0), Instant::now() + Duration::from_secs(setting("CTFS_TEST_SECONDS", 8)));
    std::thread::scope(|scope| {
        for hand in 0..6 {
            let (dir, written) = (cluster.mnt(hand % 3 + 1), &written);
            scope.spawn(move || {
                for n in 0.. {
                    if Instant::now() >= end {
                        break;
                    }
                    let len = if n % 4 == 0 { 1_500_000 } else { 3_000 };
                    write_synced(&dir.join(format!("f{hand}-{n}")), &noise(n, len)).unwrap();
                    written.fetch_add(1, Relaxed);
                }
            });
        }
    });
    println!("{} files", written.load(Relaxed));
    for server in 1..=3 {
        cluster.wait_healthy(server);
        assert_eq!(leader(server), first, "s{server} has seen an election");
    }
    for hand in 0..6usize {
        let found = std::fs::read(cluster.mnt((hand + 1) % 3 + 1).join(format!("f{hand}-0"))).unwrap();
        assert!(found == noise(0, 1_500_000), "f{hand}-0 has other bytes");
    }
}

#[test]
fn three_servers_50_ms_apart_elect_one_leader_and_keep_it() {
    keep_their_leader("wan-50", "50ms");
}
