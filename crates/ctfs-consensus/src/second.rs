//! The second disk: which other server has the journal of this life, too.

use std::sync::Arc;

use async_trait::async_trait;
use ctfs_journal::{JournalId, Position};
use ctfs_meta::Durability;

/// Who has the journal besides this server.
#[derive(Clone, Default)]
pub enum Second {
    /// Nobody that counts: what shall be on two disks must get there otherwise.
    #[default]
    Unknown,
    /// There is no other server.
    Nobody,
    /// The server that the replicated state names as this life's pair.
    Copy(Arc<dyn JournalCopy>),
}

/// A copy of this life's journal on another server.
#[async_trait]
pub trait JournalCopy: Send + Sync + 'static {
    /// Whose copy it is: positions of another life mean something else.
    fn id(&self) -> JournalId;

    /// Returns when the copy has everything up to there on its disk; `false`: it will not.
    async fn durable_at(&self, position: Position) -> bool;
}

impl Second {
    /// Whether the journal, here and there, is on as many disks as asked for.
    pub(crate) fn is_enough_for(&self, class: Durability) -> bool {
        match class {
            Durability::Local => true,
            Durability::Pair => !matches!(self, Self::Unknown),
            Durability::Quorum | Durability::All => false,
        }
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Unknown, Self::Unknown) | (Self::Nobody, Self::Nobody) => true,
            (Self::Copy(one), Self::Copy(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}
