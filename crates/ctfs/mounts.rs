//! What is mounted where, and whether a path may be mounted on.
//!
//! Everything here looks before anything is created.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use ctfs_fuse::mountinfo::{self, MountLine};
use ctfs_node::problem::{Code, Problem};

/// What is mounted on exactly `path`, the topmost.
fn mounted_on(path: &Path) -> Result<Option<MountLine>, Problem> {
    mountinfo::mounted_on(path).map_err(|error| Problem::io("read /proc/self/mountinfo", &error))
}

/// Takes a dead ctfs mount off `path`, if there is one. Nothing can be lost: nobody serves it.
///
/// Returns whether there was one.
pub fn detach_dead(path: &Path) -> Result<bool, Problem> {
    if !mounted_on(path)?.is_some_and(|mounted| mounted.is_ours()) || !mountinfo::is_dead(path) {
        return Ok(false);
    }
    rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH)
        .map_err(|error| Problem::io(&format!("take the dead mount off {}", path.display()), &io::Error::from(error)))?;
    Ok(true)
}

/// Whether `path` can be mounted on: missing, or an empty directory with nothing mounted, and
/// apart from the `others` (state and cache directory).
///
/// # Errors
/// E0101, E0102, E0103 or E0120.
pub fn validate(path: &Path, others: &[&Path]) -> Result<(), Problem> {
    let place = resolved(path);
    empty(path, &place)?;
    for other in others {
        let other = resolved(other);
        if place.starts_with(&other) || other.starts_with(&place) {
            return Err(Problem::new(Code::PathsOverlap, format!("{} and {} lie inside each other", path.display(), other.display()))
                .why("the file system would be kept inside itself")
                .try_next("choose another directory to mount on, or other --state and --cache-dir"));
        }
    }
    Ok(())
}

/// Whether `place` is missing, or a directory with nothing in it and on it; `path` is how it was spelled.
fn empty(path: &Path, place: &Path) -> Result<(), Problem> {
    let shown = path.display();
    if let Some(mounted) = mounted_on(place)? {
        return Err(Problem::new(Code::AlreadyMounted, format!("{shown} is a mount point already"))
            .why(format!("{} of type {} is mounted there", mounted.source, mounted.fs_type))
            .try_next("choose another directory")
            .try_next(format!("umount {shown}")));
    }
    match fs::metadata(place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(Problem::new(Code::NotADirectory, format!("{shown} cannot be a directory")).why("a part of the path is a file")
                .try_next("name an empty directory, or one that does not exist yet"));
        }
        Err(error) => return Err(Problem::io(&format!("look at {shown}"), &error)),
        Ok(meta) if !meta.is_dir() => {
            return Err(Problem::new(Code::NotADirectory, format!("{shown} is not a directory"))
                .try_next("name an empty directory, or one that does not exist yet"));
        }
        Ok(_) => {}
    }
    let mut entries = fs::read_dir(place).map_err(|error| Problem::io(&format!("look into {shown}"), &error))?;
    if entries.next().is_some() {
        return Err(Problem::new(Code::NotEmpty, format!("{shown} is not empty"))
            .why("its files would be hidden under the mount")
            .try_next(format!("mv {shown} {shown}.old    then run this again, and copy the files in")));
    }
    Ok(())
}

/// `path` without symlinks as far as it exists, so that two spellings of one place are seen.
pub fn resolved(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let Ok(real) = ancestor.canonicalize() {
            return match path.strip_prefix(ancestor) {
                Ok(rest) if !rest.as_os_str().is_empty() => real.join(rest),
                _ => real,
            };
        }
    }
    path.to_owned()
}

/// Bytes free for use in the file system that holds `path`, which need not exist yet.
pub fn free_bytes(path: &Path) -> Result<u64, Problem> {
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(existing)
        .map_err(|error| Problem::io(&format!("ask for the free space of {}", existing.display()), &io::Error::from(error)))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(path: &Path, others: &[&Path]) -> String {
        validate(path, others).unwrap_err().code
    }

    #[test]
    fn only_an_empty_or_missing_directory_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        validate(&root.join("missing/deep"), &[]).unwrap();
        fs::create_dir(root.join("empty")).unwrap();
        validate(&root.join("empty"), &[]).unwrap();
        fs::write(root.join("file"), "x").unwrap();
        assert_eq!(code(&root.join("file"), &[]), "E0101");
        assert_eq!(code(&root.join("file/below"), &[]), "E0101");
        assert_eq!(code(root, &[]), "E0102");
        assert_eq!(code(Path::new("/proc"), &[]), "E0103");
    }

    #[test]
    fn a_mount_point_around_or_inside_the_state_is_refused_however_it_is_spelled() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        assert_eq!(code(&state.join("mnt"), &[&state]), "E0120");
        assert_eq!(code(dir.path(), &[&state]), "E0120");
        fs::create_dir(&state).unwrap();
        std::os::unix::fs::symlink(&state, dir.path().join("link")).unwrap();
        assert_eq!(code(&dir.path().join("link/mnt"), &[&state]), "E0120");
        validate(&dir.path().join("state2"), &[&state]).unwrap();
    }

    #[test]
    fn a_living_directory_is_not_a_dead_mount() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!mountinfo::is_dead(dir.path()));
        assert!(!detach_dead(dir.path()).unwrap());
        assert!(free_bytes(&dir.path().join("not/yet")).unwrap() > 0);
    }
}
