//! The threads: one walks, some read, the caller's own tells what was found in the walk's order.
//!
//! The walk numbers what it finds. A reader takes objects as they come and answers with their
//! number; the caller's thread holds back what is ahead of its turn. Each queue has a bound, and
//! whoever fills one waits for the others, so nothing grows however far one file is behind.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Duration,
};

use rustix::fs::FileType;

use crate::{
    Event, Settings, attributes,
    content::{self, Buffers},
    finding::{Difference, Finding, Pair, Trouble, What},
    object::{self, Stat},
    walk::Walk,
};

/// Numbers between the oldest that is not told yet and the newest: while one large file is read
/// this many others go on. Each may hold some findings, few hundred bytes.
const WINDOW: usize = 8192;
/// Objects that wait for a reader. Each holds two descriptors, of which a process may have 1024.
const WAITING: usize = 64;
/// How often the caller hears of progress when nothing else happens.
const TICK: Duration = Duration::from_millis(200);

/// How far it got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Names that were looked at, those on one side only included.
    pub entries: u64,
    /// Bytes of content, of one side.
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct Shared {
    entries: AtomicU64,
    bytes: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn progress(&self) -> Progress {
        Progress { entries: self.entries.load(Relaxed), bytes: self.bytes.load(Relaxed) }
    }
}

/// Two objects of one type and one name, to be compared.
#[derive(Debug)]
pub struct Job {
    pub path: Vec<u8>,
    pub objects: Pair<OwnedFd>,
    pub stats: Pair<Stat>,
    /// What the walk found of them.
    pub findings: Vec<Finding>,
    /// False for what is mounted there: its content is not of these trees.
    pub content: bool,
}

/// The caller wants no more.
#[derive(Debug)]
pub struct Stopped;

type Numbered<T> = (u64, T);

/// Where the walk puts what it finds.
#[derive(Debug)]
pub struct Outlet<'a> {
    next: u64,
    room: SyncSender<()>,
    jobs: SyncSender<Numbered<Job>>,
    told: SyncSender<Numbered<Vec<Finding>>>,
    shared: &'a Shared,
}

impl Outlet<'_> {
    fn number(&mut self) -> Result<u64, Stopped> {
        self.room.send(()).map_err(|_| Stopped)?;
        self.next += 1;
        Ok(self.next - 1)
    }

    pub fn count_entry(&self) {
        self.shared.entries.fetch_add(1, Relaxed);
    }

    /// Waits while as many are ahead as may be.
    pub fn tell(&mut self, findings: Vec<Finding>) -> Result<(), Stopped> {
        if findings.is_empty() {
            return Ok(());
        }
        let number = self.number()?;
        self.told.send((number, findings)).map_err(|_| Stopped)
    }

    /// Waits for a reader.
    pub fn compare(&mut self, job: Job) -> Result<(), Stopped> {
        let number = self.number()?;
        self.jobs.send((number, job)).map_err(|_| Stopped)
    }
}

pub fn run(roots: Pair<OwnedFd>, settings: &Settings, event: &mut dyn FnMut(Event) -> ControlFlow<()>) -> Progress {
    let shared = Shared::default();
    let (room, rooms) = sync_channel(WINDOW);
    let (jobs, job_queue) = sync_channel(WAITING);
    // Never full: there are no more numbers than this.
    let (told, findings) = sync_channel(WINDOW);
    let job_queue = Mutex::new(job_queue);
    std::thread::scope(|scope| {
        for _ in 0..settings.threads.get() {
            let (told, queue, shared) = (told.clone(), &job_queue, &shared);
            scope.spawn(move || read(queue, &told, settings, shared));
        }
        let outlet = Outlet { next: 0, room, jobs, told, shared: &shared };
        scope.spawn(|| {
            // Stopped is no error: the caller asked for it.
            let _ = Walk::new(settings, outlet).run(roots);
        });
        if tell(findings, rooms, event, &shared).is_break() {
            shared.stop.store(true, Relaxed);
            // The walk may wait for a reader, a reader for an object: both end when one does.
            while lock(&job_queue).recv().is_ok() {}
        }
    });
    shared.progress()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the caller in the order of the numbers; takes the receivers so that the others end with it.
fn tell(findings: Receiver<Numbered<Vec<Finding>>>, rooms: Receiver<()>, event: &mut dyn FnMut(Event) -> ControlFlow<()>, shared: &Shared) -> ControlFlow<()> {
    let mut early = BTreeMap::new();
    let mut turn = 0;
    loop {
        match findings.recv_timeout(TICK) {
            Ok((number, found)) => {
                early.insert(number, found);
                while let Some(found) = early.remove(&turn) {
                    turn += 1;
                    // Its room was taken before it got its number.
                    let _ = rooms.try_recv();
                    for finding in found {
                        event(Event::Found(finding))?;
                    }
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return ControlFlow::Continue(()),
        }
        event(Event::Progress(shared.progress()))?;
    }
}

/// A reader: until the walk has ended and nothing waits.
fn read(queue: &Mutex<Receiver<Numbered<Job>>>, told: &SyncSender<Numbered<Vec<Finding>>>, settings: &Settings, shared: &Shared) {
    let mut buffers = Buffers::default();
    loop {
        let next = lock(queue).recv();
        let Ok((number, job)) = next else { return };
        let path = job.path.clone();
        // A number that is never told would hold up all that follow.
        let findings = catch_unwind(AssertUnwindSafe(|| examine(job, settings, &mut buffers, shared)))
            .unwrap_or_else(|_| vec![Finding::Trouble(Trouble { path, side: "both", error: "compare: a bug in ctfs diff".into() })]);
        if told.send((number, findings)).is_err() {
            return;
        }
    }
}

/// Everything about two objects of one type.
fn examine(job: Job, settings: &Settings, buffers: &mut Buffers, shared: &Shared) -> Vec<Finding> {
    let Job { path, objects, stats, mut findings, content } = job;
    let before = findings.len();
    let differences = |found: Vec<Difference>| found.into_iter().map(Finding::Difference);
    findings.extend(differences(attributes::compare_stats(&path, stats.as_ref(), settings.atime)));
    match objects.as_ref().map(|object| object::xattrs(object.as_fd())).both() {
        Ok(xattrs) => findings.extend(differences(attributes::compare_xattrs(&path, xattrs.as_ref()))),
        Err(errors) => findings.extend(Finding::troubles(&path, "read extended attributes", errors)),
    }
    let mut read = false;
    match stats.source.kind {
        FileType::Symlink => match objects.as_ref().map(|object| object::read_link(object.as_fd())).both() {
            Ok(targets) => findings.extend(attributes::compare_symlinks(&path, targets.as_ref().map(Vec::as_slice), stats.as_ref()).map(Finding::Difference)),
            Err(errors) => findings.extend(Finding::troubles(&path, "read symlink", errors)),
        },
        // Files of two sizes differ, and there is nothing to gain from reading them.
        FileType::RegularFile if content && stats.source.size == stats.target.size && stats.source.size > 0 => {
            read = true;
            findings.extend(compare_content(&path, &objects, stats.source.size, buffers, shared));
        }
        _ => {}
    }
    if read || findings.len() > before {
        findings.extend(changed(&path, &objects, &stats));
    }
    findings
}

fn compare_content(path: &[u8], objects: &Pair<OwnedFd>, size: u64, buffers: &mut Buffers, shared: &Shared) -> Vec<Finding> {
    let files = match objects.as_ref().map(|object| object::open_file(object.as_fd())).both() {
        Ok(files) => files,
        Err(errors) => return Finding::troubles(path, "open", errors),
    };
    let progress = |bytes| {
        shared.bytes.fetch_add(bytes, Relaxed);
        if shared.stop.load(Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let verdict = match content::compare(files.as_ref().map(AsFd::as_fd), size, buffers, &progress) {
        Ok(verdict) => verdict,
        Err(errors) => return Finding::troubles(path, "compare content", errors),
    };
    let mut findings = Vec::new();
    if verdict.differing > 0 {
        let bytes = if verdict.differing == 1 { "1 byte".into() } else { format!("{} bytes", verdict.differing) };
        let shown = Pair::new(format!("{size} bytes"), format!("{bytes} different, first at {}", verdict.first));
        findings.push(Finding::Difference(Difference::new(path, What::Content, shown)));
    }
    if verdict.holes != Pair::new(0, 0) {
        let shown = verdict.holes.zip(Pair::new(verdict.holes.target, verdict.holes.source)).map(|(here, there)| match (here, there) {
            (hole, 0) => format!("{hole} bytes of hole from {}", verdict.first_hole),
            (0, _) => "stored zeros".to_owned(),
            (hole, _) => format!("{hole} bytes of other holes"),
        });
        findings.push(Finding::Difference(Difference::new(path, What::Holes, shown)));
    }
    findings
}

/// A trouble for each side that somebody changed since `stats`.
pub fn changed(path: &[u8], objects: &Pair<OwnedFd>, stats: &Pair<Stat>) -> Vec<Finding> {
    let changed = objects.as_ref().zip(stats.as_ref()).map(|(object, earlier)| match Stat::of(object) {
        Ok(now) if now.changed_since(earlier) => Some("it changed meanwhile, so this says little of it".to_owned()),
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    });
    Finding::troubles(path, "compare", changed)
}
