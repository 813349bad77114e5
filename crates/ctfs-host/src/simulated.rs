//! A simulated machine in place of the real one, for what runs on this thread.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crate::Worker;

/// What the simulation answers for the machine of the server that runs at this moment.
pub trait Machine {
    fn boot_time(&self) -> Duration;

    /// From now on gives `worker` its turns.
    fn start(&self, name: &str, worker: SharedWorker);

    /// Somebody waits for the end of `worker`, and has told it to end. A machine that has lost its power
    /// gives it no turn any more.
    fn join(&self, worker: &SharedWorker);
}

thread_local! {
    static MACHINE: RefCell<Option<Rc<dyn Machine>>> = const { RefCell::new(None) };
}

/// Puts `machine` in place of the one before, which it answers.
pub fn enter(machine: Option<Rc<dyn Machine>>) -> Option<Rc<dyn Machine>> {
    MACHINE.with(|place| std::mem::replace(&mut *place.borrow_mut(), machine))
}

pub(crate) fn machine() -> Option<Rc<dyn Machine>> {
    MACHINE.try_with(|machine| machine.borrow().clone()).ok().flatten()
}

/// A worker that takes turns instead of a thread.
#[derive(Clone)]
pub struct SharedWorker(Arc<Mutex<Option<Box<dyn Turns>>>>);

trait Turns: Send {
    fn turn(&mut self) -> bool;
}

impl<W: Worker> Turns for W {
    fn turn(&mut self) -> bool {
        Worker::turn(self)
    }
}

impl SharedWorker {
    pub(crate) fn new(worker: impl Worker) -> Self {
        Self(Arc::new(Mutex::new(Some(Box::new(worker)))))
    }

    /// Gives it a turn; `false`: it has ended.
    pub fn turn(&self) -> bool {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(worker) = place.as_mut() else { return false };
        let goes_on = worker.turn();
        if !goes_on {
            *place = None;
        }
        goes_on
    }

    /// Takes it away with all that waits for it.
    pub fn destroy(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
