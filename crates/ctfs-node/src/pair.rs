//! The pair: which other server has the journal of this life, and what is done with those of others.
//!
//! A server that has others streams its journal to the nearest of them that answers, and when that one has
//! all of it, says so in the replicated state ([`Op::SetPair`]). From then on fsync waits for the journal on
//! both disks, and for nothing else. When the pair does not keep up, fsync goes by the chunk stores and the
//! log, as it does without a pair, until another server has the journal.
//!
//! When a life is ended from outside, what it held stays held until its pair has sent what is in its copy
//! ([`succeed`]). A copy that is older than what was acknowledged is no danger: what the log and the chunk
//! stores have since says so itself, and the rest was acknowledged by the copy alone.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_consensus::{JournalCopy, Second};
use ctfs_journal::{
    Batch, Copies, Fenced, Journal, JournalId, Position, Stream, StreamSettings, StreamState, Transport, TransportError,
    decode_answer, encode_answer,
};
use ctfs_meta::Op;
use ctfs_net::Network;
use ctfs_types::{Holder, Incarnation, NodeId};
use tokio::time::Instant;

use crate::{journal, messages::{self, service}, node::Node, stop};

/// How often the pair, and what is left to this server, is looked at unasked.
const TICK: Duration = Duration::from_millis(500);
/// A pair that has not taken what there is for so long does not keep up.
const BEHIND_MAX: Duration = Duration::from_secs(1);
/// A new pair must have the journal so far as it is by then.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);
/// A server that was no good as a pair is not asked again before.
const AVOIDED_FOR: Duration = Duration::from_secs(10);
/// A batch takes as long as a chunk at most.
const BATCH_DEADLINE: Duration = Duration::from_secs(5);
/// Up to so many bytes a batch goes by a call, which waits for no stream of its own.
const BY_CALL_MAX: usize = 256 << 10;
/// Read from a copy at once.
const PIECE_BYTES: usize = 1 << 20;

/// Batches to one server.
struct ToPeer {
    network: Network,
    to: NodeId,
}

#[async_trait]
impl Transport for ToPeer {
    async fn send(&self, id: JournalId, batch: Batch) -> Result<Position, TransportError> {
        let unreachable = |error: ctfs_net::NetError| TransportError::Unreachable(error.to_string());
        let (header, body) = (messages::encode(&id), batch.encode());
        let answer = if body.len() <= BY_CALL_MAX {
            let call = [&(header.len() as u32).to_le_bytes()[..], &header, &body].concat();
            self.network.call(self.to, service::JOURNAL, call, BATCH_DEADLINE).await.map_err(unreachable)?
        } else {
            self.network.bulk(self.to, service::JOURNAL_BULK, header, Bytes::from(body), BATCH_DEADLINE).await.map_err(unreachable)?.0
        };
        let answer = decode_answer(&answer).map_err(|error| TransportError::Unreachable(error.to_string()))?;
        Ok(answer?)
    }
}

/// The two parts of a call that [`ToPeer`] made.
pub fn split_call(mut call: Bytes) -> Result<(Bytes, Bytes), String> {
    let short = || "a batch of a journal ends before it should".to_owned();
    if call.len() < 4 {
        return Err(short());
    }
    let length = u32::from_le_bytes([call[0], call[1], call[2], call[3]]) as usize;
    let mut rest = call.split_off(4);
    if rest.len() < length {
        return Err(short());
    }
    let header = rest.split_to(length);
    Ok((header, rest))
}

/// Takes a batch of the life of another server.
///
/// # Errors
/// A text for a peer that is at fault.
pub async fn accept(copies: &Copies, from: NodeId, header: &[u8], batch: Bytes) -> Result<Vec<u8>, String> {
    let id: JournalId = messages::decode(header)?;
    if id.node != from {
        return Err("a journal is sent by the server whose it is".to_owned());
    }
    let batch = Batch::decode(batch).map_err(|error| error.to_string())?;
    Ok(encode_answer(&copies.accept(id, batch).await))
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
    fn start(node: &Node, journal: Arc<Journal>, to: NodeId) -> Arc<Self> {
        let transport = Arc::new(ToPeer { network: node.network.clone(), to });
        Arc::new(Self { id: journal.id(), node: to, stream: Stream::start(journal, transport, StreamSettings::default()) })
    }
}

/// Sees to it that another server has the journal of each life of this one.
pub async fn keep(node: Arc<Node>) {
    let mut journals = node.journal.subscribe();
    let mut stopping = node.stop.subscribe();
    loop {
        let current = journals.borrow_and_update().clone();
        let kept = async {
            match current {
                Some((life, journal)) => Keeper::new(&node, life, journal).run().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = kept => {}
            changed = journals.changed() => if changed.is_err() { return },
            () = stop::requested(&mut stopping) => return,
        }
    }
}

struct Keeper<'a> {
    node: &'a Node,
    life: Incarnation,
    journal: Arc<Journal>,
    avoided: BTreeMap<NodeId, Instant>,
}

impl<'a> Keeper<'a> {
    fn new(node: &'a Node, life: Incarnation, journal: Arc<Journal>) -> Self {
        Self { node, life, journal, avoided: BTreeMap::new() }
    }

    /// Until the journal ends.
    async fn run(mut self) {
        let mut members = self.node.events.members();
        loop {
            members.borrow_and_update();
            let others = self.others();
            if others.is_empty() {
                self.node.consensus.set_second(Second::Nobody);
            } else if let Some(to) = self.nearest(&others) {
                self.node.consensus.set_second(Second::Unknown);
                match self.pair_with(to).await {
                    Ok(copy) => {
                        self.node.consensus.set_second(Second::Copy(copy.clone()));
                        self.node.pair.send_replace(Some(to));
                        self.while_good(&copy).await;
                        self.node.pair.send_replace(None);
                        self.node.consensus.set_second(Second::Unknown);
                    }
                    Err(why) => tracing::debug!(pair = %to, why, "no pair for the journal yet"),
                }
                self.avoided.insert(to, Instant::now() + AVOIDED_FOR);
            } else {
                self.node.consensus.set_second(Second::Unknown);
            }
            tokio::select! {
                _ = members.changed() => {}
                () = tokio::time::sleep(TICK) => {}
                _ = self.journal.ended() => return,
            }
        }
    }

    /// The other members.
    fn others(&self) -> Vec<NodeId> {
        let replica = self.node.consensus.replica();
        let members = replica.read().members().unwrap_or_default();
        members.into_iter().map(|member| member.node).filter(|node| *node != self.node.id).collect()
    }

    /// The nearest of them that answers.
    fn nearest(&self, others: &[NodeId]) -> Option<NodeId> {
        let now = Instant::now();
        let is_avoided = |node: &NodeId| self.avoided.get(node).is_some_and(|until| *until > now);
        let answering = others.iter().copied().filter(|node| !is_avoided(node));
        let peers = answering.map(|node| (node, self.node.network.peer(node))).filter(|(_, peer)| peer.connected);
        peers.min_by_key(|(_, peer)| peer.rtt.unwrap_or(Duration::MAX)).map(|(node, _)| node)
    }

    /// Sends it the journal, and when it has what there is, says so to everybody.
    async fn pair_with(&self, to: NodeId) -> Result<Arc<Copy>, String> {
        let copy = Copy::start(self.node, self.journal.clone(), to);
        let upto = self.journal.depth().appended;
        match tokio::time::timeout(CATCH_UP_MAX, copy.stream.durable_at(upto)).await {
            Ok(Ok(())) => {}
            Ok(Err(end)) => return Err(end.to_string()),
            Err(_) => return Err("it does not keep up".to_owned()),
        }
        let life = Holder { node: self.node.id, incarnation: self.life };
        match self.node.consensus.propose(Op::SetPair { life, pair: Some(to) }).await {
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
            let StreamState { durable, trouble, ended } = state.borrow_and_update().clone();
            let now = Instant::now();
            if durable > progress.0 || durable >= self.journal.depth().appended {
                progress = (durable, now);
            }
            let is_behind = now - progress.1 > BEHIND_MAX;
            let is_member = self.others().contains(&copy.node);
            if is_behind || ended.is_some() || !is_member || (trouble.is_some() && !self.node.network.peer(copy.node).connected) {
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

/// Sends what is left to this server by lives that were ended, and drops copies that nobody needs.
pub async fn succeed(node: Arc<Node>) {
    let mut members = node.events.members();
    let mut stopping = node.stop.subscribe();
    loop {
        tokio::select! {
            _ = members.changed() => {}
            () = tokio::time::sleep(TICK * 4) => {}
            () = stop::requested(&mut stopping) => return,
        }
        members.borrow_and_update();
        if node.journal.borrow().is_none() {
            continue;
        }
        let left = node.consensus.replica().read().left_to(node.id).unwrap_or_default();
        for life in left {
            tokio::select! {
                done = take_over(&node, life) => if let Err(why) = done {
                    tracing::warn!(server = %life.node, why, "what an ended life left to this server is not sent yet");
                },
                () = stop::requested(&mut stopping) => return,
            }
        }
        drop_copies(&node).await;
    }
}

async fn take_over(node: &Arc<Node>, life: Holder) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let id = JournalId { cluster: node.record.identity.id, node: life.node, incarnation: life.incarnation };
    let epoch = node.consensus.replica().read().applied().0;
    let copy: Fenced = match node.copies.fence(id, epoch).await {
        Ok(Some(copy)) => copy,
        Ok(None) => return Err("its copy is not here; start that server, or remove it".to_owned()),
        Err(refusal) => return Err(text(&refusal)),
    };
    let reader = copy.clone();
    let read: journal::ReadRecords = Arc::new(move |from| reader.records(from, PIECE_BYTES));
    journal::send(id, copy.kept_from(), read, &node.consensus, &node.vfs).await.map_err(|error| text(&error))?;
    let by = Holder { node: node.id, incarnation: node.consensus.incarnation() };
    match node.consensus.propose(Op::EndLife { life, by }).await {
        Ok(Ok(_)) => tracing::warn!(server = %life.node, "took over what it had acknowledged; what it held is free now"),
        // It is back, and did it itself.
        Ok(Err(verdict)) => tracing::info!(server = %life.node, %verdict, "what it left was sent otherwise"),
        Err(error) => return Err(text(&error)),
    }
    Ok(())
}

/// Drops copies of lives that have ended and left nothing to be sent.
async fn drop_copies(node: &Node) {
    let Ok(copies) = node.copies.list().await else { return };
    for copy in copies {
        let is_over = {
            let replica = node.consensus.replica();
            let namespace = replica.read();
            let is_ended = namespace.is_ended(copy.id.incarnation).unwrap_or(false);
            is_ended && !namespace.left_by(copy.id.incarnation).unwrap_or(true)
        };
        if is_over && let Err(refusal) = node.copies.remove(copy.id).await {
            tracing::warn!(copy = %copy.id, %refusal, "a copy of an ended life cannot be removed");
        }
    }
}
