//! Locks next to a naive model that knows, for each byte, who holds it, and who waits in line.

use std::collections::{BTreeMap, BTreeSet};

use ctfs_types::{Incarnation, Ino, NodeId};
use proptest::{collection::vec, prelude::*};

use super::harness::{Verdict, Volume, cluster, owner};
use crate::{Change, Lock, LockKind, LockOwner, MetaError, Op, Reply, Wish};

/// Bytes the workload names; one more stands for all bytes behind them.
const BYTES: u64 = 16;
const SERVERS: u64 = 3;

/// Holders of one byte and whether exclusively.
type Byte = BTreeMap<LockOwner, bool>;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Model {
    bytes: BTreeMap<(Ino, LockKind, u64), Byte>,
    /// All who wait, on whichever file, oldest first.
    line: Vec<(Ino, Wish)>,
    /// The life each member is in.
    lives: BTreeMap<NodeId, Incarnation>,
}

fn span(start: u64, end: u64) -> std::ops::RangeInclusive<u64> {
    start..=end.min(BYTES)
}

impl Model {
    fn byte(&mut self, ino: Ino, kind: LockKind, at: u64) -> &mut Byte {
        self.bytes.entry((ino, kind, at)).or_default()
    }

    fn holds(&self, ino: Ino, held: &Lock) -> bool {
        let at_byte = |at| self.bytes.get(&(ino, held.kind, at)).and_then(|byte| byte.get(&held.owner));
        span(held.start, held.end).all(|at| at_byte(at) == Some(&held.exclusive))
    }

    /// Who keeps `lock` from being granted when it stands behind these: at some byte they hold what
    /// excludes it, or want it while its owner holds nothing there.
    fn in_the_way(&self, ino: Ino, lock: &Lock, ahead: &[(Ino, Wish)]) -> BTreeSet<LockOwner> {
        let nobody = Byte::new();
        let mut found = BTreeSet::new();
        for at in span(lock.start, lock.end) {
            let byte = self.bytes.get(&(ino, lock.kind, at)).unwrap_or(&nobody);
            found.extend(byte.iter().filter(|(_, exclusive)| **exclusive || lock.exclusive).map(|(holder, _)| *holder));
            if !byte.contains_key(&lock.owner) {
                let wanted = ahead.iter().filter(|(other, wish)| {
                    (*other, wish.lock.kind) == (ino, lock.kind)
                        && span(wish.lock.start, wish.lock.end).contains(&at)
                        && (wish.lock.exclusive || lock.exclusive)
                });
                found.extend(wanted.map(|(_, wish)| wish.lock.owner));
            }
        }
        found.remove(&lock.owner);
        found
    }

    /// Everybody whom `owners` wait for, directly or not, themselves included.
    fn all_waited_for(&self, owners: BTreeSet<LockOwner>) -> BTreeSet<LockOwner> {
        let mut all = owners;
        loop {
            let mut more = all.clone();
            for (at, (ino, wish)) in self.line.iter().enumerate() {
                if all.contains(&wish.lock.owner) {
                    more.extend(self.in_the_way(*ino, &wish.lock, &self.line[..at]));
                }
            }
            if more == all {
                return all;
            }
            all = more;
        }
    }

    /// Lets in who can be let in, the oldest first, and answers their tickets.
    fn serve(&mut self) -> BTreeMap<Ino, Vec<u64>> {
        let mut served: BTreeMap<Ino, Vec<u64>> = BTreeMap::new();
        // As the namespace does: through the line to its end, and again while that helped.
        loop {
            let mut at = 0;
            let mut helped = false;
            while at < self.line.len() {
                let (ino, wish) = self.line[at].clone();
                if self.in_the_way(ino, &wish.lock, &self.line[..at]).is_empty() {
                    self.line.remove(at);
                    self.lock(ino, &wish.lock);
                    served.entry(ino).or_default().push(wish.ticket);
                    helped = true;
                } else {
                    at += 1;
                }
            }
            if !helped {
                return served;
            }
        }
    }

    fn lock(&mut self, ino: Ino, lock: &Lock) {
        for at in span(lock.start, lock.end) {
            self.byte(ino, lock.kind, at).insert(lock.owner, lock.exclusive);
        }
    }

    fn free(&mut self, mut whose: impl FnMut(Ino, LockKind, u64, &LockOwner) -> bool) {
        for ((ino, kind, at), byte) in &mut self.bytes {
            byte.retain(|owner, _| !whose(*ino, *kind, *at, owner));
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Lock { file: u8, owner: (u64, u64), kind: LockKind, exclusive: bool, start: u64, len: u64, wait: bool },
    /// One of those who wait gives up.
    Withdraw { which: u8 },
    /// One of those who wait asks to be let past the others.
    Overtake { which: u8 },
    Unlock { file: u8, owner: (u64, u64), kind: LockKind, start: u64, len: u64 },
    UnlockAll { file: u8, owner: (u64, u64) },
    NewLife { server: u64 },
    /// A lock asked for by a life that has ended.
    Ghost { file: u8, server: u64 },
    Remove { server: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let file = 0..2u8;
    // Two owners on each server.
    let owner = (1..=SERVERS, 1..=2u64);
    let kind = prop_oneof![4 => Just(LockKind::Record), 1 => Just(LockKind::Flock)];
    // A length past the last byte means "to the end of the file".
    let range = (0..BYTES, 1..=BYTES + 2);
    let lock = (file.clone(), owner.clone(), kind.clone(), any::<bool>(), range.clone(), prop::bool::weighted(0.7)).prop_map(
        |(file, owner, kind, exclusive, (start, len), wait)| Step::Lock { file, owner, kind, exclusive, start, len, wait },
    );
    let unlock = (file.clone(), owner.clone(), kind, range)
        .prop_map(|(file, owner, kind, (start, len))| Step::Unlock { file, owner, kind, start, len });
    let unlock_all = (file.clone(), owner).prop_map(|(file, owner)| Step::UnlockAll { file, owner });
    let step = prop_oneof![
        20 => lock,
        12 => unlock,
        4 => unlock_all,
        3 => any::<u8>().prop_map(|which| Step::Withdraw { which }),
        3 => any::<u8>().prop_map(|which| Step::Overtake { which }),
        1 => (1..=SERVERS).prop_map(|server| Step::NewLife { server }),
        1 => (file, 1..=SERVERS).prop_map(|(file, server)| Step::Ghost { file, server }),
        // Server 1 founded the volume and stays.
        1 => (2..=SERVERS * 4).prop_map(|server| Step::Remove { server }),
    ];
    vec(step, 1..80)
}

/// Last byte of a range, `u64::MAX` when it reaches past the bytes the workload names.
fn last(start: u64, len: u64) -> u64 {
    if start + len > BYTES { u64::MAX } else { start + len - 1 }
}

fn whole(kind: LockKind, start: u64, len: u64) -> (u64, u64) {
    // flock knows no ranges.
    if kind == LockKind::Flock { (0, u64::MAX) } else { (start, last(start, len)) }
}

struct Pair {
    real: Volume,
    model: Model,
    files: [Ino; 2],
    tickets: u64,
}

impl Pair {
    fn new() -> Self {
        let mut real = cluster(SERVERS);
        let files = [real.file(Ino::ROOT, "a"), real.file(Ino::ROOT, "b")];
        let lives = (1..=SERVERS).map(|n| (NodeId(n), Incarnation(1))).collect();
        Self { real, model: Model { lives, ..Model::default() }, files, tickets: 0 }
    }

    fn owner(&self, (server, number): (u64, u64)) -> LockOwner {
        let life = self.model.lives.get(&NodeId(server)).copied().unwrap_or(Incarnation(1));
        owner(server, life.0, number)
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Lock { file, owner, kind, exclusive, start, len, wait } => {
                let (start, end) = whole(kind, start, len);
                let owner = self.owner(owner);
                let lock = Lock { owner, kind, exclusive, start, end, pid: owner.owner as u32 };
                self.lock(self.files[usize::from(file)], lock, wait)?;
            }
            Step::Withdraw { which } => self.withdraw(which)?,
            Step::Overtake { which } => self.overtake(which)?,
            Step::Unlock { file, owner, kind, start, len } => {
                let (start, end) = whole(kind, start, len);
                let (ino, owner) = (self.files[usize::from(file)], self.owner(owner));
                let member = self.model.lives.contains_key(&owner.node);
                let verdict = self.real.run(Op::Unlock { ino, owner, kind, start, end });
                prop_assert!(verdict.is_ok() || !member, "unlock: {:?}", verdict);
                self.model.free(|i, k, at, o| (i, k, *o) == (ino, kind, owner) && span(start, end).contains(&at));
            }
            Step::UnlockAll { file, owner } => {
                let (ino, owner) = (self.files[usize::from(file)], self.owner(owner));
                let member = self.model.lives.contains_key(&owner.node);
                let verdict = self.real.run(Op::UnlockAll { ino, owner });
                prop_assert!(verdict.is_ok() || !member, "unlock all: {:?}", verdict);
                self.model.free(|i, _, _, o| (i, *o) == (ino, owner));
            }
            Step::NewLife { server } => self.new_life(NodeId(server))?,
            Step::Ghost { file, server } => {
                let Some(life) = self.model.lives.get(&NodeId(server)) else { return Ok(()) };
                let ghost = owner(server, life.0 - 1, 1);
                let lock = Lock { owner: ghost, kind: LockKind::Record, exclusive: false, start: 0, end: 3, pid: 1 };
                let verdict = self.real.run(Op::Lock { ino: self.files[usize::from(file)], lock });
                prop_assert_eq!(verdict, Err(MetaError::StaleIncarnation));
            }
            Step::Remove { server } => {
                let node = NodeId(server);
                let verdict = self.real.run(Op::RemoveMember { node });
                match self.model.lives.remove(&node) {
                    Some(_) => prop_assert!(verdict.is_ok(), "{verdict:?}"),
                    None => prop_assert_eq!(verdict, Err(MetaError::NoSuchMember)),
                }
                self.end(|owner| owner.node == node);
            }
        }
        self.served()?;
        self.compare()
    }

    fn lock(&mut self, ino: Ino, lock: Lock, wait: bool) -> Result<(), TestCaseError> {
        let waits_for = self.real.ns.conflicting_lock(ino, &lock).unwrap();
        self.tickets += 1;
        let ticket = self.tickets;
        let op = if wait { Op::AwaitLock { ino, lock: lock.clone(), ticket } } else { Op::Lock { ino, lock: lock.clone() } };
        let verdict = self.real.run(op);
        if !self.model.lives.contains_key(&lock.owner.node) {
            let refused = matches!(verdict, Err(MetaError::NoSuchMember | MetaError::StaleIncarnation));
            prop_assert!(refused, "a removed server locked: {verdict:?}");
            return Ok(());
        }
        let held = self.model.in_the_way(ino, &lock, &[]);
        prop_assert_eq!(waits_for.is_none(), held.is_empty(), "GETLK says what SETLK would");
        let in_the_way = if wait { self.model.in_the_way(ino, &lock, &self.model.line) } else { held };
        if in_the_way.is_empty() {
            prop_assert_eq!(&verdict, &Ok(Reply::Locked), "{:?}", lock);
            self.model.lock(ino, &lock);
        } else if wait && self.model.all_waited_for(in_the_way).contains(&lock.owner) {
            prop_assert_eq!(&verdict, &Err(MetaError::Deadlock), "{:?}", lock);
        } else if wait {
            prop_assert_eq!(&verdict, &Ok(Reply::Queued), "{:?}", lock);
            self.model.line.push((ino, Wish { lock, ticket }));
        } else {
            self.is_refused(ino, &lock, verdict, waits_for)?;
        }
        Ok(())
    }

    fn is_refused(&self, ino: Ino, lock: &Lock, verdict: Verdict, waits_for: Option<Lock>) -> Result<(), TestCaseError> {
        let Err(MetaError::Locked { holder }) = verdict else {
            return Err(TestCaseError::fail(format!("{lock:?}: {verdict:?}")));
        };
        prop_assert_eq!(waits_for.as_ref(), Some(&*holder), "GETLK and SETLK name the same holder");
        prop_assert!(self.model.holds(ino, &holder), "{holder:?} is held");
        prop_assert!(holder.owner != lock.owner && (holder.exclusive || lock.exclusive), "{holder:?} is in the way");
        prop_assert!(holder.start <= lock.end && lock.start <= holder.end, "{holder:?} overlaps");
        Ok(())
    }

    fn withdraw(&mut self, which: u8) -> Result<(), TestCaseError> {
        if self.model.line.is_empty() {
            return Ok(());
        }
        let at = usize::from(which) % self.model.line.len();
        let (ino, wish) = self.model.line.remove(at);
        let op = Op::WithdrawLock { ino, owner: wish.lock.owner, ticket: wish.ticket };
        prop_assert_eq!(self.real.run(op.clone()), Ok(Reply::Done));
        self.served()?;
        prop_assert_eq!(self.real.run(op), Err(MetaError::NotWaiting));
        Ok(())
    }

    fn overtake(&mut self, which: u8) -> Result<(), TestCaseError> {
        if self.model.line.is_empty() {
            return Ok(());
        }
        let at = usize::from(which) % self.model.line.len();
        let (ino, Wish { lock, ticket }) = self.model.line[at].clone();
        let op = Op::Overtake { ino, owner: lock.owner, ticket };
        prop_assert_eq!(self.real.run(op.clone()), Ok(Reply::Done));
        if lock.exclusive || !self.model.in_the_way(ino, &lock, &[]).is_empty() {
            return Ok(());
        }
        let wish = self.model.line.remove(at);
        self.model.line.insert(0, wish);
        self.served()?;
        prop_assert_eq!(self.real.run(op), Err(MetaError::NotWaiting));
        Ok(())
    }

    /// The last command let those in whom the model lets in, in the same order.
    fn served(&mut self) -> Result<(), TestCaseError> {
        let of_file = |ticket: &u64| self.model.line.iter().find(|(_, wish)| wish.ticket == *ticket).map(|(ino, _)| *ino);
        let mut granted: BTreeMap<Ino, Vec<u64>> = BTreeMap::new();
        for change in std::mem::take(&mut self.real.changes) {
            if let Change::LockGranted { ticket, .. } = change {
                let ino = of_file(&ticket);
                prop_assert!(ino.is_some(), "ticket {} does not wait", ticket);
                granted.entry(ino.unwrap()).or_default().push(ticket);
            }
        }
        prop_assert_eq!(granted, self.model.serve());
        Ok(())
    }

    /// The lives that `gone` names have ended.
    fn end(&mut self, gone: impl Fn(&LockOwner) -> bool) {
        self.model.free(|_, _, _, owner| gone(owner));
        self.model.line.retain(|(_, wish)| !gone(&wish.lock.owner));
    }

    fn new_life(&mut self, node: NodeId) -> Result<(), TestCaseError> {
        let next = Incarnation(self.model.lives.get(&node).map_or(2, |life| life.0 + 1));
        let op = Op::Incarnate { node, incarnation: next, addresses: vec![], capacity: 1, version: "2".into() };
        let verdict = self.real.run(op);
        match self.model.lives.get_mut(&node) {
            Some(life) => {
                prop_assert!(verdict.is_ok(), "{verdict:?}");
                *life = next;
                self.end(|owner| owner.node == node);
            }
            None => prop_assert_eq!(verdict, Err(MetaError::NoSuchMember)),
        }
        Ok(())
    }

    /// The table says what the bytes say, and says it in as few locks as can be.
    fn compare(&self) -> Result<(), TestCaseError> {
        for ino in self.files {
            let line: Vec<Wish> = self.model.line.iter().filter(|(i, _)| *i == ino).map(|(_, wish)| wish.clone()).collect();
            prop_assert_eq!(self.real.ns.lock_waiters(ino).unwrap(), line);
            for kind in [LockKind::Record, LockKind::Flock] {
                let locks = self.real.ns.locks(ino, kind).unwrap();
                let mut bytes: BTreeMap<u64, Byte> = BTreeMap::new();
                for lock in &locks {
                    prop_assert_eq!(lock.kind, kind);
                    prop_assert_eq!(u64::from(lock.pid), lock.owner.owner);
                    prop_assert!(lock.end == u64::MAX || lock.end < BYTES, "{lock:?}");
                    for at in span(lock.start, lock.end) {
                        let twice = bytes.entry(at).or_default().insert(lock.owner, lock.exclusive);
                        prop_assert_eq!(twice, None, "{:?} overlaps a lock of the same owner", lock);
                    }
                    let touches = |other: &&Lock| {
                        (other.owner, other.exclusive) == (lock.owner, lock.exclusive)
                            && lock.end.checked_add(1) == Some(other.start)
                    };
                    prop_assert_eq!(locks.iter().find(touches), None, "{:?} was not merged", lock);
                }
                let held = self.model.bytes.iter().filter(|((i, k, _), byte)| (*i, *k) == (ino, kind) && !byte.is_empty());
                let held: BTreeMap<u64, Byte> = held.map(|((_, _, at), byte)| (*at, byte.clone())).collect();
                prop_assert_eq!(bytes, held);
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn locks_agree_with_a_model_of_single_bytes(steps in steps()) {
        let mut pair = Pair::new();
        for (number, step) in steps.into_iter().enumerate() {
            pair.step(step).map_err(|error| TestCaseError::fail(format!("step {number} {step:?}: {error}")))?;
        }
    }
}
