//! All metadata, always, exactly.

use std::{path::Path, process::Command};

use crate::{
    support::{CTFS, Cluster, text},
    tree,
};

/// Compares two trees in everything that `ctfs diff` can see, which must be able to see it all.
#[track_caller]
fn assert_same(source: &Path, copy: &Path) {
    let output = Command::new(CTFS).args(["diff", "--limit", "20"]).args([source, copy]).output().expect("run ctfs diff");
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
}

#[test]
fn a_tree_copied_on_one_server_is_the_same_on_every_server() {
    let cluster = Cluster::start("fidelity", 3);
    let source = tempfile::tempdir_in("/var/tmp").unwrap();
    let files: usize = std::env::var("CTFS_TEST_FILES").ok().and_then(|n| n.parse().ok()).unwrap_or(1500);
    tree::make(source.path(), files);
    // By itself rsync leaves the time of a directory that it made in the same second as the original.
    let rsync = "rsync -aHAXS --numeric-ids --modify-window=-1";
    cluster.sh(1, &format!("{rsync} {}/ $MNT/tree/", source.path().display()));
    for server in 1..=3 {
        assert_same(source.path(), &cluster.mnt(server).join("tree"));
    }
}

#[test]
fn a_second_rsync_finds_nothing_to_do() {
    let cluster = Cluster::start("rsync-again", 1);
    let source = tempfile::tempdir_in("/var/tmp").unwrap();
    tree::make(source.path(), 100);
    let rsync = format!("rsync -aHAXS --numeric-ids {}/ $MNT/tree/", source.path().display());
    cluster.sh(1, &rsync);
    let again = cluster.sh(1, &format!("{rsync} -i"));
    assert_eq!(again, "");
}
