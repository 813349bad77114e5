//! Commands that happened here first, on their way into the log.
//!
//! What this server alone may change it changes at once ([`Core::happen`]), and the commands follow
//! into the log in the order in which they happened: one batch at a time, each batch as a whole or not
//! at all, under the same request ids until it is answered. So what a crash leaves of them is a
//! prefix. Until they are there they stand in the journal of this life (`ctfs-journal`), from which the
//! next one sends them. A command that must go through the log first waits until those before it are answered
//! ([`Core::await_streamed`]).
//!
//! When the life of this server was ended, the rest does not happen any more, and [`Core::end_stream`]
//! takes it back.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use ctfs_journal::{Journal, Position};
use ctfs_meta::{About, Ahead, Command, MetaError, Namespace, Op, Reply};
use ctfs_types::{Holder, Ino, RequestId, Timestamp};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    core::Core,
    error::ProposeError,
    health::grows,
    proposer::Outcome,
    record,
    second::Second,
    settings::Limits,
    written::Written,
};

/// Before a batch that found no room is tried again.
const ROOM_PAUSE: Duration = Duration::from_millis(200);
/// Before a batch is tried again that found no answer.
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// With so much written down that is not in the log, more goes through the log, which is slower.
const JOURNAL_BYTES_MAX: u64 = 64 << 20;
/// When what happened is not in the log after this, more goes through the log: writers slow down.
const AGE_MAX: Duration = Duration::from_secs(1);
/// What nobody waits for gathers for so long before it is sent: an entry costs what many commands in it do.
const GATHER_FOR: Duration = Duration::from_millis(20);
/// Or until there are so many.
const GATHERED: usize = 256;
/// So many requests after the oldest that is open nothing more happens here: some 4,000 verdicts of a life
/// are remembered, and that one's must not be forgotten.
const OPEN_SPAN_MAX: u64 = 2048;
/// With fewer numbers left for new inodes, more are reserved.
const NUMBERS_LOW: u64 = 4096;
const NUMBERS_AT_ONCE: u32 = 16384;

/// How a command fared that was to happen at once.
#[derive(Debug, PartialEq, Eq)]
pub enum Happened {
    Answered(Result<Reply, MetaError>),
    /// The lease ended meanwhile: it has happened once [`Core::await_streamed`] says so.
    Unsure(Reply),
}

/// What happened here and is not in the log yet.
#[derive(Default)]
pub(crate) struct Stream {
    queue: Mutex<VecDeque<Queued>>,
    /// Something was queued.
    ready: Notify,
    /// So many are queued that they need not gather longer, or somebody waits for them.
    hurry: Notify,
    /// Somebody waits for the commands up to there, counted as those that have happened.
    wanted: AtomicU64,
    /// How many commands have happened, counted from the start of the program.
    happened: watch::Sender<u64>,
    /// How far they are done with.
    done: watch::Sender<Done>,
    /// There are few numbers left for what is made here.
    numbers_low: Notify,
    /// Bytes of what is queued, and microseconds that the last batch took to the log.
    bytes: AtomicUsize,
    pace: AtomicU64,
    /// What the log has refused, because this life was ended.
    refused: Mutex<Vec<Command>>,
    /// Something is lost, and who asks for it has not been told.
    is_untold: AtomicBool,
    /// Where what happens is written down before it is answered. Without one nothing happens here.
    pub journal: Mutex<Option<Arc<Journal>>>,
    /// Who has it, too.
    pub second: watch::Sender<Second>,
    /// What of it are bytes that are nowhere else.
    pub written: Mutex<Written>,
    /// What of that is no longer needed once so many commands are done with, in that order.
    released: Mutex<VecDeque<(u64, Ino, Position)>>,
}

/// Counts of commands that have happened.
#[derive(Debug, Clone, Copy, Default)]
struct Done {
    /// So many are in the log and visible, or lost.
    upto: u64,
    /// The last of them that is lost, because the life that did it was ended before.
    lost: u64,
}

struct Queued {
    at: Instant,
    command: Command,
    bytes: usize,
    position: Position,
}

impl Stream {
    /// Writes the command down, and queues it for the log.
    fn push(&self, journal: Option<&Journal>, command: Command) {
        let record = record::of_command(&command);
        // But for some bytes in front these are those that the log takes.
        let bytes = record.len();
        let mut queue = self.queue.lock();
        // Under the lock, or else it could be trimmed before it is queued.
        let position = match journal.map(|journal| journal.append(record.into())) {
            Some(Ok(position)) => position,
            Some(Err(error)) => {
                tracing::error!(%error, "what happens here is not written down; from here on nothing does");
                *self.journal.lock() = None;
                Position::NONE
            }
            None => Position::NONE,
        };
        self.bytes.fetch_add(bytes, Relaxed);
        queue.push_back(Queued { at: Instant::now(), command, bytes, position });
        let queued = queue.len();
        drop(queue);
        self.happened.send_modify(|count| *count += 1);
        match queued {
            1 => self.ready.notify_one(),
            GATHERED => self.hurry.notify_one(),
            _ => {}
        }
    }

    /// Until when what is queued gathers; `None`: it is to be sent now.
    fn gathers_until(&self, bytes_max: usize) -> Option<Instant> {
        let until = {
            let queue = self.queue.lock();
            let oldest = queue.front().filter(|_| queue.len() < GATHERED)?;
            oldest.at + GATHER_FOR
        };
        let is_wanted = self.wanted.load(Relaxed) > self.done.borrow().upto;
        (!is_wanted && self.bytes.load(Relaxed) < bytes_max && Instant::now() < until).then_some(until)
    }

    /// The next commands that fit into one entry. They stay queued until they are done with.
    fn batch(&self, bytes_max: usize, commands_max: usize) -> (Vec<Command>, usize) {
        let queue = self.queue.lock();
        let (mut commands, mut bytes) = (Vec::new(), 0);
        for queued in queue.iter().take(commands_max) {
            if !commands.is_empty() && bytes + queued.bytes > bytes_max {
                break;
            }
            bytes += queued.bytes;
            commands.push(queued.command.clone());
        }
        (commands, bytes)
    }

    /// Takes these off, unless they were taken back meanwhile. `lost`: the log has refused one;
    /// `life_ended`: for that reason, so [`Core::end_stream`] is about to be called.
    fn finish(&self, commands: &[Command], lost: bool, life_ended: bool) {
        let mut queue = self.queue.lock();
        let mut finished = 0;
        for command in commands {
            if let Some(queued) = queue.pop_front_if(|queued| queued.command.request == command.request) {
                finished += 1;
                self.bytes.fetch_sub(queued.bytes, Relaxed);
                if life_ended {
                    self.refused.lock().push(queued.command);
                }
            }
        }
        if life_ended && finished > 0 {
            self.is_untold.store(true, Relaxed);
        }
        drop(queue);
        self.advance(finished, lost);
        if finished > 0 {
            self.release();
            self.trim();
        }
    }

    /// The metadata have what was written down of a file up to there, by a command that has happened here.
    /// The bytes are needed until that is in the log.
    pub fn let_go(&self, ino: Ino, upto: Position) {
        self.released.lock().push_back((*self.happened.borrow(), ino, upto));
        self.release();
    }

    fn release(&self) {
        let (mut released, mut written) = (self.released.lock(), self.written.lock());
        let done = self.done.borrow().upto;
        while let Some((_, ino, upto)) = released.pop_front_if(|(happened, ..)| *happened <= done) {
            written.let_go(ino, upto);
        }
    }

    /// Lets the journal drop what nobody needs any more.
    pub fn trim(&self) {
        let (queue, written) = (self.queue.lock(), self.written.lock());
        let needed = queue.front().map(|queued| queued.position).into_iter().chain(written.first()).min();
        if let Some(journal) = self.journal.lock().as_ref() {
            journal.trim(needed.map_or(journal.depth().appended, Position::before));
        }
    }

    pub fn is_untold(&self) -> bool {
        self.is_untold.load(Relaxed)
    }

    fn advance(&self, finished: u64, lost: bool) {
        self.done.send_modify(|done| {
            done.upto += finished;
            if lost && finished > 0 {
                done.lost = done.upto;
            }
        });
    }

    /// Whether the log keeps up with what happens here: nothing waits for long, nor will.
    fn keeps_up(&self, limits: &Limits) -> bool {
        let queue = self.queue.lock();
        let Some(oldest) = queue.front() else { return true };
        let batches = (queue.len() / limits.entry_commands).max(self.bytes.load(Relaxed) / limits.entry_bytes) as u64;
        let drains_in = Duration::from_micros(self.pace.load(Relaxed).saturating_mul(batches));
        oldest.at.elapsed() < AGE_MAX && drains_in < AGE_MAX
    }

    /// The journal, if it has room.
    fn journal(&self) -> Option<Arc<Journal>> {
        let journal = self.journal.lock().clone()?;
        (journal.depth().bytes < JOURNAL_BYTES_MAX).then_some(journal)
    }

    /// From here on what happens is written down there.
    pub fn set_journal(&self, journal: Arc<Journal>) {
        *self.journal.lock() = Some(journal);
    }

    /// Commands not in the log yet.
    pub fn depth(&self) -> u64 {
        let done = self.done.borrow().upto;
        self.happened.borrow().saturating_sub(done)
    }

    fn clear(&self) -> Vec<Command> {
        let mut queue = self.queue.lock();
        let taken: Vec<Command> = queue.drain(..).map(|queued| queued.command).collect();
        self.bytes.store(0, Relaxed);
        if !taken.is_empty() {
            self.is_untold.store(true, Relaxed);
        }
        drop(queue);
        self.advance(taken.len() as u64, true);
        let mut lost = std::mem::take(&mut *self.refused.lock());
        lost.extend(taken);
        lost
    }
}

impl Core {
    /// Has `op` happen at once, if this server alone may do that. `None`: it must go through the log.
    pub fn happen(&self, op: &Op) -> Option<Happened> {
        if !self.settings.acts_ahead || self.replica.read().delegated() == 0 || !self.leased() || self.stopped().is_some() || self.health.waits() {
            return None;
        }
        if grows(op) && if self.leads() { self.is_short_of_room() } else { self.refuses_growth.load(Relaxed) } {
            return None;
        }
        let holder = Holder { node: self.me, incarnation: self.incarnation() };
        let mut replica = self.replica.write();
        replica.is_visible(*self.visible.borrow());
        if replica.left_by(holder.incarnation).unwrap_or(true) {
            return None;
        }
        match replica.lock_here(op, holder) {
            // After a pause others may know better.
            Ok(Some(answer)) => return self.leased().then_some(Happened::Answered(answer)),
            Ok(None) => {}
            Err(error) => {
                tracing::error!(%error, "the metadata store failed");
                return None;
            }
        }
        let journal = self.stream.journal().filter(|_| self.stream.keeps_up(&self.settings.limits))?;
        self.settle_locks(&mut replica, op);
        let now = Instant::now();
        let (seq, answered) = {
            let mut numbers = self.numbers.lock();
            if numbers.span() >= OPEN_SPAN_MAX {
                return None;
            }
            numbers.take(now)
        };
        let request = RequestId { client: holder.incarnation.0, seq };
        let mut command = Command { request, answered, at: Timestamp::from(SystemTime::now()), about: About::Ahead, op: op.clone() };
        let unused = || self.numbers.lock().done(seq, true, now);
        let outcome = replica.apply_ahead(&mut command, holder);
        if matches!(op, Op::Make { .. }) && replica.has_fewer_numbers(request.client, NUMBERS_LOW).unwrap_or(false) {
            self.stream.numbers_low.notify_one();
        }
        match outcome {
            Ok(Ahead::Happened { reply, changes }) => {
                // Under the replica's lock: the order of the journal and of the log is that in which they
                // happened.
                self.stream.push(Some(&journal), command);
                // A lease that still holds: nobody else can have changed any of it before it happened.
                let is_sure = self.leased();
                drop(replica);
                self.relay.happened(&changes);
                Some(if is_sure { Happened::Answered(Ok(reply)) } else { Happened::Unsure(reply) })
            }
            Ok(Ahead::Refused(why)) => {
                unused();
                // After a pause others may know better.
                self.leased().then_some(Happened::Answered(Err(why)))
            }
            Ok(Ahead::NotAlone) => {
                unused();
                None
            }
            Err(error) => {
                unused();
                tracing::error!(%error, "the metadata store failed");
                None
            }
        }
    }

    /// Before a command after which others may look: has locks that only this server knows happen ahead of
    /// the log, so that they reach it before the command does.
    pub fn settle_locks(&self, replica: &mut Namespace, before: &Op) {
        match replica.settle_locks(before) {
            Ok(ops) => self.settle(replica, ops),
            Err(error) => tracing::error!(%error, "the metadata store failed"),
        }
    }

    /// From here on nothing happens ahead of the log by these directories, which are about to be given up.
    pub fn close_ahead(&self, dirs: &[Ino]) {
        let mut replica = self.replica.write();
        match replica.settle_locks_in(dirs) {
            Ok(ops) => self.settle(&mut replica, ops),
            Err(error) => tracing::error!(%error, "the metadata store failed"),
        }
        replica.close_ahead(dirs);
    }

    fn settle(&self, replica: &mut Namespace, ops: Vec<Op>) {
        let holder = Holder { node: self.me, incarnation: self.incarnation() };
        for op in ops {
            let (seq, answered) = self.numbers.lock().take(Instant::now());
            let request = RequestId { client: holder.incarnation.0, seq };
            let mut command = Command { request, answered, at: Timestamp::from(SystemTime::now()), about: About::Ahead, op };
            match replica.settle_ahead(&mut command, holder) {
                Ok(Ahead::Happened { .. }) => {
                    // Not in the scrutinee: it would stay locked while the queue is.
                    let journal = self.stream.journal.lock().clone();
                    self.stream.push(journal.as_deref(), command);
                }
                // The life has ended, and its locks with it.
                other => {
                    tracing::warn!(?other, "a lock that only this server knew is lost");
                    self.numbers.lock().done(seq, true, Instant::now());
                }
            }
        }
    }

    /// Returns when everything that has happened here before the call is in the log and visible.
    ///
    /// # Errors
    /// [`ProposeError::LifeEnded`]: some of it did not come so far, and will not; also until that was told
    /// ([`Self::lost_is_told`]). [`ProposeError::NoQuorum`] when nothing has come so far for the deadline
    /// of a proposal, [`ProposeError::Stopped`].
    pub async fn await_streamed(&self) -> Result<(), ProposeError> {
        let upto = *self.stream.happened.borrow();
        self.stream.wanted.fetch_max(upto, Relaxed);
        self.stream.hurry.notify_one();
        let mut done = self.stream.done.subscribe();
        let lost_before = done.borrow_and_update().lost;
        let started = Instant::now();
        let mut view = self.view.subscribe();
        loop {
            if self.stream.is_untold.load(Relaxed) {
                return Err(ProposeError::LifeEnded);
            }
            let now = *done.borrow_and_update();
            if now.upto >= upto {
                return if now.lost > lost_before { Err(ProposeError::LifeEnded) } else { Ok(()) };
            }
            let patience = Instant::now() + self.settings.timings.propose_deadline;
            tokio::select! {
                moved = timeout_at(patience, done.changed()) => if moved.is_err() {
                    return Err(ProposeError::NoQuorum { waited: started.elapsed() });
                },
                _ = view.wait_for(|view| view.stopped.is_some()) => {
                    return Err(self.stopped().unwrap_or(ProposeError::Stopped(String::new())));
                }
            }
        }
    }

    /// Whoever had something open that is lost will hear of it.
    pub fn lost_is_told(&self) {
        self.stream.is_untold.store(false, Relaxed);
    }

    /// The life in which these happened was ended: what the log does not have is taken back. Answers
    /// the commands that are lost, and the journal of that life, into which nothing is written any more.
    pub fn end_stream(&self) -> (Vec<Command>, Option<Arc<Journal>>) {
        let mut replica = self.replica.write();
        replica.drop_ahead();
        // First: nothing more is written down then.
        let journal = self.stream.journal.lock().take();
        let lost = self.stream.clear();
        let (mut numbers, now) = (self.numbers.lock(), Instant::now());
        // Nobody answers these any more.
        lost.iter().for_each(|command| numbers.done(command.request.seq, true, now));
        drop(numbers);
        self.stream.released.lock().clear();
        self.stream.written.lock().clear();
        self.stream.second.send_replace(Second::Unknown);
        (lost, journal)
    }

    async fn deliver(self: &Arc<Self>, commands: &[Command], bytes: usize) {
        let mut once = true;
        loop {
            if self.stopped().is_some() || self.stream.depth() == 0 {
                return;
            }
            let started = Instant::now();
            let deadline = started + self.settings.timings.propose_deadline;
            let leader = self.leader();
            let outcome = match leader {
                Some(leader) => self.attempt(leader, commands.to_vec(), bytes, deadline).await,
                None => Outcome::NotLeader,
            };
            match outcome {
                Outcome::Answered(answer) => {
                    self.raise_visible(answer.index);
                    // However long it takes: nothing after it may overtake it.
                    while !self.await_applied(answer.index, Instant::now() + self.settings.timings.propose_deadline).await {
                        if self.stopped().is_some() {
                            return;
                        }
                    }
                    let lost = !self.check(commands, &answer.verdicts);
                    let now = Instant::now();
                    let mut numbers = self.numbers.lock();
                    commands.iter().for_each(|command| numbers.done(command.request.seq, once, now));
                    drop(numbers);
                    let life_ended = answer.verdicts.contains(&Err(MetaError::StaleIncarnation));
                    self.stream.finish(commands, lost, life_ended);
                    self.stream.pace.store(u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX), Relaxed);
                    return;
                }
                Outcome::NoSpace => sleep(ROOM_PAUSE).await,
                Outcome::NotLeader => self.await_other_leader(leader, deadline).await,
                Outcome::Unsure => {
                    once = false;
                    sleep(TRY_AGAIN).await;
                }
            }
        }
    }

    /// What happened here was never refused by the rules, so the log must not refuse it. Answers whether it
    /// has all of it.
    fn check(&self, commands: &[Command], verdicts: &[Result<Reply, MetaError>]) -> bool {
        for (command, verdict) in commands.iter().zip(verdicts) {
            match verdict {
                Ok(_) | Err(MetaError::Answered) => {}
                Err(MetaError::StaleIncarnation) => {
                    tracing::warn!(request = ?command.request, "this life was ended before its commands were in the log");
                }
                Err(why) => {
                    tracing::error!(request = ?command.request, op = ?command.op, %why, "the log refused what had happened here");
                }
            }
        }
        verdicts.iter().all(|verdict| matches!(verdict, Ok(_) | Err(MetaError::Answered)))
    }
}

/// Has numbers set aside for what is made here, before they run out.
pub(crate) async fn reserve_numbers(core: Arc<Core>) {
    loop {
        core.stream.numbers_low.notified().await;
        let client = core.incarnation().0;
        if !core.replica.read().has_fewer_numbers(client, NUMBERS_LOW).unwrap_or(true) {
            continue;
        }
        match core.propose(Op::ReserveInos { count: NUMBERS_AT_ONCE }).await {
            Ok(Ok(_)) => {}
            Ok(Err(why)) => tracing::debug!(%why, "no numbers for new inodes"),
            Err(error) => tracing::debug!(%error, "no numbers for new inodes"),
        }
    }
}

/// Sends what has happened, until the server ends.
pub(crate) async fn run(core: Arc<Core>) {
    let limits = core.settings.limits.clone();
    loop {
        if let Some(until) = core.stream.gathers_until(limits.entry_bytes) {
            // Either way it looks again.
            let _ = timeout_at(until, core.stream.hurry.notified()).await;
            continue;
        }
        let (commands, bytes) = core.stream.batch(limits.entry_bytes, limits.entry_commands);
        if commands.is_empty() {
            core.stream.ready.notified().await;
            continue;
        }
        core.deliver(&commands, bytes).await;
        if core.stopped().is_some() {
            return;
        }
    }
}
