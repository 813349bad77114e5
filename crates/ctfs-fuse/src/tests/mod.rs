//! Real mounts over the cluster in memory.
//!
//! Every test runs its file system calls on a thread of its own and gives it a deadline: when it
//! passes, the connections are aborted, so that neither the test nor the machine hangs.

#[allow(dead_code)] // Some of it only `ctfs-vfs` uses.
#[path = "../../../ctfs-vfs/src/vfs/tests/memory.rs"]
mod memory;
mod several;
mod single;

use std::{
    panic,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use ctfs_types::NodeId;
use ctfs_vfs::VfsSettings;
use memory::{Cluster, Server};
use tokio::runtime::Runtime;

use crate::{Mount, MountSettings};

/// A test that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// Some servers of one cluster, each mounted.
struct Mounts {
    cluster: Arc<Cluster>,
    mounts: Vec<Arc<Mount>>,
    servers: Vec<Server>,
    runtime: Runtime,
    dir: tempfile::TempDir,
}

impl Mounts {
    /// `None`, with the reason printed, where nothing can be mounted.
    fn new(servers: u64) -> Option<Self> {
        if !Path::new("/dev/fuse").exists() {
            println!("skipped: there is no /dev/fuse");
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root mounts");
            return None;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::new();
        let mut this = Self { cluster: cluster.clone(), mounts: Vec::new(), servers: Vec::new(), runtime, dir };
        for node in 1..=servers {
            let inside = this.runtime.enter();
            let server = cluster.server(node, this.dir.path(), VfsSettings::default());
            drop(inside);
            let mountpoint = this.dir.path().join(format!("mnt-{node}"));
            std::fs::create_dir(&mountpoint).unwrap();
            let settings = MountSettings { mountpoint, threads: 4, ..MountSettings::default() };
            let mount = Mount::start(server.vfs.clone(), this.runtime.handle().clone(), settings).unwrap();
            let notifier = mount.notifier();
            cluster.wait_for(notifier.invalidated());
            cluster.listen(Box::new(move |origin, index, changes| {
                let foreign = if origin == NodeId(node) { Vec::new() } else { changes.to_vec() };
                notifier.apply(index, foreign);
            }));
            this.mounts.push(Arc::new(mount));
            this.servers.push(server);
        }
        Some(this)
    }

    fn path(&self, server: usize) -> PathBuf {
        self.mounts[server].path().to_owned()
    }

    /// Runs `body` with the mountpoints, and aborts the connections if it does not come back.
    fn run<T: Send + 'static>(&self, body: impl FnOnce(Vec<PathBuf>) -> T + Send + 'static) -> T {
        let paths: Vec<PathBuf> = (0..self.mounts.len()).map(|server| self.path(server)).collect();
        let (done, is_done) = mpsc::channel();
        let body = thread::spawn(move || {
            let result = panic::catch_unwind(panic::AssertUnwindSafe(|| body(paths)));
            // Nobody listens when the deadline has passed.
            let _ = done.send(());
            result
        });
        if is_done.recv_timeout(DEADLINE).is_err() {
            self.mounts.iter().for_each(|mount| mount.abort());
            let _ = is_done.recv_timeout(Duration::from_secs(10));
            panic!("hangs; the mounts were aborted");
        }
        match body.join().expect("the panic was caught inside") {
            Ok(result) => result,
            Err(panic) => panic::resume_unwind(panic),
        }
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for mount in &self.mounts {
            if let Err(error) = mount.unmount() {
                eprintln!("{error}");
                mount.abort();
            }
        }
    }
}

/// Runs a script in a child process and answers what it printed; it must succeed.
fn shell(dir: &Path, script: &str) -> String {
    let output = std::process::Command::new("timeout")
        .args(["30", "bash", "-euc", script])
        .current_dir("/")
        .env("D", dir)
        .output()
        .expect("a shell");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
