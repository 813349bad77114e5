//! Which objects meet: both trees at once, depth first, by the bytes of the names.
//!
//! There is no recursion, and of the directories on the way down only the last few are held open;
//! the way back up goes through `..`, checked to lead where it came from. Depth costs names alone.

use std::{
    cmp::Ordering,
    ffi::{CStr, CString},
    os::fd::{AsFd, OwnedFd},
};

use rustix::{fs::FileType, io::Errno};

use crate::{
    Settings,
    finding::{Difference, Finding, Pair, Trouble, What},
    links::Links,
    names::Names,
    object::{self, Id, Stat, kind_name},
    pipeline::{self, Job, Outlet, Stopped},
};

/// Directories held open, from the deepest up, besides the roots: two descriptors each.
const HELD: usize = 32;

/// A directory that is being walked.
#[derive(Debug)]
struct Frame {
    names: Pair<Names>,
    at: Pair<usize>,
    /// Open for listing; closed while the walk is far below.
    directories: Option<Pair<OwnedFd>>,
    ids: Pair<Id>,
    /// How much of the walk's path is this directory's.
    path_len: usize,
}

/// On which sides a name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    Source,
    Target,
    Both,
}

impl Frame {
    fn next(&mut self) -> Option<(CString, On)> {
        let names = Pair::new(self.names.source.get(self.at.source), self.names.target.get(self.at.target));
        let (name, on) = match (names.source, names.target) {
            (None, None) => return None,
            (Some(name), None) => (name, On::Source),
            (None, Some(name)) => (name, On::Target),
            (Some(source), Some(target)) => match source.cmp(target) {
                Ordering::Less => (source, On::Source),
                Ordering::Greater => (target, On::Target),
                Ordering::Equal => (source, On::Both),
            },
        };
        let name = name.to_owned();
        self.at.source += usize::from(on != On::Target);
        self.at.target += usize::from(on != On::Source);
        Some((name, on))
    }
}

#[derive(Debug)]
pub struct Walk<'a> {
    settings: &'a Settings,
    outlet: Outlet<'a>,
    links: Links,
    /// The mounts of the roots.
    mounts: Option<Pair<u64>>,
    frames: Vec<Frame>,
    path: Vec<u8>,
}

impl<'a> Walk<'a> {
    pub fn new(settings: &'a Settings, outlet: Outlet<'a>) -> Self {
        Self { settings, outlet, links: Links::default(), mounts: None, frames: Vec::new(), path: Vec::new() }
    }

    pub fn run(mut self, roots: Pair<OwnedFd>) -> Result<(), Stopped> {
        self.outlet.count_entry();
        self.meet(roots)?;
        while let Some(frame) = self.frames.last_mut() {
            self.path.truncate(frame.path_len);
            let Some((name, on)) = frame.next() else {
                self.leave()?;
                continue;
            };
            self.outlet.count_entry();
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend(name.to_bytes());
            self.step(&name, on)?;
        }
        Ok(())
    }

    /// One name of the innermost directory.
    fn step(&mut self, name: &CStr, on: On) -> Result<(), Stopped> {
        let Some(Frame { directories: Some(directories), .. }) = self.frames.last() else {
            unreachable!("the innermost directory is always held open");
        };
        let open = |directory: &OwnedFd| object::open_entry(directory.as_fd(), name);
        match on {
            On::Both => match directories.as_ref().map(open).both() {
                Ok(objects) => self.meet(objects),
                Err(errors) => self.outlet.tell(Finding::troubles(&self.path, "open", errors.map(|error| error.map(unfound)))),
            },
            On::Source => {
                let kind = open(&directories.source).and_then(Stat::of).map(|stat| stat.kind);
                self.alone(What::Missing, kind, Pair::new)
            }
            On::Target => {
                let kind = open(&directories.target).and_then(Stat::of).map(|stat| stat.kind);
                self.alone(What::Extra, kind, |kind, error| Pair::new(error, kind))
            }
        }
    }

    /// A name that is on one side only.
    fn alone(&mut self, what: What, kind: Result<FileType, Errno>, sides: impl Fn(Option<String>, Option<String>) -> Pair<Option<String>>) -> Result<(), Stopped> {
        let finding = match kind {
            // Gone again: on neither side now.
            Err(Errno::NOENT) => Finding::troubles(&self.path, "open", sides(Some(unfound(Errno::NOENT)), None)),
            kind => {
                let kind = kind.map_or("unknown type", kind_name).to_owned();
                let shown = sides(Some(kind), None).map(|kind| kind.unwrap_or_else(|| "nothing".into()));
                vec![Finding::Difference(Difference::new(&self.path, what, shown))]
            }
        };
        self.outlet.tell(finding)
    }

    /// Two objects of one name: has them compared, and goes into directories.
    fn meet(&mut self, objects: Pair<OwnedFd>) -> Result<(), Stopped> {
        let stats = match objects.as_ref().map(Stat::of).both() {
            Ok(stats) => stats,
            Err(errors) => return self.outlet.tell(Finding::troubles(&self.path, "stat", errors)),
        };
        let kinds = stats.map(|stat| stat.kind);
        if kinds.differ() {
            return self.outlet.tell(vec![Finding::Difference(Difference::new(&self.path, What::Type, kinds.map(kind_name)))]);
        }
        let kind = kinds.source;
        let mut findings = Vec::new();
        let mounts = *self.mounts.get_or_insert(stats.map(|stat| stat.mount));
        let inside = self.settings.cross_mounts || stats.map(|stat| stat.mount) == mounts;
        if !inside {
            findings.push(Finding::NotEntered { path: self.path.clone() });
        }
        if kind != FileType::Directory {
            let meeting = self.links.meet(&self.path, stats.as_ref());
            findings.extend(meeting.difference.map(Finding::Difference));
            if meeting.again {
                return self.outlet.tell(findings);
            }
        }
        let listed = (kind == FileType::Directory && inside).then(|| objects.as_ref().map(|object| object::open_directory(object.as_fd())).both());
        self.outlet.compare(Job { path: self.path.clone(), objects, stats, findings, content: inside })?;
        match listed {
            None => Ok(()),
            Some(Ok(directories)) => self.enter(directories, stats),
            Some(Err(errors)) => self.outlet.tell(Finding::troubles(&self.path, "open directory", errors)),
        }
    }

    fn enter(&mut self, directories: Pair<OwnedFd>, stats: Pair<Stat>) -> Result<(), Stopped> {
        let ids = stats.map(|stat| stat.id);
        // Only a broken file system, or a mount entered on request, leads back to itself.
        if self.frames.iter().any(|frame| frame.ids.source == ids.source || frame.ids.target == ids.target) {
            let error = "enter: this directory contains itself".into();
            return self.outlet.tell(vec![Finding::Trouble(Trouble { path: self.path.clone(), side: "both", error })]);
        }
        let listings = match directories.as_ref().map(|directory| Names::list(directory.as_fd())).both() {
            Ok(listings) => listings,
            Err(errors) => return self.outlet.tell(Finding::troubles(&self.path, "list", errors)),
        };
        let mut findings = pipeline::changed(&self.path, &directories, &stats);
        for (side, twice) in [("source", &listings.source.1), ("target", &listings.target.1)] {
            findings.extend(twice.iter().map(|name| {
                let path = if self.path.is_empty() { name.clone() } else { [&self.path[..], b"/", name].concat() };
                Finding::Trouble(Trouble { path, side, error: "list: the name is there more than once".into() })
            }));
        }
        self.outlet.tell(findings)?;
        let names = listings.map(|(names, _)| names);
        self.frames.push(Frame { names, at: Pair::default(), directories: Some(directories), ids, path_len: self.path.len() });
        // The root stays open: everything can be reached from it again.
        if let Some(far) = self.frames.len().checked_sub(HELD + 1)
            && far > 0
        {
            self.frames[far].directories = None;
        }
        Ok(())
    }

    /// Ends the innermost directory and opens the one above again, where it was closed.
    fn leave(&mut self) -> Result<(), Stopped> {
        let mut below = self.frames.pop().and_then(|frame| frame.directories);
        while let Some(frame) = self.frames.last()
            && frame.directories.is_none()
        {
            let opened = below.take().and_then(|below| self.opened(&below, |directory| object::open_entry(directory.as_fd(), c"..")));
            match opened.or_else(|| self.reached_from_root()) {
                Some(directories) => {
                    let last = self.frames.len() - 1;
                    self.frames[last].directories = Some(directories);
                }
                None => {
                    // Moved away while the walk was below; what is left in it cannot be reached.
                    self.path.truncate(frame.path_len);
                    let error = "walk: the directory was moved meanwhile, the rest of it was not compared".into();
                    self.outlet.tell(vec![Finding::Trouble(Trouble { path: self.path.clone(), side: "both", error })])?;
                    self.frames.pop();
                }
            }
        }
        Ok(())
    }

    /// The innermost directory's two, opened from `near` by `step`, if they are the same still.
    fn opened(&self, near: &Pair<OwnedFd>, step: impl Fn(&OwnedFd) -> Result<OwnedFd, Errno>) -> Option<Pair<OwnedFd>> {
        let frame = self.frames.last()?;
        let directories = near.as_ref().map(step).both().ok()?;
        let ids = directories.as_ref().map(|directory| Stat::of(directory).map(|stat| stat.id)).both().ok()?;
        (ids == frame.ids).then_some(directories)
    }

    /// The same, component by component from the roots.
    fn reached_from_root(&self) -> Option<Pair<OwnedFd>> {
        let root = self.frames.first()?.directories.as_ref()?;
        let len = self.frames.last()?.path_len;
        self.opened(root, |root| {
            let mut directory = object::open_entry(root.as_fd(), c".")?;
            for name in self.path[..len].split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
                let name = CString::new(name).map_err(|_| Errno::INVAL)?;
                directory = object::open_entry(directory.as_fd(), &name)?;
            }
            Ok(directory)
        })
    }
}

/// A listed name that cannot be opened was most likely removed in between.
fn unfound(error: Errno) -> String {
    if error == Errno::NOENT { "it is listed and not there; was it removed meanwhile?".into() } else { error.to_string() }
}
