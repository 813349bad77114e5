//! Servers come and go.

use std::{fs, time::Duration};

use crate::support::{Cluster, noise, wait_for, write_synced};

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
