//! Commands on their way into the log.
//!
//! openraft waits for each flush of the log before the next, so proposals do not share an fsync
//! by themselves. Here they do: [`pack`] puts what has arrived while entries are being written
//! into the next one. A server that does not lead sends what waits to the leader the same way
//! ([`forward`]). [`Request::propose`] retries under the same request id until its deadline, and
//! answers when the change is visible everywhere and applied here.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use ctfs_meta::{About, Command, MetaError, Op, Reply};
use ctfs_types::{
    Incarnation, Ino, NodeId, RequestId, Timestamp, codec,
    rules::{Rule, keeps},
};
use openraft::error::ClientWriteError;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    core::Core,
    error::ProposeError,
    health::grows,
    messages::{self, Answer, Fate, Forward, Forwarded, service},
    raft_types::{Entries, TypeConfig, log_index},
    settings::COMMAND_BYTES_MAX,
};

/// Beyond a lease, what a change may take at the leader before a follower asks again.
const FORWARD_SLACK: Duration = Duration::from_millis(1500);

/// Before it is asked again what became of a request.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Commands that wait for their answer. They are in the log together, or none of them is.
pub(crate) struct Ticket {
    commands: Vec<Command>,
    bytes: usize,
    deadline: Instant,
    answer: oneshot::Sender<Outcome>,
}

/// How one try ended. A ticket that is dropped means [`Outcome::Unsure`].
#[derive(Debug)]
pub(crate) enum Outcome {
    Answered(Answer),
    /// It did not happen by this try.
    NotLeader,
    /// It may have happened.
    Unsure,
    /// It did not happen by this try.
    NoSpace,
}

impl From<Fate> for Outcome {
    fn from(fate: Fate) -> Self {
        match fate {
            Fate::Answered(answer) => Self::Answered(answer),
            Fate::Unsure => Self::Unsure,
            Fate::NoSpace => Self::NoSpace,
        }
    }
}

/// One request of this server: all commands proposed through it happen once, together.
///
/// Whichever of them is applied first is the one that happens; each later one is answered with its
/// verdict and changes nothing. So when a proposal ended with [`ProposeError::NoQuorum`],
/// [`Op::Noop`] proposed here ends the doubt: the answer is the verdict of what was proposed
/// before, or [`Reply::Done`] if that did not happen, and then it never will.
/// [`MetaError::Answered`] leaves open whether it happened (this server had some thousand commands
/// applied since, and the verdict was forgotten); it does not happen any more.
///
/// Its verdict is remembered while this lives.
pub struct Request {
    core: Arc<Core>,
    /// Of the first proposal: the request, and up to which this server had its answers.
    number: Mutex<Option<(RequestId, u64)>>,
    /// No copy of a command is about that has not been answered.
    once: AtomicBool,
    /// Inodes of commands without an answer: nothing happens to them ahead of the log.
    on_the_way: Mutex<Vec<Ino>>,
}

impl Drop for Request {
    fn drop(&mut self) {
        let inos = std::mem::take(self.on_the_way.get_mut());
        let number = *self.number.get_mut();
        if !inos.is_empty() {
            // Its caller got no answer, or went away.
            let sent = number.filter(|_| !*self.once.get_mut());
            self.core.doubts.add(Doubt { sent, inos });
            if sent.is_some() {
                return;
            }
        }
        if let Some((request, _)) = number {
            self.core.numbers.lock().done(request.seq, *self.once.get_mut(), Instant::now());
        }
    }
}

/// Requests that nobody asks for any more and whose commands may still come to the log.
#[derive(Default)]
pub(crate) struct Doubts {
    open: Mutex<VecDeque<Doubt>>,
    added: Notify,
}

struct Doubt {
    /// What may come. `None`: nothing was sent.
    sent: Option<(RequestId, u64)>,
    inos: Vec<Ino>,
}

impl Doubts {
    fn add(&self, doubt: Doubt) {
        self.open.lock().push_back(doubt);
        self.added.notify_one();
    }
}

/// Makes sure that what was given up does not happen any more, or has: only then may what it is about be
/// changed ahead of the log again.
pub(crate) async fn end_doubts(core: Arc<Core>) {
    loop {
        let Some(Doubt { sent, inos }) = core.doubts.open.lock().pop_front() else {
            core.doubts.added.notified().await;
            continue;
        };
        if sent.is_some() {
            let request = Request::new(core.clone());
            *request.number.lock() = sent;
            request.once.store(false, Relaxed);
            while let Err(error) = request.propose(Op::Noop).await {
                if core.stopped().is_some() {
                    return;
                }
                tracing::debug!(%error, "whether a request that was given up happened is not known yet");
                sleep(ASK_AGAIN).await;
            }
        }
        core.replica.write().has_landed(&inos);
    }
}

impl Request {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core, number: Mutex::new(None), once: AtomicBool::new(true), on_the_way: Mutex::default() }
    }

    /// Proposes `op` and waits until it is visible everywhere and applied here.
    ///
    /// # Errors
    /// As [`crate::Consensus::propose`].
    pub async fn propose(&self, op: Op) -> Result<Result<Reply, MetaError>, ProposeError> {
        let core = &*self.core;
        let started = Instant::now();
        let deadline = started + core.settings.timings.propose_deadline;
        let no_quorum = || ProposeError::NoQuorum { waited: started.elapsed() };
        // Without a place, or those that wait would keep the report from being proposed.
        if is_for_life(&op) && !core.is_reported_by(deadline).await {
            return Err(no_quorum());
        }
        let Ok(place) = timeout_at(deadline, core.places.acquire()).await else { return Err(no_quorum()) };
        let _place = place.map_err(|_| ProposeError::Stopped("this server is shutting down".to_owned()))?;
        self.set_out(&op)?;
        let answered = self.propose_in_order(op, started, deadline).await;
        // Without an answer it may happen at any time, so its inodes stay on the way: what is done to
        // them goes through the log, behind it.
        if matches!(answered, Ok(_) | Err(ProposeError::TooLarge { .. } | ProposeError::NoSpace | ProposeError::LifeEnded)) {
            self.has_landed();
        }
        answered
    }

    fn set_out(&self, op: &Op) -> Result<(), ProposeError> {
        if !self.core.settings.acts_ahead {
            return Ok(());
        }
        let mut replica = self.core.replica.write();
        self.core.settle_locks(&mut replica, op);
        match replica.sets_out(op) {
            Ok(inos) => {
                self.on_the_way.lock().extend(inos);
                Ok(())
            }
            Err(error) => Err(ProposeError::Stopped(error.to_string())),
        }
    }

    fn has_landed(&self) {
        let inos = std::mem::take(&mut *self.on_the_way.lock());
        if !inos.is_empty() {
            self.core.replica.write().has_landed(&inos);
        }
    }

    async fn propose_in_order(&self, op: Op, started: Instant, deadline: Instant) -> Result<Result<Reply, MetaError>, ProposeError> {
        let core = &*self.core;
        let no_quorum = || ProposeError::NoQuorum { waited: started.elapsed() };
        // It may depend on them, and must not survive a crash that they do not. What is about no inode does
        // not, and the server's own affairs must not wait for a long backlog.
        let mut deadline = deadline;
        if !self.on_the_way.lock().is_empty() && keeps(Rule::DirectFollowsStreamed) {
            let before = Instant::now();
            core.await_streamed().await?;
            deadline += before.elapsed();
        }

        let (request, answered) = *self.number.lock().get_or_insert_with(|| {
            let (seq, answered) = core.numbers.lock().take(started);
            (RequestId { client: core.incarnation().0, seq }, answered)
        });
        let command = Command { request, answered, at: Timestamp::from(SystemTime::now()), about: About::Inodes(self.on_the_way.lock().clone()), op };
        let bytes = encoded_bytes(&command);
        if bytes > COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLarge { bytes, max: COMMAND_BYTES_MAX });
        }

        while Instant::now() < deadline {
            if let Some(stopped) = core.stopped() {
                return Err(stopped);
            }
            if self.once.load(Relaxed) && core.health.waits() {
                // It could not be applied here.
                return Err(ProposeError::NoSpace);
            }
            let leader = core.leader();
            if let Some(leader) = leader {
                let first = self.once.swap(false, Relaxed);
                match core.attempt(leader, vec![command.clone()], bytes, deadline).await {
                    Outcome::Answered(mut answer) => {
                        self.once.store(first, Relaxed);
                        core.raise_visible(answer.index);
                        let applied = core.await_applied(answer.index, deadline).await;
                        let verdict = answer.verdicts.pop().expect("a ticket is answered command by command");
                        return if applied { Ok(verdict) } else { Err(no_quorum()) };
                    }
                    Outcome::NotLeader => self.once.store(first, Relaxed),
                    Outcome::NoSpace if first => {
                        self.once.store(true, Relaxed);
                        return Err(ProposeError::NoSpace);
                    }
                    Outcome::Unsure | Outcome::NoSpace => {}
                }
            }
            core.await_other_leader(leader, deadline).await;
        }
        Err(no_quorum())
    }
}

/// Whether a life has something from it that is free when the life ends. Whoever ends lives knows those that were
/// reported: what an earlier one gets stays for ever, if it ends before.
fn is_for_life(op: &Op) -> bool {
    match op {
        Op::Make { node, .. } => node.holder.is_some(),
        Op::Own { .. } | Op::Lock { .. } | Op::AwaitLock { .. } => true,
        _ => false,
    }
}

impl Core {
    /// Waits until the present life is reported; `false`: it was not by then.
    async fn is_reported_by(&self, deadline: Instant) -> bool {
        let mut reported = self.reported.subscribe();
        let is_this = |life: &Incarnation| *life == self.incarnation();
        !self.settings.acts_ahead || matches!(timeout_at(deadline, reported.wait_for(is_this)).await, Ok(Ok(_)))
    }

    pub async fn propose(self: &Arc<Self>, op: Op) -> Result<Result<Reply, MetaError>, ProposeError> {
        Request::new(self.clone()).propose(op).await
    }

    pub async fn attempt(&self, leader: NodeId, commands: Vec<Command>, bytes: usize, deadline: Instant) -> Outcome {
        if leader == self.me && commands.iter().any(needs_room) && self.is_short_of_room() {
            return Outcome::NoSpace;
        }
        let (answer, answered) = oneshot::channel();
        let ticket = Ticket { commands, bytes, deadline, answer };
        let queue = if leader == self.me { &self.entries } else { &self.outbox };
        let mut view = self.view.subscribe();
        let served = async {
            if queue.send(ticket).await.is_err() {
                return Outcome::Unsure;
            }
            answered.await.unwrap_or(Outcome::Unsure)
        };
        tokio::select! {
            outcome = timeout_at(deadline, served) => outcome.unwrap_or(Outcome::Unsure),
            // Another leader: it is worth asking there, the request id keeps it from happening twice.
            _ = view.wait_for(|view| view.leader.is_some_and(|now| now != leader) || view.stopped.is_some()) => {
                Outcome::Unsure
            }
        }
    }

    /// The leader's side of [`forward`].
    ///
    /// # Errors
    /// A text for the log of the sender when the message breaks a limit.
    pub async fn forwarded(&self, message: Forward) -> Result<Forwarded, String> {
        let limits = &self.settings.limits;
        let count: usize = message.together.iter().map(Vec::len).sum();
        if message.together.iter().any(Vec::is_empty) || count == 0 || count > limits.entry_commands {
            return Err(format!("{count} commands in one message"));
        }
        let sizes: Vec<usize> = message.together.iter().map(|commands| commands.iter().map(encoded_bytes).sum()).collect();
        if let Some(bytes) = sizes.iter().find(|&&bytes| bytes > COMMAND_BYTES_MAX) {
            return Err(format!("command of {bytes} bytes"));
        }
        if !self.leads() {
            return Ok(Forwarded::NotLeader);
        }
        let deadline = Instant::now() + message.patience.min(self.settings.timings.propose_deadline);
        let unsure = || Forwarded::Answers(vec![Fate::Unsure; sizes.len()]);
        let no_space = self.is_short_of_room();
        let Ok(Ok(_places)) = timeout_at(deadline, self.places.acquire_many(count as u32)).await else {
            return Ok(unsure());
        };
        let mut waiting = Vec::with_capacity(sizes.len());
        for (commands, &bytes) in message.together.into_iter().zip(&sizes) {
            let (answer, answered) = oneshot::channel();
            if no_space && commands.iter().any(needs_room) {
                // Its asker waits below.
                let _ = answer.send(Outcome::NoSpace);
                waiting.push(answered);
                continue;
            }
            if self.entries.send(Ticket { commands, bytes, deadline, answer }).await.is_err() {
                return Ok(unsure());
            }
            waiting.push(answered);
        }
        let mut answers = Vec::with_capacity(sizes.len());
        let mut refused = 0;
        for answered in waiting {
            answers.push(match timeout_at(deadline, answered).await {
                Ok(Ok(Outcome::Answered(answer))) => Fate::Answered(answer),
                Ok(Ok(Outcome::NotLeader)) => {
                    refused += 1;
                    Fate::Unsure
                }
                Ok(Ok(Outcome::NoSpace)) => Fate::NoSpace,
                Ok(Ok(Outcome::Unsure) | Err(_)) | Err(_) => Fate::Unsure,
            });
        }
        Ok(if refused == answers.len() { Forwarded::NotLeader } else { Forwarded::Answers(answers) })
    }
}

/// Whether the command is refused where there is no room for it. What has happened ahead of the log is not:
/// it is bounded, and what frees room waits behind it.
fn needs_room(command: &Command) -> bool {
    grows(&command.op) && matches!(command.about, About::Inodes(_))
}

pub(crate) fn encoded_bytes(command: &Command) -> usize {
    codec::encode(messages::VERSION, command).len()
}

/// Takes tickets from a queue in batches that fit into one entry or one call.
struct Batches {
    queue: mpsc::Receiver<Ticket>,
    /// Did not fit into the batch before.
    next: Option<Ticket>,
    bytes_max: usize,
    commands_max: usize,
}

impl Batches {
    fn new(core: &Core, queue: mpsc::Receiver<Ticket>) -> Self {
        let limits = &core.settings.limits;
        Self { queue, next: None, bytes_max: limits.entry_bytes, commands_max: limits.entry_commands }
    }

    /// Waits for a ticket and a permit, and then takes all that waits by now and fits. `None`
    /// when the server shuts down.
    async fn next(&mut self, in_flight: &Arc<Semaphore>) -> Option<(Vec<Ticket>, OwnedSemaphorePermit)> {
        loop {
            let first = match self.next.take() {
                Some(ticket) => ticket,
                None => self.queue.recv().await?,
            };
            let permit = in_flight.clone().acquire_owned().await.ok()?;
            let (mut bytes, mut commands) = (first.bytes, first.commands.len());
            let mut batch = vec![first];
            while commands < self.commands_max {
                let Ok(ticket) = self.queue.try_recv() else { break };
                bytes += ticket.bytes;
                commands += ticket.commands.len();
                if bytes > self.bytes_max || commands > self.commands_max {
                    self.next = Some(ticket);
                    break;
                }
                batch.push(ticket);
            }
            // Whose asker gave up before it was written need not be written.
            batch.retain(|ticket| !ticket.answer.is_closed());
            if !batch.is_empty() {
                return Some((batch, permit));
            }
        }
    }
}

/// At the leader: writes what waits, one entry for many commands.
pub(crate) async fn pack(core: Arc<Core>, queue: mpsc::Receiver<Ticket>) {
    let in_flight = Arc::new(Semaphore::new(core.settings.limits.entries_in_flight));
    let mut batches = Batches::new(&core, queue);
    while let Some((batch, permit)) = batches.next(&in_flight).await {
        let (mut commands, mut askers) = (Vec::new(), Vec::with_capacity(batch.len()));
        for ticket in batch {
            askers.push(Asker { commands: ticket.commands.len(), answer: ticket.answer, deadline: ticket.deadline });
            commands.extend(ticket.commands);
        }
        // Sent from here, so that entries keep the order of the queue.
        match core.raft.client_write_ff(Entries { commands }).await {
            Ok(written) => drop(tokio::spawn(answer(core.clone(), written, permit, askers))),
            Err(fatal) => tracing::error!(error = %fatal, "openraft has ended; commands are refused"),
        }
    }
}

/// Who waits for the verdicts of so many commands of an entry.
struct Asker {
    commands: usize,
    answer: oneshot::Sender<Outcome>,
    deadline: Instant,
}

type Written = oneshot::Receiver<openraft::raft::ClientWriteResult<TypeConfig>>;

/// Waits until the entry is applied, then until it is visible, and tells the askers.
async fn answer(
    core: Arc<Core>,
    written: Written,
    permit: OwnedSemaphorePermit,
    askers: Vec<Asker>,
) {
    let written = written.await;
    drop(permit);
    let response = match written {
        Ok(Ok(response)) => response,
        Ok(Err(refusal)) => {
            let outcome = match refusal {
                ClientWriteError::ForwardToLeader(_) => || Outcome::NotLeader,
                ClientWriteError::ChangeMembershipError(_) => || Outcome::Unsure,
            };
            // An entry that was cut off by the next leader did not happen by this try, either.
            askers.into_iter().for_each(|asker| drop(asker.answer.send(outcome())));
            return;
        }
        // openraft has ended. The dropped askers learn that nothing is sure.
        Err(_) => return,
    };
    let index = log_index(response.log_id.index);
    let deadline = askers.iter().map(|asker| asker.deadline).max().unwrap_or_else(Instant::now);
    let commands: usize = askers.iter().map(|asker| asker.commands).sum();
    if response.data.0.len() != commands {
        tracing::error!(%index, verdicts = response.data.0.len(), commands, "verdicts do not match");
        return;
    }
    if keeps(Rule::AnswersWaitForLeases) && !core.await_visible(index, deadline).await {
        return;
    }
    let mut verdicts = response.data.0.into_iter();
    for asker in askers {
        let verdicts = verdicts.by_ref().take(asker.commands).collect();
        // Whoever gave up meanwhile does not listen.
        let _ = asker.answer.send(Outcome::Answered(Answer { index, verdicts }));
    }
}

/// Elsewhere: sends what waits to the leader, many commands in one call.
pub(crate) async fn forward(core: Arc<Core>, queue: mpsc::Receiver<Ticket>) {
    let in_flight = Arc::new(Semaphore::new(core.settings.limits.forwards_in_flight));
    let mut batches = Batches::new(&core, queue);
    while let Some((batch, permit)) = batches.next(&in_flight).await {
        let core = core.clone();
        tokio::spawn(async move {
            let _permit = permit;
            send(&core, batch).await;
        });
    }
}

async fn send(core: &Core, batch: Vec<Ticket>) {
    let Some(leader) = core.leader().filter(|leader| *leader != core.me) else {
        batch.into_iter().for_each(|ticket| drop(ticket.answer.send(Outcome::NotLeader)));
        return;
    };
    let now = Instant::now();
    let deadline = batch.iter().map(|ticket| ticket.deadline).max().unwrap_or(now);
    let deadline = deadline.min(now + core.settings.timings.lease + FORWARD_SLACK);
    let (together, askers): (Vec<_>, Vec<_>) =
        batch.into_iter().map(|ticket| (ticket.commands, ticket.answer)).unzip();
    let sizes: Vec<usize> = together.iter().map(Vec::len).collect();
    let message = Forward { patience: deadline.saturating_duration_since(now), together };
    let outcomes: Vec<Outcome> =
        match core.call_leader(leader, service::FORWARD, messages::encode(&message), deadline).await {
            Ok(Forwarded::Answers(answers)) if fits(&answers, &sizes) => answers.into_iter().map(Outcome::from).collect(),
            Ok(Forwarded::Answers(_)) | Err(_) => askers.iter().map(|_| Outcome::Unsure).collect(),
            Ok(Forwarded::NotLeader) => askers.iter().map(|_| Outcome::NotLeader).collect(),
        };
    for (asker, outcome) in askers.into_iter().zip(outcomes) {
        // Whoever gave up meanwhile does not listen.
        let _ = asker.send(outcome);
    }
}

/// Whether these answer tickets of so many commands each.
fn fits(answers: &[Fate], commands: &[usize]) -> bool {
    answers.len() == commands.len()
        && answers.iter().zip(commands).all(|(fate, commands)| match fate {
            Fate::Answered(answer) => answer.verdicts.len() == *commands,
            Fate::Unsure | Fate::NoSpace => true,
        })
}
