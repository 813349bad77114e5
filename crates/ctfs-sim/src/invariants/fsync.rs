//! An acknowledged fsync is never lost: the content of a file that one program overwrites is at least as
//! new as at the last fsync that was answered.

use std::collections::BTreeMap;

use ctfs_types::Ino;

/// Of one file.
#[derive(Debug, Default, Clone, Copy)]
pub struct Version {
    /// The last that was asked to be written.
    pub asked: u64,
    /// The last that was written when fsync answered.
    pub synced: u64,
}

#[derive(Default)]
pub struct Versions(pub BTreeMap<Ino, Version>);

/// So long that it is no inline extent.
const BYTES: usize = 6000;

impl Version {
    /// What is wrong with what is left.
    pub fn check(&self, ino: Ino, bytes: &[u8]) -> Option<String> {
        let found = if bytes.is_empty() { Some(0) } else { number(bytes) };
        match found {
            Some(version) if version >= self.synced && version <= self.asked => None,
            Some(version) => Some(format!("file {ino} holds version {version}: {self:?}")),
            None => Some(format!("file {ino} holds a mixture of versions: {self:?}")),
        }
    }
}

/// The content of a version.
pub fn content(version: u64) -> Vec<u8> {
    version.to_le_bytes().into_iter().cycle().take(BYTES).collect()
}

fn number(bytes: &[u8]) -> Option<u64> {
    let version = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    (bytes == content(version)).then_some(version)
}
