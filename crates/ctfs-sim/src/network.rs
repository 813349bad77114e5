//! The network between the servers: calls that are delayed, dropped, delivered twice, or cut off.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use ctfs_consensus::{Transport, TransportError};
use ctfs_types::NodeId;
use tokio::sync::oneshot;

use crate::{chance::Chance, shared::Shared};

/// A message on its way.
#[derive(Debug, Clone)]
pub struct Packet {
    pub from: NodeId,
    pub to: NodeId,
    pub call: u64,
    pub service: u16,
    pub content: Content,
}

#[derive(Debug, Clone)]
pub enum Content {
    Question(Vec<u8>),
    Answer(Result<Vec<u8>, TransportError>),
}

/// How the network treats messages. Still air unless a run says otherwise.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    /// Of a thousand messages so many are lost.
    pub lost: u64,
    /// So many questions arrive twice.
    pub doubled: u64,
    /// So many take long, up to `late_millis`.
    pub late: u64,
    pub late_millis: u64,
}

/// Messages that are lost on purpose.
#[derive(Debug, Clone, Copy)]
pub struct Filter {
    pub from: Option<NodeId>,
    pub to: Option<NodeId>,
    pub service: u16,
    /// Of the answers, else of the questions.
    pub answers: bool,
    /// So many of them.
    pub left: u32,
    /// They are not lost but come so late, whatever is cut meanwhile.
    pub late_by: Option<Duration>,
}

impl Filter {
    fn takes(&mut self, packet: &Packet) -> bool {
        let is_answer = matches!(packet.content, Content::Answer(_));
        let taken = self.left > 0
            && self.service == packet.service
            && self.answers == is_answer
            && self.from.is_none_or(|from| from == packet.from)
            && self.to.is_none_or(|to| to == packet.to);
        if taken {
            self.left -= 1;
        }
        taken
    }
}

pub struct Wires {
    chance: Chance,
    pub weather: Weather,
    pub filters: Vec<Filter>,
    /// Directed.
    cut: BTreeSet<(NodeId, NodeId)>,
    down: BTreeSet<NodeId>,
    next_call: u64,
    /// By time of arrival, then in the order of sending.
    under_way: BTreeMap<(Duration, u64), Packet>,
    sent: u64,
    /// Between two servers, the smaller first; measured when it is asked for first.
    distances: BTreeMap<(NodeId, NodeId), Duration>,
    waiting: BTreeMap<u64, (NodeId, oneshot::Sender<Result<Vec<u8>, TransportError>>)>,
}

impl Wires {
    pub fn new(chance: Chance) -> Self {
        Self {
            chance,
            weather: Weather::default(),
            filters: Vec::new(),
            cut: BTreeSet::new(),
            down: BTreeSet::new(),
            next_call: 0,
            under_way: BTreeMap::new(),
            sent: 0,
            distances: BTreeMap::new(),
            waiting: BTreeMap::new(),
        }
    }

    /// From now on nothing gets from `from` to `to`.
    pub fn cut(&mut self, from: NodeId, to: NodeId) {
        self.cut.insert((from, to));
    }

    pub fn heal(&mut self) {
        self.cut.clear();
        self.filters.clear();
        self.weather = Weather::default();
    }

    pub fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cut.contains(&(from, to))
    }

    pub fn is_up(&self, node: NodeId) -> bool {
        !self.down.contains(&node)
    }

    /// Whether both hear each other.
    pub fn connects(&self, a: NodeId, b: NodeId) -> bool {
        self.is_up(a) && self.is_up(b) && !self.is_cut(a, b) && !self.is_cut(b, a)
    }

    /// What a server takes for the round trip to another, while both hear each other.
    pub fn distance(&mut self, from: NodeId, to: NodeId) -> Option<Duration> {
        if !self.connects(from, to) {
            return None;
        }
        let chance = &mut self.chance;
        let measured = self.distances.entry((from.min(to), from.max(to)));
        Some(*measured.or_insert_with(|| Duration::from_micros(chance.between(200, 3_000))))
    }

    /// From now on both take this for the round trip between them.
    pub fn set_distance(&mut self, a: NodeId, b: NodeId, distance: Duration) {
        self.distances.insert((a.min(b), a.max(b)), distance);
    }

    /// The server is gone, and who waits for an answer there with it.
    pub fn goes_down(&mut self, node: NodeId) {
        self.down.insert(node);
        self.waiting.retain(|_, (asker, _)| *asker != node);
        self.under_way.retain(|_, packet| packet.to != node);
    }

    pub fn comes_up(&mut self, node: NodeId) {
        self.down.remove(&node);
    }

    fn send(&mut self, now: Duration, packet: Packet) {
        let weather = self.weather;
        if let Some(filter) = self.filters.iter_mut().find_map(|filter| filter.takes(&packet).then_some(*filter)) {
            if let Some(late_by) = filter.late_by {
                self.sent += 1;
                self.under_way.insert((now + late_by, self.sent), packet);
            }
            return;
        }
        if self.cut.contains(&(packet.from, packet.to)) || self.chance.strikes(weather.lost) {
            return;
        }
        let is_question = matches!(packet.content, Content::Question(_));
        let copies = if is_question && self.chance.strikes(weather.doubled) { 2 } else { 1 };
        for _ in 0..copies {
            let mut micros = self.chance.between(150, 1_500);
            if self.chance.strikes(weather.late) {
                micros += self.chance.below(weather.late_millis * 1000 + 1);
            }
            self.sent += 1;
            self.under_way.insert((now + Duration::from_micros(micros), self.sent), packet.clone());
        }
    }

    /// What has arrived by now. A link that is cut by now lets nothing through.
    pub fn arrived(&mut self, now: Duration) -> Vec<Packet> {
        let mut arrived = Vec::new();
        while let Some(entry) = self.under_way.first_entry()
            && entry.key().0 <= now
        {
            let packet = entry.remove();
            if !self.cut.contains(&(packet.from, packet.to)) {
                arrived.push(packet);
            }
        }
        arrived
    }

    /// Hands an answer to who asked, if that still waits.
    pub fn answer(&mut self, call: u64, answer: Result<Vec<u8>, TransportError>) {
        if let Some((_, waiting)) = self.waiting.remove(&call) {
            // Whoever gave up meanwhile does not listen.
            let _ = waiting.send(answer);
        }
    }
}

/// One server's end of the network.
pub struct Link {
    pub me: NodeId,
    pub shared: Arc<Shared>,
}

impl Link {
    /// Sends the answer to a question.
    pub fn answer(&self, question: &Packet, answer: Result<Vec<u8>, String>) {
        let content = Content::Answer(answer.map_err(TransportError::Refused));
        let packet = Packet { from: self.me, to: question.from, call: question.call, service: question.service, content };
        self.shared.wires.lock().send(self.shared.now(), packet);
    }
}

#[async_trait]
impl Transport for Link {
    async fn call(&self, to: NodeId, service: u16, payload: Vec<u8>, deadline: Duration) -> Result<Vec<u8>, TransportError> {
        let answered = {
            let mut wires = self.shared.wires.lock();
            if !wires.is_up(to) {
                None
            } else {
                let (answer, answered) = oneshot::channel();
                wires.next_call += 1;
                let call = wires.next_call;
                wires.waiting.insert(call, (self.me, answer));
                let packet = Packet { from: self.me, to, call, service, content: Content::Question(payload) };
                wires.send(self.shared.now(), packet);
                Some(answered)
            }
        };
        let Some(answered) = answered else {
            // As long as it takes to be refused.
            tokio::time::sleep(Duration::from_millis(1)).await;
            return Err(TransportError::Unreachable);
        };
        match tokio::time::timeout(deadline, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(TransportError::Closed),
            Err(_) => Err(TransportError::Deadline),
        }
    }

    fn reachable(&self, to: NodeId) -> bool {
        self.shared.wires.lock().connects(self.me, to)
    }
}
