//! Servers come and go.

use std::{fs, time::Duration};

use crate::support::{CTFS, Cluster, noise, text, wait_for, write_synced};

#[test]
fn a_removed_servers_chunks_are_made_again_and_a_new_server_takes_its_place() {
    let cluster = Cluster::start("replace", 4);
    let files: Vec<(String, Vec<u8>)> = (0..12).map(|n| (format!("f{n}"), noise(n, 2_000_000))).collect();
    for (name, bytes) in &files {
        write_synced(&cluster.mnt(1).join(name), bytes).unwrap();
    }
    cluster.kill(4);
    let said = cluster.ctfs(1, &["node", "remove", "s4", "--yes"]);
    assert!(said.contains("s4"), "{said}");
    every_chunk_has(&cluster, &files, 3, &["s1", "s2", "s3"]);
    cluster.wait_healthy(1);
    let status = cluster.json(1, &["status"]);
    assert_eq!(status["servers"].as_array().unwrap().len(), 3, "{status}");

    cluster.script(&["add"]);
    let status = cluster.json(1, &["status"]);
    assert_eq!(status["servers"].as_array().unwrap().len(), 4, "{status}");
    every_chunk_has(&cluster, &files, 3, &["s1", "s2", "s3", "s5"]);
    for (name, bytes) in &files {
        assert!(fs::read(cluster.mnt(5).join(name)).unwrap() == *bytes, "{name}");
    }
    let refused = cluster.command_start(4);
    assert!(refused.contains("E0114") || refused.contains("E0119"), "the removed server came back: {refused}");
}

/// Waits until every chunk of the files is on exactly `copies` of these servers.
fn every_chunk_has(cluster: &Cluster, files: &[(String, Vec<u8>)], copies: usize, servers: &[&str]) {
    for (name, _) in files {
        let path = cluster.mnt(1).join(name);
        wait_for(&format!("{copies} copies of {name}"), Duration::from_secs(60), || {
            let info = cluster.json(1, &["info", path.to_str().unwrap()]);
            let done = info["cells"].as_array()?.iter().filter(|cell| cell["kind"] == "chunk").all(|cell| {
                let holders: Vec<&str> = cell["holders"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter(|h| h["holds"] == true)
                    .filter_map(|h| h["name"].as_str())
                    .collect();
                holders.len() >= copies && holders.iter().all(|holder| servers.contains(holder))
            });
            done.then_some(())
        });
    }
}

#[test]
fn a_server_that_stays_away_is_replaced_and_taken_back() {
    let config = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    fs::write(config.path(), "[data]\naway_after = \"3s\"\n").unwrap();
    let args = format!("--cache-size 64MiB --config {}", config.path().display());
    let cluster = Cluster::start_with("away", 4, &args, "");
    let files: Vec<(String, Vec<u8>)> = (0..6).map(|n| (format!("f{n}"), noise(n, 1_500_000))).collect();
    for (name, bytes) in &files {
        write_synced(&cluster.mnt(1).join(name), bytes).unwrap();
    }
    cluster.kill(4);
    every_chunk_has(&cluster, &files, 3, &["s1", "s2", "s3"]);
    cluster.restart(4);
    cluster.wait_healthy(1);
    for (name, bytes) in &files {
        assert!(fs::read(cluster.mnt(4).join(name)).unwrap() == *bytes, "{name}");
    }
}

#[test]
fn servers_that_never_came_up_or_that_ask_themselves_are_removed_and_followers_let_others_in() {
    let cluster = Cluster::start("leave", 3);
    write_synced(&cluster.mnt(1).join("kept"), b"kept").unwrap();
    let names = |from: usize| -> Vec<String> {
        let nodes = cluster.json(from, &["nodes"]);
        let mut names: Vec<String> = nodes["servers"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    // A token of a follower names that follower's address only.
    let follower = if cluster.leader(1) == 2 { 3 } else { 2 };
    let joined = cluster.script(&["add", &follower.to_string()]);
    assert!(joined.contains("joined"), "{joined}");
    assert_eq!(names(1), ["s1", "s2", "s3", "s4"]);

    // Dead before it could ever vote: it lacks most of the log, and everybody would wait for it.
    let nodes = cluster.json(1, &["nodes"]);
    let own = nodes["servers"].as_array().unwrap().iter().find(|server| server["name"] == "s1").unwrap();
    let host = own["addresses"][0].as_str().unwrap().rsplit_once(':').unwrap().0.to_owned();
    let dir = cluster.beside("dead").display().to_string();
    let token = cluster.json(1, &["token"])["token"].as_str().unwrap().to_owned();
    let up = format!("env -u CTFS_STATE {CTFS} up {dir}/mnt --state {dir}/state --name dead --cache-size 64MiB --listen {host}:7601 --join {token} --foreground");
    cluster.sh(1, &format!("{up} >/dev/null 2>&1 & p=$!; until {CTFS} nodes | grep -qw dead; do sleep 0.01; done; kill -KILL $p; wait $p || true"));
    let removed = cluster.ctfs(1, &["node", "remove", "dead", "--yes"]);
    assert!(removed.contains("removed dead"), "{removed}");

    // Asked on the server itself: first a follower, then the leader.
    let leader = cluster.leader(1);
    let [follower, stays] = [1, 2, 3, 4].into_iter().filter(|&n| n != leader).take(2).collect::<Vec<_>>()[..] else { unreachable!() };
    for leaver in [follower, leader] {
        let name = format!("s{leaver}");
        let removed = cluster.ctfs(leaver, &["node", "remove", &name, "--yes"]);
        assert!(removed.contains(&format!("removed {name}")) && removed.contains("ctfs down"), "{removed}");
        assert!(!names(stays).contains(&name), "{:?}", names(stays));
        let status = cluster.try_ctfs(leaver, &["status"]);
        assert!(text(&status.stderr).contains("E0114"), "{}", text(&status.stderr));
    }
    cluster.wait_healthy(stays);
    assert_eq!(fs::read_to_string(cluster.mnt(stays).join("kept")).unwrap(), "kept");
}
