//! Hard links: are the names of one inode the names of one inode on the other side too?
//!
//! Counted are splits and joins: a group that falls into two is one difference, into three two,
//! whatever the number of names. Links from outside the tree concern nobody.

use std::collections::{HashMap, HashSet};

use crate::{
    finding::{Difference, Pair, What},
    object::{Id, Stat},
    show::escape,
};

/// Names kept so that a difference can say whose other name it is. Without a bound a tree in which
/// every file has links outside, such as one of many linked backups, would be kept as a whole;
/// above it the inode number is told.
const NAME_BYTES_MAX: usize = 64 << 20;

/// An inode of which names are still to come.
#[derive(Debug)]
struct Group {
    first: Option<Box<[u8]>>,
    seen: u32,
    partners: Vec<Id>,
}

#[derive(Debug, Default)]
pub struct Links {
    sides: Pair<HashMap<Id, Group>>,
    /// Inode of the source and inode of the target that share a name.
    met: HashSet<(Id, Id)>,
    name_bytes: usize,
}

/// What is known when two objects meet under one name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Meeting {
    /// These two inodes were compared under an earlier name.
    pub again: bool,
    pub difference: Option<Difference>,
}

impl Links {
    /// Notes that `path` names these two.
    pub fn meet(&mut self, path: &[u8], stats: Pair<&Stat>) -> Meeting {
        if stats.source.links <= 1 && stats.target.links <= 1 {
            return Meeting::default();
        }
        let ids = stats.map(|stat| stat.id);
        let again = self.met.contains(&(ids.source, ids.target));
        let known = Pair::new(self.sides.source.get(&ids.source), self.sides.target.get(&ids.target));
        let difference = (!again && (known.source.is_some() || known.target.is_some())).then(|| {
            let shown = known.zip(ids).map(|(group, id)| match group {
                Some(Group { first: Some(first), .. }) => format!("same file as {}", escape(first)),
                Some(_) => format!("same file as others of inode {}", id.inode),
                None => "a file of its own".to_owned(),
            });
            Difference::new(path, What::Links, shown)
        });
        if !again {
            self.met.insert((ids.source, ids.target));
        }
        let Self { sides, met, name_bytes } = self;
        let forget = |partner| {
            met.remove(&(ids.source, partner));
        };
        note(&mut sides.source, name_bytes, path, stats.source, (!again).then_some(ids.target), forget);
        note(&mut sides.target, name_bytes, path, stats.target, None, |_| {});
        Meeting { again, difference }
    }

    #[cfg(test)]
    fn kept(&self) -> (usize, usize, usize, usize) {
        (self.sides.source.len(), self.sides.target.len(), self.met.len(), self.name_bytes)
    }
}

/// Counts one more name of an inode, and forgets the inode with its last.
fn note(groups: &mut HashMap<Id, Group>, name_bytes: &mut usize, path: &[u8], stat: &Stat, partner: Option<Id>, mut forget: impl FnMut(Id)) {
    let group = groups.entry(stat.id).or_insert_with(|| {
        let room = stat.links > 1 && *name_bytes + path.len() <= NAME_BYTES_MAX;
        if room {
            *name_bytes += path.len();
        }
        Group { first: room.then(|| path.into()), seen: 0, partners: Vec::new() }
    });
    group.seen += 1;
    group.partners.extend(partner);
    if group.seen >= stat.links
        && let Some(group) = groups.remove(&stat.id)
    {
        *name_bytes -= group.first.map_or(0, |first| first.len());
        group.partners.into_iter().for_each(&mut forget);
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::FileType;

    use super::*;

    fn stat(inode: u64, links: u32) -> Stat {
        let id = Id { device: (8, 1), inode };
        Stat { kind: FileType::RegularFile, mode: 0, uid: 0, gid: 0, size: 0, atime: (0, 0), mtime: (0, 0), ctime: (0, 0), links, device: (0, 0), id, mount: 0 }
    }

    /// Inodes of the names a, b, c ... on both sides; returns the lines and what is still kept.
    fn lines(source: &[u64], target: &[u64]) -> (Vec<String>, (usize, usize, usize, usize)) {
        let mut links = Links::default();
        let count = |all: &[u64], inode| all.iter().filter(|other| **other == inode).count() as u32;
        let mut lines = Vec::new();
        for (i, (from, to)) in source.iter().zip(target).enumerate() {
            let stats = Pair::new(stat(*from, count(source, *from)), stat(*to, count(target, *to)));
            let meeting = links.meet(&[b'a' + i as u8], stats.as_ref());
            lines.extend(meeting.difference.map(|difference| difference.to_string()));
        }
        (lines, links.kept())
    }

    #[test]
    fn equal_groups_are_no_difference_and_nothing_of_them_is_kept() {
        assert_eq!(lines(&[1, 2, 1, 3, 2, 1], &[9, 8, 9, 7, 8, 9]), (vec![], (0, 0, 0, 0)));
    }

    #[test]
    fn a_split_or_a_join_is_one_difference_wherever_it_is() {
        for (source, target, line) in [
            (&[1, 1, 1], &[9, 9, 8], "links    c: same file as a -> a file of its own"),
            (&[1, 1, 1], &[9, 8, 8], "links    b: same file as a -> a file of its own"),
            (&[1, 1, 1], &[9, 8, 9], "links    b: same file as a -> a file of its own"),
            (&[1, 1, 2], &[9, 9, 9], "links    c: a file of its own -> same file as a"),
            (&[1, 2, 2], &[9, 9, 9], "links    b: a file of its own -> same file as a"),
        ] {
            assert_eq!(lines(source, target), (vec![line.to_owned()], (0, 0, 0, 0)), "{source:?} {target:?}");
        }
        assert_eq!(lines(&[1, 1, 1, 1], &[9, 8, 7, 6]).0.len(), 3);
        assert_eq!(lines(&[1, 1, 2, 2], &[9, 8, 9, 8]).0.len(), 3, "two splits and a join of what they left");
    }

    #[test]
    fn links_from_outside_the_tree_are_no_difference() {
        let mut links = Links::default();
        let stats = Pair::new(stat(1, 3), stat(9, 1));
        assert_eq!(links.meet(b"a", stats.as_ref()), Meeting::default());
    }
}
