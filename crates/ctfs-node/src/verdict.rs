//! The verdict of `ctfs status`: is all well, if not why, and what to do about it. Pure.

use std::time::Duration;

use crate::admin::{ChunksReport, Room, ServerReport, ServerRole, ServerState, Verdict};

/// What the verdict is made of.
pub struct Seen<'a> {
    pub this_node: &'a str,
    pub servers: &'a [ServerReport],
    pub chunks: &'a ChunksReport,
    /// A majority of the voting servers agrees with this one now.
    pub majority: bool,
    pub voters: usize,
    pub away_after: Duration,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Judgement {
    pub verdict: Verdict,
    /// One line after the verdict.
    pub summary: String,
    pub why: Vec<String>,
    pub action: Vec<String>,
}

impl Judgement {
    fn degraded(&mut self, why: String, action: String) {
        self.verdict = Verdict::Degraded;
        self.why.push(why);
        self.action.push(action);
    }
}

/// Whether it takes part: an answer alone is not enough.
fn works(server: &ServerReport) -> bool {
    server.state == ServerState::Up && server.stopped.is_none()
}

pub fn judge(seen: &Seen<'_>) -> Judgement {
    let Seen { this_node, servers, chunks, .. } = *seen;
    let mut judgement = Judgement { verdict: Verdict::Healthy, summary: String::new(), why: Vec::new(), action: Vec::new() };
    for server in servers.iter().filter(|s| s.state != ServerState::Up) {
        absent(server, seen.away_after, &mut judgement);
    }
    for server in servers.iter().filter(|s| s.state == ServerState::Up) {
        ill(server, this_node, &mut judgement);
    }
    let refused: u64 = servers.iter().map(|server| server.store_refused).sum();
    if chunks.below_policy > refused && judgement.verdict == Verdict::Healthy {
        judgement.degraded(
            format!("{} chunks have fewer copies than their policy asks for; they are being copied", chunks.below_policy),
            "none needed: wait for the repair job".into(),
        );
    }
    if !seen.majority {
        no_majority(seen, &mut judgement);
    }
    if let Some(why) = servers.iter().find(|server| server.name == this_node).and_then(|own| own.stopped.as_ref()) {
        judgement.verdict = Verdict::Unavailable;
        judgement.why = vec![format!("this server takes no further part: {why}")];
        judgement.action = vec![
            "look at its disk and its log, then start it again: ctfs down, then ctfs up".into(),
            format!("if it stops again and the others are healthy, on a server of the cluster: ctfs node remove {this_node}"),
        ];
    }
    let state = match judgement.verdict {
        Verdict::Healthy | Verdict::Degraded => "all data readable and writable",
        Verdict::Unavailable => "files cannot be used",
    };
    if judgement.verdict == Verdict::Healthy {
        judgement.action.extend(grow(servers.len()));
    }
    judgement.summary = format!("{} of {} servers alive, {state}", servers.iter().filter(|s| works(s)).count(), servers.len());
    judgement
}

/// A server that does not answer.
fn absent(server: &ServerReport, away_after: Duration, judgement: &mut Judgement) {
    let name = &server.name;
    let since = match server.last_heard_secs {
        Some(seconds) => format!("for {}", humanly(seconds)),
        None => "since this server started".to_owned(),
    };
    let action = match (server.state, &server.stopped) {
        (ServerState::Down, _) => {
            let left = away_after.as_secs().saturating_sub(server.last_heard_secs.unwrap_or(0));
            format!("none needed: if {name} stays away its copies are re-made elsewhere in {}; sooner: ctfs node remove {name}", humanly(left))
        }
        (_, Some(_)) => format!("its copies are being kept elsewhere; on that server: ctfs down, then ctfs up; if it is gone for good: ctfs node remove {name}"),
        (_, None) => format!("its copies are being kept elsewhere; if it is gone for good: ctfs node remove {name}"),
    };
    let why = match &server.stopped {
        Some(why) => format!("{name} ({}) answers, but takes no further part: {why}", server.zone),
        None => format!("{name} ({}) unreachable {since}", server.zone),
    };
    judgement.degraded(why, action);
}

/// A server that answers and does not do its part.
fn ill(server: &ServerReport, this_node: &str, judgement: &mut Judgement) {
    let name = &server.name;
    let there = if name == this_node { String::new() } else { "on that server: ".to_owned() };
    // A full disk says why better, and ends by itself.
    if let Some(why) = server.stopped.as_ref().filter(|_| server.room != Room::Full) {
        judgement.degraded(
            format!("{name} ({}) answers, but takes no further part: {why}", server.zone),
            format!("{there}look at its disk and its log, then ctfs down, then ctfs up; if it is gone for good: ctfs node remove {name}"),
        );
    }
    match server.room {
        Room::Enough => {}
        Room::Low => judgement.degraded(
            format!("the disk of log and metadata of {name} is nearly full: changes that need room are refused once most servers are like this"),
            format!("{there}make room on the disk of its state directory, or delete files"),
        ),
        Room::Full => judgement.degraded(
            format!("the disk of log and metadata of {name} is full: it takes no part until there is room"),
            format!("{there}make room on the disk of its state directory; it goes on by itself"),
        ),
    }
    if let Some(why) = &server.store_failed {
        judgement.degraded(
            format!("the chunk store of {name} accepts nothing more: {why}"),
            format!("{there}look at its disk and its log, then ctfs down, then ctfs up"),
        );
    }
    if server.store_refused > 0 {
        let filled = match (server.store_used, server.store_capacity) {
            (Some(used), Some(capacity)) => format!(" ({used} of {capacity})"),
            _ => String::new(),
        };
        judgement.degraded(
            format!("the chunk store of {name} is full{filled}: {} chunks that belong there have a copy less", server.store_refused),
            format!("{there}make room on its disk, or ctfs down, then ctfs up --capacity SIZE; or delete files; or add a server: ctfs token"),
        );
    }
}

fn no_majority(seen: &Seen<'_>, judgement: &mut Judgement) {
    let answering = seen.servers.iter().filter(|s| works(s) && s.role != ServerRole::Learner).count();
    judgement.verdict = Verdict::Unavailable;
    judgement.why.insert(
        0,
        format!("no majority of the {} voting servers agrees now ({answering} answer): files can be neither read nor changed", seen.voters),
    );
    // Neither waiting for copies nor removing anybody works without a majority.
    judgement.action = vec!["bring the unreachable servers back (ctfs up on each), or wait some seconds for an election".into()];
    for server in seen.servers.iter().filter(|s| s.state == ServerState::Up && s.stopped.is_some() && s.name != seen.this_node) {
        judgement.action.push(format!("{} answers, but takes no further part; on that server: ctfs down, then ctfs up", server.name));
    }
}

/// What more servers would bring.
fn grow(servers: usize) -> Option<String> {
    match servers {
        1 => Some("1 server = 1 copy: losing this disk loses the data; ctfs token prints the line for the next server".into()),
        2 => Some("2 servers = 2 copies, but the loss of either stops writing; add a third: ctfs token".into()),
        _ => None,
    }
}

/// `4 min 12 s`
fn humanly(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use ctfs_types::ByteSize;

    use super::*;

    fn server(name: &str) -> ServerReport {
        ServerReport { name: name.into(), zone: "z".into(), last_heard_secs: Some(0), ..ServerReport::default() }
    }

    fn three() -> Vec<ServerReport> {
        ["a", "b", "c"].map(server).into()
    }

    fn judged(servers: &[ServerReport], below_policy: u64, majority: bool) -> Judgement {
        let chunks = ChunksReport { total: 100, below_policy, lost: 0 };
        judge(&Seen { this_node: "a", servers, chunks: &chunks, majority, voters: 3, away_after: Duration::from_secs(600) })
    }

    #[test]
    fn three_servers_that_do_their_part_are_healthy() {
        let all = judged(&three(), 0, true);
        assert_eq!((all.verdict, all.why.len(), all.action.len()), (Verdict::Healthy, 0, 0));
        assert_eq!(all.summary, "3 of 3 servers alive, all data readable and writable");
    }

    #[test]
    fn a_server_that_answers_but_lost_its_log_is_not_alive_and_named() {
        let mut servers = three();
        servers[1].stopped = Some("log: no space left on device".into());
        let seen = judged(&servers, 0, true);
        assert_eq!((seen.verdict, seen.summary.as_str()), (Verdict::Degraded, "2 of 3 servers alive, all data readable and writable"));
        assert_eq!(seen.why, ["b (z) answers, but takes no further part: log: no space left on device"]);
        assert!(seen.action[0].starts_with("on that server: ") && seen.action[0].contains("ctfs node remove b"), "{:?}", seen.action);
        servers[1].state = ServerState::Away;
        assert!(judged(&servers, 0, true).why[0].contains("answers, but takes no further part"));
    }

    #[test]
    fn a_server_whose_own_log_stopped_is_unavailable_and_says_why() {
        let mut servers = three();
        servers[0].stopped = Some("log: input/output error".into());
        for majority in [true, false] {
            let seen = judged(&servers, 0, majority);
            assert_eq!(seen.verdict, Verdict::Unavailable);
            assert_eq!(seen.why, ["this server takes no further part: log: input/output error"]);
            assert!(seen.action[0].contains("ctfs down, then ctfs up"), "{:?}", seen.action);
        }
    }

    #[test]
    fn a_full_store_is_called_full_and_nobody_is_told_to_wait() {
        let mut servers = three();
        servers[2].store_refused = 7;
        servers[2].store_used = Some(ByteSize(10 << 30));
        servers[2].store_capacity = Some(ByteSize(10 << 30));
        let seen = judged(&servers, 7, true);
        assert_eq!(seen.verdict, Verdict::Degraded);
        assert_eq!(seen.why, ["the chunk store of c is full (10.0 GiB of 10.0 GiB): 7 chunks that belong there have a copy less"]);
        assert!(seen.action[0].contains("--capacity"), "{:?}", seen.action);
        assert!(!seen.action.concat().contains("wait for the repair job"));
    }

    #[test]
    fn a_store_that_failed_is_named_with_its_reason() {
        let mut servers = three();
        servers[0].store_failed = Some("fdatasync: input/output error".into());
        let seen = judged(&servers, 0, true);
        assert_eq!(seen.verdict, Verdict::Degraded);
        assert_eq!(seen.why, ["the chunk store of a accepts nothing more: fdatasync: input/output error"]);
        assert!(seen.action[0].starts_with("look at its disk"), "{:?}", seen.action);
    }

    #[test]
    fn a_disk_without_room_for_the_log_is_named_before_it_is_full_and_when_it_is() {
        let mut servers = three();
        for (room, part) in [(Room::Low, "nearly full"), (Room::Full, "takes no part until there is room")] {
            servers[1].room = room;
            let seen = judged(&servers, 0, true);
            assert_eq!(seen.verdict, Verdict::Degraded);
            assert!(seen.why[0].contains("of b is") && seen.why[0].contains(part), "{:?}", seen.why);
            assert!(seen.action[0].starts_with("on that server: make room"), "{:?}", seen.action);
        }
    }

    #[test]
    fn chunks_on_their_way_need_no_action() {
        let seen = judged(&three(), 5, true);
        assert_eq!((seen.verdict, seen.action[0].as_str()), (Verdict::Degraded, "none needed: wait for the repair job"));
    }

    #[test]
    fn without_a_majority_the_only_advice_is_to_bring_servers_back() {
        let mut servers = three();
        servers[1].state = ServerState::Down;
        servers[2].stopped = Some("log".into());
        let seen = judged(&servers, 9, false);
        assert_eq!(seen.verdict, Verdict::Unavailable);
        assert!(seen.why[0].starts_with("no majority of the 3 voting servers agrees now (1 answer)"), "{:?}", seen.why);
        assert!(!seen.action.concat().contains("remove") && seen.action[1].starts_with("c answers"), "{:?}", seen.action);
    }

    #[test]
    fn a_server_that_is_down_is_waited_for_and_one_that_is_away_is_not() {
        let mut servers = three();
        servers[1] = ServerReport { state: ServerState::Down, last_heard_secs: Some(252), ..server("b") };
        let seen = judged(&servers, 0, true);
        assert_eq!(seen.why, ["b (z) unreachable for 4 min 12 s"]);
        assert!(seen.action[0].contains("in 5 min 48 s"), "{:?}", seen.action);
        servers[1].state = ServerState::Away;
        assert!(judged(&servers, 0, true).action[0].starts_with("its copies are being kept elsewhere"));
    }
}
