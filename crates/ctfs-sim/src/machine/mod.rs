//! One simulated machine: its clocks, its disk's pace, its power.

pub mod system;

use std::{
    cell::Cell,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use ctfs_host::simulated::{self, SharedWorker};
use tokio::time::Instant;

use crate::shared::Shared;

/// The machine of one server, from one start of the server to its end.
pub struct Machine {
    /// The time of tokio at which the boot clock showed `boot`.
    epoch: Cell<Option<Instant>>,
    boot: Cell<Duration>,
    has_power: Cell<bool>,
    shared: Arc<Shared>,
}

impl Machine {
    pub fn new(boot: Duration, shared: Arc<Shared>) -> Rc<Self> {
        Rc::new(Self { epoch: Cell::new(None), boot: Cell::new(boot), has_power: Cell::new(true), shared })
    }

    /// What the boot clock shows at the present moment of the runtime that runs.
    pub fn set_boot(&self, boot: Duration) {
        self.epoch.set(Some(Instant::now()));
        self.boot.set(boot);
    }

    /// Nothing reaches the disk any more.
    pub fn lose_power(&self) {
        self.has_power.set(false);
    }
}

impl simulated::Machine for Machine {
    fn boot_time(&self) -> Duration {
        // What is dropped at the end asks outside of the runtime; for it time stands still.
        let in_runtime = tokio::runtime::Handle::try_current().is_ok();
        match self.epoch.get().filter(|_| in_runtime) {
            Some(epoch) => self.boot.get() + epoch.elapsed(),
            None => self.boot.get(),
        }
    }

    fn start(&self, _name: &str, worker: SharedWorker) {
        let shared = self.shared.clone();
        tokio::spawn(async move {
            loop {
                let latency = shared.disk_latency();
                tokio::time::sleep(latency).await;
                if !worker.turn() {
                    return;
                }
            }
        });
    }

    fn join(&self, worker: &SharedWorker) {
        if self.has_power.get() {
            while worker.turn() {}
        } else {
            worker.destroy();
        }
    }
}
