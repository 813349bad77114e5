use std::collections::BTreeMap;

use ctfs_types::{Incarnation, Ino, NodeId};

use super::super::harness::{Verdict, Volume, cluster, owner, record_lock};
use crate::{
    Change, Lock, LockKind, LockOwner, MetaError, Op, Reply,
    namespace::{WAITERS_MAX, WAITERS_OF_LIFE_MAX},
};

const END: u64 = u64::MAX;

struct Locks {
    volume: Volume,
    ino: Ino,
    tickets: u64,
}

fn locks() -> Locks {
    let mut volume = cluster(3);
    let ino = volume.file(Ino::ROOT, "a");
    Locks { volume, ino, tickets: 0 }
}

fn exclusive(owner: LockOwner) -> Lock {
    record_lock(owner, true, 0, END)
}

fn shared(owner: LockOwner) -> Lock {
    record_lock(owner, false, 0, END)
}

impl Locks {
    fn wish(&mut self, lock: Lock) -> Verdict {
        self.wish_of(self.ino, lock)
    }

    fn wish_of(&mut self, ino: Ino, lock: Lock) -> Verdict {
        self.tickets += 1;
        self.volume.run(Op::AwaitLock { ino, lock, ticket: self.tickets })
    }

    #[track_caller]
    fn gets(&mut self, lock: Lock) {
        assert_eq!(self.wish(lock), Ok(Reply::Locked));
    }

    /// Answers the ticket.
    #[track_caller]
    fn waits(&mut self, lock: Lock) -> u64 {
        assert_eq!(self.wish(lock), Ok(Reply::Queued));
        self.tickets
    }

    /// Runs a command and answers whose waits ended with a lock, in order.
    #[track_caller]
    fn granted_by(&mut self, op: Op) -> Vec<LockOwner> {
        self.volume.ok(op);
        let granted = self.volume.changes.iter().filter_map(|change| match change {
            Change::LockGranted { owner, .. } => Some(*owner),
            _ => None,
        });
        granted.collect()
    }

    fn unlock(&self, owner: LockOwner) -> Op {
        Op::Unlock { ino: self.ino, owner, kind: LockKind::Record, start: 0, end: END }
    }

    fn withdraw(&self, owner: LockOwner, ticket: u64) -> Op {
        Op::WithdrawLock { ino: self.ino, owner, ticket }
    }

    fn holders(&self) -> Vec<LockOwner> {
        self.volume.ns.locks(self.ino, LockKind::Record).unwrap().iter().map(|lock| lock.owner).collect()
    }

    fn waiting(&self) -> usize {
        self.volume.ns.lock_waiters(self.ino).unwrap().len()
    }
}

#[test]
fn the_oldest_waiter_gets_the_lock_whatever_its_server() {
    let mut locks = locks();
    let owners = [owner(1, 1, 1), owner(3, 1, 1), owner(2, 1, 1), owner(1, 1, 2)];
    locks.gets(exclusive(owners[0]));
    for owner in &owners[1..] {
        locks.waits(exclusive(*owner));
    }
    for pair in owners.windows(2) {
        assert_eq!(locks.granted_by(locks.unlock(pair[0])), [pair[1]]);
        assert_eq!(locks.holders(), [pair[1]]);
    }
    assert_eq!(locks.waiting(), 0);
}

#[test]
fn servers_that_contend_get_turns_within_one_of_each_other() {
    let mut locks = locks();
    let contenders = [owner(1, 1, 1), owner(2, 1, 1), owner(3, 1, 1)];
    let mut turns: BTreeMap<LockOwner, u64> = BTreeMap::new();
    locks.gets(exclusive(contenders[0]));
    locks.waits(exclusive(contenders[1]));
    locks.waits(exclusive(contenders[2]));
    for _ in 0..30 {
        // The holder wants it back at once, and is the quickest to ask.
        let holder = locks.holders()[0];
        *turns.entry(holder).or_default() += 1;
        locks.volume.ok(locks.unlock(holder));
        locks.waits(exclusive(holder));
        let counts = contenders.map(|one| turns.get(&one).copied().unwrap_or(0));
        assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
    }
}

#[test]
fn readers_that_wait_get_in_together_and_no_further_than_the_next_writer() {
    let mut locks = locks();
    let of = |n| owner(n % 3 + 1, 1, n);
    locks.gets(exclusive(of(0)));
    locks.waits(shared(of(1)));
    locks.waits(shared(of(2)));
    locks.waits(exclusive(of(3)));
    locks.waits(shared(of(4)));
    assert_eq!(locks.granted_by(locks.unlock(of(0))), [of(1), of(2)]);
    assert_eq!(locks.granted_by(locks.unlock(of(1))), []);
    assert_eq!(locks.granted_by(locks.unlock(of(2))), [of(3)]);
    assert_eq!(locks.granted_by(locks.unlock(of(3))), [of(4)]);
}

#[test]
fn readers_do_not_overtake_a_writer_that_waits() {
    let mut locks = locks();
    let (reader, writer, late) = (owner(1, 1, 1), owner(2, 1, 1), owner(3, 1, 1));
    locks.gets(shared(reader));
    let ticket = locks.waits(record_lock(writer, true, 10, 19));
    let wish = record_lock(late, false, 15, 30);
    locks.waits(wish);
    locks.gets(record_lock(late, false, 20, 40));
    assert_eq!(locks.granted_by(locks.withdraw(writer, ticket)), [late], "nothing but the writer kept it out");
}

/// On a local disk a waiting writer is nobody's reason for EAGAIN.
#[test]
fn who_does_not_wait_is_refused_for_what_is_held_alone() {
    let mut locks = locks();
    let (reader, writer, late) = (owner(1, 1, 1), owner(2, 1, 1), owner(3, 1, 1));
    locks.gets(shared(reader));
    locks.waits(exclusive(writer));
    let ino = locks.ino;
    assert_eq!(locks.volume.ns.conflicting_lock(ino, &shared(late)).unwrap(), None);
    assert_eq!(locks.volume.run(Op::Lock { ino, lock: shared(late) }), Ok(Reply::Locked));
    let held = Box::new(shared(reader));
    assert_eq!(locks.volume.run(Op::Lock { ino, lock: exclusive(late) }), Err(MetaError::Locked { holder: held }));
}

/// Whoever holds the lock may wait for the reader in a way that no owner shows: its child, say.
#[test]
fn a_reader_that_asks_gets_past_writers_that_wait_and_past_nothing_held() {
    let mut locks = locks();
    let [first, writer, reader, other] = [owner(1, 1, 1), owner(2, 1, 1), owner(1, 1, 2), owner(3, 1, 1)];
    locks.gets(shared(first));
    let waits = locks.waits(exclusive(writer));
    let ticket = locks.waits(shared(reader));
    let late = locks.waits(shared(other));
    let overtake = |ino, owner, ticket| Op::Overtake { ino, owner, ticket };
    let ino = locks.ino;
    assert_eq!(locks.granted_by(overtake(ino, writer, waits)), [], "a writer never");
    assert_eq!(locks.granted_by(overtake(ino, reader, ticket)), [reader]);
    assert_eq!(locks.volume.run(overtake(ino, reader, ticket)), Err(MetaError::NotWaiting));
    assert_eq!(locks.granted_by(locks.unlock(first)), []);
    assert_eq!(locks.granted_by(locks.unlock(reader)), [writer]);
    assert_eq!(locks.granted_by(overtake(ino, other, late)), [], "what is held excludes it");
    assert_eq!(locks.granted_by(locks.unlock(writer)), [other]);
}

/// Whoever waits for it waits for its owner: standing behind them would be a deadlock.
#[test]
fn what_an_owner_holds_it_changes_past_all_waiters() {
    let mut locks = locks();
    let (holder, writer) = (owner(1, 1, 1), owner(2, 1, 1));
    locks.gets(shared(holder));
    locks.waits(exclusive(writer));
    locks.gets(exclusive(holder));
    locks.gets(shared(holder));
    assert_eq!(locks.holders(), [holder]);
    assert_eq!(locks.granted_by(locks.unlock(holder)), [writer]);
}

#[test]
fn a_downgrade_lets_waiting_readers_in() {
    let mut locks = locks();
    let (holder, reader, writer) = (owner(1, 1, 1), owner(2, 1, 1), owner(3, 1, 1));
    locks.gets(exclusive(holder));
    locks.waits(shared(reader));
    locks.waits(exclusive(writer));
    let (ino, lock) = (locks.ino, shared(holder));
    assert_eq!(locks.granted_by(Op::Lock { ino, lock }), [reader]);
}

#[test]
fn an_upgrade_waits_for_the_other_readers_and_keeps_what_it_had() {
    let mut locks = locks();
    let (upgrader, reader, writer) = (owner(1, 1, 1), owner(2, 1, 1), owner(3, 1, 1));
    locks.gets(shared(upgrader));
    locks.gets(shared(reader));
    locks.waits(exclusive(writer));
    let ticket = locks.waits(exclusive(upgrader));
    locks.volume.ok(locks.withdraw(upgrader, ticket));
    assert_eq!(locks.holders(), [upgrader, reader]);
    locks.waits(exclusive(upgrader));
    assert_eq!(locks.granted_by(locks.unlock(reader)), [upgrader]);
    assert_eq!(locks.granted_by(locks.unlock(upgrader)), [writer]);
}

/// flock(2) would give up the old lock first, fcntl(2) says EDEADLK; the two look the same here.
#[test]
fn of_two_readers_that_both_upgrade_the_second_is_told_of_the_deadlock() {
    let mut locks = locks();
    let (one, other) = (owner(1, 1, 1), owner(2, 1, 1));
    locks.gets(shared(one));
    locks.gets(shared(other));
    locks.waits(exclusive(one));
    assert_eq!(locks.wish(exclusive(other)), Err(MetaError::Deadlock));
    assert_eq!(locks.holders(), [one, other], "nobody lost anything");
    assert_eq!(locks.granted_by(locks.unlock(other)), [one]);
}

#[test]
fn a_cycle_over_files_and_servers_is_a_deadlock_and_a_chain_is_none() {
    let mut locks = locks();
    let files = ["b", "c", "d"].map(|text| locks.volume.file(Ino::ROOT, text));
    let owners = [owner(1, 1, 1), owner(2, 1, 1), owner(3, 1, 1)];
    for (ino, owner) in files.iter().zip(owners) {
        assert_eq!(locks.wish_of(*ino, exclusive(owner)), Ok(Reply::Locked));
    }
    assert_eq!(locks.wish_of(files[1], exclusive(owners[0])), Ok(Reply::Queued));
    assert_eq!(locks.wish_of(files[2], exclusive(owners[1])), Ok(Reply::Queued));
    assert_eq!(locks.wish_of(files[0], exclusive(owners[2])), Err(MetaError::Deadlock));
    let lock = exclusive(owners[2]);
    let refused = locks.volume.run(Op::Lock { ino: files[0], lock });
    assert!(matches!(refused, Err(MetaError::Locked { .. })), "who does not wait is in no cycle");
    // Another owner on the same server may wait: it holds nothing that anybody needs.
    assert_eq!(locks.wish_of(files[0], exclusive(owner(3, 1, 2))), Ok(Reply::Queued));
    locks.volume.ok(Op::UnlockAll { ino: files[2], owner: owners[2] });
    assert_eq!(locks.wish_of(files[0], exclusive(owners[2])), Ok(Reply::Queued), "the cycle is broken");
}

#[test]
fn whoever_withdrew_gets_nothing_and_whoever_got_it_cannot_withdraw() {
    let mut locks = locks();
    let (holder, waiter) = (owner(1, 1, 1), owner(2, 1, 1));
    locks.gets(exclusive(holder));
    let ticket = locks.waits(exclusive(waiter));
    locks.volume.ok(locks.withdraw(waiter, ticket));
    assert_eq!(locks.granted_by(locks.unlock(holder)), []);
    assert_eq!(locks.holders(), []);

    locks.gets(exclusive(holder));
    let ticket = locks.waits(exclusive(waiter));
    assert_eq!(locks.granted_by(locks.unlock(holder)), [waiter]);
    let late = locks.withdraw(waiter, ticket);
    assert_eq!(locks.volume.run(late), Err(MetaError::NotWaiting));
    assert_eq!(locks.holders(), [waiter]);
}

#[test]
fn unlocking_a_part_grants_what_fits_there() {
    let mut locks = locks();
    let (holder, first, second) = (owner(1, 1, 1), owner(2, 1, 1), owner(3, 1, 1));
    locks.gets(record_lock(holder, true, 0, 99));
    locks.waits(record_lock(first, true, 40, 69));
    locks.waits(record_lock(second, true, 0, 9));
    let unlock = |start, end| Op::Unlock { ino: locks.ino, owner: holder, kind: LockKind::Record, start, end };
    let (part, rest, begin) = (unlock(40, 60), unlock(61, 99), unlock(0, 9));
    assert_eq!(locks.granted_by(part), []);
    assert_eq!(locks.granted_by(begin), [second]);
    assert_eq!(locks.granted_by(rest), [first]);
}

fn incarnate(node: u64, life: u64) -> Op {
    let incarnation = Incarnation(life);
    Op::Incarnate { node: NodeId(node), incarnation, addresses: vec![], capacity: 1, version: "2".into() }
}

#[test]
fn locks_of_an_ended_life_pass_to_the_next_waiter_and_its_own_waits_end() {
    for end_of_life in [incarnate(2, 2), Op::RemoveMember { node: NodeId(2) }] {
        let mut locks = locks();
        let (ended, waiter) = (owner(2, 1, 1), owner(3, 1, 1));
        locks.gets(exclusive(ended));
        let ticket = locks.waits(exclusive(owner(2, 1, 2)));
        locks.waits(exclusive(waiter));
        assert_eq!(locks.granted_by(end_of_life), [waiter]);
        assert!(locks.volume.changes.contains(&Change::LockWaitEnded { owner: owner(2, 1, 2), ticket }));
        assert_eq!((locks.holders(), locks.waiting()), (vec![waiter], 0));
        let late = locks.withdraw(owner(2, 1, 2), ticket);
        assert!(matches!(locks.volume.run(late), Err(MetaError::StaleIncarnation | MetaError::NoSuchMember)));
    }
}

#[test]
fn waits_end_with_the_inode() {
    let mut locks = locks();
    locks.gets(exclusive(owner(1, 1, 1)));
    let ticket = locks.waits(exclusive(owner(2, 1, 1)));
    locks.volume.unlink(Ino::ROOT, "a").unwrap();
    let reap = Op::Reap { inos: vec![locks.ino] };
    locks.volume.ok(reap);
    assert!(locks.volume.changes.contains(&Change::LockWaitEnded { owner: owner(2, 1, 1), ticket }));
    assert!(!locks.volume.ns.waits_for_lock(locks.ino, owner(2, 1, 1), ticket).unwrap());
    assert_eq!(locks.waiting(), 0);
}

#[test]
fn a_queue_has_an_end() {
    let mut locks = locks();
    locks.gets(exclusive(owner(1, 1, 0)));
    for n in 1..=WAITERS_MAX as u64 {
        locks.waits(exclusive(owner(n % 3 + 1, 1, n)));
    }
    assert_eq!(locks.wish(exclusive(owner(2, 1, 9999))), Err(MetaError::TooManyWaiters));
    let next = owner(2, 1, 1);
    assert_eq!(locks.granted_by(locks.unlock(owner(1, 1, 0))), [next]);
    locks.waits(exclusive(owner(2, 1, 9999)));
}

#[test]
fn a_life_of_a_server_waits_only_so_often() {
    let mut locks = locks();
    let mut files = Vec::new();
    for n in 0..WAITERS_OF_LIFE_MAX {
        if n % 256 == 0 {
            files.push(locks.volume.file(Ino::ROOT, &format!("f{n}")));
            assert_eq!(locks.wish_of(files[files.len() - 1], exclusive(owner(1, 1, 0))), Ok(Reply::Locked));
        }
        assert_eq!(locks.wish_of(files[files.len() - 1], exclusive(owner(2, 1, n))), Ok(Reply::Queued));
    }
    let other = locks.ino;
    locks.gets(exclusive(owner(1, 1, 0)));
    assert_eq!(locks.wish_of(other, exclusive(owner(2, 1, 9999))), Err(MetaError::TooManyWaiters));
    assert_eq!(locks.wish_of(other, exclusive(owner(3, 1, 1))), Ok(Reply::Queued));
}
