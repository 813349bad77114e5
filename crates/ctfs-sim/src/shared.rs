//! What the tasks of all servers reach: the wires, the chunks, the trace, the histories.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use ctfs_types::NodeId;
use parking_lot::Mutex;

use crate::{chance::Chance, chunks::Chunks, history::History, network::Wires, trace::Trace};

pub struct Shared {
    now: AtomicU64,
    chance: Mutex<Chance>,
    pub wires: Mutex<Wires>,
    pub chunks: Mutex<Chunks>,
    pub trace: Mutex<Trace>,
    pub history: Mutex<History>,
    /// How slow disks are now, in thousandths.
    disk_slowness: AtomicU64,
    /// Milliseconds of silence after which a life is ended.
    fence_after: AtomicU64,
}

/// As in `ctfs-node`.
const FENCE_AFTER: Duration = Duration::from_secs(10);

impl Shared {
    pub fn new(mut chance: Chance) -> Self {
        Self {
            now: AtomicU64::new(0),
            wires: Mutex::new(Wires::new(chance.fork())),
            chunks: Mutex::default(),
            trace: Mutex::default(),
            history: Mutex::default(),
            disk_slowness: AtomicU64::new(1000),
            fence_after: AtomicU64::new(FENCE_AFTER.as_millis() as u64),
            chance: Mutex::new(chance),
        }
    }

    /// Since the beginning of the simulation.
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.now.load(Relaxed))
    }

    pub fn set_now(&self, now: Duration) {
        self.now.store(now.as_nanos() as u64, Relaxed);
    }

    /// Draws from the chance of the servers' surroundings.
    pub fn draw<T>(&self, draw: impl FnOnce(&mut Chance) -> T) -> T {
        draw(&mut self.chance.lock())
    }

    /// How long a disk takes for what waits at this moment.
    pub fn disk_latency(&self) -> Duration {
        let micros = self.draw(|chance| if chance.strikes(5) { chance.between(5_000, 60_000) } else { chance.between(1_000, 4_000) });
        Duration::from_micros(micros * self.disk_slowness.load(Relaxed) / 1000)
    }

    pub fn set_disk_slowness(&self, thousandths: u64) {
        self.disk_slowness.store(thousandths, Relaxed);
    }

    pub fn fence_after(&self) -> Duration {
        Duration::from_millis(self.fence_after.load(Relaxed))
    }

    pub fn set_fence_after(&self, silence: Duration) {
        self.fence_after.store(silence.as_millis() as u64, Relaxed);
    }

    /// A line of the trace, said by a server.
    pub fn note(&self, node: NodeId, what: std::fmt::Arguments<'_>) {
        self.trace.lock().line(self.now(), node, what);
    }
}
