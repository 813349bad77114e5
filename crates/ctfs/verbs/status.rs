//! `ctfs status`: the verdict, the reason, what to type.

use std::{
    thread,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use ctfs_node::{
    admin::{Request, Response, ServerReport, ServerRole, ServerState, StatusReport, Verdict},
    problem::{Code, Problem, exit},
};

use crate::{
    Context, choices,
    errors::{Outcome, spelled},
    ui::{Ui, counted, filled, grouped, percent, table},
};

/// Is all well, and if not, what to do
///
/// Exit status: 0 healthy, 4 degraded, 5 unavailable, 3 not running.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  ctfs status\n  ctfs status --wait healthy --timeout 60s && ./deploy\n  ctfs status --json | jq -r .verdict")]
pub struct Status {
    /// For machines
    #[arg(long)]
    json: bool,

    /// Wait until the cluster is so
    #[arg(long, value_name = "VERDICT")]
    wait: Option<Wanted>,

    /// How long to wait
    #[arg(long, value_name = "TIME", value_parser = choices::duration, default_value = "60s", requires = "wait")]
    timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Wanted {
    /// Everything answers and has its copies
    Healthy,
    /// Everything can be read and written
    Available,
}

impl Wanted {
    fn met_by(self, verdict: Verdict) -> bool {
        match self {
            Self::Healthy => verdict == Verdict::Healthy,
            Self::Available => verdict != Verdict::Unavailable,
        }
    }
}

/// The verdict has no event to wait for: half a second is fresh enough and costs nothing.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

impl Status {
    pub fn run(self, context: &Context) -> Outcome {
        let looked = match self.wait {
            None => look(context, super::LOOK),
            Some(wanted) => wait(context, wanted, self.timeout),
        };
        let report = looked?;
        if self.json {
            context.ui.json(&report)?;
        } else {
            context.ui.print(&render(&report, context));
        }
        match self.wait {
            Some(wanted) if !wanted.met_by(report.verdict) => {
                Err(Problem::new(Code::TimedOut, format!("still not so after {}", humantime::format_duration(self.timeout))))
            }
            Some(_) => Ok(exit::OK),
            None => Ok(exit_for(report.verdict)),
        }
    }
}

fn look(context: &Context, deadline: Duration) -> Result<StatusReport, Problem> {
    match super::ask(context, &Request::Status, deadline)? {
        Response::Status(report) => Ok(report),
        _ => Err(super::unexpected()),
    }
}

/// The first status that is as wanted, else the last one before the time is over. A daemon that
/// is not there yet is waited for too.
fn wait(context: &Context, wanted: Wanted, timeout: Duration) -> Result<StatusReport, Problem> {
    let until = Instant::now() + timeout;
    loop {
        let looked = look(context, super::LOOK.min(timeout));
        let met = looked.as_ref().is_ok_and(|report| wanted.met_by(report.verdict));
        // Of all that can be wrong, only this does not pass by itself.
        let refused = looked.as_ref().is_err_and(|problem| problem.is(Code::PermissionDenied));
        if met || refused || Instant::now() + LOOK_AGAIN > until {
            return looked.map_err(|problem| if refused { problem } else { Problem { exit: exit::TIMED_OUT, ..problem } });
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn exit_for(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Healthy => exit::OK,
        Verdict::Degraded => exit::DEGRADED,
        Verdict::Unavailable => exit::UNAVAILABLE,
    }
}

/// `node1*` for the server that answers.
pub fn marked(name: &str, this_node: &str) -> String {
    format!("{name}{}", if name == this_node { "*" } else { "" })
}

/// One word for state and role.
pub fn standing(server: &ServerReport) -> &'static str {
    match (server.state, server.role) {
        (ServerState::Down, _) => "down",
        (ServerState::Away, _) => "away",
        (ServerState::Up, _) if server.stopped.is_some() => "stopped",
        (ServerState::Up, ServerRole::Leader) => "leader",
        (ServerState::Up, ServerRole::Voter) => "voter",
        (ServerState::Up, ServerRole::Learner) => "learner",
        (ServerState::Up, ServerRole::None) => "joining",
    }
}

fn render(report: &StatusReport, context: &Context) -> String {
    let mut text = format!("cluster {}   {}   {}\n", report.cluster_name, verdict(report.verdict, context.ui), report.summary);
    let labelled = |label: &str, lines: &[String]| -> String {
        lines.iter().enumerate().map(|(i, line)| format!("  {:<8}{line}\n", if i == 0 { label } else { "" })).collect()
    };
    text += &labelled("why", &report.why);
    let steps: Vec<_> = report.action.iter().map(|step| spelled(step, &context.state)).collect();
    text += &labelled("action", &steps);
    text += "\n";
    text += &servers(report);
    text += "\n";
    text += &below(report);
    text
}

fn verdict(verdict: Verdict, ui: Ui) -> String {
    match verdict {
        Verdict::Healthy => ui.green("HEALTHY"),
        Verdict::Degraded => ui.yellow("DEGRADED"),
        Verdict::Unavailable => ui.red("UNAVAILABLE"),
    }
}

fn servers(report: &StatusReport) -> String {
    let row = |server: &ServerReport| {
        let own = server.name == report.this_node;
        let address = match (own, &server.connected) {
            (true, _) => "local".into(),
            (false, Some(address)) => address.clone(),
            (false, None) => server.addresses.first().cloned().unwrap_or_else(|| "-".into()),
        };
        vec![
            marked(&server.name, &report.this_node),
            server.zone.clone(),
            standing(server).to_owned(),
            address,
            server.rtt_ms.filter(|_| !own).map_or("-".into(), |rtt| format!("{rtt:.1} ms")),
            filled(server.cache_used, server.cache_limit),
            filled(server.store_used, server.store_capacity),
            server.chunks.map_or("-".into(), grouped),
        ]
    };
    table(&["node", "zone", "state", "address", "rtt", "cache", "cold", "chunks"], report.servers.iter().map(row).collect())
}

/// Mounts, chunks and jobs.
fn below(report: &StatusReport) -> String {
    let cache = &report.cache;
    let asked = cache.hits + cache.misses;
    let mut lines = Vec::new();
    for mount in &report.mounts {
        let hits = if asked > 0 { format!("   hit ratio {} %", percent(cache.hits, asked)) } else { String::new() };
        let (files, open) = (counted(mount.files, "file"), grouped(mount.open_handles));
        lines.push(("mounts", format!("{}  {files}, {}, {open} open{hits}", mount.path, mount.bytes)));
    }
    if report.mounts.is_empty() {
        lines.push(("mounts", "none".into()));
    }
    if cache.dirty.0 > 0 {
        lines.push(("cache", format!("{} written here and not yet on the stores", cache.dirty)));
    }
    if report.reads.cut_off {
        let count = counted(report.reads.stale, "read");
        lines.push(("reads", format!("no majority answers: what this server knew last, or as ctfs policy says ({count} so far)")));
    }
    let journal = &report.journal;
    if let Some(pair) = &journal.pair {
        lines.push(("journal", format!("{}, also on {pair}", journal.bytes)));
    } else if !journal.alone {
        lines.push(("journal", format!("{}, on no other server yet: fsync waits for the stores instead", journal.bytes)));
    }
    let chunks = &report.chunks;
    if chunks.below_policy > 0 || chunks.lost > 0 {
        let (total, below, lost) = (grouped(chunks.total), grouped(chunks.below_policy), grouped(chunks.lost));
        lines.push(("chunks", format!("{total} in all, {below} with too few copies, {lost} lost")));
    }
    for job in &report.jobs {
        let share = if job.total > 0 { format!(" {} %", percent(job.done, job.total)) } else { String::new() };
        lines.push(("jobs", format!("{}{share}  {}", job.name, job.detail).trim_end().to_owned()));
    }
    let mut last = "";
    let mut text = String::new();
    for (label, line) in lines {
        text += &format!(" {:<8}{line}\n", if label == last { "" } else { label });
        last = label;
    }
    text
}

#[cfg(test)]
pub mod tests {
    use ctfs_node::admin::{CacheReport, ChunksReport, DirectoriesReport, JobReport, JournalReport, MountReport, ReadsReport, WirePath};
    use ctfs_types::ByteSize;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn server(name: &str, zone: &str, role: ServerRole) -> ServerReport {
        ServerReport {
            name: name.into(),
            node: "00000000000000ab".into(),
            zone: zone.into(),
            state: ServerState::Up,
            role,
            addresses: vec![],
            connected: None,
            rtt_ms: None,
            mtu: None,
            cache_used: None,
            cache_limit: None,
            store_used: None,
            store_capacity: None,
            chunks: None,
            version: "0.1.0".into(),
            last_heard_secs: Some(0),
            lag: Some(0),
            ..ServerReport::default()
        }
    }

    /// Three servers, the third one down.
    pub fn report() -> StatusReport {
        let node1 = ServerReport {
            cache_used: Some(ByteSize(74 * GIB)),
            cache_limit: Some(ByteSize(120 * GIB)),
            store_used: Some(ByteSize(310 * GIB)),
            store_capacity: Some(ByteSize(1000 * GIB)),
            chunks: Some(12_841),
            ..server("node1", "nyc", ServerRole::Leader)
        };
        let node2 = ServerReport { connected: Some("10.9.0.2:7420".into()), rtt_ms: Some(82.0), mtu: Some(1437), ..server("node2", "ams", ServerRole::Voter) };
        let node3 = ServerReport {
            state: ServerState::Down,
            addresses: vec!["10.9.0.3:7420".into()],
            last_heard_secs: Some(252),
            ..server("node3", "fra", ServerRole::Voter)
        };
        StatusReport {
            cluster_name: "brave-otter".into(),
            cluster_id: "00".into(),
            verdict: Verdict::Degraded,
            summary: "2 of 3 servers alive, all data readable and writable".into(),
            why: vec!["node3 (fra) unreachable for 4 min 12 s".into()],
            action: vec!["none needed: copies are made elsewhere in 5 min 48 s".into(), "ctfs node remove node3".into()],
            this_node: "node1".into(),
            servers: vec![node1, node2, node3],
            mounts: vec![MountReport { path: WirePath("/srv/data".into()), files: 412_384, bytes: ByteSize(608 * GIB), open_handles: 3 }],
            cache: CacheReport { used: ByteSize(74 * GIB), limit: ByteSize(120 * GIB), dirty: ByteSize(0), hits: 97, misses: 3 },
            jobs: vec![JobReport { name: "repair".into(), detail: "212 MiB/s".into(), done: 43, total: 100 }],
            chunks: ChunksReport { total: 12_841, below_policy: 41, lost: 0 },
            applied: 10,
            term: 2,
            leader: Some("node1".into()),
            leased: true,
            reads: ReadsReport::default(),
            directories: DirectoriesReport::default(),
            journal: JournalReport { pair: Some("node2".into()), alone: false, records: 3, bytes: ByteSize(12 << 10) },
        }
    }

    #[test]
    fn status_is_verdict_then_reason_then_what_to_type_then_the_servers() {
        let context = Context { state: crate::STATE_DEFAULT.into(), ui: Ui::plain() };
        let expected = "\
cluster brave-otter   DEGRADED   2 of 3 servers alive, all data readable and writable
  why     node3 (fra) unreachable for 4 min 12 s
  action  none needed: copies are made elsewhere in 5 min 48 s
          ctfs node remove node3

 node    zone  state   address        rtt      cache                       cold                          chunks
 node1*  nyc   leader  local          -        74.0 GiB / 120.0 GiB  61 %  310.0 GiB / 1000.0 GiB  31 %  12 841
 node2   ams   voter   10.9.0.2:7420  82.0 ms  -                           -                             -
 node3   fra   down    10.9.0.3:7420  -        -                           -                             -

 mounts  /srv/data  412 384 files, 608.0 GiB, 3 open   hit ratio 97 %
 journal 12.0 KiB, also on node2
 chunks  12 841 in all, 41 with too few copies, 0 lost
 jobs    repair 43 %  212 MiB/s
";
        assert_eq!(render(&report(), &context), expected);
    }

    #[test]
    fn the_exit_status_is_the_verdict() {
        assert_eq!([Verdict::Healthy, Verdict::Degraded, Verdict::Unavailable].map(exit_for), [0, 4, 5]);
    }

    #[test]
    fn degraded_is_available_but_not_healthy() {
        assert!(Wanted::Available.met_by(Verdict::Degraded) && !Wanted::Healthy.met_by(Verdict::Degraded));
        assert!(!Wanted::Available.met_by(Verdict::Unavailable));
    }

    #[test]
    fn a_server_that_is_down_has_no_role_however_it_votes() {
        let mut down = server("a", "z", ServerRole::Leader);
        assert_eq!(standing(&down), "leader");
        down.stopped = Some("log failed".into());
        assert_eq!(standing(&down), "stopped");
        down.state = ServerState::Away;
        assert_eq!(standing(&down), "away");
    }
}
