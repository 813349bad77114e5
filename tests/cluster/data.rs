//! Chunks on their servers, the cache within its limit, and what travels between servers.

use std::{collections::BTreeSet, fs, io::Read, process::{Command, Stdio}, time::Duration};

use crate::support::{Cluster, noise, wait_for, write_synced};

const MIB: usize = 1 << 20;

#[test]
fn each_chunk_is_on_three_of_four_servers_and_nowhere_else() {
    let cluster = Cluster::start("spread", 4);
    let size = std::env::var("CTFS_TEST_MIB").ok().and_then(|n| n.parse().ok()).unwrap_or(48) * MIB;
    let before = stored(&cluster);
    let bytes = noise(1, size);
    write_synced(&cluster.mnt(1).join("big"), &bytes).unwrap();

    let info = cluster.json(1, &["info", cluster.mnt(1).join("big").to_str().unwrap()]);
    let cells = info["cells"].as_array().unwrap();
    assert_eq!(cells.len(), size / MIB);
    let mut used = BTreeSet::new();
    for cell in cells {
        let holders: Vec<&str> =
            cell["holders"].as_array().unwrap().iter().filter(|h| h["holds"] == true).map(|h| h["name"].as_str().unwrap()).collect();
        assert_eq!(holders.len(), 3, "{cell}");
        used.extend(holders.iter().map(|name| (*name).to_owned()));
    }
    assert_eq!(used.len(), 4, "{used:?}");

    let stored = stored(&cluster) - before;
    let ratio = stored as f64 / (3 * size) as f64;
    assert!((0.95..1.05).contains(&ratio), "stored {stored} bytes for {size}: {ratio}");

    for server in 2..=4 {
        cluster.drop_caches(server);
        assert!(fs::read(cluster.mnt(server).join("big")).unwrap() == bytes, "s{server} reads other bytes");
    }
}

/// Bytes in the chunk stores of all servers.
fn stored(cluster: &Cluster) -> u64 {
    let bytes = cluster.sh(1, &format!("du -sbc {}/../s*/state/chunks/segments | tail -n 1 | cut -f 1", cluster.state(1).join("..").display()));
    bytes.trim().parse().unwrap()
}

#[test]
fn a_file_larger_than_the_cache_reads_back_right_and_the_cache_keeps_its_limit() {
    let cluster = Cluster::start_with("cache-limit", 1, "--cache-size 32MiB", "");
    let path = cluster.mnt(1).join("big");
    let bytes = noise(2, 160 * MIB);
    fs::write(&path, &bytes).unwrap();
    let cache = cluster.state(1).join("cache");
    let check = |when: &str| {
        let used: u64 = cluster.sh(1, &format!("du -s -B1 {} | cut -f 1", cache.display())).trim().parse().unwrap();
        assert!(used <= 40 << 20, "{when}: the cache directory takes {used} bytes");
    };
    check("after writing");
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    let mut file = fs::File::open(&path).unwrap();
    let mut piece = vec![0; MIB];
    for (index, expected) in bytes.chunks(MIB).enumerate() {
        file.read_exact(&mut piece).unwrap();
        assert!(piece == expected, "MiB {index} differs");
    }
    check("after reading");
}

#[test]
fn close_on_one_server_then_open_on_another_shows_it() {
    let cluster = Cluster::start("close-open", 3);
    for round in 0..60u64 {
        let (from, to) = (1 + round as usize % 3, 1 + (round as usize + 1) % 3);
        let bytes = noise(round, 1 + (round as usize * 7919) % 300_000);
        fs::write(cluster.mnt(from).join("file"), &bytes).unwrap();
        let found = fs::read(cluster.mnt(to).join("file")).unwrap_or_else(|e| panic!("round {round}: s{to} after s{from}: {e}"));
        assert!(found == bytes, "round {round}: s{to} reads other bytes than s{from} wrote");
        let name = format!("name-{round}");
        fs::rename(cluster.mnt(to).join("file"), cluster.mnt(to).join(&name)).unwrap();
        assert!(!cluster.mnt(from).join("file").exists(), "round {round}");
        assert!(cluster.mnt(from).join(&name).exists(), "round {round}");
        fs::rename(cluster.mnt(from).join(&name), cluster.mnt(from).join("file")).unwrap();
    }
}

#[test]
fn what_travels_between_servers_is_encrypted() {
    let cluster = Cluster::start("plaintext", 2);
    let capture = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    let marker = "a-marker-that-must-not-be-seen-on-the-wire";
    let pid = std::process::id();
    let mut tcpdump = Command::new("nsenter")
        .arg("--net=/run/netns/ctfs-t-plaintext-1")
        .args(["tcpdump", "--immediate-mode", "-Z", "root", "-i", "any", "-U", "-s", "0", "-w"])
        .arg(capture.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut stderr = tcpdump.stderr.take().unwrap();
    wait_for("tcpdump", Duration::from_secs(10), || {
        let mut byte = [0; 64];
        let n = stderr.read(&mut byte).unwrap();
        said += &String::from_utf8_lossy(&byte[..n]);
        said.contains("listening").then_some(())
    });
    // Small (inline, through the log) and large (a chunk), content and name.
    fs::write(cluster.mnt(1).join(marker), format!("{marker} {pid}\n")).unwrap();
    // Noise between the markers, so that compression does not hide them.
    let large: Vec<u8> = (0..300).flat_map(|n| [marker.as_bytes().to_vec(), noise(n, 4096)].concat()).collect();
    fs::write(cluster.mnt(1).join("large"), &large).unwrap();
    cluster.drop_caches(2);
    assert!(fs::read_to_string(cluster.mnt(2).join(marker)).unwrap().contains(marker));
    assert!(fs::read(cluster.mnt(2).join("large")).unwrap() == large);
    // SAFETY: the process is our own child, not waited for yet.
    unsafe { libc::kill(tcpdump.id() as i32, libc::SIGINT) };
    tcpdump.wait().unwrap();
    let captured = fs::read(capture.path()).unwrap();
    assert!(captured.len() > 100_000, "the capture holds the traffic: {} bytes", captured.len());
    assert!(!captured.windows(marker.len()).any(|window| window == marker.as_bytes()), "the marker is in the capture");
}
