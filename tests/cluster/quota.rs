//! Quotas: set on one server, in force on all.

use std::{fs, time::Duration};

use crate::support::{Cluster, noise, wait_for};

const LIMIT: u64 = 5 << 20;

#[test]
fn a_quota_set_on_one_server_holds_to_the_block_on_every_server() {
    let cluster = Cluster::start("quota", 2);
    let (one, two) = (cluster.mnt(1).join("home"), cluster.mnt(2).join("home"));
    fs::create_dir_all(one.join("alice")).unwrap();
    let outside = cluster.mnt(2).join("outside");
    fs::write(&outside, noise(1, 9 << 20)).unwrap();
    cluster.ctfs(1, &["quota", "set", one.to_str().unwrap(), "--bytes", "5MiB", "--files", "4"]);

    // dd: a write fails, close has nothing more to say, and every block is used.
    let dd = "dd if=$MNT/outside of=$MNT/home/alice/dd bs=100k 2>&1 || true";
    let said = cluster.sh(2, dd);
    assert!(said.contains("Disk quota exceeded") && said.contains("writing"), "{said}");
    assert_eq!(fs::metadata(one.join("alice/dd")).unwrap().len(), LIMIT);
    assert!(fs::read(one.join("alice/dd")).unwrap() == fs::read(&outside).unwrap()[..LIMIT as usize]);

    // df and ctfs df show the quota as the size, on both servers.
    for server in [1, 2] {
        // A server that has just started does not know yet how large the volume is.
        let figures = wait_for("the size of the volume", Duration::from_secs(30), || {
            let df = cluster.sh(server, "df -B1 --output=size,used,avail $MNT/home/alice | tail -n 1");
            let figures: Vec<u64> = df.split_whitespace().map(|n| n.parse().unwrap()).collect();
            (figures[0] > 0).then_some(figures)
        });
        assert_eq!(figures, [LIMIT, LIMIT, 0], "on s{server}");
        let df = cluster.json(server, &["df", cluster.mnt(server).join("home/alice").to_str().unwrap()]);
        assert_eq!((df["total"].as_u64(), df["available"].as_u64()), (Some(LIMIT), Some(0)), "{df}");
        let list = cluster.json(server, &["quota", "list"]);
        assert_eq!((list["quotas"][0]["bytes_used"].as_u64(), list["quotas"][0]["files_used"].as_u64()), (Some(LIMIT), Some(2)), "{list}");
    }

    let df = cluster.json(1, &["df", one.join("alice/dd").to_str().unwrap()]);
    assert_eq!((df["files"].as_u64(), df["bytes"].as_u64()), (Some(1), Some(LIMIT)), "a file counts itself: {df}");

    // Stores through a mapping: what fits stays, and msync tells of the rest.
    fs::remove_file(one.join("alice/dd")).unwrap();
    let mapped = "import mmap, os, sys\n\
        fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)\n\
        os.ftruncate(fd, 6 << 20)\n\
        with mmap.mmap(fd, 6 << 20) as memory:\n\
        \x20   memory[:] = os.urandom(6 << 20)\n\
        \x20   try: memory.flush()\n\
        \x20   except OSError as error: print(error.strerror)\n";
    assert_eq!(cluster.sh(2, &format!("python3 -c '{mapped}' $MNT/home/alice/dd")).trim(), "Disk quota exceeded");

    // cp gets nothing in, and room is there again once something is gone.
    let cp = "cp $MNT/outside $MNT/home/alice/cp 2>&1 || true";
    assert!(cluster.sh(2, cp).contains("Disk quota exceeded"));
    fs::remove_file(one.join("alice/dd")).unwrap();
    let said = cluster.sh(2, cp);
    assert!(said.contains("Disk quota exceeded"), "{said}");
    assert_eq!(fs::metadata(one.join("alice/cp")).unwrap().blocks_bytes(), LIMIT);
    fs::remove_file(two.join("alice/cp")).unwrap();
    fs::write(two.join("alice/fits"), noise(2, LIMIT as usize)).unwrap();
    assert!(fs::read(one.join("alice/fits")).unwrap() == noise(2, LIMIT as usize));

    // Inodes: alice and fits are two of four.
    cluster.sh(2, "mkdir $MNT/home/bob $MNT/home/carol");
    assert!(cluster.sh(2, "mkdir $MNT/home/dave 2>&1 || true").contains("Disk quota exceeded"));

    // One limit is lifted alone.
    cluster.ctfs(1, &["quota", "set", one.to_str().unwrap(), "--files", "none"]);
    cluster.sh(2, "mkdir $MNT/home/dave && rmdir $MNT/home/dave");
    let list = cluster.json(2, &["quota", "list"]);
    let limits = (&list["quotas"][0]["bytes_limit"], &list["quotas"][0]["files_limit"]);
    assert_eq!((limits.0.as_u64(), limits.1.as_u64()), (Some(LIMIT), None), "{list}");

    // Across the edge nothing is linked, and mv copies.
    assert!(cluster.sh(2, "ln $MNT/outside $MNT/home/bob/link 2>&1 || true").contains("Invalid cross-device link"));
    cluster.sh(2, "mv $MNT/home/alice/fits $MNT/fits && rmdir $MNT/home/alice");
    assert!(fs::read(cluster.mnt(1).join("fits")).unwrap() == noise(2, LIMIT as usize));

    cluster.ctfs(2, &["quota", "clear", two.to_str().unwrap()]);
    cluster.sh(1, "mkdir $MNT/home/dave && mv $MNT/outside $MNT/home/dave && df --output=size $MNT/home | tail -n 1");
    assert_eq!(cluster.ctfs(1, &["quota", "list"]).trim(), "no quota");
}

trait Blocks {
    fn blocks_bytes(&self) -> u64;
}

impl Blocks for fs::Metadata {
    fn blocks_bytes(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(self) * 512
    }
}
