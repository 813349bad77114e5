//! Are two trees the same in everything a file system can hold?
//!
//! [`compare`] reads two directories, or two single files, side by side and tells each difference
//! as one [`Difference`]: names, types, content, sizes, modes, owners, times to the nanosecond,
//! hard-link groups, device numbers, symlink targets, xattrs, ACLs, holes. What could not be read,
//! or changed meanwhile, is told as [`Trouble`]; nothing is passed over in silence.
//!
//! Both sides are walked at once, a directory at a time, in the order of the names' bytes. Memory
//! grows with the largest directories on one path and with the hard links whose other names were
//! not met yet, never with the tree. Objects are held by descriptor and reached relative to their
//! directory, so no path is too long, no symlink is followed, and what is read is what was looked
//! at. Nothing is changed, not even an access time where the kernel lets us ask for that
//! (`O_NOATIME`; there is no such thing for the target of a symlink).
//!
//! Not compared, because no copy can set them: ctime, birth time, inode numbers, the size of
//! directories, how often links outside the tree name a file.
//!
//! Reading order: [`finding`] (what comes out), [`object`] (what is read of one object),
//! [`attributes`], [`acl`], [`links`], [`content`] (the rules), [`walk`] (which objects meet),
//! [`pipeline`] (on which threads), [`show`] (as text).

mod acl;
mod attributes;
mod content;
mod finding;
mod links;
mod names;
mod object;
mod pipeline;
mod show;
mod walk;

use std::{num::NonZeroUsize, ops::ControlFlow, path::{Path, PathBuf}};

pub use finding::{Difference, Finding, Pair, Trouble, What};
pub use pipeline::Progress;
pub use show::escape;

/// What to compare, and how.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Compare access times too.
    pub atime: bool,
    /// Enter what is mounted below the two directories. Without it a mount point is compared as
    /// the object it shows, and not entered nor read.
    pub cross_mounts: bool,
    /// Threads that read attributes and contents.
    pub threads: NonZeroUsize,
}

impl Default for Settings {
    /// A thread per CPU, from 2, so that reading one side overlaps with the other, to 16, above
    /// which a disk or the wire is the limit.
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(2, NonZeroUsize::get).clamp(2, 16);
        Self { atime: false, cross_mounts: false, threads: NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN) }
    }
}

/// What a caller is told while trees are compared.
#[derive(Debug)]
pub enum Event {
    /// In the order of the walk: a directory, then what is in it, by the bytes of the names.
    Found(Finding),
    /// From time to time, also when nothing is found.
    Progress(Progress),
}

/// Why two trees cannot be compared at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("open {}: {error}", path.display())]
    Open { path: PathBuf, error: std::io::Error },
}

/// Compares the trees, or files, `source` and `target`; the two paths themselves are followed when
/// they are symlinks, nothing below is. Returns early when `event` breaks.
///
/// # Errors
/// [`Error::Open`]: one of the two cannot be opened.
pub fn compare(source: &Path, target: &Path, settings: &Settings, event: &mut dyn FnMut(Event) -> ControlFlow<()>) -> Result<Progress, Error> {
    let open = |path: &Path| object::open_root(path).map_err(|error| Error::Open { path: path.to_owned(), error: error.into() });
    let roots = Pair { source: open(source)?, target: open(target)? };
    Ok(pipeline::run(roots, settings, event))
}
