//! What comes out: differences, and what kept us from looking.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::show::escape;

/// The same of both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pair<T> {
    pub source: T,
    pub target: T,
}

impl<T> Pair<T> {
    pub fn new(source: T, target: T) -> Self {
        Self { source, target }
    }

    pub fn as_ref(&self) -> Pair<&T> {
        Pair { source: &self.source, target: &self.target }
    }

    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Pair<U> {
        Pair { source: f(self.source), target: f(self.target) }
    }

    pub fn zip<U>(self, other: Pair<U>) -> Pair<(T, U)> {
        Pair { source: (self.source, other.source), target: (self.target, other.target) }
    }

    pub fn differ(&self) -> bool
    where
        T: PartialEq,
    {
        self.source != self.target
    }
}

impl<T, E> Pair<Result<T, E>> {
    /// Both, or for each side that failed its error.
    pub fn both(self) -> Result<Pair<T>, Pair<Option<E>>> {
        match (self.source, self.target) {
            (Ok(source), Ok(target)) => Ok(Pair { source, target }),
            (source, target) => Err(Pair { source: source.err(), target: target.err() }),
        }
    }
}

/// In what two objects differ. The names are part of the output that scripts read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// In the source only, with all that is below.
    Missing,
    /// In the target only, with all that is below.
    Extra,
    Type,
    /// The twelve bits of chmod(2).
    Mode,
    Owner,
    Group,
    Size,
    Mtime,
    Atime,
    /// Bytes of a file.
    Content,
    /// A hole on one side is stored zeros on the other.
    Holes,
    /// Names of one inode on one side, of several on the other.
    Links,
    /// Major and minor number.
    Device,
    /// Where a symlink points.
    Symlink,
    Xattr,
    /// A POSIX ACL.
    Acl,
}

impl What {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Type => "type",
            Self::Mode => "mode",
            Self::Owner => "owner",
            Self::Group => "group",
            Self::Size => "size",
            Self::Mtime => "mtime",
            Self::Atime => "atime",
            Self::Content => "content",
            Self::Holes => "holes",
            Self::Links => "links",
            Self::Device => "device",
            Self::Symlink => "symlink",
            Self::Xattr => "xattr",
            Self::Acl => "acl",
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

fn escaped<S: Serializer>(path: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&shown(path))
}

/// A path below the two roots, which themselves are `.`.
fn shown(path: &[u8]) -> String {
    if path.is_empty() { ".".into() } else { escape(path) }
}

/// One thing in which the two trees differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Below the roots, as bytes; empty for the roots. Serialised with [`escape`].
    #[serde(serialize_with = "escaped")]
    pub path: Vec<u8>,
    pub what: What,
    /// Which xattr or ACL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub source: String,
    pub target: String,
}

impl Difference {
    pub fn new(path: &[u8], what: What, sides: Pair<impl ToString>) -> Self {
        Self { path: path.to_owned(), what, name: None, source: sides.source.to_string(), target: sides.target.to_string() }
    }

    pub fn named(self, name: impl Into<String>) -> Self {
        Self { name: Some(name.into()), ..self }
    }
}

/// One line without its end; only printable characters.
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {}: ", self.what, shown(&self.path))?;
        if let Some(name) = &self.name {
            write!(f, "{name}: ")?;
        }
        write!(f, "{} -> {}", self.source, self.target)
    }
}

/// What kept us from comparing something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Trouble {
    #[serde(serialize_with = "escaped")]
    pub path: Vec<u8>,
    /// `source`, `target` or, where it is of both, `both`.
    pub side: &'static str,
    /// Verb, object and reason: `open: Permission denied`.
    pub error: String,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", shown(&self.path), self.side, self.error)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    Difference(Difference),
    Trouble(Trouble),
    /// A mount point below the roots that was not entered.
    NotEntered {
        path: Vec<u8>,
    },
}

impl Finding {
    /// A trouble of each side that has one.
    pub fn troubles<E: fmt::Display>(path: &[u8], doing: &str, errors: Pair<Option<E>>) -> Vec<Self> {
        let of = |side: &'static str, error: Option<E>| {
            error.map(|error| Self::Trouble(Trouble { path: path.to_owned(), side, error: format!("{doing}: {error}") }))
        };
        of("source", errors.source).into_iter().chain(of("target", errors.target)).collect()
    }
}
