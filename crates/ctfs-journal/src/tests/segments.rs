//! The files alone, against a disk that loses what was not synced.

use std::{path::PathBuf, sync::Arc};

use proptest::{collection::vec, prelude::*};

use super::{check_records, disk::CrashDisk, id, record, root};
use crate::{Disk, JournalError, Position, Record, segments::Segments};

const SEGMENT_BYTES: u64 = 4096;

#[derive(Debug, Clone)]
enum Step {
    Write(u8),
    Sync,
    Prepare,
    /// Trims this part (of 256) of what is kept.
    Trim(u8),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u8..30).prop_map(Step::Write),
        3 => Just(Step::Sync),
        1 => Just(Step::Prepare),
        1 => any::<u8>().prop_map(Step::Trim),
    ]
}

fn dir() -> PathBuf {
    root().join("one")
}

fn open(disk: &CrashDisk) -> Result<Option<Segments>, JournalError> {
    Segments::recover(Arc::new(disk.clone()), &dir(), id(1), SEGMENT_BYTES)
}

fn create(disk: &CrashDisk, first: Position) -> Option<Segments> {
    Segments::create(Arc::new(disk.clone()), &dir(), id(1), first, SEGMENT_BYTES).ok()
}

/// What was said to be durable and to be trimmed, before a crash.
#[derive(Debug, Clone, Copy, Default)]
struct Told {
    synced: Position,
    trimmed: Position,
}

/// Does `steps` until one fails.
fn run(segments: &mut Segments, steps: &[Step], told: &mut Told) {
    for step in steps {
        let done = match step {
            Step::Write(count) => {
                let first = segments.written().0 + 1;
                let records: Vec<Record> = (first..first + u64::from(*count)).map(record).collect();
                segments.write(&records).is_ok()
            }
            Step::Sync => segments.sync().is_ok(),
            Step::Prepare => {
                segments.prepare();
                true
            }
            Step::Trim(part) => {
                let kept = segments.written().0 - segments.trimmed().0;
                let upto = Position(segments.trimmed().0 + kept * u64::from(*part) / 256);
                told.trimmed = told.trimmed.max(upto);
                segments.trim(upto).is_ok()
            }
        };
        if !done {
            return;
        }
        told.synced = segments.synced();
    }
}

/// What is found holds all that was told, and nothing but what was written.
fn check(segments: &Segments, told: Told) {
    assert!(segments.written() >= told.synced, "{told:?}, found up to {}", segments.written());
    assert_eq!(segments.written(), segments.synced());
    assert!(segments.trimmed() <= told.trimmed, "{told:?}, trimmed {}", segments.trimmed());
    let reader = segments.reader();
    let last = check_records(segments.trimmed().next(), |from| reader.read(from, 2000));
    assert_eq!(last, segments.written());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Three lives of the same files, each ended by a loss of power at some step.
    #[test]
    fn whatever_was_synced_is_there_after_any_crash_and_what_is_there_is_a_prefix(
        first in 1u64..50,
        lives in vec((vec(any_step(), 1..40), 0u64..80, any::<u64>(), any::<bool>()), 3)
    ) {
        let mut disk = CrashDisk::new();
        disk.create_dir(root()).unwrap();
        let begin = Position(first).before();
        let mut told = Told { synced: begin, trimmed: begin };
        for (steps, power, seed, kill) in lives {
            disk.cut_power_after(power);
            let opened = match open(&disk) {
                Ok(Some(segments)) => Some(segments),
                Ok(None) => create(&disk, Position(first)),
                Err(why) => {
                    prop_assert!(disk.steps() > power, "{why}");
                    None
                }
            };
            if let Some(mut segments) = opened {
                // What was found and made durable is promised from now on.
                check(&segments, told);
                told.synced = segments.synced();
                run(&mut segments, &steps, &mut told);
            }
            // A kill loses nothing that was written; a later loss of power must not lose what was
            // found after it.
            disk = if kill { disk.after_kill() } else { disk.after_crash(seed) };
            match open(&disk) {
                Ok(Some(segments)) => {
                    check(&segments, told);
                    told.synced = segments.synced();
                }
                Ok(None) => prop_assert_eq!(told.synced, begin),
                Err(why) => prop_assert!(false, "a crash is no damage: {}", why),
            }
        }
    }

    #[test]
    fn a_changed_byte_is_reported_or_takes_only_what_was_never_promised(
        counts in vec(1u8..20, 1..12), file in any::<prop::sample::Index>(), offset in 0usize..5000, with in 1u8..
    ) {
        let disk = CrashDisk::new();
        let mut segments = create(&disk, Position(1)).unwrap();
        for count in counts {
            run(&mut segments, &[Step::Write(count), Step::Sync], &mut Told::default());
        }
        let synced = segments.synced();
        let mut files = disk.list(&dir()).unwrap();
        files.retain(|name| name.ends_with(".seg"));
        disk.rot(&dir().join(&files[file.index(files.len())]), offset, with);
        // Found, or where no record lies.
        if let Ok(found) = open(&disk) {
            check(&found.expect("it had begun"), Told { synced, trimmed: Position::NONE });
        }
    }

    #[test]
    fn hostile_files_are_an_error_or_empty_and_never_a_panic(
        bytes in vec(any::<u8>(), 0..400), marks in vec(any::<u8>(), 0..70), salt in any::<u32>(), header in any::<bool>()
    ) {
        let disk = CrashDisk::new();
        disk.create_dir(&dir()).unwrap();
        let mut file = if header { crate::frame::segment_header(&id(1), Position(1), salt).to_vec() } else { Vec::new() };
        file.extend_from_slice(&bytes);
        disk.set(&dir().join("00000000000000000001.seg"), file);
        disk.set(&dir().join("marks"), marks);
        if let Ok(Some(segments)) = open(&disk) {
            prop_assert_eq!(segments.written(), Position::NONE);
        }
    }
}

/// Ten records, each synced by itself, all in one segment.
fn ten() -> (CrashDisk, PathBuf) {
    let disk = CrashDisk::new();
    let mut segments = create(&disk, Position(1)).unwrap();
    for _ in 0..10 {
        run(&mut segments, &[Step::Write(1), Step::Sync], &mut Told::default());
    }
    (disk, dir().join("00000000000000000001.seg"))
}

#[test]
fn a_damaged_frame_in_the_middle_is_an_error_that_names_file_and_byte() {
    let (disk, path) = ten();
    disk.rot(&path, 200, 1);
    // Also when nothing but the frames tells.
    disk.set(&dir().join("marks"), Vec::new());
    match open(&disk) {
        Err(JournalError::Damaged { file, offset, why }) => {
            assert_eq!((file, why), (path, "bad frame before a later write"));
            assert!((60..=200).contains(&offset), "{offset}");
        }
        other => panic!("{:?}", other.map(|found| found.map(|segments| segments.written()))),
    }
}

#[test]
fn a_damaged_last_record_is_an_error_when_the_marks_know_that_it_was_durable() {
    let (disk, path) = ten();
    let end = disk.get(&path).iter().rposition(|byte| *byte != 0).unwrap();
    disk.rot(&path, end, 1);
    assert!(matches!(open(&disk), Err(JournalError::Damaged { .. })));
}

#[test]
fn a_missing_segment_in_the_middle_is_an_error() {
    let disk = CrashDisk::new();
    let mut segments = create(&disk, Position(1)).unwrap();
    run(&mut segments, &[Step::Write(29), Step::Write(29), Step::Write(29), Step::Sync], &mut Told::default());
    drop(segments);
    let mut names = disk.list(&dir()).unwrap();
    names.retain(|name| name.ends_with(".seg"));
    assert!(names.len() > 2);
    disk.remove_file(&dir().join(&names[1])).unwrap();
    assert!(matches!(open(&disk), Err(JournalError::Damaged { .. })));
}

#[test]
fn the_files_of_another_life_are_refused() {
    let (disk, _) = ten();
    let other = Segments::recover(Arc::new(disk), &dir(), id(2), SEGMENT_BYTES);
    assert!(matches!(other, Err(JournalError::Damaged { .. })));
}

#[test]
fn trimmed_segments_are_used_again_and_the_rest_removed() {
    let disk = CrashDisk::new();
    let mut segments = create(&disk, Position(1)).unwrap();
    for _ in 0..50 {
        run(&mut segments, &[Step::Write(10), Step::Sync, Step::Trim(255)], &mut Told::default());
        let files = disk.list(&dir()).unwrap();
        assert!(files.len() <= 5, "{files:?}");
    }
}
