//! Commands of this server that happened before they are in the log.
//!
//! [`Namespace::apply_ahead`] runs a command over the state as this server sees it, and keeps the
//! records it wrote in a layer over the store: readers here see them, the store and the state hash do
//! not. Later the log brings the same command. [`Namespace::apply`] runs it over the store alone, and
//! what it wrote there takes the place of what the layer had of it.
//!
//! Both runs come to the same end because a command may be ahead only if everything it looks at is
//! covered by directories this server holds ([`super::cover`]): nobody else can have changed any of
//! it. What looks further (the directories above, which are counted and asked for limits) either is
//! only added to, or is in the command, or keeps it from being ahead. That the ends are the same is
//! checked each time ([`super::Applied::diverged`]).

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
};

use ctfs_types::{
    FileKind, FileUse, Holder, Incarnation, Ino, LogIndex, RequestId,
    rules::{Rule, keeps},
};

use super::{
    Apply, Namespace, Totals, keys,
    records::{self, Dentry, Numbers},
    txn::{Fail, Txn},
    view::{View, Written},
};
use crate::{Batch, Change, Command, MetaError, NewContent, Op, Reply, SetAttr, StoreError};

/// How a command fared that this server wanted to happen at once.
#[derive(Debug, PartialEq, Eq)]
pub enum Ahead {
    /// It happened, here. It must reach the log, after those that happened before it.
    Happened { reply: Reply, changes: Vec<Change> },
    /// It is refused, and would be by the log.
    Refused(MetaError),
    /// It must go through the log, after those that happened before it.
    NotAlone,
}

/// What the commands ahead of the log have written.
#[derive(Default)]
pub struct Layer {
    pub records: BTreeMap<Vec<u8>, Written>,
    /// Added to records that are only added to.
    pub sums: BTreeMap<Vec<u8>, Totals>,
    waiting: VecDeque<Waiting>,
    next: u64,
    /// Who did all of it.
    holder: Option<Holder>,
    /// Directories that are being given up, each with how often: nothing more happens there.
    closed: BTreeMap<Ino, u32>,
    /// Files made ahead of the log since a directory was given up last: nobody else can have seen them.
    born: BTreeSet<Ino>,
    /// Inodes that commands of this server are about that go through the log now, each with how many.
    /// What happened to them here meanwhile would hide what the log makes of them.
    on_the_way: BTreeMap<Ino, u32>,
    /// Files that came under a holding by this entry: until that is visible everywhere, others may show
    /// what they knew of them.
    newly_covered: BTreeMap<Ino, LogIndex>,
    /// Inodes with locks that only this server knows; see [`super::own_locks`].
    pub own_locks: BTreeSet<Ino>,
    /// The record of the range of numbers that was used last.
    numbers: Option<Vec<u8>>,
    /// What is about to be said of such locks, whatever else is on its way to their files.
    is_settling: bool,
}

/// One command ahead of the log.
struct Waiting {
    command: Command,
    number: u64,
    wrote: Vec<Vec<u8>>,
    added: Vec<(Vec<u8>, Totals)>,
}

impl Layer {
    fn push(&mut self, command: &Command, batch: Batch, added: BTreeMap<Vec<u8>, Totals>) {
        let number = self.next;
        self.next += 1;
        let wrote = batch.keys().cloned().collect();
        self.records.extend(batch.into_iter().map(|(key, value)| (key, Written { value, by: number })));
        for (key, difference) in &added {
            let sum = self.sums.entry(key.clone()).or_default();
            *sum = sum.plus(*difference);
        }
        self.waiting.push_back(Waiting { command: command.clone(), number, wrote, added: added.into_iter().collect() });
    }

    pub fn is_closed(&self, dir: Ino) -> bool {
        self.closed.contains_key(&dir)
    }

    pub fn is_on_the_way(&self, ino: Ino) -> bool {
        self.on_the_way.contains_key(&ino) && !self.is_settling
    }

    pub fn is_newly_covered(&self, ino: Ino) -> bool {
        self.newly_covered.contains_key(&ino)
    }

    pub fn note_covered(&mut self, ino: Ino, index: LogIndex) {
        if self.newly_covered.len() >= NEWLY_COVERED_MAX
            && let Some(oldest) = self.newly_covered.iter().min_by_key(|(_, index)| **index).map(|(ino, _)| *ino)
        {
            self.newly_covered.remove(&oldest);
        }
        self.newly_covered.insert(ino, index);
    }

    /// Whether the log has come to this layer's next command.
    pub fn is_next(&self, request: RequestId) -> bool {
        self.waiting.front().is_some_and(|waiting| waiting.command.request == request)
    }

    /// The log has the next command, in an entry that wrote `batch`. Answers whether all that the
    /// command was last to write is what the entry wrote.
    pub fn retire(&mut self, batch: &Batch) -> bool {
        let Some(done) = self.waiting.pop_front() else { return true };
        let mut same = true;
        for key in done.wrote {
            if self.records.get(&key).is_some_and(|written| written.by == done.number)
                && let Some(written) = self.records.remove(&key)
            {
                // What is noted of the journal is counted by the life, and commands on the way count, too.
                let is_note = key.first() == Some(&keys::NOTED);
                same &= is_note || batch.get(&key).is_some_and(|value| *value == written.value);
            }
        }
        for (key, difference) in done.added {
            // One that is not there is zero: what other commands add and take may have come to that.
            let sum = self.sums.get(&key).copied().unwrap_or_default().minus(difference);
            if sum == Totals::default() { self.sums.remove(&key) } else { self.sums.insert(key, sum) };
        }
        same
    }

    /// Whether what is ahead was done by this life.
    pub fn is_of(&self, life: Incarnation) -> bool {
        self.waiting.front().is_some_and(|waiting| waiting.command.request.client == life.0)
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }
}

impl Namespace {
    /// Runs the command of `holder` now, if everything it touches is the holder's alone. A command that
    /// makes something is completed with what it would otherwise take from elsewhere: a number from those
    /// that are reserved, and the grid; a directory is held from birth.
    ///
    /// # Errors
    /// The store failed; nothing happened.
    pub fn apply_ahead(&mut self, command: &mut Command, holder: Holder) -> Result<Ahead, StoreError> {
        let is_idle = self.counters.delegated == 0 && self.layer.len() == 0;
        if is_idle || !Self::can_be_ahead(&command.op) || self.layer.len() >= AHEAD_MAX || self.tells_nobody(&command.op, holder)? || !self.complete(command, holder)? {
            return Ok(Ahead::NotAlone);
        }
        self.may_have_policies |= matches!(command.op, Op::SetPolicy { .. });
        let mut txn = Txn::new(View::ahead(&*self.store, &self.layer.records, &self.layer.sums));
        txn.numbers = self.layer.numbers.clone();
        let mut counters = self.counters.clone();
        let mut apply = Apply::of_one(&mut txn, &mut counters, command.request, command.at, self.freed_max);
        let outcome = apply.dispatch(&command.op);
        let at_home = match &outcome {
            Err(Fail::Store(error)) => return Err(error.clone()),
            _ => apply.counted.is_empty() && apply.is_covered(holder, &self.layer).map_err(store_only)? && apply.moves_no_directory(&command.op).map_err(store_only)?,
        };
        counters.delegated = self.counters.delegated;
        if !keeps(Rule::ChunksAreNamedInLog) {
            counters.chunks = self.counters.chunks;
        }
        if !at_home || counters != self.counters {
            return Ok(Ahead::NotAlone);
        }
        match outcome {
            Ok(reply) => {
                if let (Op::Make { .. }, Reply::Entry { attr, made: true }) = (&command.op, &reply)
                    && self.layer.born.len() < BORN_MAX
                {
                    self.layer.born.insert(attr.ino);
                }
                let changes = txn.keep();
                let (batch, added) = txn.written_and_added();
                self.layer.holder = Some(holder);
                self.layer.push(command, batch, added);
                Ok(Ahead::Happened { reply, changes })
            }
            Err(Fail::Verdict(verdict)) => Ok(Ahead::Refused(verdict)),
            Err(Fail::Store(error)) => Err(error),
        }
    }

    /// Whether the command changes bytes, or announces that they will be, of a file of which other servers'
    /// kernels may keep pages: those are told by the log when the file is taken.
    fn tells_nobody(&self, op: &Op, holder: Holder) -> Result<bool, StoreError> {
        let (ino, by_taking) = match op {
            Op::Own { ino, .. } => (*ino, true),
            Op::Write { ino, .. } | Op::SetAttr { ino, set: SetAttr { size: Some(_), .. } } => (*ino, false),
            _ => return Ok(false),
        };
        if self.layer.born.contains(&ino) {
            return Ok(false);
        }
        let is_taken = matches!(self.attr(ino)?.map(|attr| attr.usage), Some(FileUse::Owned { holder: by, .. }) if by == holder);
        Ok(by_taking || !is_taken)
    }

    /// Answers whether there was a number for what is made.
    fn complete(&mut self, command: &mut Command, holder: Holder) -> Result<bool, StoreError> {
        let Op::Make { parent, node, .. } = &mut command.op else { return Ok(true) };
        if node.ino.is_none() {
            node.ino = self.next_number(command.request.client)?;
        }
        if node.cell.is_none() {
            node.cell = Some(self.effective_policy(*parent)?.cell);
        }
        if node.content == NewContent::Directory && self.cover(*parent)? == Some((*parent, holder)) {
            node.holder = Some(holder);
        }
        Ok(node.ino.is_some())
    }

    /// The next number of those that the client has set aside.
    fn next_number(&mut self, client: u64) -> Result<Option<Ino>, StoreError> {
        if let Some(left) = self.numbers_in_use(client)? {
            return Ok(Some(left.start));
        }
        let first = self.reserved_ranges(client)?.into_iter().next();
        self.layer.numbers = first.as_ref().map(|(key, _)| key.clone());
        Ok(first.map(|(_, range)| range.start))
    }

    /// What is left of the range of numbers that was used last, if that is the client's and something is.
    fn numbers_in_use(&self, client: u64) -> Result<Option<Range<Ino>>, StoreError> {
        let Some(key) = self.layer.numbers.as_ref().filter(|key| keys::number_at(key, 1) == Some(client)) else { return Ok(None) };
        let Some(record) = self.view().get(key)? else { return Ok(None) };
        let Numbers { next, end } = records::decode(key, &record)?;
        Ok((next < end).then_some(next..end))
    }

    /// Whether the client has fewer numbers set aside than so many.
    ///
    /// # Errors
    /// The store failed.
    pub fn has_fewer_numbers(&self, client: u64, than: u64) -> Result<bool, StoreError> {
        let count = |range: &Range<Ino>| range.end.0.saturating_sub(range.start.0);
        if self.numbers_in_use(client)?.is_some_and(|left| count(&left) >= than) {
            return Ok(false);
        }
        Ok(self.reserved_inos(client)?.iter().map(count).sum::<u64>() < than)
    }

    /// As [`Self::apply_ahead`], of what [`Self::settle_locks`] answered.
    ///
    /// # Errors
    /// The store failed.
    pub fn settle_ahead(&mut self, command: &mut Command, holder: Holder) -> Result<Ahead, StoreError> {
        self.layer.is_settling = true;
        let settled = self.apply_ahead(command, holder);
        self.layer.is_settling = false;
        settled
    }

    /// Forgets what is ahead of the log and not in it yet.
    pub fn drop_ahead(&mut self) {
        let Layer { on_the_way, newly_covered, .. } = std::mem::take(&mut self.layer);
        self.layer = Layer { on_the_way, newly_covered, ..Layer::default() };
    }

    /// A command of this server is about to go through the log: until [`Self::has_landed`] nothing happens
    /// ahead of the log to the inodes it is about, which are answered.
    ///
    /// # Errors
    /// The store failed.
    pub fn sets_out(&mut self, op: &Op) -> Result<Vec<Ino>, StoreError> {
        let inos = self.inodes_of(op)?;
        for ino in &inos {
            *self.layer.on_the_way.entry(*ino).or_default() += 1;
        }
        Ok(inos)
    }

    /// The log has that command, or never will.
    pub fn has_landed(&mut self, inos: &[Ino]) {
        count_down(&mut self.layer.on_the_way, inos);
    }

    /// Whether a command about the inode is on its way through the log.
    pub fn is_on_the_way(&self, ino: Ino) -> bool {
        self.layer.is_on_the_way(ino)
    }

    /// Whether the inode may come to be known to its holder alone, by something that others do not show yet.
    pub fn is_between(&self, ino: Ino) -> bool {
        self.layer.is_on_the_way(ino) || self.layer.is_newly_covered(ino)
    }

    /// Every server shows what is in the log up to here.
    pub fn is_visible(&mut self, index: LogIndex) {
        if !self.layer.newly_covered.is_empty() {
            self.layer.newly_covered.retain(|_, by| *by > index);
        }
    }

    /// Inodes whose records the command may change.
    pub(super) fn inodes_of(&self, op: &Op) -> Result<Vec<Ino>, StoreError> {
        let mut inos = match op {
            Op::Make { parent, .. } => vec![*parent],
            Op::Link { ino, parent, .. } => vec![*ino, *parent],
            Op::Unlink { parent, name } | Op::Rmdir { parent, name } => {
                let mut inos = vec![*parent];
                inos.extend(self.lookup(*parent, name)?);
                inos
            }
            Op::Rename { from, name, to, new_name, .. } => {
                let mut inos = vec![*from, *to];
                inos.extend(self.lookup(*from, name)?);
                inos.extend(self.lookup(*to, new_name)?);
                inos
            }
            Op::SetAttr { ino, .. }
            | Op::SetXattr { ino, .. }
            | Op::RemoveXattr { ino, .. }
            | Op::Write { ino, .. }
            | Op::Punch { ino, .. }
            | Op::Own { ino, .. }
            | Op::Lock { ino, .. }
            | Op::AwaitLock { ino, .. }
            | Op::WithdrawLock { ino, .. }
            | Op::Overtake { ino, .. }
            | Op::Unlock { ino, .. }
            | Op::UnlockAll { ino, .. }
            | Op::SetPolicy { ino, .. }
            | Op::SetQuota { ino, .. } => vec![*ino],
            Op::CloneCells { source, ino, .. } => vec![*source, *ino],
            Op::Disown { files, .. } => files.iter().map(|(ino, _)| *ino).collect(),
            Op::Reap { inos } | Op::FreeCells { inos } => inos.clone(),
            Op::Noop
            | Op::ForgetChunks { .. }
            | Op::Found { .. }
            | Op::CreateToken { .. }
            | Op::RevokeToken { .. }
            | Op::Join { .. }
            | Op::Incarnate { .. }
            | Op::SetMemberState { .. }
            | Op::RemoveMember { .. }
            | Op::Fence { .. }
            | Op::SetPair { .. }
            | Op::EndLife { .. }
            | Op::ReserveInos { .. } => Vec::new(),
        };
        inos.sort_unstable();
        inos.dedup();
        Ok(inos)
    }

    /// From here on nothing happens ahead of the log by these directories, which are about to be given
    /// up: what they cover goes through the log.
    pub fn close_ahead(&mut self, dirs: &[Ino]) {
        for dir in dirs {
            *self.layer.closed.entry(*dir).or_default() += 1;
        }
        self.layer.born.clear();
    }

    /// They are given up, or taken anew, or known not to be given up.
    pub fn open_ahead(&mut self, dirs: &[Ino]) {
        count_down(&mut self.layer.closed, dirs);
    }

    /// This state takes the place of `old`, at the same or a later index: what was ahead of that one, and
    /// is not in the log up to here, is ahead of this one. Answers the requests that are not, which is none.
    ///
    /// # Errors
    /// The store failed.
    pub fn take_ahead_of(&mut self, old: &mut Namespace) -> Result<Vec<RequestId>, StoreError> {
        let Layer { waiting, holder, closed, on_the_way, newly_covered, born, own_locks, mut records, .. } = std::mem::take(&mut old.layer);
        self.layer.born = born;
        let locks = own_locks.iter().map(|ino| keys::locks(*ino)).filter_map(|key| records.remove_entry(&key));
        self.layer.records.extend(locks);
        self.layer.own_locks = own_locks;
        let mut lost = Vec::new();
        for Waiting { mut command, .. } in waiting {
            let Some(holder) = holder else { break };
            if !self.is_answered(command.request)? && !matches!(self.apply_ahead(&mut command, holder)?, Ahead::Happened { .. }) {
                lost.push(command.request);
            }
        }
        // Only now: these had happened before anything was closed or set out.
        (self.layer.closed, self.layer.on_the_way, self.layer.newly_covered) = (closed, on_the_way, newly_covered);
        Ok(lost)
    }

    /// Commands ahead of the log.
    pub fn ahead(&self) -> usize {
        self.layer.len()
    }

    /// Whether the log had this request, of a command that happened ahead of it.
    pub fn is_answered(&self, request: RequestId) -> Result<bool, StoreError> {
        let key = keys::streamed(request.client);
        let upto: Option<u64> = self.store.get(&key)?.map(|bytes| records::decode(&key, &bytes)).transpose()?;
        Ok(upto.is_some_and(|upto| request.seq <= upto))
    }

    /// The kinds of commands that may be; whether one is depends on what it touches.
    fn can_be_ahead(op: &Op) -> bool {
        match op {
            Op::Make { .. }
            | Op::Own { .. }
            | Op::Link { .. }
            | Op::Unlink { .. }
            | Op::Rmdir { .. }
            | Op::Rename { .. }
            | Op::SetAttr { .. }
            | Op::SetXattr { .. }
            | Op::RemoveXattr { .. }
            | Op::Write { .. }
            | Op::Lock { .. }
            | Op::AwaitLock { .. }
            | Op::WithdrawLock { .. }
            | Op::Overtake { .. }
            | Op::Unlock { .. }
            | Op::UnlockAll { .. } => true,
            _ => false,
        }
    }
}

/// Files that are remembered to be new; the bytes of others are changed through the log at first.
const BORN_MAX: usize = 1 << 20;
/// Files that are remembered to have come under a holding; older ones are visible long since.
const NEWLY_COVERED_MAX: usize = 1 << 16;
/// Commands that may be ahead of the log at once: some tens of megabytes, and about a second of work
/// for those who apply them.
pub const AHEAD_MAX: usize = 16384;

fn count_down(counts: &mut BTreeMap<Ino, u32>, inos: &[Ino]) {
    for ino in inos {
        if let Some(count) = counts.get_mut(ino) {
            *count -= 1;
            if *count == 0 {
                counts.remove(ino);
            }
        }
    }
}

pub(super) fn store_only(fail: Fail) -> StoreError {
    match fail {
        Fail::Store(error) => error,
        Fail::Verdict(verdict) => StoreError::Corrupt { key: Vec::new(), why: format!("no inode where one was: {verdict}") },
    }
}

impl Apply<'_, '_> {
    /// A directory that changes its parent may end up below itself, by what somebody else does.
    fn moves_no_directory(&mut self, op: &Op) -> super::txn::Outcome<bool> {
        let Op::Rename { from, name, to, new_name, .. } = op else { return Ok(true) };
        if from == to {
            return Ok(true);
        }
        for (dir, name) in [(*from, name), (*to, new_name)] {
            let entry: Option<Dentry> = self.txn.before(&keys::name(dir, name))?;
            if entry.is_some_and(|entry| entry.kind == FileKind::Directory) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
