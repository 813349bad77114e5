//! The cache directory: one sparse file per inode, opened on demand.
//!
//! Everything is reached through one descriptor of the directory with `openat2`, without symbolic
//! links, so nothing placed in the directory can lead a write elsewhere. Where the directory was
//! removed under the daemon it is made again.

use std::{
    collections::HashMap,
    ffi::CString,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use ctfs_types::Ino;
use parking_lot::{Mutex, RwLock};
use rustix::{
    fs::{self, AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use tracing::warn;

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// The directory and its open files.
pub(super) struct Files {
    dir: PathBuf,
    root: RwLock<Arc<OwnedFd>>,
    open: Mutex<OpenFiles>,
    open_max: usize,
}

#[derive(Default)]
struct OpenFiles {
    files: HashMap<Ino, (Arc<OwnedFd>, u64)>,
    /// Counts uses; the file with the lowest stamp was used longest ago.
    clock: u64,
}

impl Files {
    /// Opens and locks `dir` (made with mode 0700 if missing) and removes what an earlier life
    /// left in it.
    ///
    /// Only directories with names of our making are removed: a wrong path in the configuration
    /// must not cost anybody their files.
    pub(super) fn open(dir: &Path, open_max: usize) -> io::Result<Self> {
        let root = make_root(dir)?;
        wipe(&root, 0)?;
        let root = RwLock::new(Arc::new(root));
        Ok(Self { dir: dir.to_owned(), root, open: Mutex::default(), open_max: open_max.max(1) })
    }

    /// Bytes an unprivileged program may still write to the file system.
    pub(super) fn free(&self) -> Result<u64, Errno> {
        let root = self.root.read().clone();
        let stat = fs::fstatvfs(&*root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// The file of `ino`; with `fresh`, made new and empty whatever was there.
    ///
    /// Called under the lock of the inode's entry, as [`Self::remove`] is, so the two never race.
    pub(super) fn get(&self, ino: Ino, fresh: bool) -> Result<Arc<OwnedFd>, Errno> {
        let mut open = self.open.lock();
        open.clock += 1;
        let clock = open.clock;
        if let Some((file, used)) = open.files.get_mut(&ino).filter(|_| !fresh) {
            *used = clock;
            return Ok(file.clone());
        }
        drop(open);
        let file = Arc::new(self.open_file(ino, fresh)?);
        let mut open = self.open.lock();
        if open.files.len() >= self.open_max {
            open.close_oldest(self.open_max / 16 + 1);
        }
        open.files.insert(ino, (file.clone(), clock));
        Ok(file)
    }

    pub(super) fn remove(&self, ino: Ino) -> Result<(), Errno> {
        self.open.lock().files.remove(&ino);
        let root = self.root.read().clone();
        match fs::unlinkat(&*root, path_of(ino), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    #[cfg(test)]
    fn open_count(&self) -> usize {
        self.open.lock().files.len()
    }

    fn open_file(&self, ino: Ino, fresh: bool) -> Result<OwnedFd, Errno> {
        let root = self.root.read().clone();
        if !fresh {
            return fs::openat2(&*root, path_of(ino), FILE_FLAGS, Mode::empty(), BENEATH);
        }
        match make_file(&root, ino) {
            Err(Errno::NOENT) => make_file(&*self.renew_root(&root)?, ino),
            made => made,
        }
    }

    /// Makes the directory again, after somebody removed it.
    fn renew_root(&self, old: &Arc<OwnedFd>) -> Result<Arc<OwnedFd>, Errno> {
        let mut root = self.root.write();
        if Arc::ptr_eq(&root, old) {
            *root = Arc::new(make_root(&self.dir)?);
            warn!(dir = %self.dir.display(), "the cache directory was removed; it was made again");
        }
        Ok(root.clone())
    }
}

const FILE_FLAGS: OFlags = OFlags::RDWR.union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);
const DIR_FLAGS: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);

/// Opens and locks the directory, making it if it is not there.
fn make_root(dir: &Path) -> Result<OwnedFd, Errno> {
    match fs::mkdir(dir, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    let root = fs::open(dir, DIR_FLAGS, Mode::empty())?;
    fs::fchmod(&root, Mode::RWXU)?;
    fs::flock(&root, FlockOperation::NonBlockingLockExclusive)?;
    Ok(root)
}

/// Makes the file of `ino` new and empty.
fn make_file(root: &OwnedFd, ino: Ino) -> Result<OwnedFd, Errno> {
    let path = path_of(ino);
    let flags = FILE_FLAGS | OFlags::CREATE | OFlags::TRUNC;
    let make = || fs::openat2(root, &path, flags, Mode::RUSR | Mode::WUSR, BENEATH);
    match make() {
        Err(Errno::NOENT) => {
            for dir in parents_of(ino) {
                match fs::mkdirat(root, dir, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno),
                }
            }
            make()
        }
        other => other,
    }
}

/// Wipes the directory unless a daemon has it locked.
pub(super) fn wipe_unused(dir: &Path) -> io::Result<()> {
    let root = match fs::open(dir, DIR_FLAGS, Mode::empty()) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    match fs::flock(&root, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(wipe(&root, 0)?),
        Err(Errno::WOULDBLOCK) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

impl OpenFiles {
    fn close_oldest(&mut self, count: usize) {
        let mut uses: Vec<(u64, Ino)> = self.files.iter().map(|(ino, (_, used))| (*used, *ino)).collect();
        uses.sort_unstable();
        for (_, ino) in uses.into_iter().take(count) {
            self.files.remove(&ino);
        }
    }
}

/// Two levels of 256 directories by the low bytes: inode numbers are handed out in order, so
/// every directory gets its share.
fn path_of(ino: Ino) -> CString {
    c_string(format!("{:02x}/{:02x}/{:x}", ino.0 & 0xff, ino.0 >> 8 & 0xff, ino.0))
}

fn parents_of(ino: Ino) -> [CString; 2] {
    let (a, b) = (ino.0 & 0xff, ino.0 >> 8 & 0xff);
    [c_string(format!("{a:02x}")), c_string(format!("{a:02x}/{b:02x}"))]
}

fn c_string(text: String) -> CString {
    CString::new(text).expect("hexadecimal digits and slashes hold no NUL")
}

/// Removes the two levels of directories and the files in them; `depth` counts levels above.
fn wipe(dir: &OwnedFd, depth: u8) -> Result<(), Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        names.push((entry.file_name().to_owned(), entry.file_type()));
    }
    for (name, kind) in names {
        let hex = name.as_bytes().iter().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase());
        if !hex {
            continue;
        }
        match (depth, kind) {
            (0 | 1, FileType::Directory) if name.as_bytes().len() == 2 => {
                let below = fs::openat2(dir, &name, DIR_FLAGS, Mode::empty(), BENEATH)?;
                wipe(&below, depth + 1)?;
                match fs::unlinkat(dir, &name, AtFlags::REMOVEDIR) {
                    Ok(()) | Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                    Err(errno) => return Err(errno),
                }
            }
            (2, FileType::RegularFile) => fs::unlinkat(dir, &name, AtFlags::empty())?,
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opening_wipes_what_we_made_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("ab/cd")).unwrap();
        std::fs::write(dir.path().join("ab/cd/12abcd"), b"old").unwrap();
        std::fs::write(dir.path().join("ab/README"), b"mine").unwrap();
        std::fs::write(dir.path().join("precious.txt"), b"mine").unwrap();
        std::fs::create_dir_all(dir.path().join("home/ab")).unwrap();
        let _files = Files::open(dir.path(), 4).unwrap();
        assert!(!dir.path().join("ab/cd").exists());
        for kept in ["ab/README", "precious.txt", "home/ab"] {
            assert!(dir.path().join(kept).exists(), "{kept}");
        }
    }

    #[test]
    fn a_directory_in_use_is_not_wiped_and_one_that_is_missing_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        wipe_unused(&cache).unwrap();
        assert!(!cache.exists());
        let files = Files::open(&cache, 4).unwrap();
        files.get(Ino(1), true).unwrap();
        wipe_unused(&cache).unwrap();
        assert!(cache.join("01/00/1").exists());
        drop(files);
        wipe_unused(&cache).unwrap();
        assert!(cache.exists() && !cache.join("01").exists());
    }

    #[test]
    fn a_removed_directory_is_made_again_and_locked() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        let files = Files::open(&cache, 4).unwrap();
        files.get(Ino(1), true).unwrap();
        std::fs::remove_dir_all(&cache).unwrap();
        files.get(Ino(2), true).unwrap();
        assert!(cache.join("02/00/2").exists());
        assert!(Files::open(&cache, 4).is_err(), "the new directory is locked too");
    }

    #[test]
    fn two_daemons_cannot_share_a_cache_directory() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Files::open(dir.path(), 4).unwrap();
        assert!(Files::open(dir.path(), 4).is_err());
    }

    #[test]
    fn open_descriptors_stay_within_their_bound_and_files_keep_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path(), 8).unwrap();
        for n in 0..50u64 {
            let file = files.get(Ino(n), true).unwrap();
            rustix::io::pwrite(&*file, &n.to_le_bytes(), 0).unwrap();
            assert!(files.open_count() <= 8);
        }
        for n in 0..50u64 {
            let mut bytes = [0; 8];
            rustix::io::pread(&*files.get(Ino(n), false).unwrap(), &mut bytes, 0).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), n);
        }
        files.remove(Ino(3)).unwrap();
        assert_eq!(files.get(Ino(3), false).unwrap_err(), Errno::NOENT);
    }

    #[test]
    fn a_symbolic_link_in_the_cache_directory_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        let files = Files::open(dir.path(), 4).unwrap();
        std::fs::create_dir_all(dir.path().join("01/00")).unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("01/00/1")).unwrap();
        assert!(files.get(Ino(1), true).is_err());
    }
}
