//! PostgreSQL on the mount.

use std::time::Duration;

use crate::{
    support::Cluster,
    tools::{run, script, setting},
};

#[test]
fn postgresql_survives_kill_9_and_goes_on_with_the_same_data_on_another_server() {
    let cluster = Cluster::start("postgresql", 3);
    let (scale, seconds) = (setting("CTFS_TEST_SCALE", 1), setting("CTFS_TEST_SECONDS", 5));
    let line = format!("bash {} {} {} {scale} {seconds}", script("postgresql.sh"), cluster.mnt(1).display(), cluster.mnt(2).display());
    let said = run(Duration::from_secs(120 + 3 * seconds + 20 * scale), &line);
    println!("{said}");
    // What pgbench keeps true in each transaction: all balances have the same sum.
    let balances: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("balances: ")).collect();
    assert_eq!(balances.len(), 2, "{said}");
    assert_eq!(balances[0], balances[1], "the other server has other data");
    let sums: Vec<&str> = balances[0].split('|').collect();
    assert!(sums[..4].iter().all(|sum| *sum == sums[0]) && sums[4].parse::<u64>().unwrap() > 0, "{balances:?}");
}
