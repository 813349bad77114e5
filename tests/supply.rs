//! What `deny.toml` demands, checked against Cargo.lock without the network.

use std::fs;

/// Name and version of everything in the lock file.
fn locked() -> Vec<(String, Vec<u64>)> {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock")).unwrap();
    let mut found = Vec::new();
    let mut name = String::new();
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("name = ") {
            name = value.trim_matches('"').to_owned();
        } else if let Some(value) = line.strip_prefix("version = ") {
            let version = value.trim_matches('"').split(['-', '+']).next().unwrap();
            let numbers = version.split('.').filter_map(|part| part.parse().ok()).collect();
            found.push((std::mem::take(&mut name), numbers));
        }
    }
    assert!(found.len() > 100, "the lock file was read");
    found
}

#[test]
fn one_tls_provider_is_in_the_tree() {
    for (name, _) in locked() {
        assert!(!["aws-lc-rs", "aws-lc-sys", "openssl-sys", "native-tls"].contains(&name.as_str()), "{name}");
    }
}

#[test]
fn versions_with_known_holes_are_not_in_the_tree() {
    let floors: [(&str, &[u64]); 5] = [
        ("quinn-proto", &[0, 11, 15]),
        ("rustls-webpki", &[0, 103, 13]),
        ("rustls", &[0, 23, 18]),
        ("tracing-subscriber", &[0, 3, 20]),
        ("fuser", &[0, 16, 0]),
    ];
    let locked = locked();
    for (name, floor) in floors {
        let versions: Vec<_> = locked.iter().filter(|(locked, _)| locked == name).collect();
        assert_eq!(versions.len(), 1, "{name} stands once in the tree");
        assert!(versions[0].1.as_slice() >= floor, "{name} {:?} is below {floor:?}", versions[0].1);
    }
}

#[test]
fn only_one_module_each_names_the_foreign_crates() {
    for (dependency, crates) in [
        ("fuser", &["ctfs-fuse"][..]),
        ("quinn", &["ctfs-net"]),
        ("rustls", &["ctfs-net"]),
        ("sled", &["ctfs-consensus"]),
        ("openraft", &["ctfs-consensus"]),
        ("bincode", &["ctfs-types"]),
    ] {
        for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/crates")).unwrap() {
            let dir = entry.unwrap();
            let Ok(manifest) = fs::read_to_string(dir.path().join("Cargo.toml")) else { continue };
            let names = manifest.lines().any(|line| line.starts_with(&format!("{dependency}.")) || line.starts_with(&format!("{dependency} ")));
            let allowed = crates.contains(&dir.file_name().to_str().unwrap());
            assert!(!names || allowed, "{} names {dependency}", dir.file_name().to_string_lossy());
        }
    }
}
