//! Programs people run.

use std::time::Duration;

use crate::{
    support::Cluster,
    tools::{run, setting},
};

#[test]
fn sqlite_git_and_fio_run_on_the_mount() {
    let cluster = Cluster::start("programs", 3);
    let count = cluster.sh(
        1,
        r#"cd /; db=$MNT/data.sqlite
        timeout 60 sqlite3 "$db" 'pragma journal_mode=delete; create table t(id integer primary key, text); '
        for i in 1 2 3; do timeout 60 sqlite3 "$db" "begin; with recursive n(i) as (select 1 union all select i+1 from n where i<500) insert into t(text) select hex(randomblob(100)) from n; commit"; done
        timeout 60 sqlite3 "$db" 'pragma integrity_check; select count(*) from t'"#,
    );
    assert!(count.ends_with("ok\n1500\n"), "{count}");
    let elsewhere = cluster.sh(2, r#"timeout 60 sqlite3 "$MNT/data.sqlite" 'pragma integrity_check; select count(*) from t'"#);
    assert_eq!(elsewhere, "ok\n1500\n");

    let source = tempfile::tempdir_in("/var/tmp").unwrap();
    let files = setting("CTFS_TEST_REPO", 60);
    run(Duration::from_secs(120 + files / 10), &format!(
        r#"cd {source}; git init -q origin; cd origin; git config user.email t@example.com; git config user.name t
        for i in $(seq {files}); do mkdir -p d$((i % 100)); echo "file $i" > d$((i % 100))/f$i; done
        git add .; git commit -qm one; echo more >> d1/f1; git commit -qam two
        git clone -q {source}/origin {clone}; git -C {clone} fsck --strict --no-progress"#,
        source = source.path().display(),
        clone = cluster.mnt(1).join("clone").display(),
    ));
    let status = cluster.sh(3, r#"git config --global --add safe.directory '*'; git -C "$MNT/clone" status --porcelain; git -C "$MNT/clone" log --oneline | wc -l"#);
    assert_eq!(status.trim(), "2");

    cluster.sh(1, r#"cd $(mktemp -d); mkdir $MNT/fio; timeout 100 fio --name=mixed --directory=$MNT/fio --rw=randrw --bs=4k --size=8M --numjobs=2 --verify=crc32c --verify_fatal=1 --fsync=64 --group_reporting --output=/dev/null"#);
    cluster.sh(1, r#"cd $(mktemp -d); timeout 100 fio --name=mmap --directory=$MNT/fio --ioengine=mmap --rw=randwrite --bs=4k --size=4M --verify=crc32c --verify_fatal=1 --output=/dev/null"#);
}

/// Stressors of stress-ng that work on files and check what they did.
const STRESSORS: [&str; 35] = [
    "access", "chmod", "chown", "copy-file", "dentry", "dir", "dirdeep", "dirmany", "fallocate", "fcntl", "filename", "flock", "fpunch", "fsize",
    "fstat", "getdent", "hdd", "iomix", "lease", "link", "locka", "lockf", "lockofd", "mknod", "open", "readahead", "rename", "revio", "seal",
    "seek", "symlink", "sync-file", "touch", "utime", "xattr",
];

#[test]
fn stress_ng_finds_no_error_on_two_servers() {
    let cluster = Cluster::start("stress-ng", 3);
    let seconds = setting("CTFS_TEST_SECONDS", 5);
    let stressors: String = STRESSORS.iter().map(|name| format!(" --{name} 1")).collect();
    std::thread::scope(|scope| {
        // All of them here, and those that write much on another server beside them.
        for (server, which) in [(2, stressors.as_str()), (1, " --hdd 1 --iomix 1 --rename 2 --dentry 2")] {
            let dir = cluster.mnt(server).join(format!("stress-{server}"));
            std::fs::create_dir(&dir).unwrap();
            let line = format!("stress-ng{which} --timeout {seconds} --verify --no-rand-seed --hdd-bytes 16M --iomix-bytes 16M --log-brief --temp-path {}", dir.display());
            scope.spawn(move || {
                let said = run(Duration::from_secs(120 + 3 * seconds), &line);
                assert!(said.contains("successful run completed") && !said.contains("fail:"), "{said}");
                assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "stress-ng left something");
            });
        }
    });
}
