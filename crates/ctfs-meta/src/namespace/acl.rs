//! POSIX access control lists as Linux keeps them in extended attributes
//! (`include/uapi/linux/posix_acl_xattr.h`, version 2), and the rules of POSIX.1e draft 17 that
//! tie them to mode bits.

use crate::MetaError;

pub const ACCESS: &[u8] = b"system.posix_acl_access";
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    tag: u16,
    perm: u16,
    id: u32,
}

/// A list that keeps the rules: the three base entries once each, a mask where named entries are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acl(Vec<Entry>);

impl Acl {
    /// # Errors
    /// [`MetaError::BadAcl`], as EINVAL of setxattr(2).
    pub fn parse(bytes: &[u8]) -> Result<Self, MetaError> {
        let (version, body) = bytes.split_first_chunk::<4>().ok_or(MetaError::BadAcl)?;
        if u32::from_le_bytes(*version) != VERSION || body.len() % 8 != 0 {
            return Err(MetaError::BadAcl);
        }
        let mut entries: Vec<Entry> = body
            .chunks_exact(8)
            .map(|e| Entry {
                tag: u16::from_le_bytes([e[0], e[1]]),
                perm: u16::from_le_bytes([e[2], e[3]]),
                id: u32::from_le_bytes([e[4], e[5], e[6], e[7]]),
            })
            .collect();
        let count = |tag| entries.iter().filter(|e| e.tag == tag).count();
        let named = count(USER) + count(GROUP);
        let known = [USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER].iter().map(|tag| count(*tag)).sum::<usize>();
        let right = count(USER_OBJ) == 1
            && count(GROUP_OBJ) == 1
            && count(OTHER) == 1
            && count(MASK) <= 1
            && (named == 0 || count(MASK) == 1)
            && known == entries.len()
            && entries.iter().all(|e| e.perm <= 7);
        if !right {
            return Err(MetaError::BadAcl);
        }
        entries.sort_by_key(|e| (e.tag, if e.tag == USER || e.tag == GROUP { e.id } else { 0 }));
        Ok(Self(entries))
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for e in &self.0 {
            bytes.extend_from_slice(&e.tag.to_le_bytes());
            bytes.extend_from_slice(&e.perm.to_le_bytes());
            bytes.extend_from_slice(&e.id.to_le_bytes());
        }
        bytes
    }

    /// Whether mode bits say the same.
    pub fn is_minimal(&self) -> bool {
        self.0.len() == 3
    }

    fn perm(&mut self, tag: u16) -> Option<&mut u16> {
        self.0.iter_mut().find(|e| e.tag == tag).map(|e| &mut e.perm)
    }

    /// The entry that the group bits of the mode show: the mask, else the owning group.
    fn group_class(&mut self) -> &mut u16 {
        let tag = if self.0.iter().any(|e| e.tag == MASK) { MASK } else { GROUP_OBJ };
        self.perm(tag).expect("a parsed list has the owning group")
    }

    /// The nine mode bits this list stands for.
    pub fn mode_bits(&mut self) -> u16 {
        let user = *self.perm(USER_OBJ).expect("a parsed list has the owner");
        let other = *self.perm(OTHER).expect("a parsed list has others");
        user << 6 | *self.group_class() << 3 | other
    }

    /// Follows a chmod.
    pub fn chmod(&mut self, mode: u16) {
        *self.perm(USER_OBJ).expect("a parsed list has the owner") = mode >> 6 & 7;
        *self.group_class() = mode >> 3 & 7;
        *self.perm(OTHER).expect("a parsed list has others") = mode & 7;
    }

    /// Makes a default list the access list of a new inode asked for with `mode`; returns the
    /// mode it gets.
    pub fn inherit(&mut self, mode: u16) -> u16 {
        let user = self.perm(USER_OBJ).expect("a parsed list has the owner");
        *user &= mode >> 6 & 7;
        let group = self.group_class();
        *group &= mode >> 3 & 7;
        let other = self.perm(OTHER).expect("a parsed list has others");
        *other &= mode & 7;
        mode & !0o777 | self.mode_bits()
    }
}
