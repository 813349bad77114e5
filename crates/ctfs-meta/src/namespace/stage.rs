//! How an entry of the log is applied: worked out first, then made part of the state.
//!
//! Working it out ([`Stage::apply`]) is nearly all of the work, and needs only what the log said before. So whoever
//! keeps a namespace behind a lock does that outside of it: programs go on meanwhile, above the same records, with
//! what this server alone may change. Making it part of the state ([`Namespace::commit`]) is a moment.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use ctfs_types::{
    Ino, LogIndex, RequestId,
    rules::{Rule, keeps},
};

use super::{
    Apply, Namespace,
    cuts::Cut,
    keys,
    records::{self, Counters},
    txn::{Fail, Txn},
    view::View,
};
use crate::{About, Batch, Change, Command, MetaError, Op, Reply, Store, StoreError};

/// Verdicts remembered for one client that never says it has its answers.
const VERDICTS_MAX: u64 = 4096;
/// Up to so many are forgotten by number.
const FORGOTTEN_ONE_BY_ONE: u64 = 8;

/// What applying one log entry gave.
#[derive(Debug, Default)]
pub struct Applied {
    /// One verdict per command, in order.
    pub verdicts: Vec<Result<Reply, MetaError>>,
    /// What changed, each with the client ([`ctfs_types::RequestId`]) whose command did it.
    pub changes: Vec<(u64, Change)>,
    /// Commands of this server that were ahead of the log and came out otherwise in it. Never, unless
    /// the rules of what may be ahead are wrong.
    pub diverged: Vec<RequestId>,
}

/// The state as the log left it, for the next entry to be worked out. Nobody else may apply one meanwhile.
pub struct Stage {
    store: Arc<dyn Store>,
    counters: Counters,
    hash: u128,
    newest: BTreeMap<u64, u64>,
    freed_max: usize,
}

/// An entry that was worked out, and is not part of the state yet.
#[must_use = "an entry counts when it is committed"]
pub struct Staged {
    after: LogIndex,
    counters: Counters,
    hash: u128,
    newest: BTreeMap<u64, u64>,
    batch: Batch,
    /// Records of cuts among them.
    cuts: Vec<(Ino, Option<Vec<Cut>>)>,
    requests: Vec<RequestId>,
    sets_policies: bool,
    applied: Applied,
}

impl Stage {
    /// The index of the last applied entry.
    pub fn applied(&self) -> LogIndex {
        LogIndex(self.counters.applied)
    }

    /// Works out the committed entry at `index`, which must be past [`Self::applied`] (entries of
    /// the consensus layer itself use up indexes without coming here). All of its commands, the
    /// index, and `extra` (records under keys starting with 0xff, kept for the caller and no part
    /// of the state hash) are to reach the store in one batch.
    ///
    /// # Errors
    /// The store failed: it must not be used further.
    pub fn apply(self, index: LogIndex, commands: &[Command], extra: Batch) -> Result<Staged, StoreError> {
        let after = self.applied();
        assert!(index > after, "log entries apply in order, each exactly once");
        let Self { store, mut counters, hash, mut newest, freed_max } = self;
        let mut txn = Txn::new(View::committed(&*store));
        let mut applied = Applied::default();
        for command in commands {
            txn.begin();
            let verdict = run(&mut txn, &mut counters, &mut newest, command, freed_max)?;
            let changes = txn.keep();
            applied.changes.extend(changes.into_iter().map(|change| (command.request.client, change)));
            applied.verdicts.push(verdict);
        }
        counters.applied = index.0;
        txn.put(keys::counters(), &counters);
        txn.keep();
        let (mut batch, difference) = txn.finish()?;
        let hash = hash.wrapping_add(difference);
        batch.insert(keys::state_hash(), Some(records::encode(&hash)));
        for (key, value) in extra {
            assert_eq!(key.first(), Some(&keys::CALLER), "the caller's records stand apart from the state");
            batch.insert(key, value);
        }
        let (from, to) = keys::under(keys::CUTS, &[]);
        let mut cuts = Vec::new();
        for (key, value) in batch.range(from..to) {
            let ino = keys::number_at(key, 1).map(Ino).expect("keys of cuts hold an inode's number");
            cuts.push((ino, value.as_ref().map(|value| records::decode(key, value)).transpose()?));
        }
        let requests = commands.iter().map(|command| command.request).collect();
        let sets_policies = commands.iter().any(|command| matches!(command.op, Op::SetPolicy { .. }));
        Ok(Staged { after, counters, hash, newest, batch, cuts, requests, sets_policies, applied })
    }
}

impl Namespace {
    /// For the next entry to be worked out.
    pub fn stage(&self) -> Stage {
        Stage {
            store: self.store.clone(),
            counters: self.counters.clone(),
            hash: self.hash,
            newest: self.newest.clone(),
            freed_max: self.freed_max,
        }
    }

    /// Makes what was worked out part of the state.
    ///
    /// # Errors
    /// The store failed: nothing of the entry is applied, and the store must not be used further.
    pub fn commit(&mut self, staged: Staged) -> Result<Applied, StoreError> {
        assert_eq!(staged.after, self.applied(), "nobody applied another entry meanwhile");
        let Staged { counters, hash, newest, batch, cuts, requests, sets_policies, mut applied, .. } = staged;
        self.may_have_policies |= sets_policies;
        if applied.changes.iter().any(|(_, change)| matches!(change, Change::Fenced { incarnation, .. } if self.layer.is_of(*incarnation))) {
            // None of it happens any more; what stands in this entry behind the end was refused for that.
            self.drop_ahead();
        }
        for (request, verdict) in requests.into_iter().zip(&applied.verdicts) {
            if self.layer.is_next(request) && !(self.layer.retire(&batch) & verdict.is_ok()) {
                applied.diverged.push(request);
            }
        }
        for (_, change) in &applied.changes {
            if let Change::Covered { ino } = change {
                self.layer.note_covered(*ino, LogIndex(counters.applied));
            }
        }
        self.store.write(batch)?;
        for (ino, cuts) in cuts {
            match cuts {
                Some(cuts) => self.cuts.insert(ino, cuts),
                None => self.cuts.remove(&ino),
            };
        }
        (self.counters, self.hash, self.newest) = (counters, hash, newest);
        Ok(applied)
    }

    /// [`Stage::apply`] and [`Self::commit`] in one.
    ///
    /// # Errors
    /// As those.
    pub fn apply(&mut self, index: LogIndex, commands: &[Command], extra: Batch) -> Result<Applied, StoreError> {
        let staged = self.stage().apply(index, commands, extra)?;
        self.commit(staged)
    }
}

/// Applies one command unless its request was applied before, and remembers the verdict.
fn run(
    txn: &mut Txn<'_>,
    counters: &mut Counters,
    newest: &mut BTreeMap<u64, u64>,
    command: &Command,
    freed_max: usize,
) -> Result<Result<Reply, MetaError>, StoreError> {
    let request = command.request;
    let key = keys::verdict(request.client, request.seq);
    let newest = match newest.entry(request.client) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(unknown) => {
            let (from, to) = keys::under(keys::VERDICT, &[request.client]);
            let verdicts = txn.scan(&from, &to, usize::MAX)?;
            unknown.insert(verdicts.last().and_then(|(key, _)| keys::number_at(key, 9)).unwrap_or(0))
        }
    };
    let is_new = request.seq > *newest;
    *newest = request.seq.max(*newest);
    let in_order = command.comes_in_order();
    let is_known = if in_order {
        txn.get::<u64>(&keys::streamed(request.client))?.is_some_and(|upto| request.seq <= upto)
    } else {
        !is_new
    };
    if is_known && keeps(Rule::RequestsHappenOnce) {
        match txn.get(&key)? {
            Some(verdict) => return Ok(verdict),
            None if in_order => return Ok(Err(MetaError::Answered)),
            None => {}
        }
    }
    let floor: u64 = txn.get(&keys::floor(request.client))?.unwrap_or(0);
    let is_ended = floor == keys::ENDED;
    if is_ended && keeps(Rule::EndedLivesAreRefused) {
        return Ok(Err(MetaError::StaleIncarnation));
    }
    if request.seq <= floor && !is_ended {
        // A stray copy: its first one was applied, answered and forgotten.
        return Ok(Err(MetaError::Answered));
    }
    let before = counters.clone();
    let is_left = matches!(command.about, About::Left { .. });
    let mut apply = Apply { txn, counters, request, at: command.at, freed_max, is_left, counted: BTreeMap::new() };
    let may = apply.life_may(command);
    if let Err(Fail::Verdict(refusal)) = may {
        txn.discard();
        *counters = before;
        if !keeps(Rule::RefusalsAreForgotten) {
            txn.put(key, &Err::<Reply, _>(refusal.clone()));
            txn.put(keys::streamed(request.client), &request.seq);
        }
        // Not remembered: it was not this one's to ask, and whoever takes over asks the same request.
        return Ok(Err(refusal));
    }
    let outcome = may.and_then(|()| match apply.dispatch(&command.op) {
        // What it is refused for may be what the holder has changed ahead of the log.
        Err(Fail::Verdict(verdict)) if before.delegated > 0 => match apply.may_touch(command) {
            Ok(()) => Err(Fail::Verdict(verdict)),
            held => held.map(|()| Reply::Done),
        },
        outcome => outcome,
    });
    let outcome = outcome.and_then(|reply| {
        // What was acknowledged from the journal is not refused for a limit that was set later.
        if !is_left && !matches!(command.op, Op::Write { noted: Some(_), .. }) {
            apply.keep_quotas(&command.op)?;
        }
        // Also when it removed the last directory that is held.
        if before.delegated > 0 {
            apply.may_touch(command)?;
        }
        apply.tell_newly_covered()?;
        Ok(reply)
    });
    let verdict = match outcome {
        Ok(reply) => Ok(reply),
        Err(Fail::Verdict(verdict)) => {
            txn.discard();
            *counters = before;
            Err(verdict)
        }
        Err(Fail::Store(error)) => return Err(error),
    };
    if in_order {
        txn.put(keys::streamed(request.client), &request.seq);
        if verdict.is_err() {
            txn.put(key, &verdict);
        }
        return Ok(verdict);
    }
    // What is sent in the name of a life that has ended may have any number, and that life's own come again.
    let forget = if is_left { 0 } else { command.answered.max(request.seq.saturating_sub(VERDICTS_MAX)).min(request.seq.saturating_sub(1)) };
    if forget > floor {
        if forget - floor <= FORGOTTEN_ONE_BY_ONE {
            // Most often it is one, and looking for a record costs less than looking which there are.
            for seq in floor + 1..=forget {
                let old = keys::verdict(request.client, seq);
                if txn.get_raw(&old)?.is_some() {
                    txn.delete(old);
                }
            }
        } else {
            let (from, _) = keys::under(keys::VERDICT, &[request.client]);
            let to = keys::verdict(request.client, forget + 1);
            for (old, _) in txn.scan(&from, &to, usize::MAX)? {
                txn.delete(old);
            }
        }
        txn.put(keys::floor(request.client), &forget);
    }
    if is_new { txn.put_new(key, &verdict) } else { txn.put(key, &verdict) }
    Ok(verdict)
}
