//! What was synced is in the journal of its server and of its pair, and survives both ways of losing the
//! rest: the daemon killed, and the server gone.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use crate::support::{Cluster, noise, wait_for, write_synced};

const PAGE: usize = 4096;

/// A file of pages written over and over, each write synced, and what must be in it.
struct Pages {
    file: File,
    want: Vec<u8>,
    seed: u64,
}

impl Pages {
    fn create(path: &Path, pages: usize) -> Self {
        let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(path).unwrap();
        Self { file, want: vec![0; pages * PAGE], seed: 1 }
    }

    /// Writes a piece that begins and ends anywhere and syncs it.
    fn step(&mut self) -> std::io::Result<()> {
        self.seed += 1;
        let chance = noise(self.seed, 16);
        let number = |at: usize| u64::from_le_bytes(chance[at..at + 8].try_into().unwrap()) as usize;
        let at = number(0) % (self.want.len() - 2 * PAGE);
        let len = 1 + number(8) % (2 * PAGE);
        let bytes = noise(self.seed, len);
        self.file.write_all_at(&bytes, at as u64)?;
        self.file.sync_data()?;
        self.want[at..at + len].copy_from_slice(&bytes);
        Ok(())
    }

    fn for_a_while(&mut self, time: Duration) -> usize {
        let start = Instant::now();
        let mut steps = 0;
        while start.elapsed() < time {
            self.step().expect("a write or fsync failed");
            steps += 1;
        }
        steps
    }

    /// The file may be shorter by zeros at its end that were never written.
    fn check(&self, cluster: &Cluster, server: usize, name: &str) {
        let mut found = fs::read(cluster.mnt(server).join(name)).unwrap_or_else(|error| panic!("s{server}: {name}: {error}"));
        assert!(found.len() <= self.want.len());
        found.resize(self.want.len(), 0);
        let differs = found.chunks(PAGE).zip(self.want.chunks(PAGE)).position(|(found, want)| found != want);
        assert_eq!(differs, None, "s{server}: {name} has other bytes in this page");
    }
}

/// The pair of a server's journal, by number.
fn pair_of(cluster: &Cluster, server: usize) -> usize {
    wait_for("pair of the journal", Duration::from_secs(20), || {
        cluster.json(server, &["status"])["journal"]["pair"].as_str()?.strip_prefix('s')?.parse().ok()
    })
}

#[test]
fn what_was_synced_is_there_after_a_kill_although_it_was_not_flushed() {
    let cluster = Cluster::start("journal-kill", 1);
    let mut long = Pages::create(&cluster.mnt(1).join("long"), 300);
    let mut short = Pages::create(&cluster.mnt(1).join("short"), 4);
    for round in 0..3 {
        let daemon = cluster.daemon(1);
        // Long enough for some of it to be flushed in between, and some not.
        let steps = long.for_a_while(Duration::from_millis(7000)) + short.for_a_while(Duration::from_millis(500));
        daemon.kill();
        println!("round {round}: {steps} writes");
        cluster.restart(1);
        cluster.says(1, "bytes that a life left were written");
        for (pages, name) in [(&mut long, "long"), (&mut short, "short")] {
            pages.check(&cluster, 1, name);
            pages.file = OpenOptions::new().read(true).write(true).open(cluster.mnt(1).join(name)).unwrap();
        }
    }
}

#[test]
fn times_and_modes_set_after_a_write_was_synced_are_not_undone_by_the_journal() {
    let cluster = Cluster::start("journal-times", 1);
    let path = cluster.mnt(1).join("f");
    let daemon = cluster.daemon(1);
    let file = File::create(&path).unwrap();
    file.write_all_at(b"synced", 0).unwrap();
    file.sync_all().unwrap();
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    file.set_modified(then).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o4755)).unwrap();
    file.sync_all().unwrap();
    daemon.kill();
    cluster.restart(1);
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.modified().unwrap(), found.mode() & 0o7777), (then, 0o4755));
    assert_eq!(fs::read(&path).unwrap(), b"synced");
}

#[test]
fn what_was_synced_on_a_server_that_is_lost_is_there_on_the_others() {
    let cluster = Cluster::start("journal-lost", 3);
    let lead = cluster.leader(1);
    let pair = pair_of(&cluster, 1);
    println!("s{lead} leads, s1 has s{pair} as its pair");
    fs::create_dir(cluster.mnt(1).join("d")).unwrap();
    let mut pages = Pages::create(&cluster.mnt(1).join("d/pages"), 300);
    let daemon = cluster.daemon(1);
    let steps = pages.for_a_while(Duration::from_secs(7));
    write_synced(&cluster.mnt(1).join("d/last"), b"the last words").unwrap();
    pages.step().unwrap();
    daemon.kill();
    println!("{steps} writes");
    let start = Instant::now();
    for server in 2..=3 {
        pages.check(&cluster, server, "d/pages");
        assert_eq!(fs::read(cluster.mnt(server).join("d/last")).unwrap(), b"the last words", "s{server}");
    }
    println!("read elsewhere after {:?}", start.elapsed());
    cluster.says(pair, "bytes that a life left were written");
    // It comes back to what went on without it.
    write_synced(&cluster.mnt(2).join("d/pages"), b"newer").unwrap();
    cluster.restart(1);
    for server in 1..=3 {
        assert_eq!(fs::read(cluster.mnt(server).join("d/pages")).unwrap(), b"newer", "s{server}");
    }
}

#[test]
fn a_server_that_comes_back_before_it_is_missed_sends_what_it_left_itself() {
    let cluster = Cluster::start("journal-back", 3);
    pair_of(&cluster, 1);
    let mut pages = Pages::create(&cluster.mnt(1).join("pages"), 300);
    for _ in 0..2 {
        let daemon = cluster.daemon(1);
        pages.for_a_while(Duration::from_millis(1500));
        daemon.kill();
        cluster.restart(1);
        cluster.says(1, "bytes that a life left were written");
        for server in 1..=3 {
            pages.check(&cluster, server, "pages");
        }
        pages.file = OpenOptions::new().read(true).write(true).open(cluster.mnt(1).join("pages")).unwrap();
    }
}

#[test]
fn syncing_goes_on_when_the_pair_is_lost_and_another_server_takes_its_place() {
    let cluster = Cluster::start("journal-pair", 3);
    let pair = pair_of(&cluster, 1);
    let mut pages = Pages::create(&cluster.mnt(1).join("pages"), 300);
    pages.for_a_while(Duration::from_secs(1));
    cluster.kill(pair);
    let start = Instant::now();
    let mut longest = Duration::ZERO;
    let other = loop {
        let step = Instant::now();
        pages.step().expect("a write or fsync failed");
        longest = longest.max(step.elapsed());
        let now = cluster.json(1, &["status"])["journal"]["pair"].as_str().and_then(|name| name.strip_prefix('s')?.parse::<usize>().ok());
        match now {
            Some(now) if now != pair => break now,
            _ => assert!(start.elapsed() < Duration::from_secs(30), "no other pair"),
        }
    };
    println!("s{pair} was lost, s{other} took its place after {:?}; longest fsync {longest:?}", start.elapsed());
    assert!(longest < Duration::from_secs(10), "an fsync stood still for {longest:?}");
    pages.for_a_while(Duration::from_secs(1));
    // The first pair has an old copy now, and the second is lost with what the writer wrote.
    cluster.restart(pair);
    cluster.wait_healthy(pair);
    let daemon = cluster.daemon(1);
    pages.for_a_while(Duration::from_millis(500));
    daemon.kill();
    for server in [pair, other] {
        pages.check(&cluster, server, "pages");
    }
}

#[test]
fn a_server_that_was_cut_off_loses_nothing_that_it_had_synced() {
    let cluster = Cluster::start("journal-cut", 3);
    pair_of(&cluster, 1);
    let mut pages = Pages::create(&cluster.mnt(1).join("pages"), 300);
    pages.for_a_while(Duration::from_secs(2));
    cluster.script(&["cut", "1"]);
    // Whatever is not acknowledged any more may or may not be there; nothing else is written.
    pages.check(&cluster, 2, "pages");
    cluster.script(&["heal", "1"]);
    cluster.wait_healthy(1);
    for server in 1..=3 {
        pages.check(&cluster, server, "pages");
    }
}

#[test]
fn a_file_of_class_all_is_on_every_server_that_is_up_when_fsync_returns() {
    let cluster = Cluster::start("journal-all", 4);
    cluster.wait_healthy(2);
    let dir = cluster.mnt(2).join("all");
    fs::create_dir(&dir).unwrap();
    cluster.ctfs(2, &["policy", "set", dir.to_str().unwrap(), "--durability", "all"]);
    let holders = |name: &str| -> Vec<String> {
        let report = cluster.json(2, &["info", dir.join(name).to_str().unwrap()]);
        let holders = report["cells"][0]["holders"].as_array().unwrap();
        let mut names: Vec<_> = holders.iter().filter(|holder| holder["holds"] == true).map(|holder| holder["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    write_synced(&dir.join("a"), &noise(1, 100_000)).unwrap();
    assert_eq!(holders("a"), ["s1", "s2", "s3", "s4"]);
    cluster.kill(4);
    // As long as s4 may be up, it is waited for.
    let start = Instant::now();
    wait_for("fsync without s4", Duration::from_secs(30), || write_synced(&dir.join("b"), &noise(2, 100_000)).ok());
    println!("went on after {:?}", start.elapsed());
    assert_eq!(holders("b"), ["s1", "s2", "s3"]);
    cluster.restart(4);
    wait_for("repair", Duration::from_secs(60), || (holders("b").len() == 4).then_some(()));
}
