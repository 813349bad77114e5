//! A process that appends is killed in the middle of it.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use super::{check_records, id, payload};
use crate::{Journal, OldLife, Position, Settings, SystemDisk};

const DIR: &str = "CTFS_JOURNAL_TEST_DIR";

/// Begun as a program of its own by the test below: appends without end, says what is durable.
#[tokio::test]
#[ignore = "the child of the test below"]
async fn child() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let settings = Settings { segment_bytes: 64 << 10, ..Settings::default() };
    let journal = Journal::create(Arc::new(SystemDisk), Path::new(&dir), id(1), settings).unwrap();
    loop {
        let last = (0..20).map(|_| journal.append(payload(journal.depth().appended.0 + 1)).unwrap()).last().unwrap();
        journal.durable(last).await.unwrap();
        println!("\ndurable {last}");
        journal.trim(Position(last.0.saturating_sub(500)));
    }
}

#[test]
fn a_killed_process_leaves_all_that_it_reported_durable() {
    for lines in [1, 10, 100] {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::killed::child", "--ignored", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let told = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut told = told.filter_map(|line| line.strip_prefix("durable ").and_then(|number| number.parse::<u64>().ok()));
        let before = told.nth(lines).expect("the child appends");
        child.kill().unwrap();
        // What it still said while it was dying counts too.
        let durable = told.last().unwrap_or(before).max(before);
        child.wait().unwrap();
        let old = OldLife::recover(Arc::new(SystemDisk), dir.path(), id(1)).unwrap();
        assert!(old.last() >= Position(durable));
        assert!(old.kept_from() <= old.last());
        assert_eq!(check_records(old.kept_from(), |from| old.read(from, 10_000)), old.last());
    }
}
