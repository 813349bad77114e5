//! A random run: programs on every server, faults, then none, and what must be true afterwards.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use ctfs_meta::OnPartition;
use ctfs_types::{Ino, NodeId};

use crate::{
    invariants::{holders::Listener, names, replicas},
    network::{Filter, Weather},
    programs::{self, Care, NamePair},
    server::{Server, metadata::service},
    sim::{End, Pending, Sim},
};

/// How long programs run among faults.
const STORM: Duration = Duration::from_secs(14);
/// After the last fault everything must be well again within this.
const HEAL: Duration = Duration::from_secs(60);
/// Sooner than in the product, so that more lives end; longer than any lease.
const FENCE_AFTER: Duration = Duration::from_millis(4500);
/// A life that is ended from outside is so after this.
const FENCED: Duration = Duration::from_secs(9);

/// How often it is looked whether all stand at the same entry.
const LOOKS: usize = 10;
/// Lines of the trace that an outcome keeps.
const TRACE_LINES: usize = 400;

/// What a run found.
#[derive(Debug)]
pub struct Outcome {
    pub violations: Vec<String>,
    /// Of everything that happened.
    pub hash: String,
    pub events: u64,
    /// Calls that were answered.
    pub answered: usize,
    /// Calls without answer when faults struck, added up.
    pub at_risk: usize,
    pub simulated: Duration,
    /// The end of the trace.
    pub trace: Vec<String>,
}

/// Which faults a seed has.
#[derive(Debug, Clone, Copy)]
struct Faults {
    weather: Weather,
    cuts: bool,
    ends: bool,
    pauses: bool,
    clocks: bool,
    slow_disks: bool,
    stuck_kernels: bool,
    /// What is sent to copies of journals, or their answers, comes late or not at all.
    slow_pairs: bool,
    /// A server goes for good.
    loss: bool,
}

impl Faults {
    fn draw(sim: &mut Sim) -> Self {
        let chance = &mut sim.chance;
        let mut one_in = |of| chance.below(of) == 0;
        let is_calm = one_in(3);
        let (lost, doubled, late) = (!is_calm && one_in(3), one_in(3), one_in(2));
        let faults = Self {
            weather: Weather::default(),
            cuts: !is_calm && one_in(2),
            ends: !is_calm && one_in(2),
            pauses: !is_calm && one_in(2),
            clocks: one_in(3),
            slow_disks: one_in(5),
            stuck_kernels: one_in(4),
            slow_pairs: one_in(3),
            loss: !is_calm && one_in(3),
        };
        let weather = Weather {
            lost: if lost { chance.between(1, 40) } else { 0 },
            doubled: if doubled { chance.between(1, 30) } else { 0 },
            late: if late { chance.between(1, 200) } else { 0 },
            late_millis: chance.between(5, 400),
        };
        Self { weather, ..faults }
    }

    /// Whether lives may end, and with them what was not synced.
    fn end_lives(&self) -> bool {
        self.cuts || self.ends || self.pauses || self.loss || self.weather.lost > 0
    }
}

/// What programs share.
#[derive(Clone)]
struct Stage {
    pairs: Vec<NamePair>,
    files: Vec<Ino>,
    logs: Vec<Ino>,
    locks: Vec<Ino>,
    /// Directories in which programs make theirs.
    homes: BTreeMap<NodeId, Ino>,
    care: Care,
    until: Duration,
}

/// Runs a seed.
pub fn run(seed: u64, is_loud: bool) -> Outcome {
    // Directories change hands often.
    let mut sim = Sim::with(seed, |_, vfs| {
        vfs.delegations.flapping = Duration::from_secs(1);
        vfs.delegations.shared_for = Duration::from_millis(1200);
        vfs.delegations.idle = Duration::from_millis(400);
    });
    sim.shared.trace.lock().is_loud = is_loud;
    Listener::install(&sim.shared, if is_loud { tracing::Level::DEBUG } else { tracing::Level::ERROR });
    let servers = if sim.chance.below(5) == 0 { 5 } else { 3 };
    sim.found(servers);
    sim.set_on_partition(OnPartition::EACH[(seed % 3) as usize]);
    let faults = Faults::draw(&mut sim);
    if is_loud {
        eprintln!("{servers} servers, {faults:?}");
    }
    let stage = set_up(&mut sim, faults.end_lives());
    sim.shared.set_fence_after(FENCE_AFTER);
    let (mut programs, mut at_risk) = (Vec::new(), 0);
    for node in sim.running() {
        programs.extend(begin_programs(&mut sim, node, &stage));
    }
    let lost = rage(&mut sim, faults, &stage, &mut programs, &mut at_risk);

    sim.heal();
    sim.shared.set_disk_slowness(1000);
    for node in sim.nodes().into_iter().filter(|node| Some(*node) != lost) {
        if !sim.is_running(node) {
            sim.start(node);
        }
        sim.look_at_kernel(node, |kernel| kernel.stick(false));
    }
    if lost.is_some() {
        sim.run_for(FENCED);
    }
    let mut wrong = heal(&mut sim, &programs);
    if wrong.is_empty() {
        wrong = take_over(&mut sim);
    }
    if wrong.is_empty() {
        wrong = look_at_the_end(&mut sim, &stage);
    }
    let history = sim.shared.history.lock();
    wrong.extend(history.check(stage.care == Care::Synced));
    let trace = sim.shared.trace.lock();
    Outcome {
        violations: wrong,
        hash: trace.hash(),
        events: trace.events(),
        answered: history.answered(),
        at_risk,
        simulated: sim.now(),
        trace: trace.last(TRACE_LINES).cloned().collect(),
    }
}

fn set_up(sim: &mut Sim, ends_lives: bool) -> Stage {
    let first = sim.nodes()[0];
    let nodes = sim.nodes();
    let until = sim.now() + STORM;
    let care = if ends_lives { Care::Synced } else { Care::Unsynced };
    let stage = sim.ask(first, move |server| async move {
        let file = async |name: &str| server.make(Ino::ROOT, name, 0).await.expect("nothing is wrong yet").ino;
        let dir = async |name: &str| server.make_dir(Ino::ROOT, name).await.expect("nothing is wrong yet");
        let (a, b, c) = (dir("a").await, dir("b").await, dir("c").await);
        let mut pairs = vec![[(a, "x"), (a, "y")], [(a, "z"), (b, "x")], [(b, "y"), (c, "x")]];
        for number in 0..nodes.len() {
            let own = dir(&format!("d{number}")).await;
            pairs.push([(own, "x"), (own, "y")]);
        }
        let mut homes = BTreeMap::new();
        for node in nodes {
            homes.insert(node, dir(&format!("home{}", node.0)).await);
        }
        Stage {
            pairs,
            files: vec![file("f0").await, file("f1").await],
            logs: vec![file("l0").await, file("l1").await],
            locks: vec![file("k0").await],
            homes,
            care,
            until,
        }
    });
    // What is held from making it is given up, so that nobody is preferred.
    sim.run_for(Duration::from_secs(2));
    stage
}

/// Begins the programs of one server.
fn begin_programs(sim: &mut Sim, node: NodeId, stage: &Stage) -> Vec<(NodeId, Pending<()>)> {
    let mut begun = Vec::new();
    for _ in 0..3 {
        let stage = stage.clone();
        begun.push((node, sim.spawn(node, move |server| async move { wander(&server, &stage).await })));
    }
    let (home, until) = (stage.homes[&node], stage.until);
    begun.push((node, sim.spawn(node, move |server| async move {
        let name = format!("names{}", server.consensus.incarnation().0);
        if let Ok(dir) = server.make_dir(home, &name).await
            && server.metadata_settled().await
        {
            programs::make_in_order(&server, dir, until).await;
        }
    })));
    begun.push((node, sim.spawn(node, move |server| async move {
        let name = format!("versions{}", server.consensus.incarnation().0);
        if let Ok(attr) = server.make(home, &name, 0o600).await
            && server.metadata_settled().await
        {
            programs::overwrite(&server, attr.ino, until).await;
        }
    })));
    begun
}

/// One program that does this and that with what all share.
async fn wander(server: &Arc<Server>, stage: &Stage) {
    let chance = |end: u64| server.shared.draw(|chance| chance.below(end));
    // Some stay with few things for a while, so that their server comes to hold them.
    let (mut pair, mut file) = (chance(stage.pairs.len() as u64), chance(stage.files.len() as u64));
    let mut tag = server.node.0 as u16;
    let own = stage.pairs.len() as u64 - stage.homes.len() as u64 + server.node.0 - 1;
    while server.shared.now() < stage.until {
        if chance(10) == 0 {
            (pair, file) = (chance(stage.pairs.len() as u64), chance(stage.files.len() as u64));
        }
        tag = (tag + 7) % 0o777 + 1;
        match chance(29) {
            20..25 => {
                let name = chance(2) as usize;
                let action = if chance(2) == 0 { names::Action::Make { name, tag } } else { names::Action::Remove { name } };
                programs::ask_names(server, own, stage.pairs[own as usize], action, stage.care).await;
            }
            25..27 => visit(server, stage, pair).await,
            // Where another server is alone, but for this.
            27..29 => visit(server, stage, stage.pairs.len() as u64 - 1 - chance(stage.homes.len() as u64)).await,
            0..8 => {
                let (name, other) = (chance(2) as usize, chance(2) as usize);
                let action = match chance(9) {
                    0..2 => names::Action::Make { name, tag },
                    2 => names::Action::Remove { name },
                    3 if name != other => names::Action::Rename { from: name, to: other },
                    _ => names::Action::Look { name },
                };
                programs::ask_names(server, pair, stage.pairs[pair as usize], action, stage.care).await;
            }
            8..13 => {
                let set = (chance(3) == 0).then_some(tag);
                programs::ask_attributes(server, file, stage.files[file as usize], set, stage.care).await;
            }
            13..17 => {
                let log = chance(stage.logs.len() as u64);
                let piece = (chance(2) == 0).then(|| chance(1 << 16) as u16);
                programs::ask_appends(server, log, stage.logs[log as usize], piece).await;
            }
            _ => {
                let lock = chance(stage.locks.len() as u64);
                let held_for = Duration::from_millis(chance(400));
                programs::use_lock(server, lock, stage.locks[lock as usize], chance(1 << 40) + 1, held_for).await;
            }
        }
        let pause = chance(chance(4) * 300 + 20);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

/// Looks at the same names again and again, so that the kernel has them.
async fn visit(server: &Arc<Server>, stage: &Stage, pair: u64) {
    for _ in 0..20 {
        let name = server.shared.draw(|chance| chance.below(2)) as usize;
        programs::ask_names(server, pair, stage.pairs[pair as usize], names::Action::Look { name }, stage.care).await;
        let pause = server.shared.draw(|chance| chance.between(2, 60));
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

/// Lets faults happen until the programs end; answers which server went for good.
fn rage(sim: &mut Sim, faults: Faults, stage: &Stage, programs: &mut Vec<(NodeId, Pending<()>)>, at_risk: &mut usize) -> Option<NodeId> {
    sim.shared.wires.lock().weather = faults.weather;
    let mut later: BTreeMap<Duration, Vec<Later>> = BTreeMap::new();
    let mut lost = None;
    if faults.loss {
        let when = sim.now() + Duration::from_millis(sim.chance.between(3_000, 12_000));
        let node = *sim.chance.pick(&sim.nodes());
        lost = Some(node);
        // It is cut off for a moment before it goes: what it did last nobody else has, or one.
        let cut_off = Duration::from_millis(sim.chance.between(100, 2_500));
        let others: Vec<NodeId> = sim.nodes().into_iter().filter(|other| *other != node).collect();
        let hears = if sim.chance.strikes(500) { Some(*sim.chance.pick(&others)) } else { None };
        later.entry(when).or_default().push(Later::CutOff { node, hears });
        later.entry(when + cut_off).or_default().push(Later::Lose(node));
    }
    while sim.now() < stage.until {
        let pause = Duration::from_millis(sim.chance.between(50, 2500));
        let next = (sim.now() + pause).min(stage.until);
        while sim.now() < next {
            sim.turn();
            while let Some(entry) = later.first_entry()
                && *entry.key() <= sim.now()
            {
                for what in entry.remove() {
                    what.happen(sim, faults, stage, programs, lost);
                }
            }
        }
        *at_risk += sim.shared.history.lock().at_risk();
        if let Some((after, what)) = strike(sim, faults) {
            later.entry(sim.now() + after).or_default().push(what);
        }
    }
    if let Some(node) = lost.filter(|node| !sim.shared.chunks.lock().is_lost(*node)) {
        Later::Lose(node).happen(sim, faults, stage, programs, lost);
    }
    lost
}

/// What ends a fault.
enum Later {
    Heal,
    Start(NodeId),
    Unstick(NodeId),
    FastDisks,
    /// From all but one.
    CutOff { node: NodeId, hears: Option<NodeId> },
    /// For good.
    Lose(NodeId),
}

impl Later {
    fn happen(self, sim: &mut Sim, faults: Faults, stage: &Stage, programs: &mut Vec<(NodeId, Pending<()>)>, lost: Option<NodeId>) {
        match self {
            Self::Heal => {
                sim.heal();
                sim.shared.wires.lock().weather = faults.weather;
            }
            Self::Start(node) => {
                let is_gone = lost == Some(node) && sim.shared.chunks.lock().is_lost(node);
                if !sim.is_running(node) && !is_gone {
                    sim.start(node);
                    programs.extend(begin_programs(sim, node, stage));
                }
            }
            Self::Unstick(node) => sim.look_at_kernel(node, |kernel| kernel.stick(false)),
            Self::CutOff { node, hears } => {
                let others: Vec<NodeId> = sim.nodes().into_iter().filter(|other| *other != node && Some(*other) != hears).collect();
                sim.part(&[node], &others);
            }
            Self::Lose(node) => {
                sim.end(node, End::PowerCut);
                sim.wipe(node);
                sim.heal();
                sim.shared.wires.lock().weather = faults.weather;
            }
            Self::FastDisks => sim.shared.set_disk_slowness(1000),
        }
    }
}

/// One fault, and what ends it after a while.
fn strike(sim: &mut Sim, faults: Faults) -> Option<(Duration, Later)> {
    let nodes = sim.nodes();
    let node = *sim.chance.pick(&nodes);
    let short = Duration::from_millis(sim.chance.between(100, 4_000));
    let long = Duration::from_millis(sim.chance.between(100, 14_000));
    let kind = sim.chance.below(9);
    match kind {
        0 if faults.cuts => {
            sim.isolate(node);
            Some((long, Later::Heal))
        }
        1 if faults.cuts => {
            let other = *sim.chance.pick(&nodes);
            let both = sim.chance.strikes(500);
            let mut wires = sim.shared.wires.lock();
            wires.cut(node, other);
            if both {
                wires.cut(other, node);
            }
            Some((long, Later::Heal))
        }
        2 | 3 if faults.ends && sim.is_running(node) => {
            let how = if sim.chance.strikes(500) { End::Kill } else { End::PowerCut };
            sim.end(node, how);
            Some((long, Later::Start(node)))
        }
        4 if faults.pauses => {
            let time = if sim.chance.strikes(300) { long } else { short };
            sim.pause(node, time);
            None
        }
        5 if faults.clocks => {
            if sim.chance.strikes(500) {
                sim.jump(node, short);
            } else {
                let ahead = sim.chance.below(100_000);
                sim.set_wall_clock(node, Duration::from_secs(1_767_000_000 + ahead));
            }
            None
        }
        6 if faults.slow_disks => {
            sim.shared.set_disk_slowness(sim.chance.between(5_000, 30_000));
            Some((short, Later::FastDisks))
        }
        7 if faults.stuck_kernels => {
            sim.look_at_kernel(node, |kernel| kernel.stick(true));
            Some((short, Later::Unstick(node)))
        }
        8 if faults.slow_pairs => {
            let late_by = if sim.chance.strikes(500) { Some(short) } else { None };
            let (left, answers) = (sim.chance.between(1, 300) as u32, sim.chance.strikes(300));
            let (from, to) = if answers { (Some(node), None) } else { (None, Some(node)) };
            sim.shared.wires.lock().filters.push(Filter { from, to, service: service::JOURNAL, answers, left, late_by });
            Some((long, Later::Heal))
        }
        _ => None,
    }
}

/// Everything goes on once all faults are gone.
fn heal(sim: &mut Sim, programs: &[(NodeId, Pending<()>)]) -> Vec<String> {
    let deadline = sim.now() + HEAL;
    let ready: Vec<_> = sim.running().into_iter().map(|node| (node, sim.spawn(node, |server| async move { server.ready().await }))).collect();
    let is_well = |sim: &Sim| {
        ready.iter().all(|(_, ready)| ready.is_done()) && programs.iter().all(|(node, program)| program.is_done() || program.is_lost() || !sim.is_running(*node))
    };
    while !is_well(sim) && sim.now() < deadline {
        sim.turn();
    }
    let mut wrong = Vec::new();
    for (node, _) in ready.iter().filter(|(_, ready)| !ready.is_done()) {
        wrong.push(format!("s{} does not serve {HEAL:?} after the last fault", node.0));
    }
    let stuck = programs.iter().filter(|(node, program)| sim.is_running(*node) && !program.is_done() && !program.is_lost());
    wrong.extend(stuck.map(|(node, _)| format!("a program on s{} waits {HEAL:?} after the last fault", node.0)));
    wrong
}

/// What lives left that ended is sent by whoever has it.
fn take_over(sim: &mut Sim) -> Vec<String> {
    let deadline = sim.now() + HEAL;
    let node = sim.leader();
    loop {
        let left = sim.look(node, |server| {
            let replica = server.metadata.replica.read();
            let members = replica.members().unwrap_or_default();
            members.iter().flat_map(|member| replica.left_to(member.node).unwrap_or_default()).collect::<Vec<_>>()
        });
        match left.unwrap_or_default() {
            left if left.is_empty() => return Vec::new(),
            left if sim.now() > deadline => return vec![format!("what {left:?} left is not sent {HEAL:?} after the last fault")],
            _ => sim.run_for(Duration::from_millis(200)),
        }
    }
}

/// What every server shows in the end.
fn look_at_the_end(sim: &mut Sim, stage: &Stage) -> Vec<String> {
    let mut wrong = Vec::new();
    for node in sim.running() {
        let stage = stage.clone();
        wrong.extend(sim.ask(node, move |server| async move { last_look(&server, &stage).await }));
    }
    // No program does anything any more: everybody comes to stand at the same entry, between two of what
    // servers do by themselves.
    let mut applied = BTreeSet::new();
    for _ in 0..LOOKS {
        sim.run_for(Duration::from_secs(1));
        let mut states = BTreeMap::new();
        for node in sim.running() {
            states.extend(sim.look(node, move |server| {
                let replica = server.metadata.replica.read();
                (node, (replica.applied(), replica.state_hash()))
            }));
        }
        wrong.extend(replicas::check(&states));
        applied = states.values().map(|(applied, _)| *applied).collect();
        if applied.len() == 1 {
            return wrong;
        }
    }
    wrong.push(format!("the servers do not come together: {applied:?}"));
    wrong
}

/// Looks at everything once more from one server.
async fn last_look(server: &Arc<Server>, stage: &Stage) -> Vec<String> {
    for (object, pair) in stage.pairs.iter().enumerate() {
        for name in 0..2 {
            programs::ask_names(server, object as u64, *pair, names::Action::Look { name }, Care::Synced).await;
        }
    }
    for (object, ino) in stage.files.iter().enumerate() {
        programs::ask_attributes(server, object as u64, *ino, None, Care::Synced).await;
    }
    for (object, ino) in stage.logs.iter().enumerate() {
        programs::ask_appends(server, object as u64, *ino, None).await;
    }
    let (sequences, versions) = {
        let history = server.shared.history.lock();
        (history.sequences.0.clone(), history.versions.0.clone())
    };
    let mut wrong = Vec::new();
    for (dir, sequence) in sequences {
        match server.vfs.readdir(dir, 0, usize::MAX, false).await {
            Ok(items) => {
                let numbers = items.iter().filter_map(|item| std::str::from_utf8(&item.name).ok()?.parse().ok()).collect();
                wrong.extend(sequence.check(dir, numbers).map(|why| format!("s{}: {why}", server.node.0)));
            }
            Err(error) => wrong.push(format!("s{}: directory {dir} cannot be listed: {error}", server.node.0)),
        }
    }
    for (ino, version) in versions {
        match server.read(ino, Care::Unsynced).await {
            Ok(bytes) => wrong.extend(version.check(ino, &bytes).map(|why| format!("s{}: {why}", server.node.0))),
            Err(error) => wrong.push(format!("s{}: file {ino} cannot be read: {error}", server.node.0)),
        }
    }
    wrong
}
