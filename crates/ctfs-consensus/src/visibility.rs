//! Applied is not visible: leases, the visible index, and reads by index.
//!
//! Every server runs [`renew`]: it tells the leader how far it has applied and invalidated, and
//! gets its lease and the visible index back. At the leader the [`Ledger`] keeps the book, and
//! [`lapse`] lets go who is silent. A reader goes through [`Core::barrier`]: with a lease it
//! reads at once, as soon as what its replica shows is visible ([`chase`] asks); without one the
//! leader is asked for a read index ([`serve_readers`], one question for all who wait).

use std::{future::pending, sync::Arc, time::Duration};

use ctfs_types::{
    LogIndex, NodeId,
    rules::{Rule, keeps},
};
use openraft::error::RaftError;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    boottime::BootTime,
    core::{Core, Lease},
    error::ProposeError,
    health::Space,
    messages::{self, AwaitVisible, ReadIndex, ReadIndexed, Renew, Renewed, Visible, service},
    raft_types::log_index_of,
};

/// One question to the leader waits so long before it is asked anew: an answer that got lost
/// shall not use up a reader's whole patience.
const QUESTION_PATIENCE: Duration = Duration::from_secs(2);

/// How long after a machine wakes up its server may believe in a lease of before.
const LAPSE_CHECK: Duration = Duration::from_millis(200);

pub(crate) type Reader = oneshot::Sender<Result<LogIndex, ProposeError>>;

impl Core {
    /// Whether this server holds a lease right now.
    pub fn leased(&self) -> bool {
        !self.leased_for().is_zero()
    }

    /// For how long the lease still holds.
    pub fn leased_for(&self) -> Duration {
        if self.view.borrow().stopped.is_some() {
            return Duration::ZERO;
        }
        match *self.lease.borrow() {
            Some(lease) if self.relay.acked(&self.invalidated) >= lease.from || !keeps(Rule::ReadmissionCatchesUp) => lease.until.since(BootTime::now()),
            _ => Duration::ZERO,
        }
    }

    /// Returns when a lease that was held has ended.
    pub async fn lease_lapsed(&self) {
        let mut lease = self.lease.subscribe();
        if lease.wait_for(Option::is_some).await.is_err() {
            return pending().await;
        }
        loop {
            let Some(now) = *lease.borrow_and_update() else { return };
            let left = now.until.since(BootTime::now());
            if left.is_zero() {
                // Forgotten, unless another was granted at this moment.
                self.lease.send_if_modified(|lease| {
                    let lapsed = lease.is_some_and(|lease| lease.until == now.until);
                    if lapsed {
                        *lease = None;
                    }
                    lapsed
                });
                return;
            }
            tokio::select! {
                () = changed(&mut lease) => {}
                // Timers do not count while the machine is suspended; the lease does.
                () = sleep(left.min(LAPSE_CHECK)) => {}
            }
        }
    }

    /// Returns when entry `index`, which the replica shows, may be shown.
    pub async fn seen(&self, index: LogIndex) -> Result<(), ProposeError> {
        let started = Instant::now();
        let deadline = started + self.settings.timings.barrier_deadline;
        self.want(index);
        if self.await_visible(index, deadline).await {
            return Ok(());
        }
        Err(self.stopped().unwrap_or(ProposeError::NoQuorum { waited: started.elapsed() }))
    }

    /// Has [`chase`] ask when `index` becomes visible.
    fn want(&self, index: LogIndex) {
        self.wanted.send_if_modified(|wanted| {
            let news = index > *wanted;
            *wanted = index.max(*wanted);
            news
        });
    }

    /// Returns when a read of the local replica shows nothing of the past, and nothing that
    /// another server may not show yet.
    pub async fn barrier(&self) -> Result<(), ProposeError> {
        if let Some(stopped) = self.stopped() {
            return Err(stopped);
        }
        let started = Instant::now();
        let deadline = started + self.settings.timings.barrier_deadline;
        let shown = self.relay.applied_index();
        if self.leased() {
            if *self.visible.borrow() >= shown {
                return Ok(());
            }
            self.want(shown);
            if self.await_visible(shown, deadline).await && self.leased() {
                return Ok(());
            }
        }
        let no_quorum = |_| ProposeError::NoQuorum { waited: started.elapsed() };
        let (answer, answered) = oneshot::channel();
        match timeout_at(deadline, self.readers.send(answer)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(ProposeError::Stopped("this server is shutting down".to_owned())),
            Err(late) => return Err(no_quorum(late)),
        }
        let index = match timeout_at(deadline, answered).await.map_err(no_quorum)? {
            Ok(index) => index?,
            Err(_) => return Err(ProposeError::Stopped("this server is shutting down".to_owned())),
        };
        if self.await_applied(index, deadline).await {
            Ok(())
        } else {
            Err(ProposeError::NoQuorum { waited: started.elapsed() })
        }
    }

    /// The leader's side of [`renew`].
    pub fn heard(&self, from: NodeId, renew: &Renew) -> Renewed {
        let applied = self.relay.applied_index();
        let now = BootTime::now();
        let quorum = self.quorum_acked(now).map(|acked| self.patient.of(acked, now));
        let now = self.patient.now();
        let (grant, visible) = {
            let mut ledger = self.ledger.lock();
            let Some(ledger) = ledger.as_mut() else { return Renewed::NotLeader };
            ledger.applied(applied, now);
            (ledger.acked(from, renew.incarnation, renew.acked, quorum, now), ledger.visible())
        };
        {
            let mut short = self.short_of_room.lock();
            if renew.short_of_room { short.insert(from) } else { short.remove(&from) };
        }
        self.raise_visible(visible);
        Renewed::Heard { grant, visible, committed: applied, short_of_room: self.is_short_of_room() }
    }

    /// Takes the leader's answer to a renewal that was sent at `asked`.
    fn renewed(&self, asked: BootTime, answer: &Renewed) -> bool {
        let Renewed::Heard { grant, visible, committed, short_of_room } = answer else { return false };
        self.refuses_growth.store(*short_of_room, std::sync::atomic::Ordering::Relaxed);
        if let Some(grant) = grant {
            // Never more than our own settings allow, whatever the leader says.
            let usable = grant.usable.min(self.settings.timings.lease_used);
            self.lease.send_replace(Some(Lease { until: asked + usable, from: grant.from }));
        }
        self.raise_visible(*visible);
        self.committed.fetch_max(committed.0, std::sync::atomic::Ordering::Relaxed);
        true
    }

    /// The leader's answer to a read without lease: an index that is visible, not below anything
    /// answered before the question, nor below what the reader has `applied` and may show.
    pub async fn read_index(&self, applied: LogIndex, patience: Duration) -> ReadIndexed {
        let deadline = Instant::now() + patience.min(self.settings.timings.barrier_deadline);
        if !self.leads() {
            return ReadIndexed::NotLeader;
        }
        let index = match timeout_at(deadline, self.raft.ensure_linearizable()).await {
            Ok(Ok(id)) => log_index_of(id).max(applied),
            Ok(Err(error @ RaftError::APIError(_))) if error.forward_to_leader().is_some() => {
                return ReadIndexed::NotLeader;
            }
            Ok(Err(_)) | Err(_) => return ReadIndexed::NoQuorum,
        };
        if self.await_visible(index, deadline).await { ReadIndexed::At(index) } else { ReadIndexed::NoQuorum }
    }

    /// The leader's answer to [`chase`].
    pub async fn visible_at(&self, question: &AwaitVisible) -> Visible {
        if !self.leads() {
            return Visible::NotLeader;
        }
        let patience = question.patience.min(self.settings.timings.barrier_deadline);
        self.await_visible(question.index, Instant::now() + patience).await;
        Visible::UpTo(*self.visible.borrow())
    }

    async fn ask_read_index(&self) -> Result<LogIndex, ProposeError> {
        let started = Instant::now();
        let deadline = started + self.settings.timings.barrier_deadline;
        while Instant::now() < deadline {
            if let Some(stopped) = self.stopped() {
                return Err(stopped);
            }
            let leader = self.leader();
            let applied = self.relay.applied_index();
            let until = deadline.min(Instant::now() + QUESTION_PATIENCE);
            let patience = until.saturating_duration_since(Instant::now());
            let answer = match leader {
                None => ReadIndexed::NotLeader,
                Some(leader) if leader == self.me => self.read_index(applied, patience).await,
                Some(leader) => {
                    let question = messages::encode(&ReadIndex { applied, patience });
                    let answer = self.call_leader(leader, service::READ_INDEX, question, until).await;
                    answer.unwrap_or(ReadIndexed::NoQuorum)
                }
            };
            if let ReadIndexed::At(index) = answer {
                self.raise_visible(index);
                return Ok(index);
            }
            self.await_other_leader(leader, deadline).await;
        }
        Err(ProposeError::NoQuorum { waited: started.elapsed() })
    }
}

/// Keeps this server's lease and tells the leader of progress: at once when there is some, with
/// one call in flight, and every [`crate::Timings::renew`] otherwise.
pub(crate) async fn renew(core: Arc<Core>) {
    let mut applied = core.relay.watch_applied();
    let mut invalidated = core.invalidated.clone();
    let mut view = core.view.subscribe();
    loop {
        let leader = view.borrow_and_update().leader;
        let acked = (*applied.borrow_and_update()).min(*invalidated.borrow_and_update());
        let Some(leader) = leader else {
            if view.changed().await.is_err() {
                return;
            }
            continue;
        };
        let until = Instant::now() + core.renew_every();
        if core.silent().is_some() {
            core.await_other_leader(Some(leader), until).await;
            continue;
        }
        let asked = BootTime::now();
        let short_of_room = core.health.space() != Space::Enough;
        let question = Renew { incarnation: core.incarnation(), acked, short_of_room };
        let answer = if leader == core.me {
            Ok(core.heard(core.me, &question))
        } else {
            core.call_leader(leader, service::RENEW, messages::encode(&question), until).await
        };
        if !answer.is_ok_and(|answer| core.renewed(asked, &answer)) {
            core.await_other_leader(Some(leader), until).await;
            continue;
        }
        tokio::select! {
            () = changed(&mut applied) => {}
            () = changed(&mut invalidated) => {}
            () = changed(&mut view) => {}
            () = sleep(core.renew_every()) => {}
        }
    }
}

/// A watch whose sender is gone never changes again.
async fn changed<T>(watch: &mut watch::Receiver<T>) {
    if watch.changed().await.is_err() {
        pending::<()>().await;
    }
}

/// At the leader: lets go of servers whose lease has ended.
pub(crate) async fn lapse(core: Arc<Core>) {
    let mut view = core.view.subscribe();
    loop {
        if view.wait_for(|view| view.leader == Some(core.me)).await.is_err() {
            return;
        }
        sleep(core.settings.timings.margin()).await;
        let visible = core.ledger.lock().as_mut().map(|ledger| {
            ledger.expire(core.patient.now());
            ledger.visible()
        });
        if let Some(visible) = visible {
            core.raise_visible(visible);
        }
    }
}

/// Elsewhere: asks the leader when what readers here wait for becomes visible; one question in
/// flight, the highest index next.
pub(crate) async fn chase(core: Arc<Core>) {
    let mut wanted = core.wanted.subscribe();
    loop {
        let Ok(index) = wanted.wait_for(|index| *index > *core.visible.borrow()).await.map(|index| *index) else {
            return;
        };
        let until = Instant::now() + QUESTION_PATIENCE;
        match core.leader() {
            Some(leader) if leader == core.me => {
                core.await_visible(index, until).await;
            }
            leader => {
                let mut failed = true;
                if let Some(leader) = leader {
                    let patience = until.saturating_duration_since(Instant::now());
                    let question = messages::encode(&AwaitVisible { index, patience });
                    let answer = core.call_leader(leader, service::AWAIT_VISIBLE, question, until).await;
                    if let Ok(Visible::UpTo(visible)) = answer {
                        core.raise_visible(visible);
                        failed = false;
                    }
                }
                if failed {
                    core.await_other_leader(leader, until).await;
                }
            }
        }
    }
}

/// Answers readers without lease: all who wait when a question starts share it.
pub(crate) async fn serve_readers(core: Arc<Core>, mut readers: mpsc::Receiver<Reader>) {
    while let Some(first) = readers.recv().await {
        let mut waiting = vec![first];
        while let Ok(reader) = readers.try_recv() {
            waiting.push(reader);
        }
        waiting.retain(|reader| !reader.is_closed());
        if waiting.is_empty() {
            continue;
        }
        let answer = core.ask_read_index().await;
        for reader in waiting {
            // Whoever gave up meanwhile does not listen.
            let _ = reader.send(answer.clone());
        }
    }
}
