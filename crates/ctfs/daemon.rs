//! Running the server: start the node, say that it is ready, stop it in order on a signal.

use std::{path::Path, time::Duration};

use ctfs_node::{
    Node,
    problem::{Code, Problem, exit},
};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{errors::Outcome, logging, plan::Plan};

/// How long a start may go on after a signal, so that what it mounted can be unmounted again.
const FINISH_START: Duration = Duration::from_secs(30);
/// How long tasks may hang on to the runtime after the node said that it is down.
const RUNTIME_END: Duration = Duration::from_secs(5);

/// Runs the server until it is told to stop. `ready` is called once, when it serves.
///
/// # Errors
/// Whatever kept it from starting; after `ready`, only what kept it from ending in order.
pub fn run(plan: &Plan, ready: impl FnOnce()) -> Outcome {
    logging::start(plan.log_level(), plan.log_format())?;
    // Requests of the kernel, the journal, the log and the stores have threads of their own. With more of these
    // than there is work for, each message wakes one that finds nothing to do: fsync took a sixth longer.
    let workers = std::thread::available_parallelism().map_or(1, |cores| cores.get() / 2).max(1);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .map_err(|error| Problem::io("start the runtime", &error))?;
    let outcome = runtime.block_on(serve(plan, ready));
    runtime.shutdown_timeout(RUNTIME_END);
    outcome
}

async fn serve(plan: &Plan, ready: impl FnOnce()) -> Outcome {
    let mut signals = Signals::new().map_err(|error| Problem::io("listen for signals", &error))?;
    let starting = Node::start(plan.settings()?);
    tokio::pin!(starting);
    let started = tokio::select! {
        started = &mut starting => started,
        name = signals.next() => {
            tracing::info!(signal = name, "told to stop while starting");
            // Dropped half way, it could leave a mount that nobody serves.
            if let Ok(Ok(node)) = tokio::time::timeout(FINISH_START, &mut starting).await {
                node.shutdown().await;
            }
            return Err(Problem::new(Code::Interrupted, "told to stop before the server was up"));
        }
    };
    let node = started.map_err(Problem::from)?;

    // The server is up whether or not this is remembered; the next `up` then needs its options again.
    if let Err(problem) = plan.memory.save(plan.state()) {
        tracing::warn!(%problem, "cannot remember how this server was started");
    }
    ready();
    service_manager(&[NotifyState::Ready, NotifyState::Status(&serving(plan.mountpoint()))]);

    tokio::select! {
        () = node.stopped() => tracing::info!("stopped"),
        name = signals.next() => tracing::info!(signal = name, "told to stop"),
    }
    service_manager(&[NotifyState::Stopping]);
    tokio::select! {
        () = node.shutdown() => Ok(exit::OK),
        name = signals.next() => {
            tracing::warn!(signal = name, "told twice: ending before everything was written out; what no program has closed or fsynced may be lost");
            Ok(exit::FAILED)
        }
    }
}

fn serving(mountpoint: Option<&Path>) -> String {
    mountpoint.map_or("serving without a mount".into(), |path| format!("serving {}", path.display()))
}

/// Tells systemd, where it listens.
fn service_manager(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "cannot tell the service manager");
    }
}

/// The signals that end a server.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hangup.recv() => "SIGHUP",
        }
    }
}
