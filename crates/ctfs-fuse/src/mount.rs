//! How a mount begins and ends.
//!
//! We mount by ourselves with mount(2) and hand the open `/dev/fuse` to the session. No descriptor
//! inside the mount is ever held, and nothing here asks the mountpoint a question while it may
//! hang: the mount table answers instead, and a connection that does not end is aborted through
//! `/sys/fs/fuse/connections`.

use std::{
    ffi::CString,
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use ctfs_vfs::Vfs;
use fuser::{Config, Session, SessionACL};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, UnmountFlags},
};
use tokio::{runtime::Handle, sync::watch};

use crate::{
    bridge::Bridge,
    caches::Caches,
    mountinfo::{self, FS_TYPE},
    notice::{Abilities, NoticeChannel},
    notifier::Notifier,
    runner::Runner,
};

const DEVICE: &str = "/dev/fuse";
const CONNECTIONS: &str = "/sys/fs/fuse/connections";
/// How long a regular unmount may take: it waits until mapped pages are written back to us.
const UNMOUNT_PATIENCE: Duration = Duration::from_secs(10);
/// How long programs that keep a detached mount busy may go on before it is aborted.
const DETACHED_PATIENCE: Duration = Duration::from_secs(2);
/// Read-ahead per file; the kernel's 128 KiB are less than one chunk.
const READ_AHEAD_KIB: u32 = 1024;

#[derive(Debug, Clone)]
pub struct MountSettings {
    /// An empty directory.
    pub mountpoint: PathBuf,
    /// Threads that read requests. Each takes 16 MiB of address space for its buffer.
    pub threads: usize,
    /// Shown as the device in the mount table.
    pub source: String,
}

impl Default for MountSettings {
    fn default() -> Self {
        Self { mountpoint: PathBuf::new(), threads: 4, source: "ctfs".into() }
    }
}

/// Why there is no mount, in words for whoever typed the command.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("{DEVICE} does not open ({0}); load the kernel module with `modprobe fuse`, and run as root")]
    NoDevice(io::Error),
    #[error("mountpoint {path}: {error}", path = path.display())]
    Unreachable { path: PathBuf, error: io::Error },
    #[error("mountpoint {} is not a directory", .0.display())]
    NotDirectory(PathBuf),
    #[error("mountpoint {} is not empty; files in it would be hidden", .0.display())]
    NotEmpty(PathBuf),
    #[error("something ({fs_type}) is mounted on {path} already", path = path.display())]
    AlreadyMounted { path: PathBuf, fs_type: String },
    #[error("mount on {path}: {error}", path = path.display())]
    Refused { path: PathBuf, error: io::Error },
    #[error("the kernel and this program do not understand each other: {0}")]
    Handshake(io::Error),
    #[error("unmount {path}: {error}", path = path.display())]
    Unmount { path: PathBuf, error: io::Error },
    #[error("start a thread: {0}")]
    Thread(io::Error),
}

/// A mounted file system. Dropping it unmounts, by force if need be.
pub struct Mount {
    path: PathBuf,
    /// The kernel's number of this connection, if the mount table told it.
    connection: Option<u32>,
    notifier: Notifier,
    ended: watch::Receiver<bool>,
}

impl Mount {
    /// Mounts and begins to serve. Requests that must wait run on `runtime`.
    ///
    /// # Errors
    /// See [`MountError`]; nothing stays mounted then.
    pub fn start(vfs: Arc<Vfs>, runtime: Handle, settings: MountSettings) -> Result<Self, MountError> {
        let path = ready_mountpoint(&settings.mountpoint)?;
        let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| MountError::NoDevice(error.into()))?;
        let second = device.try_clone().map_err(MountError::NoDevice)?;
        mount(&path, &device, &settings.source)?;
        let connection = match mountinfo::mounted_on(&path) {
            Ok(line) => line.map(|line| line.minor),
            Err(_) => None,
        };

        let began = Self::serve(vfs, runtime, device, second, &path, settings.threads);
        let (notifier, ended) = began.inspect_err(|_| {
            // Nobody serves it; whoever touched it would hang.
            let _ = rustix::mount::unmount(&path, UnmountFlags::DETACH);
        })?;
        widen_read_ahead(connection);
        tracing::info!(path = %path.display(), threads = settings.threads, "mounted");
        Ok(Self { path, connection, notifier, ended })
    }

    fn serve(
        vfs: Arc<Vfs>,
        runtime: Handle,
        device: OwnedFd,
        second: OwnedFd,
        path: &Path,
        threads: usize,
    ) -> Result<(Notifier, watch::Receiver<bool>), MountError> {
        let caches = Arc::new(Caches::default());
        let kernel = Arc::new(Abilities::default());
        let channel = Arc::new(NoticeChannel::new(second, kernel.clone(), path.to_owned()));
        let bridge = Bridge {
            vfs: vfs.clone(),
            caches: caches.clone(),
            runner: Runner::new(runtime.clone()),
            kernel,
            channel: channel.clone(),
            failed: Arc::default(),
        };
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(threads.max(1));
        // One descriptor for all threads: closing a clone ends the requests it has read.
        config.clone_fd = false;
        let session = Session::from_fd(bridge, device, SessionACL::All, config).map_err(MountError::Handshake)?;

        let notifier = Notifier::start(vfs.clone(), caches, channel).map_err(MountError::Thread)?;
        vfs.set_kernel(Some(Arc::new(notifier.clone())));

        let (end, ended) = watch::channel(false);
        let at_the_end = notifier.clone();
        thread::Builder::new()
            .name("ctfs-session".into())
            .spawn(move || {
                if let Err(error) = session.run() {
                    tracing::error!(%error, "the mount ended with an error");
                }
                vfs.set_kernel(None);
                at_the_end.stop();
                runtime.spawn(async move { vfs.disconnect().await });
                end.send_replace(true);
            })
            .map_err(MountError::Thread)?;
        Ok((notifier, ended))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// Resolves when the mount has ended, by whomever.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // An error means that the session thread is gone: ended as well.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    pub fn has_ended(&self) -> bool {
        *self.ended.borrow() || self.ended.has_changed().is_err()
    }

    /// Unmounts. A mount that programs still use is detached: it vanishes from the tree, they get
    /// two seconds, then errors. Blocks for at most that and ten seconds.
    ///
    /// # Errors
    /// [`MountError::Unmount`]: the kernel refuses also to detach it.
    pub fn unmount(&self) -> Result<(), MountError> {
        let failed = |error: io::Error| MountError::Unmount { path: self.path.clone(), error };
        if self.has_ended() {
            return self.clear_away().map_err(failed);
        }
        match self.unmount_within(UnmountFlags::NOFOLLOW, UNMOUNT_PATIENCE) {
            Ok(()) => {}
            // Somebody else unmounted it meanwhile.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "in use; detaching the mount");
                let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
                self.unmount_within(flags, UNMOUNT_PATIENCE).map_err(failed)?;
            }
        }
        if !self.wait_ended(DETACHED_PATIENCE) {
            tracing::warn!(path = %self.path.display(), "programs still use the detached mount; aborting it");
            self.abort();
            self.wait_ended(DETACHED_PATIENCE);
        }
        Ok(())
    }

    /// Takes an aborted mount out of the tree, if it is still there. By its connection: another
    /// mount may stand in its place.
    fn clear_away(&self) -> io::Result<()> {
        match mountinfo::mounted_on(&self.path)? {
            Some(line) if line.is_ours() && Some(line.minor) == self.connection => {
                let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
                rustix::mount::unmount(&self.path, flags).map_err(io::Error::from)
            }
            _ => Ok(()),
        }
    }

    /// umount2(2) on a thread of its own, for it waits for whatever is being written back.
    fn unmount_within(&self, flags: UnmountFlags, patience: Duration) -> io::Result<()> {
        let (sender, receiver) = mpsc::channel();
        let path = self.path.clone();
        thread::Builder::new().name("ctfs-unmount".into()).spawn(move || {
            // Nobody listens any more after the patience has run out.
            let _ = sender.send(rustix::mount::unmount(&path, flags));
        })?;
        match receiver.recv_timeout(patience) {
            Ok(result) => result.map_err(io::Error::from),
            Err(_) => {
                self.abort();
                receiver.recv_timeout(patience).map_err(|_| io::ErrorKind::TimedOut)?.map_err(io::Error::from)
            }
        }
    }

    fn wait_ended(&self, patience: Duration) -> bool {
        let (mut waited, step) = (Duration::ZERO, Duration::from_millis(5));
        while !self.has_ended() && waited < patience {
            thread::sleep(step);
            waited += step;
        }
        self.has_ended()
    }

    /// Ends the connection at once: every program inside gets an error. The mountpoint stays in the
    /// tree until it is unmounted.
    pub fn abort(&self) {
        let Some(connection) = self.connection else { return };
        if let Err(error) = abort_connection(connection) {
            tracing::error!(connection, %error, "abort the kernel connection");
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::error!(%error, "aborting the mount");
            self.abort();
        }
    }
}

/// Checks the mountpoint and answers its absolute path. A dead mount of ours is cleared away.
fn ready_mountpoint(given: &Path) -> Result<PathBuf, MountError> {
    let unreachable = |error| MountError::Unreachable { path: given.to_owned(), error };
    // Only the parent is asked: the mountpoint itself may be a mount whose server hangs.
    let absolute = std::path::absolute(given).map_err(unreachable)?;
    let path = match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => fs::canonicalize(parent).map_err(unreachable)?.join(name),
        _ => absolute,
    };
    if let Some(found) = mountinfo::mounted_on(&path).map_err(unreachable)? {
        if !found.is_ours() || !mountinfo::is_dead(&path) {
            return Err(MountError::AlreadyMounted { path, fs_type: found.fs_type });
        }
        tracing::info!(path = %path.display(), "clearing away the mount of a server that died");
        rustix::mount::unmount(&path, UnmountFlags::DETACH)
            .map_err(|error| MountError::Unmount { path: path.clone(), error: error.into() })?;
        return ready_mountpoint(given);
    }
    let found = fs::metadata(&path).map_err(unreachable)?;
    if !found.is_dir() {
        return Err(MountError::NotDirectory(path));
    }
    // A symlink as mountpoint leads to the directory that is really covered.
    let path = fs::canonicalize(&path).map_err(unreachable)?;
    if let Some(found) = mountinfo::mounted_on(&path).map_err(unreachable)? {
        return Err(MountError::AlreadyMounted { path, fs_type: found.fs_type });
    }
    match fs::read_dir(&path).map_err(unreachable)?.next() {
        None => Ok(path),
        Some(_) => Err(MountError::NotEmpty(path)),
    }
}

fn mount(path: &Path, device: &OwnedFd, source: &str) -> Result<(), MountError> {
    let refused = |error| MountError::Refused { path: path.to_owned(), error };
    // setuid programs and devices work, as on any file system of the machine: only root mounts.
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let options = CString::new(options).map_err(|error| refused(error.into()))?;
    rustix::mount::mount(source, path, FS_TYPE, MountFlags::empty(), options.as_c_str())
        .map_err(|error| refused(error.into()))
}

/// The kernel offers 128 KiB in the handshake and takes more only here. Slower without, so
/// a failure is only mentioned.
fn widen_read_ahead(connection: Option<u32>) {
    let Some(minor) = connection else { return };
    let path = format!("/sys/class/bdi/0:{minor}/read_ahead_kb");
    if let Err(error) = fs::write(&path, READ_AHEAD_KIB.to_string()) {
        tracing::debug!(%error, path, "widen read-ahead");
    }
}

fn abort_connection(connection: u32) -> io::Result<()> {
    let control = format!("{CONNECTIONS}/{connection}/abort");
    match fs::write(&control, "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Either it is over already, or nobody mounted the control file system.
            if mountinfo::mounted_on(Path::new(CONNECTIONS))?.is_none() {
                rustix::mount::mount("fusectl", CONNECTIONS, "fusectl", MountFlags::empty(), None)?;
                return match fs::write(&control, "1") {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    other => other,
                };
            }
            Ok(())
        }
        other => other,
    }
}
