//! Directories that one server holds.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, atomic::{AtomicBool, Ordering::Relaxed}},
    time::Duration,
};

use crate::{
    support::{Cluster, noise, write_synced},
    tools::setting,
};

#[test]
fn a_killed_server_leaves_nothing_out_that_it_did_in_directories_it_held() {
    let cluster = Cluster::start("held", 3);
    let dir = cluster.mnt(1).join("d");
    fs::create_dir(&dir).unwrap();
    let mut made = Vec::new();
    for attempt in 0..5 {
        // Changed through the log, so it is taken, if it was not yet.
        fs::create_dir(dir.join(format!("attempt{attempt}"))).unwrap();
        // Nothing reaches the log any more; the lease lasts a moment longer.
        cluster.script(&["cut", "1"]);
        for number in 0..50 {
            let name = format!("cut-off{attempt}-{number}");
            match fs::create_dir(dir.join(&name)) {
                Ok(()) => made.push(name),
                // The lease is over, or the directory was not held yet.
                Err(_) => break,
            }
        }
        if !made.is_empty() {
            break;
        }
        cluster.script(&["heal", "1"]);
        cluster.wait_healthy(1);
    }
    cluster.kill(1);
    println!("{} names at risk", made.len());
    assert!(!made.is_empty(), "nothing was at risk");
    cluster.script(&["heal", "1"]);
    cluster.restart(1);
    for server in 1..=3 {
        for name in &made {
            assert!(cluster.mnt(server).join("d").join(name).is_dir(), "s{server}: {name} is lost");
        }
    }
}

#[test]
fn two_servers_take_turns_writing_one_directory_and_both_go_on() {
    let cluster = Cluster::start("turns", 3);
    let seconds = setting("CTFS_TEST_SECONDS", 5);
    fs::create_dir(cluster.mnt(1).join("d")).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let write = |server: usize, dir: PathBuf| {
        let stop = stop.clone();
        std::thread::spawn(move || {
            let mut names = 0;
            while !stop.load(Relaxed) {
                let name = dir.join(format!("{server}-{names}"));
                fs::write(&name, name.as_os_str().as_encoded_bytes()).unwrap();
                fs::rename(&name, name.with_extension("done")).unwrap();
                names += 1;
            }
            names
        })
    };
    let writers: Vec<_> = (1..=2).map(|server| write(server, cluster.mnt(server).join("d"))).collect();
    std::thread::sleep(Duration::from_secs(seconds));
    stop.store(true, Relaxed);
    let counts: Vec<usize> = writers.into_iter().map(|writer| writer.join().expect("no error")).collect();
    println!("names by server: {counts:?}");
    let figures = [1, 2].map(|server| cluster.json(server, &["status"])["directories"].clone());
    println!("directories: {figures:?}");
    let sum = |figure: &str| figures.iter().map(|figures| figures[figure].as_u64().unwrap()).sum::<u64>();
    // It went to and fro at most twice in 10 s, and was shared from then on; so was what is above it.
    assert!(sum("shared") >= 1 && sum("given_up") <= 6 + seconds, "{figures:?}");
    assert!(counts.iter().all(|count| *count > 0), "one of them made no progress: {counts:?}");
    for server in 1..=3 {
        assert_eq!(fs::read_dir(cluster.mnt(server).join("d")).unwrap().count(), counts.iter().sum::<usize>(), "s{server}");
    }
}

#[test]
fn what_was_synced_everywhere_outlives_a_server_whose_journal_alone_had_it() {
    let cluster = Cluster::start("sync", 3);
    let dir = cluster.mnt(2).join("d");
    fs::create_dir(&dir).unwrap();
    cluster.ctfs(2, &["policy", "set", dir.to_str().unwrap(), "--durability", "local"]);
    let contents: Vec<Vec<u8>> = (0..20).map(|number| noise(number, 100_000)).collect();
    for (number, content) in contents.iter().enumerate() {
        write_synced(&dir.join(number.to_string()), content).unwrap();
    }
    let said = cluster.ctfs(3, &["sync"]);
    assert!(said.contains("is in the metadata up to log index"), "{said}");
    // Its journal is not asked any more.
    cluster.kill(2);
    fs::remove_dir_all(cluster.state(2).join("journal")).unwrap();
    for server in [1, 3] {
        for (number, content) in contents.iter().enumerate() {
            let path = cluster.mnt(server).join("d").join(number.to_string());
            assert!(fs::read(&path).unwrap() == *content, "s{server}: {number} is not as it was synced");
        }
    }
}
