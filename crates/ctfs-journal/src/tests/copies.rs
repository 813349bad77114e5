//! The pair's side: what it accepts, refuses, and still has after a crash.

use std::sync::Arc;

use bytes::Bytes;
use proptest::{collection::vec, prelude::*};

use super::{batch, check_records, disk::CrashDisk, id, root};
use crate::{Batch, COPIES_MAX, Copies, CopySettings, CopyStatus, Disk, JournalId, Position, Refusal};

const SETTINGS: CopySettings = CopySettings { segment_bytes: 4096, bytes_max: 50_000 };

fn open(disk: &CrashDisk) -> Copies {
    Copies::open(Arc::new(disk.clone()), root(), id(1).cluster, SETTINGS).expect("a crash is no damage")
}

async fn status(copies: &Copies, id: JournalId) -> Option<CopyStatus> {
    copies.list().await.unwrap().into_iter().find(|status| status.id == id)
}

fn other_node() -> JournalId {
    JournalId { node: ctfs_types::NodeId(5), ..id(1) }
}

#[tokio::test]
async fn what_was_accepted_is_there_after_a_crash() {
    let disk = CrashDisk::new();
    let copies = open(&disk);
    assert_eq!(copies.accept(id(1), batch(1, 1..=20)).await, Ok(Position(20)));
    assert_eq!(copies.accept(id(1), batch(1, 21..=40)).await, Ok(Position(40)));
    let again = open(&disk.after_crash(3));
    assert_eq!(status(&again, id(1)).await.unwrap().last, Position(40));
    // And it goes on from there.
    assert_eq!(again.accept(id(1), batch(1, 41..=50)).await, Ok(Position(50)));
    let fenced = again.fence(id(1), 1).await.unwrap().unwrap();
    assert_eq!(check_records(Position(1), |from| fenced.records(from, 1000)), Position(50));
}

#[tokio::test]
async fn the_same_records_again_are_accepted_and_others_in_their_place_have_diverged() {
    let copies = open(&CrashDisk::new());
    copies.accept(id(1), batch(1, 1..=20)).await.unwrap();
    assert_eq!(copies.accept(id(1), batch(1, 5..=10)).await, Ok(Position(20)));
    assert_eq!(copies.accept(id(1), batch(1, 15..=25)).await, Ok(Position(25)));
    let mut other = batch(1, 20..=30);
    other.payloads[2] = Bytes::from_static(b"something else");
    assert_eq!(copies.accept(id(1), other).await, Err(Refusal::Diverged { position: Position(22) }));
    assert_eq!(copies.accept(id(1), batch(1, 26..=26)).await, Ok(Position(26)), "nothing of it was taken");
}

#[tokio::test]
async fn a_gap_is_refused_and_says_what_is_there() {
    let copies = open(&CrashDisk::new());
    copies.accept(id(1), batch(1, 1..=20)).await.unwrap();
    assert_eq!(copies.accept(id(1), batch(1, 22..=30)).await, Err(Refusal::Gap { has: Position(20) }));
    assert_eq!(copies.accept(id(2), batch(1, 2..=3)).await, Err(Refusal::Gap { has: Position::NONE }));
}

#[tokio::test]
async fn an_empty_batch_asks_what_is_there() {
    let copies = open(&CrashDisk::new());
    assert_eq!(copies.accept(id(1), Batch::new(Position(1), Vec::new())).await, Ok(Position::NONE));
    copies.accept(id(1), batch(1, 1..=20)).await.unwrap();
    assert_eq!(copies.accept(id(1), Batch::new(Position(1), Vec::new())).await, Ok(Position(20)));
}

#[tokio::test]
async fn a_copy_begins_where_its_owner_keeps_records_and_begins_anew_when_it_fell_behind_that() {
    let disk = CrashDisk::new();
    let copies = open(&disk);
    assert_eq!(copies.accept(id(1), batch(10, 10..=20)).await, Ok(Position(20)));
    assert_eq!(status(&copies, id(1)).await.unwrap().kept_from, Position(10));
    assert_eq!(copies.accept(id(1), batch(21, 21..=22)).await, Ok(Position(22)), "nothing was missed");
    assert_eq!(copies.accept(id(1), batch(40, 40..=41)).await, Ok(Position(41)));
    let again = open(&disk.after_crash(1));
    let fenced = again.fence(id(1), 1).await.unwrap().unwrap();
    assert_eq!(fenced.kept_from(), Position(40));
    assert_eq!(check_records(Position(40), |from| fenced.records(from, 1000)), Position(41));
}

#[tokio::test]
async fn a_fenced_life_and_those_before_it_are_refused_for_good_and_the_next_is_not() {
    let disk = CrashDisk::new();
    let copies = open(&disk);
    for life in 1..=2 {
        copies.accept(id(life), batch(1, 1..=20)).await.unwrap();
    }
    let fenced = copies.fence(id(2), 7).await.unwrap().unwrap();
    assert_eq!(fenced.last(), Position(20));
    let again = open(&disk.after_crash(0));
    for copies in [&copies, &again] {
        for life in 1..=2 {
            assert_eq!(copies.accept(id(life), batch(1, 21..=21)).await, Err(Refusal::Fenced { epoch: 7 }));
            assert_eq!(status(copies, id(life)).await.unwrap().fenced, Some(7));
        }
        copies.accept(id(3), batch(1, 1..=1)).await.unwrap();
        copies.accept(other_node(), batch(1, 1..=1)).await.unwrap();
        assert_eq!(copies.fence(id(2), 6).await.err(), Some(Refusal::Superseded { epoch: 7 }));
        assert_eq!(copies.fence(id(2), 7).await.unwrap().unwrap().last(), Position(20), "asked again");
    }
}

#[tokio::test]
async fn a_fence_stays_when_its_copy_is_removed() {
    let copies = open(&CrashDisk::new());
    copies.accept(id(2), batch(1, 1..=20)).await.unwrap();
    copies.fence(id(2), 7).await.unwrap();
    copies.remove(id(2)).await.unwrap();
    assert_eq!(copies.accept(id(2), batch(1, 1..=1)).await, Err(Refusal::Fenced { epoch: 7 }));
    assert!(copies.fence(id(2), 8).await.unwrap().is_none());
    assert_eq!(copies.fence(id(2), 7).await.err(), Some(Refusal::Superseded { epoch: 8 }));
}

#[tokio::test]
async fn a_fence_holds_where_no_copy_is() {
    let disk = CrashDisk::new();
    assert!(open(&disk).fence(id(1), 3).await.unwrap().is_none());
    assert_eq!(open(&disk.after_crash(0)).accept(id(1), batch(1, 1..=1)).await, Err(Refusal::Fenced { epoch: 3 }));
}

#[tokio::test]
async fn a_damaged_copy_says_so_and_the_others_are_used() {
    let disk = CrashDisk::new();
    let copies = open(&disk);
    for _ in 0..3 {
        let last = status(&copies, id(1)).await.map_or(0, |status| status.last.0);
        copies.accept(id(1), batch(1, last + 1..=last + 5)).await.unwrap();
    }
    copies.accept(other_node(), batch(1, 1..=5)).await.unwrap();
    drop(copies);
    disk.rot(&root().join(id(1).dir_name()).join("00000000000000000001.seg"), 200, 1);
    let copies = open(&disk);
    assert!(status(&copies, id(1)).await.unwrap().failed.is_some());
    assert!(matches!(copies.accept(id(1), batch(1, 16..=16)).await, Err(Refusal::Failed(_))));
    assert!(matches!(copies.fence(id(1), 1).await, Err(Refusal::Failed(_))));
    assert_eq!(copies.accept(other_node(), batch(1, 6..=6)).await, Ok(Position(6)));
}

#[tokio::test]
async fn damaged_fences_keep_everything_closed() {
    let disk = CrashDisk::new();
    open(&disk).fence(id(1), 1).await.unwrap();
    disk.rot(&root().join("fences"), 8, 1);
    assert!(Copies::open(Arc::new(disk), root(), id(1).cluster, SETTINGS).is_err());
}

#[tokio::test]
async fn what_is_kept_is_bounded_and_a_trim_makes_room() {
    let disk = CrashDisk::new();
    let copies = open(&disk);
    let mut last = 0;
    while copies.accept(id(1), batch(1, last + 1..=last + 10)).await.is_ok() {
        last += 10;
    }
    assert_eq!(copies.accept(id(1), batch(1, last + 1..=last + 10)).await, Err(Refusal::Full));
    assert!(status(&copies, id(1)).await.unwrap().bytes <= SETTINGS.bytes_max);
    copies.trim(id(1), Position(last)).await.unwrap();
    assert_eq!(copies.accept(id(1), batch(1, last + 1..=last + 10)).await, Ok(Position(last + 10)));
    for life in 2..=COPIES_MAX as u64 {
        copies.accept(id(life), batch(1, 1..=1)).await.unwrap();
    }
    assert_eq!(copies.accept(id(1000), batch(1, 1..=1)).await, Err(Refusal::Full));
}

#[tokio::test]
async fn a_full_disk_refuses_and_what_was_accepted_stays() {
    let disk = CrashDisk::new();
    let copies = open(&disk);
    copies.accept(id(1), batch(1, 1..=5)).await.unwrap();
    disk.set_full(true);
    assert_eq!(copies.accept(id(1), batch(1, 6..=100)).await, Err(Refusal::Full));
    assert_eq!(copies.accept(id(2), batch(1, 1..=5)).await, Err(Refusal::Full));
    disk.set_full(false);
    assert_eq!(copies.accept(id(1), batch(1, 6..=100)).await, Ok(Position(100)));
    assert_eq!(copies.accept(id(2), batch(1, 1..=5)).await, Ok(Position(5)));
    drop(copies);
    let again = open(&disk.after_crash(0));
    let fenced = again.fence(id(1), 1).await.unwrap().unwrap();
    assert_eq!(check_records(Position(1), |from| fenced.records(from, 1000)), Position(100));
}

#[tokio::test]
async fn after_a_failed_sync_a_copy_accepts_nothing_until_it_is_opened_again() {
    let disk = CrashDisk::new();
    let copies = open(&disk);
    copies.accept(id(1), batch(1, 1..=5)).await.unwrap();
    copies.list().await.unwrap();
    // The write, then the sync.
    disk.fail_nth(2);
    assert!(matches!(copies.accept(id(1), batch(1, 6..=6)).await, Err(Refusal::Failed(_))));
    assert!(matches!(copies.accept(id(1), batch(1, 6..=6)).await, Err(Refusal::Failed(_))));
    assert!(matches!(copies.fence(id(1), 1).await, Err(Refusal::Failed(_))));
    drop(copies);
    assert!(status(&open(&disk.after_crash(1)), id(1)).await.unwrap().last >= Position(5));
}

#[tokio::test]
async fn a_fence_that_could_not_be_written_closes_the_copies() {
    let disk = CrashDisk::new();
    let copies = open(&disk);
    copies.accept(id(1), batch(1, 1..=5)).await.unwrap();
    copies.list().await.unwrap();
    disk.fail_nth(3);
    assert!(matches!(copies.fence(id(1), 1).await, Err(Refusal::Failed(_))));
    assert!(matches!(copies.accept(other_node(), batch(1, 1..=1)).await, Err(Refusal::Failed(_))));
}

#[tokio::test]
async fn impossible_batches_are_refused() {
    let copies = open(&CrashDisk::new());
    for (kept_from, first) in [(0, 1), (1, 0), (u64::MAX, 1), (1, u64::MAX)] {
        let bad = Batch { kept_from: Position(kept_from), first: Position(first), payloads: vec![Bytes::new()] };
        assert_eq!(copies.accept(id(1), bad).await, Err(Refusal::Invalid));
    }
    let foreign = JournalId { cluster: [8; 16], ..id(1) };
    assert_eq!(copies.accept(foreign, batch(1, 1..=1)).await, Err(Refusal::Invalid));
    assert!(copies.list().await.unwrap().is_empty());
}

#[derive(Debug, Clone)]
enum Step {
    /// Of one of two owners: so many records, from so many before the end.
    Accept(bool, u64, u64),
    Fence(bool),
    Trim(bool, u64),
    Remove(bool),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (any::<bool>(), 0u64..30, 0u64..10).prop_map(|(who, count, back)| Step::Accept(who, count, back)),
        1 => any::<bool>().prop_map(Step::Fence),
        2 => (any::<bool>(), 0u64..40).prop_map(|(who, upto)| Step::Trim(who, upto)),
        1 => any::<bool>().prop_map(Step::Remove),
    ]
}

/// What one owner was told.
#[derive(Debug, Default, Clone, Copy)]
struct Told {
    durable: u64,
    kept_from: u64,
    fenced: bool,
    /// A removal was begun: all or nothing may be there.
    removed: bool,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn accepted_records_and_fences_survive_a_loss_of_power_at_any_step(
        steps in vec(any_step(), 1..40), power in 0u64..150, seed in any::<u64>()
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let disk = CrashDisk::new();
            disk.create_dir(root()).unwrap();
            disk.cut_power_after(power);
            let owner = |who: bool| if who { id(1) } else { other_node() };
            let mut told = [Told { kept_from: 1, ..Told::default() }; 2];
            if let Ok(copies) = Copies::open(Arc::new(disk.clone()), root(), id(1).cluster, SETTINGS) {
                for step in steps {
                    let answer = match step {
                        Step::Accept(who, count, back) => {
                            let told = &mut told[usize::from(who)];
                            let first = (told.durable + 1).saturating_sub(back).max(1);
                            let sent = Batch::new(Position(told.kept_from), (first..first + count).map(super::record).collect());
                            match copies.accept(owner(who), sent).await {
                                Ok(has) => {
                                    assert!(!told.fenced, "accepted after a fence");
                                    assert!(has.0 >= told.durable || told.removed);
                                    told.durable = has.0;
                                    told.removed = false;
                                    Ok(())
                                }
                                Err(Refusal::Fenced { .. }) => {
                                    assert!(told.fenced);
                                    Ok(())
                                }
                                Err(Refusal::Gap { .. }) if told.removed => Ok(()),
                                Err(why) => Err(why),
                            }
                        }
                        Step::Fence(who) => copies.fence(owner(who), 1).await.map(|_| told[usize::from(who)].fenced = true),
                        Step::Trim(who, back) => {
                            let told = &mut told[usize::from(who)];
                            let upto = told.durable.saturating_sub(back);
                            told.kept_from = told.kept_from.max(upto + 1);
                            copies.trim(owner(who), Position(upto)).await.or(Ok(()))
                        }
                        Step::Remove(who) => {
                            told[usize::from(who)].removed = true;
                            copies.remove(owner(who)).await
                        }
                    };
                    if let Err(why) = answer {
                        assert!(disk.steps() > power, "{why}");
                        break;
                    }
                }
            }
            let again = open(&disk.after_crash(seed));
            for who in [false, true] {
                let Told { durable, kept_from, fenced, removed } = told[usize::from(who)];
                if fenced {
                    let refused = again.accept(owner(who), batch(1, 1..=1)).await;
                    assert_eq!(refused, Err(Refusal::Fenced { epoch: 1 }));
                }
                match again.fence(owner(who), 1).await.unwrap() {
                    Some(copy) => {
                        let last = check_records(copy.kept_from(), |from| copy.records(from, 1000));
                        assert_eq!(last, copy.last());
                        assert!(removed || last.0 >= durable, "{last} of {durable}");
                        assert!(removed || copy.kept_from().0 <= kept_from);
                    }
                    None => assert!(removed || durable == 0, "{durable} were accepted"),
                }
            }
        });
    }
}
