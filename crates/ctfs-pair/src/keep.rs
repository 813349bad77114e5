//! Sees to it that another server has the journal of each life of this one.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use ctfs_consensus::{JournalCopy, Second};
use ctfs_journal::{Batch, Journal, JournalId, Position, Stream, StreamSettings, StreamState, Transport, TransportError};
use ctfs_meta::Op;
use ctfs_types::{
    Holder, Incarnation, NodeId,
    rules::{Rule, keeps},
};
use tokio::time::Instant;

use crate::{Pairs, Peers, TICK};

/// A pair that has taken nothing of what there is for so long does not keep up. As long as a lease: one sync of a disk
/// under load takes a second, and a new pair on the same machines would be no faster; fsync goes the slower way
/// until there is one.
const BEHIND_MAX: Duration = Duration::from_secs(3);
/// A new pair must have the journal so far as it is by then.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);
/// A server that was no good as a pair is not asked again before.
const AVOIDED_FOR: Duration = Duration::from_secs(10);

/// Batches to one server.
struct ToPeer {
    peers: Arc<dyn Peers>,
    to: NodeId,
}

#[async_trait]
impl Transport for ToPeer {
    async fn send(&self, id: JournalId, batch: Batch) -> Result<Position, TransportError> {
        self.peers.send(self.to, id, batch).await
    }
}

/// The copy of this life's journal on one other server.
struct Copy {
    id: JournalId,
    node: NodeId,
    stream: Stream,
}

#[async_trait]
impl JournalCopy for Copy {
    fn id(&self) -> JournalId {
        self.id
    }

    async fn durable_at(&self, position: Position) -> bool {
        self.stream.durable_at(position).await.is_ok()
    }
}

impl Copy {
    fn start(peers: Arc<dyn Peers>, journal: Arc<Journal>, to: NodeId) -> Arc<Self> {
        let transport = Arc::new(ToPeer { peers, to });
        Arc::new(Self { id: journal.id(), node: to, stream: Stream::start(journal, transport, StreamSettings::default()) })
    }
}

impl Pairs {
    /// Keeps a copy of each life's journal on another server, until it is dropped.
    pub async fn keep(&self) {
        let mut journals = self.journal.subscribe();
        loop {
            let current = journals.borrow_and_update().clone();
            let kept = async {
                match current {
                    Some((life, journal)) => Keeper::new(self, life, journal).run().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = kept => {}
                changed = journals.changed() => if changed.is_err() { return },
            }
        }
    }
}

struct Keeper<'a> {
    pairs: &'a Pairs,
    life: Incarnation,
    journal: Arc<Journal>,
    avoided: BTreeMap<NodeId, Instant>,
}

impl<'a> Keeper<'a> {
    fn new(pairs: &'a Pairs, life: Incarnation, journal: Arc<Journal>) -> Self {
        Self { pairs, life, journal, avoided: BTreeMap::new() }
    }

    /// Until the journal ends.
    async fn run(mut self) {
        let mut members = self.pairs.members.clone();
        loop {
            members.borrow_and_update();
            let others = self.pairs.others();
            if others.is_empty() {
                self.pairs.consensus.set_second(Second::Nobody);
            } else if let Some(to) = self.nearest(&others) {
                self.pairs.consensus.set_second(Second::Unknown);
                match self.pair_with(to).await {
                    Ok(copy) => {
                        self.pairs.consensus.set_second(Second::Copy(copy.clone()));
                        self.pairs.pair.send_replace(Some(to));
                        self.while_good(&copy).await;
                        self.pairs.pair.send_replace(None);
                        self.pairs.consensus.set_second(Second::Unknown);
                    }
                    Err(why) => tracing::debug!(pair = %to, why, "no pair for the journal yet"),
                }
                self.avoided.insert(to, Instant::now() + AVOIDED_FOR);
            } else {
                self.pairs.consensus.set_second(Second::Unknown);
            }
            tokio::select! {
                _ = members.changed() => {}
                () = tokio::time::sleep(TICK) => {}
                _ = self.journal.ended() => return,
            }
        }
    }

    /// The nearest of them that answers.
    fn nearest(&self, others: &[NodeId]) -> Option<NodeId> {
        let now = Instant::now();
        let is_avoided = |node: &NodeId| self.avoided.get(node).is_some_and(|until| *until > now);
        let answering = others.iter().copied().filter(|node| !is_avoided(node));
        let near = answering.filter_map(|node| Some((node, self.pairs.peers.distance(node)?)));
        near.min_by_key(|(_, distance)| *distance).map(|(node, _)| node)
    }

    /// Sends it the journal, and when it has what there is, says so to everybody.
    async fn pair_with(&self, to: NodeId) -> Result<Arc<Copy>, String> {
        let copy = Copy::start(self.pairs.peers.clone(), self.journal.clone(), to);
        if keeps(Rule::PairHasAll) {
            let upto = self.journal.depth().appended;
            match tokio::time::timeout(CATCH_UP_MAX, copy.stream.durable_at(upto)).await {
                Ok(Ok(())) => {}
                Ok(Err(end)) => return Err(end.to_string()),
                Err(_) => return Err("it does not keep up".to_owned()),
            }
        }
        if !keeps(Rule::PairIsRecorded) {
            return Ok(copy);
        }
        let life = Holder { node: self.pairs.node(), incarnation: self.life };
        match self.pairs.consensus.propose(Op::SetPair { life, pair: Some(to) }).await {
            Ok(Ok(_)) => {
                tracing::info!(pair = %to, "the journal is kept there, too");
                Ok(copy)
            }
            Ok(Err(verdict)) => Err(verdict.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Returns when the copy is no longer good for anything.
    async fn while_good(&self, copy: &Copy) {
        let mut state = copy.stream.watch();
        let mut progress = (Position::NONE, Instant::now());
        loop {
            let StreamState { durable, trouble, ended, .. } = state.borrow_and_update().clone();
            let now = Instant::now();
            if durable > progress.0 || durable >= self.journal.depth().appended {
                progress = (durable, now);
            }
            let is_behind = now - progress.1 > BEHIND_MAX;
            let is_member = self.pairs.others().contains(&copy.node);
            if is_behind || ended.is_some() || !is_member || (trouble.is_some() && self.pairs.peers.distance(copy.node).is_none()) {
                tracing::warn!(pair = %copy.node, ?trouble, ?ended, "the pair does not take the journal any more");
                return;
            }
            tokio::select! {
                _ = state.changed() => {}
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }
}
