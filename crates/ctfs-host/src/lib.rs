//! What a server takes from the machine it runs on: threads that write, work that blocks, the clock
//! that leases are counted on.
//!
//! All of it can be simulated, so that several servers run on one thread and the same seed makes the
//! same run (`ctfs-sim`). In the program itself the feature for that is off, and each function is the
//! one call of the system that it stands for.

#[cfg(feature = "simulated")]
pub mod simulated;

use std::{io, time::Duration};

use tokio::task::JoinError;

/// CLOCK_BOOTTIME: like the monotonic clock, but it goes on while the machine is suspended.
pub fn boot_time() -> Duration {
    #[cfg(feature = "simulated")]
    if let Some(machine) = simulated::machine() {
        return machine.boot_time();
    }
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Runs `step` where it may block.
///
/// # Errors
/// It panicked, or the runtime is ending.
pub async fn blocking<T: Send + 'static>(step: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    #[cfg(feature = "simulated")]
    if simulated::machine().is_some() {
        return Ok(step());
    }
    tokio::task::spawn_blocking(step).await
}

/// What a thread does all its life: wait for work, and do it.
pub trait Worker: Send + 'static {
    /// Works until there is nothing to wait for any more.
    fn run(self);

    /// Does what there is to do at this moment, and waits for nothing. `false`: it has ended, as
    /// [`Self::run`] does.
    fn turn(&mut self) -> bool;
}

/// A thread that was started.
pub struct Thread(Inner);

enum Inner {
    Real(std::thread::JoinHandle<()>),
    #[cfg(feature = "simulated")]
    Simulated(simulated::SharedWorker),
}

impl Thread {
    /// Starts a thread of this name for `worker`.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start<W: Worker>(name: &str, worker: W) -> io::Result<Self> {
        #[cfg(feature = "simulated")]
        if let Some(machine) = simulated::machine() {
            let worker = simulated::SharedWorker::new(worker);
            machine.start(name, worker.clone());
            return Ok(Self(Inner::Simulated(worker)));
        }
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || worker.run())?;
        Ok(Self(Inner::Real(thread)))
    }

    /// Waits for its end. Whoever is not the thread's owner any more must have told it to end before.
    /// `false`: it panicked.
    pub fn join(self) -> bool {
        match self.0 {
            Inner::Real(thread) => thread.join().is_ok(),
            #[cfg(feature = "simulated")]
            Inner::Simulated(worker) => {
                if let Some(machine) = simulated::machine() {
                    machine.join(&worker);
                }
                true
            }
        }
    }
}
