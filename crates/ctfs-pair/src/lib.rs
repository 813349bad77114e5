//! The pair: which other server has the journal of this life, and what is done with those of others.
//!
//! A server that has others streams its journal to the nearest of them that answers, and when that one has
//! all of it, says so in the replicated state ([`ctfs_meta::Op::SetPair`]). From then on fsync waits for the
//! journal on both disks, and for nothing else. When the pair does not keep up, fsync goes by the chunk stores
//! and the log, as it does without a pair, until another server has the journal.
//!
//! When a life is ended from outside, what it held stays held until its pair has sent what is in its copy
//! ([`Pairs::succeed`]). A copy that is older than what was acknowledged is no danger: what the log and the
//! chunk stores have since says so itself, and the rest was acknowledged by the copy alone.
//!
//! Reading order: [`journals`] (those of this server's own lives, and how one is sent), `keep` (the copy of
//! the present one), `succeed` (those of others), [`wire`] (what travels). The other servers come in as
//! [`Peers`].

pub mod journals;
mod keep;
mod succeed;
mod successor;
pub mod wire;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_consensus::Consensus;
use ctfs_journal::{Batch, Copies, Journal, JournalError, JournalId, Position, TransportError};
use ctfs_types::{Incarnation, LogIndex, NodeId};
use ctfs_vfs::Vfs;
use tokio::sync::watch;

pub use journals::{Journals, ReplayError};
pub use successor::{InTheNameOf, no_verdict};

/// How often the pair, and what is left to this server, is looked at unasked.
const TICK: Duration = Duration::from_millis(500);

/// The other servers, as those who may keep a copy.
#[async_trait]
pub trait Peers: Send + Sync + 'static {
    /// How far a server is, while there is a connection to it.
    fn distance(&self, to: NodeId) -> Option<Duration>;

    /// Sends a batch to the copies that a server keeps; see [`ctfs_journal::Transport::send`].
    async fn send(&self, to: NodeId, id: JournalId, batch: Batch) -> Result<Position, TransportError>;
}

/// What a server has to do with journals: its own, and the copies of others'.
pub struct Pairs {
    journals: Journals,
    consensus: Consensus,
    vfs: Arc<Vfs>,
    copies: Arc<Copies>,
    peers: Arc<dyn Peers>,
    /// Fires when the member list may have changed, or a life was ended.
    members: watch::Receiver<LogIndex>,
    /// The journal of the present life.
    journal: watch::Sender<Option<(Incarnation, Arc<Journal>)>>,
    /// The server that has it, too, while it keeps up.
    pair: watch::Sender<Option<NodeId>>,
}

impl Pairs {
    pub fn new(
        journals: Journals,
        consensus: Consensus,
        vfs: Arc<Vfs>,
        copies: Arc<Copies>,
        peers: Arc<dyn Peers>,
        members: watch::Receiver<LogIndex>,
    ) -> Arc<Self> {
        let (journal, pair) = (watch::Sender::new(None), watch::Sender::new(None));
        Arc::new(Self { journals, consensus, vfs, copies, peers, members, journal, pair })
    }

    /// The server that has the journal of this life, too.
    pub fn pair(&self) -> Option<NodeId> {
        *self.pair.borrow()
    }

    /// Sends what lives before `life` left behind, and removes their journals. Answers how many commands
    /// of them are in the log now.
    ///
    /// # Errors
    /// The journals stay, and all may be asked again.
    pub async fn replay(&self, life: Incarnation) -> Result<u64, ReplayError> {
        self.journals.replay(life, &self.consensus, &self.vfs).await
    }

    /// From here on this server may act ahead of the log, where it alone may change something.
    ///
    /// # Errors
    /// See [`Journal::create`].
    pub fn begin_journal(&self, life: Incarnation) -> Result<(), JournalError> {
        let journal = self.journals.begin(life)?;
        self.consensus.set_journal(journal.clone());
        self.journal.send_replace(Some((life, journal)));
        Ok(())
    }

    /// The life was ended; nothing is written into its journal any more.
    pub fn journal_ended(&self) {
        self.journal.send_replace(None);
        self.pair.send_replace(None);
    }

    /// Takes a batch of the life of another server.
    ///
    /// # Errors
    /// A text for a peer that is at fault.
    pub async fn accept(&self, from: NodeId, header: &[u8], batch: Bytes) -> Result<Vec<u8>, String> {
        wire::accept(&self.copies, from, header, batch).await
    }

    fn node(&self) -> NodeId {
        self.journals.node()
    }

    /// The other members.
    fn others(&self) -> Vec<NodeId> {
        let members = self.consensus.replica().read().members().unwrap_or_default();
        members.into_iter().map(|member| member.node).filter(|node| *node != self.node()).collect()
    }
}
