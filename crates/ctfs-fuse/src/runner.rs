//! Where requests run: at once on the thread that read them, or on the runtime if they must wait.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    task::{Context, Poll, Waker},
};

use tokio::{runtime::Handle, sync::Semaphore};

/// Requests that may wait at the same time, lock waits apart (those have their own bound). One
/// that comes when all places are taken holds up its reading thread, and so the kernel's queue.
const WAITING_MAX: usize = 4096;

#[derive(Debug, Clone)]
pub struct Runner {
    runtime: Handle,
    places: Arc<Semaphore>,
}

impl Runner {
    pub fn new(runtime: Handle) -> Self {
        Self { runtime, places: Arc::new(Semaphore::new(WAITING_MAX)) }
    }

    /// Runs a request. Its wait is bounded, so its place becomes free.
    pub fn run(&self, request: impl Future<Output = ()> + Send + 'static) {
        let Some(rest) = self.poll_once(request) else { return };
        let place = match self.places.clone().try_acquire_owned() {
            Ok(place) => place,
            // Never on a runtime thread: the kernel's requests are read by threads of their own.
            Err(_) => match self.runtime.block_on(self.places.clone().acquire_owned()) {
                Ok(place) => place,
                Err(_) => unreachable!("the semaphore is never closed"),
            },
        };
        self.runtime.spawn(async move {
            rest.await;
            drop(place);
        });
    }

    /// Runs a request that may wait as long as its program likes and has a bound elsewhere.
    pub fn run_long(&self, request: impl Future<Output = ()> + Send + 'static) {
        if let Some(rest) = self.poll_once(request) {
            self.runtime.spawn(rest);
        }
    }

    /// Polls once here. What is ready at once needs no waker; what is not is polled again by the
    /// runtime, which brings a real one.
    fn poll_once<F: Future<Output = ()> + Send + 'static>(&self, request: F) -> Option<std::pin::Pin<Box<F>>> {
        let mut request = Box::pin(request);
        let _runtime = self.runtime.enter();
        let mut context = Context::from_waker(Waker::noop());
        // A panic here would take one of the few reading threads away. The request's reply is
        // dropped, which answers EIO; on the runtime the same happens by itself.
        match catch_unwind(AssertUnwindSafe(|| request.as_mut().poll(&mut context))) {
            Ok(Poll::Ready(())) => None,
            Ok(Poll::Pending) => Some(request),
            Err(_) => {
                tracing::error!("a file system request panicked; it was answered with EIO");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn what_is_ready_runs_on_the_calling_thread_and_what_waits_does_not() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let runner = Runner::new(runtime.handle().clone());
        let (sender, receiver) = mpsc::channel();
        let at_once = sender.clone();
        runner.run(async move { at_once.send(std::thread::current().id()).unwrap() });
        assert_eq!(receiver.try_recv().expect("done already"), std::thread::current().id());
        runner.run(async move {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            sender.send(std::thread::current().id()).unwrap();
        });
        let elsewhere = receiver.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        assert_ne!(elsewhere, std::thread::current().id());
    }

    #[test]
    fn a_panic_in_a_request_leaves_the_thread_alive() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let runner = Runner::new(runtime.handle().clone());
        runner.run(async { panic!("on purpose") });
    }
}
