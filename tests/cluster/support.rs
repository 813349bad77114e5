//! A cluster for one test.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

pub const REPO: &str = env!("CARGO_MANIFEST_DIR");
pub const CTFS: &str = env!("CARGO_BIN_EXE_ctfs");

/// Servers in namespaces of their own.
pub struct Cluster {
    name: String,
    dir: PathBuf,
    up_args: String,
    zones: String,
    /// Round trip of a long line, if the servers shall have one.
    rtt: Option<String>,
    /// Takes the cluster down when its standard input ends, which is also when this process is killed.
    janitor: Child,
}

impl Cluster {
    /// Starts `servers` servers and waits until the cluster is healthy.
    pub fn start(test: &str, servers: usize) -> Self {
        Self::start_with(test, servers, "--cache-size 256MiB", "")
    }

    pub fn start_with(test: &str, servers: usize, up_args: &str, zones: &str) -> Self {
        Self::start_in(test, servers, up_args, zones, Path::new(&format!("/var/tmp/ctfs-cluster-t-{test}")))
    }

    /// Starts servers that are `rtt` apart.
    pub fn start_apart(test: &str, servers: usize, rtt: &str) -> Self {
        build_the_line();
        let dir = format!("/var/tmp/ctfs-cluster-t-{test}");
        Self::begin(test, servers, "--cache-size 256MiB", "", Path::new(&dir), Some(rtt.to_owned()))
    }

    /// Starts a cluster whose state lies in `dir`.
    pub fn start_in(test: &str, servers: usize, up_args: &str, zones: &str, dir: &Path) -> Self {
        Self::begin(test, servers, up_args, zones, dir, None)
    }

    fn begin(test: &str, servers: usize, up_args: &str, zones: &str, dir: &Path, rtt: Option<String>) -> Self {
        let (name, dir) = (format!("t-{test}"), dir.to_owned());
        let script = format!("{REPO}/scripts/cluster");
        let janitor = Command::new("setsid")
            .args(["sh", "-c", &format!("cat >/dev/null; exec {script} down")])
            .env("CTFS_CLUSTER", &name)
            .env("CTFS_CLUSTER_DIR", &dir)
            .env("CTFS_BIN", CTFS)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the janitor");
        let cluster = Self { name, dir, up_args: up_args.to_owned(), zones: zones.to_owned(), rtt, janitor };
        cluster.script(&["down"]);
        cluster.script(&["up", &servers.to_string()]);
        cluster
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["-k", "5", "120"])
            .arg(format!("{REPO}/scripts/cluster"))
            .args(args)
            .env("CTFS_CLUSTER", &self.name)
            .env("CTFS_CLUSTER_DIR", &self.dir)
            .env("CTFS_BIN", CTFS)
            .env("CTFS_UP_ARGS", &self.up_args)
            .env("CTFS_ZONES", &self.zones)
            .envs(self.rtt.iter().map(|rtt| ("CTFS_RTT", rtt)))
            .stdin(Stdio::null());
        command
    }

    /// Runs `scripts/cluster`, which must succeed, and returns what it printed.
    pub fn script(&self, args: &[&str]) -> String {
        let output = self.command(args).output().expect("run scripts/cluster");
        assert!(output.status.success(), "scripts/cluster {args:?} failed\n{}{}", text(&output.stdout), self.story(&output));
        text(&output.stdout)
    }

    /// Runs `ctfs` for one server and returns its output whatever its exit code.
    pub fn try_ctfs(&self, server: usize, args: &[&str]) -> Output {
        let server = server.to_string();
        let mut all = vec!["ctfs", &server];
        all.extend(args);
        self.command(&all).output().expect("run ctfs")
    }

    pub fn ctfs(&self, server: usize, args: &[&str]) -> String {
        let output = self.try_ctfs(server, args);
        assert!(output.status.success(), "ctfs {args:?} on s{server} failed\n{}{}", text(&output.stdout), self.story(&output));
        text(&output.stdout)
    }

    /// Runs a shell command on a server; `$MNT` is its mount.
    pub fn sh(&self, server: usize, line: &str) -> String {
        self.script(&["exec", &server.to_string(), "bash", "-euo", "pipefail", "-c", line])
    }

    pub fn mnt(&self, server: usize) -> PathBuf {
        self.dir.join(format!("s{server}/mnt"))
    }

    pub fn state(&self, server: usize) -> PathBuf {
        self.dir.join(format!("s{server}/state"))
    }

    pub fn json(&self, server: usize, args: &[&str]) -> serde_json::Value {
        let mut all = args.to_vec();
        all.push("--json");
        let output = self.try_ctfs(server, &all);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("ctfs {args:?} --json on s{server}: {error}\n{}\n{}", text(&output.stdout), text(&output.stderr))
        })
    }

    /// Directory for the state and mount of a server started by hand, which goes with the cluster
    /// whatever happens to the test.
    pub fn beside(&self, name: &str) -> PathBuf {
        let dir = self.dir.join("beside").join(name);
        fs::create_dir_all(dir.join("mnt")).expect("make a directory beside the servers");
        dir
    }

    /// Number of the server that leads now, as `server` sees it.
    pub fn leader(&self, server: usize) -> usize {
        wait_for("a leader", Duration::from_secs(15), || {
            let status = self.json(server, &["status"]);
            status["leader"].as_str().and_then(|name| name.trim_start_matches('s').parse().ok())
        })
    }

    pub fn kill(&self, server: usize) {
        self.script(&["kill", &server.to_string()]);
    }

    /// The daemon of a server, to be killed without starting a program: that closes the descriptors of
    /// this one once more, and a close writes back what was written through them.
    pub fn daemon(&self, server: usize) -> Daemon {
        let pid = self.script(&["pid", &server.to_string()]).trim().parse().expect("a process id");
        Daemon(rustix::process::Pid::from_raw(pid).expect("a process id"))
    }

    pub fn restart(&self, server: usize) {
        // The mount of a killed daemon is dead; a new daemon replaces it.
        self.script(&["start", &server.to_string()]);
    }

    /// Starts a server whatever comes of it, and returns all it said.
    pub fn command_start(&self, server: usize) -> String {
        let output = self.command(&["start", &server.to_string()]).output().expect("run scripts/cluster");
        text(&output.stdout) + &text(&output.stderr)
    }

    /// What the log of a server must say.
    pub fn says(&self, server: usize, what: &str) {
        let log = fs::read_to_string(self.state(server).join("ctfs.log")).expect("read the log");
        assert!(log.contains(what), "s{server} never said {what:?}");
    }

    pub fn wait_healthy(&self, server: usize) {
        self.ctfs(server, &["status", "--wait", "healthy", "--timeout", "60s"]);
    }

    pub fn drop_caches(&self, server: usize) {
        self.ctfs(server, &["cache", "drop"]);
        fs::write("/proc/sys/vm/drop_caches", "3").expect("drop the kernel's caches");
    }

    /// Last log lines of every server, for a failed assertion.
    fn story(&self, output: &Output) -> String {
        let mut story = text(&output.stderr);
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if let Ok(log) = fs::read_to_string(entry.path().join("state/ctfs.log")) {
                let lines: Vec<&str> = log.lines().collect();
                let tail = &lines[lines.len().saturating_sub(15)..];
                story += &format!("--- {}\n{}\n", entry.file_name().to_string_lossy(), tail.join("\n"));
            }
        }
        story
    }
}

pub struct Daemon(rustix::process::Pid);

impl Daemon {
    pub fn kill(self) {
        rustix::process::kill_process(self.0, rustix::process::Signal::KILL).expect("kill the daemon");
        wait_for("end of the daemon", Duration::from_secs(10), || rustix::process::test_kill_process(self.0).is_err().then_some(()));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        if let Err(error) = self.janitor.wait() {
            eprintln!("the janitor of {} is lost: {error}", self.name);
        }
    }
}

/// `cargo test -p ctfs` builds the program and not the long line, which is another crate's.
fn build_the_line() {
    let line = Path::new(CTFS).with_file_name("ctfs-wan");
    let target = Path::new(CTFS).ancestors().nth(2).expect("the program is in TARGET/PROFILE");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--locked", "-p", "ctfs-wan", "--target-dir"])
        .arg(target)
        .current_dir(REPO)
        .status()
        .expect("run cargo");
    assert!(status.success() && line.exists(), "{} is not there", line.display());
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Asks until there is an answer; the limit bounds a wait for something real.
pub fn wait_for<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < limit, "no {what} within {limit:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Writes a file and has it durable.
pub fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Bytes that do not compress, different for each seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    use rand::{RngCore, SeedableRng};
    let mut bytes = vec![0; len];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}
