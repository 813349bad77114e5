//! Time, the servers, and what is done to them.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    rc::Rc,
    sync::{
        Arc,
        atomic::AtomicU64,
    },
    time::Duration,
};

use ctfs_consensus::Settings;
use ctfs_meta::{OnPartition, Op, Policy};
use ctfs_types::{
    Ino, NodeId,
    rules::{Rule, keeps},
};
use ctfs_vfs::VfsSettings;
use parking_lot::Mutex;
use tokio::{runtime::Runtime, sync::mpsc, time::Instant};

use crate::{
    CrashDisk,
    chance::Chance,
    machine::{Machine, system},
    network::Content,
    server::{self, kernel::Kernel, Disks, Input, Server, Start},
    shared::Shared,
};

/// One turn of every server. Messages arrive between turns.
pub const TURN: Duration = Duration::from_millis(1);
/// 2026-01-01.
const WALL_START: Duration = Duration::from_secs(1_767_225_600);
/// No clock of a machine starts at zero.
const BOOT_START: Duration = Duration::from_secs(1000);
/// Questions with a line in the trace: forwarded commands, and those to holders.
const TOLD: [u16; 4] = [0x0201, 0x0302, 0x0305, 0x0306];
/// Longest wait of a script for anything, in simulated time.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a server ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The daemon is killed; the machine goes on.
    Kill,
    /// What was not synced is lost.
    PowerCut,
}

type Adjust = Arc<dyn Fn(&mut Settings, &mut VfsSettings) + Send + Sync>;

/// A simulation under way.
pub struct Sim {
    pub shared: Arc<Shared>,
    /// What the script and its faults draw from.
    pub chance: Chance,
    now: Duration,
    slots: BTreeMap<NodeId, Slot>,
    adjust: Adjust,
    root: PathBuf,
}

/// A place for a server.
struct Slot {
    dir: PathBuf,
    journal: CrashDisk,
    lives: Arc<AtomicU64>,
    running: Option<Running>,
    paused_until: Duration,
    /// So long of its time the monotonic clock stood still.
    suspended: Duration,
    /// What the clocks show beyond simulated time.
    boot_ahead: Duration,
    wall_ahead: Duration,
}

struct Running {
    runtime: Runtime,
    machine: Rc<Machine>,
    inputs: mpsc::UnboundedSender<Input>,
    /// The time of tokio when the runtime began, and of the simulation.
    epoch: (Instant, Duration),
}

/// What a program on a server will have answered.
pub struct Pending<T>(Arc<Mutex<Option<T>>>);

impl<T> Pending<T> {
    pub fn is_done(&self) -> bool {
        self.0.lock().is_some()
    }

    pub fn take(&self) -> Option<T> {
        self.0.lock().take()
    }

    /// The program is gone with its server.
    pub fn is_lost(&self) -> bool {
        !self.is_done() && Arc::strong_count(&self.0) == 1
    }
}

impl Sim {
    /// A simulation without servers. The calling thread is the simulation's from here on.
    pub fn new(seed: u64) -> Self {
        Self::with(seed, |_, _| ())
    }

    pub fn with(seed: u64, adjust: impl Fn(&mut Settings, &mut VfsSettings) + Send + Sync + 'static) -> Self {
        let mut chance = Chance::new(seed);
        let root = PathBuf::from(format!("/dev/shm/ctfs-sim-{}", std::process::id()));
        // Of a process that had the same number.
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root).expect("there is memory for files");
        system::simulate_chance(chance.next());
        let shared = Arc::new(Shared::new(chance.fork()));
        Self { shared, chance, now: Duration::ZERO, slots: BTreeMap::new(), adjust: Arc::new(adjust), root }
    }

    /// `count` servers, all of them voters with a lease.
    pub fn founded(seed: u64, count: u64) -> Self {
        let mut sim = Self::new(seed);
        sim.found(count);
        sim
    }

    /// Makes `count` servers a volume.
    pub fn found(&mut self, count: u64) {
        let all: Vec<NodeId> = (1..=count).map(NodeId).collect();
        for node in &all {
            self.add(*node);
        }
        let first = all[0];
        self.ask(first, move |server| async move {
            server.consensus.found(server::found(first)).await.expect("it is founded once");
            server.consensus.propose(server::invitation()).await.expect("a leader").expect("an invitation");
        });
        for node in all.iter().skip(1).copied() {
            self.ask(first, move |server| async move {
                server.consensus.propose(server::join(node)).await.expect("a leader").expect("it joins");
            });
        }
        self.ask(first, move |server| async move {
            server.consensus.set_membership(all.into_iter().collect(), Default::default()).await.expect("all vote");
        });
        self.all_ready();
        self.set_on_partition(OnPartition::Error);
    }

    /// What reads do on servers that are cut off.
    pub fn set_on_partition(&mut self, on_partition: OnPartition) {
        let first = self.nodes()[0];
        let policy = Policy { on_partition: Some(on_partition), ..Policy::default() };
        self.ask(first, move |server| async move {
            server.consensus.propose(Op::SetPolicy { ino: Ino::ROOT, policy }).await.expect("a leader").expect("the root has a policy");
        });
    }

    /// Runs until every running server has reported its life and holds a lease.
    pub fn all_ready(&mut self) {
        for node in self.running() {
            self.ready(node);
        }
    }

    /// Runs until the server has reported its life and holds a lease.
    pub fn ready(&mut self, node: NodeId) {
        self.ask(node, |server| async move { server.ready().await });
    }

    fn add(&mut self, node: NodeId) {
        let dir = self.root.join(format!("s{}", node.0));
        std::fs::create_dir_all(&dir).expect("there is memory for files");
        let slot = Slot {
            dir,
            journal: CrashDisk::new(),
            lives: Arc::default(),
            running: None,
            paused_until: Duration::ZERO,
            suspended: Duration::ZERO,
            boot_ahead: BOOT_START + self.chance_of_clock(),
            wall_ahead: WALL_START + self.chance_of_clock(),
        };
        self.slots.insert(node, slot);
        self.start(node);
    }

    fn chance_of_clock(&mut self) -> Duration {
        Duration::from_millis(self.chance.below(5_000))
    }

    pub fn nodes(&self) -> Vec<NodeId> {
        self.slots.keys().copied().collect()
    }

    pub fn running(&self) -> Vec<NodeId> {
        self.slots.iter().filter(|(_, slot)| slot.running.is_some()).map(|(node, _)| *node).collect()
    }

    pub fn is_running(&self, node: NodeId) -> bool {
        self.slots.get(&node).is_some_and(|slot| slot.running.is_some())
    }

    pub fn now(&self) -> Duration {
        self.now
    }

    /// Starts a server on what its disks hold.
    pub fn start(&mut self, node: NodeId) {
        let slot = self.slots.get_mut(&node).expect("a server of this simulation");
        assert!(slot.running.is_none(), "it runs already");
        // tokio reads the clocks of the system while it is made.
        set_clocks(self.now, slot);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.expect("a runtime without I/O");
        let machine = Machine::new(self.now + slot.boot_ahead, self.shared.clone());
        let (inputs, queue) = mpsc::unbounded_channel();
        let disks = Disks { dir: slot.dir.clone(), journal: slot.journal.clone(), lives: slot.lives.clone() };
        let start = Start { node, disks, shared: self.shared.clone(), adjust: self.adjust.clone() };
        let epoch = runtime.block_on(async { Instant::now() });
        runtime.spawn(server::run(start, queue));
        self.shared.wires.lock().comes_up(node);
        slot.running = Some(Running { runtime, machine, inputs, epoch: (epoch, self.now) });
    }

    /// The server ends without a word.
    pub fn end(&mut self, node: NodeId, how: End) {
        self.shared.note(node, format_args!("ends: {how:?}"));
        let seed = self.chance.next();
        let slot = self.slots.get_mut(&node).expect("a server of this simulation");
        let Some(running) = slot.running.take() else { return };
        let life = server::life_of(node, &slot.lives);
        self.shared.history.lock().life_ends(self.now, life);
        self.shared.wires.lock().goes_down(node);
        set_clocks(self.now, slot);
        running.machine.lose_power();
        let before = ctfs_host::simulated::enter(Some(running.machine.clone()));
        drop(running);
        ctfs_host::simulated::enter(before);
        slot.journal = match how {
            End::Kill => slot.journal.after_kill(),
            End::PowerCut => slot.journal.after_crash(seed),
        };
        slot.paused_until = Duration::ZERO;
        slot.suspended = Duration::ZERO;
    }

    /// What the disks of a server that is down held is gone; its machine goes on with empty ones.
    pub fn wipe(&mut self, node: NodeId) {
        self.shared.note(node, format_args!("loses its disks"));
        self.shared.chunks.lock().lose(node);
        let slot = self.slots.get_mut(&node).expect("a server of this simulation");
        assert!(slot.running.is_none(), "disks are taken out of a machine that is off");
        std::fs::remove_dir_all(&slot.dir).expect("it was there");
        std::fs::create_dir_all(&slot.dir).expect("there is memory for files");
        slot.journal = CrashDisk::new();
    }

    /// Who leads, as it thinks itself.
    pub fn leader(&mut self) -> NodeId {
        for _ in 0..1000 {
            for node in self.running() {
                if self.look(node, |server| server.consensus.status().is_leader) == Some(true) {
                    return node;
                }
            }
        }
        panic!("nobody leads")
    }

    /// Nothing gets from one of these groups to the other.
    pub fn part(&mut self, some: &[NodeId], others: &[NodeId]) {
        let mut wires = self.shared.wires.lock();
        for a in some {
            for b in others {
                wires.cut(*a, *b);
                wires.cut(*b, *a);
            }
        }
    }

    /// Runs until the program has answered, or for `time`.
    pub fn wait_for<T>(&mut self, pending: &Pending<T>, time: Duration) -> Option<T> {
        let until = self.now + time;
        while !pending.is_done() && !pending.is_lost() && self.now < until {
            self.turn();
        }
        pending.take()
    }

    /// The server's processor stands still; its clocks go on.
    pub fn pause(&mut self, node: NodeId, time: Duration) {
        self.shared.note(node, format_args!("pauses for {time:?}"));
        let until = self.now + time;
        if let Some(slot) = self.slots.get_mut(&node) {
            slot.paused_until = until;
        }
    }

    /// The machine is suspended for `time`: its processor stands still, and of its clocks only the boot
    /// clock and the wall clock go on.
    pub fn suspend(&mut self, node: NodeId, time: Duration) {
        self.shared.note(node, format_args!("is suspended for {time:?}"));
        let until = self.now + time;
        if let Some(slot) = self.slots.get_mut(&node) {
            slot.paused_until = until;
            slot.suspended += time;
            if let Some(running) = &mut slot.running {
                running.epoch.1 += time;
            }
        }
    }

    /// The boot clock jumps, as that of a guest does that was moved to another host.
    pub fn jump(&mut self, node: NodeId, ahead: Duration) {
        self.shared.note(node, format_args!("boot clock jumps by {ahead:?}"));
        if let Some(slot) = self.slots.get_mut(&node) {
            slot.boot_ahead += ahead;
        }
    }

    /// Somebody sets the clock.
    pub fn set_wall_clock(&mut self, node: NodeId, ahead: Duration) {
        if let Some(slot) = self.slots.get_mut(&node) {
            slot.wall_ahead = ahead;
        }
    }

    /// Nothing gets from or to `node`.
    pub fn isolate(&mut self, node: NodeId) {
        self.shared.note(node, format_args!("is cut off"));
        let others: Vec<NodeId> = self.nodes().into_iter().filter(|other| *other != node).collect();
        let mut wires = self.shared.wires.lock();
        for other in others {
            wires.cut(node, other);
            wires.cut(other, node);
        }
    }

    /// The network is as new.
    pub fn heal(&mut self) {
        self.shared.wires.lock().heal();
    }

    /// One turn of every server.
    pub fn turn(&mut self) {
        self.now += TURN;
        self.shared.set_now(self.now);
        let arrived = self.shared.wires.lock().arrived(self.now);
        for packet in arrived {
            self.deliver(packet);
        }
        for slot in self.slots.values_mut() {
            if slot.running.is_none() || slot.paused_until > self.now {
                continue;
            }
            set_clocks(self.now, slot);
            let mut boot = self.now + slot.boot_ahead;
            if !keeps(Rule::LeasesCountSuspend) {
                boot = boot.saturating_sub(slot.suspended);
            }
            let running = slot.running.as_mut().expect("looked at above");
            let before = ctfs_host::simulated::enter(Some(running.machine.clone()));
            let until = running.epoch.0 + (self.now - running.epoch.1);
            let machine = running.machine.clone();
            running.runtime.block_on(async move {
                let behind = until.saturating_duration_since(Instant::now());
                machine.set_boot(boot.saturating_sub(behind));
                if behind > TURN {
                    // What came due in a pause comes due at once, and late.
                    tokio::time::advance(behind - TURN).await;
                }
                tokio::time::sleep_until(until).await;
            });
            ctfs_host::simulated::enter(before);
        }
    }

    fn deliver(&mut self, packet: crate::network::Packet) {
        {
            let mut trace = self.shared.trace.lock();
            trace.count(&(self.now.as_nanos() as u64).to_le_bytes());
            trace.count(&[packet.from.0 as u8, packet.to.0 as u8]);
            trace.count(&packet.service.to_le_bytes());
            match &packet.content {
                Content::Question(payload) => {
                    trace.count(payload);
                    if TOLD.contains(&packet.service) {
                        let (from, service, bytes) = (packet.from.0, packet.service, payload.len());
                        trace.line(self.now, packet.to, format_args!("is asked {service:#06x} by s{from}, {bytes} bytes"));
                    }
                }
                Content::Answer(Ok(bytes)) => trace.count(bytes),
                Content::Answer(Err(error)) => trace.count(error.to_string().as_bytes()),
            }
        }
        if let Content::Answer(answer) = packet.content {
            self.shared.wires.lock().answer(packet.call, answer);
            return;
        }
        if let Some(running) = self.slots.get(&packet.to).and_then(|slot| slot.running.as_ref()) {
            let _ = running.inputs.send(Input::Packet(packet));
        }
    }

    pub fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.turn();
        }
    }

    /// Runs until `condition` holds.
    ///
    /// # Panics
    /// After a long time, with the end of the trace.
    pub fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = self.now + PATIENCE;
        while !condition(self) {
            assert!(self.now < deadline, "waited in vain for {what}");
            self.turn();
        }
    }

    /// Begins a program on a server.
    pub fn spawn<T, F>(&self, node: NodeId, program: impl FnOnce(Arc<Server>) -> F + Send + 'static) -> Pending<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let place = Arc::new(Mutex::new(None));
        let answer = place.clone();
        if let Some(running) = self.slots.get(&node).and_then(|slot| slot.running.as_ref()) {
            let program = Box::new(move |server: Arc<Server>| {
                Box::pin(async move {
                    let value = program(server).await;
                    *answer.lock() = Some(value);
                }) as std::pin::Pin<Box<dyn Future<Output = ()> + Send>>
            });
            let _ = running.inputs.send(Input::Program(program));
        }
        Pending(place)
    }

    /// Runs until the program has answered; `None` when its server ended.
    pub fn wait<T>(&mut self, pending: &Pending<T>) -> Option<T> {
        self.until("a program to end", |_| pending.is_done() || pending.is_lost());
        pending.take()
    }

    /// Runs a program on a server to its end.
    ///
    /// # Panics
    /// The server is down.
    pub fn ask<T, F>(&mut self, node: NodeId, program: impl FnOnce(Arc<Server>) -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let pending = self.spawn(node, program);
        self.wait(&pending).expect("the server runs")
    }

    /// Has something done to a server's kernel in its next turn.
    pub fn look_at_kernel(&self, node: NodeId, look: impl FnOnce(&Kernel) + Send + 'static) {
        drop(self.spawn(node, move |server| async move { look(&server.kernel) }));
    }

    /// Looks at a running server, between its turns.
    pub fn look<T: Send + 'static>(&mut self, node: NodeId, look: impl FnOnce(&Server) -> T + Send + 'static) -> Option<T> {
        let pending = self.spawn(node, move |server| async move { look(&server) });
        self.wait(&pending)
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        for node in self.nodes() {
            self.end(node, End::Kill);
        }
        // What is left is memory; the next process of this number removes it.
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

fn set_clocks(now: Duration, slot: &Slot) {
    system::set_clocks(system::Clocks { monotonic: (now + BOOT_START).saturating_sub(slot.suspended), wall: now + slot.wall_ahead });
}
