//! `ctfs up`: the whole installation on one server.

use std::{
    fs,
    io::{self, Read},
    net::SocketAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Args;
use ctfs_net::{JoinToken, TokenError};
use ctfs_node::{
    admin::{AdminClient, ClientError, PingReport, Request, Response, ServerState, StatusReport, WirePath},
    problem::{Code, Problem, exit},
};

use super::{ask_to, launch};
use crate::{
    Context,
    choices::{self, Choices, Copies, HostPort, Label, Share},
    config, daemon,
    errors::{Outcome, spelled},
    mounts,
    plan::{Memory, Plan, Sources, differences, fixed},
    ui::counted,
};

const TOKEN_NOT_USED: &str = "  note  it is a member already: the token was not used.\n";
/// A token is a line.
const TOKEN_BYTES_MAX: u64 = 64 << 10;

/// Start this server: create a cluster of one, join one, or come back
///
/// Safe to repeat. Choices are remembered: after a reboot, `ctfs up` alone brings the same
/// server back. The join token can also come in the environment variable CTFS_TOKEN.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  ctfs up /srv/data                          a new cluster of one\n  ctfs up /srv/data --join ctfs1-k7q2...     join; `ctfs token` prints this line\n  ssh node1 ctfs token | ctfs up /srv/data --join -\n  ctfs up                                    the same server again, after a reboot")]
pub struct Up {
    /// Directory to mount on; created if missing
    #[arg(value_parser = choices::absolute)]
    path: Option<PathBuf>,

    /// Join a cluster: a token, @FILE, or - for stdin
    #[arg(long, value_name = "TOKEN|@FILE|-", help_heading = "Cluster")]
    join: Option<String>,

    /// Name of this server [default: host name]
    #[arg(long, help_heading = "Cluster")]
    name: Option<Label>,

    /// Where it stands; copies are spread over zones first [default: default]
    #[arg(long, help_heading = "Cluster")]
    zone: Option<Label>,

    /// UDP address to listen on [default: 0.0.0.0:7420]
    #[arg(long, value_name = "ADDR:PORT", help_heading = "Network")]
    listen: Option<SocketAddr>,

    /// Address at which the others reach this server; may be repeated [default: its interfaces']
    #[arg(long, value_name = "ADDR:PORT", help_heading = "Network")]
    advertise: Vec<HostPort>,

    /// Directory of the cache tier [default: STATE/cache]
    #[arg(long, value_name = "DIR", value_parser = choices::absolute, help_heading = "Storage")]
    cache_dir: Option<PathBuf>,

    /// Most space the cache tier may take, e.g. 64GiB or 40% of what is free [default: 10%]
    #[arg(long, value_name = "SIZE", help_heading = "Storage")]
    cache_size: Option<Share>,

    /// Most space this server's share of the chunks may take [default: 80%]
    #[arg(long, value_name = "SIZE", help_heading = "Storage")]
    capacity: Option<Share>,

    /// Servers that hold each chunk, for a new cluster: auto or a number [default: auto]
    #[arg(long, value_name = "N", help_heading = "Storage")]
    copies: Option<Copies>,

    /// Configuration file [default: /etc/ctfs/ctfs.toml if it exists]
    #[arg(long, value_name = "FILE", value_parser = choices::absolute)]
    config: Option<PathBuf>,

    /// Serve in this process, for service managers
    #[arg(long)]
    foreground: bool,

    /// Serve the other servers without mounting here
    #[arg(long, conflicts_with = "path")]
    no_mount: bool,
}

/// How this server came up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Came {
    Created,
    Joined,
    Back,
    /// As [`Self::Back`], and a token was given that was not needed.
    MemberAlready,
}

impl Came {
    fn of(member: bool, token: bool) -> Self {
        match (member, token) {
            (true, true) => Self::MemberAlready,
            (true, false) => Self::Back,
            (false, true) => Self::Joined,
            (false, false) if std::env::var_os("CTFS_TOKEN").is_some() => Self::Joined,
            (false, false) => Self::Created,
        }
    }
}

impl Up {
    pub fn run(self, context: &Context) -> Outcome {
        let started = Instant::now();
        let flags = self.choices();
        match AdminClient::call(&context.state, &Request::Ping, Duration::from_secs(10)) {
            Ok(_) if self.foreground => return Err(Problem::state_locked(&context.state)),
            Ok(Response::Ping(ping)) => {
                let token = self.join.is_some().then(|| self.token(Came::Joined)).transpose()?.flatten();
                return already(context, &flags, ping, token.as_deref());
            }
            Ok(_) => return Err(super::unexpected()),
            Err(ClientError::NotRunning) => {}
            Err(error) => return Err(error.into_problem(&context.state)),
        }
        let memory = Memory::load(&context.state)?;
        // The memory is written last: an `up` that was interrupted may have joined all the same.
        let came = Came::of(memory.is_some() || ctfs_node::is_member(&context.state), self.join.is_some());
        let file = config::load(self.config.as_deref().or(memory.as_ref().and_then(|memory| Some(memory.config.as_ref()?.as_path()))))?;
        let join = self.token(came)?;
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let plan = Plan::new(&context.state, Sources { flags, file, memory, config: self.config, join, hostname })?;
        prepare(&plan, context)?;

        let say = || context.ui.print(&summary(came, &plan, status(context).as_ref(), started.elapsed(), &context.state));
        if self.foreground {
            return daemon::run(&plan, say);
        }
        launch::launch(&plan, context.ui)?;
        say();
        Ok(exit::OK)
    }

    fn choices(&self) -> Choices {
        Choices {
            mountpoint: self.path.clone().map(|path| WirePath(mounts::resolved(&path))),
            no_mount: self.no_mount.then_some(true),
            name: self.name.clone(),
            zone: self.zone.clone(),
            listen: self.listen,
            advertise: (!self.advertise.is_empty()).then(|| self.advertise.clone()),
            cache_dir: self.cache_dir.clone().map(WirePath),
            cache_size: self.cache_size,
            capacity: self.capacity,
            copies: self.copies,
            ..Default::default()
        }
    }

    /// The token from wherever it is.
    fn token(&self, came: Came) -> Result<Option<String>, Problem> {
        let text = match self.join.as_deref() {
            Some("-") => {
                let mut text = String::new();
                io::stdin().lock().take(TOKEN_BYTES_MAX).read_to_string(&mut text).map_err(|error| Problem::io("read the token from stdin", &error))?;
                text
            }
            Some(text) => match text.strip_prefix('@') {
                Some(file) => {
                    let mut text = String::new();
                    fs::File::open(file)
                        .and_then(|file| file.take(TOKEN_BYTES_MAX).read_to_string(&mut text))
                        .map_err(|error| Problem::io(&format!("read the token from {file}"), &error))?;
                    text
                }
                None => text.to_owned(),
            },
            // In the environment of a service it is still there at the next boot, used up long since.
            None if came == Came::Back => return Ok(None),
            None => match std::env::var("CTFS_TOKEN") {
                Ok(text) => text,
                Err(_) => return Ok(None),
            },
        };
        Ok(Some(token_in(&text)))
    }
}

/// The token in a text that may be the whole line `ctfs token` printed.
fn token_in(text: &str) -> String {
    let words = || text.split_whitespace();
    words().find(|word| word.starts_with("ctfs1-")).or_else(|| words().next()).unwrap_or_default().to_owned()
}

/// Checks the rest of what can be checked, and only then makes directories.
fn prepare(plan: &Plan, context: &Context) -> Result<(), Problem> {
    let state = plan.state();
    if let Some(path) = plan.mountpoint() {
        if !rustix::process::geteuid().is_root() {
            return Err(Problem::new(Code::PermissionDenied, "mounting needs root")
                .try_next(format!("sudo ctfs up {}", path.display()))
                .try_next("or serve the other servers only: ctfs up --no-mount"));
        }
        if mounts::detach_dead(path)? {
            context.ui.talk(&format!("  took a dead mount off {}, left by a daemon that did not end in order\n", path.display()));
        }
        mounts::validate(path, &[state, &plan.cache_dir()])?;
    }
    match fs::metadata(state) {
        Ok(meta) if !meta.is_dir() => {
            return Err(Problem::new(Code::NotADirectory, format!("state directory {} is not a directory", state.display())));
        }
        Ok(_) => {}
        Err(_) => {
            let parent = state.parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(parent)
                .and_then(|()| fs::DirBuilder::new().mode(0o700).create(state))
                .map_err(|error| Problem::io(&format!("create the state directory {}", state.display()), &error))?;
        }
    }
    if let Some(path) = plan.mountpoint() {
        fs::create_dir_all(path).map_err(|error| Problem::io(&format!("create {}", path.display()), &error))?;
    }
    Ok(())
}

/// `up` while the daemon runs: nothing to do, unless something else is asked of it.
fn already(context: &Context, flags: &Choices, ping: PingReport, token: Option<&str>) -> Outcome {
    if let Some(token) = token {
        let token: JoinToken = token.parse().map_err(|error: TokenError| Problem::token_mistyped(&error.to_string()))?;
        let pinned: String = token.ca_hash.iter().map(|byte| format!("{byte:02x}")).collect();
        if !ping.authority.is_empty() && ping.authority != pinned {
            let cluster = status(context).map(|status| status.cluster_name).unwrap_or_default();
            return Err(Problem::foreign_cluster(&context.state, &cluster));
        }
    }

    let memory = Memory::load(&context.state)?;
    let effective = memory.map(|memory| memory.effective).unwrap_or_default();
    differs(&context.state, flags, &effective)?;
    let mut text = String::new();
    if ping.mountpoint.is_none() && effective.mountpoint.is_some() {
        text += &format!("  {}\n", ask_to(context, &Request::Mount { path: None }, super::CHANGE)?.message);
    } else {
        let place = ping.mountpoint.map_or("without a mount".into(), |path| format!("on {path}"));
        let cluster = status(context).map(|status| format!(" in cluster {}", status.cluster_name)).unwrap_or_default();
        text += &format!("  already up {place}{cluster}\n");
    }
    if token.is_some() {
        text += TOKEN_NOT_USED;
    }
    text += &format!("  next  {}\n", spelled("ctfs status", &context.state));
    context.ui.print(&text);
    Ok(exit::OK)
}

/// Refuses what a running server cannot become by being asked.
fn differs(state: &Path, flags: &Choices, effective: &Choices) -> Result<(), Problem> {
    // What no restart changes either is refused with what does.
    fixed(state, flags, effective)?;
    let differing = differences(flags, effective);
    if differing.is_empty() {
        return Ok(());
    }
    let mut problem = Problem::new(Code::ChoiceDiffers, "already up, with other choices").why(differing.join("\n"));
    // The number of copies is the cluster's, not this server's.
    if let Some(copies) = flags.copies.filter(|copies| Some(*copies) != effective.copies) {
        let path = effective.mountpoint.as_ref().map_or("DIRECTORY".to_owned(), ToString::to_string);
        problem = problem.try_next(format!("to change the copies: ctfs policy set {path} --copies {copies}"));
        if differing.len() == 1 {
            return Err(problem.try_next("leave --copies out"));
        }
    }
    Err(problem.try_next("leave the option out, or to change it: ctfs down, then this ctfs up again"))
}

/// The status, if the daemon can say it now; what `up` did stands either way.
fn status(context: &Context) -> Option<StatusReport> {
    match AdminClient::call(&context.state, &Request::Status, super::LOOK) {
        Ok(Response::Status(status)) => Some(status),
        _ => None,
    }
}

fn summary(came: Came, plan: &Plan, status: Option<&StatusReport>, took: Duration, state: &Path) -> String {
    let line = |left: String, right: String| format!("  {left:<42} {right}").trim_end().to_owned() + "\n";
    let next = |command: &str, what: &str| format!("  next  {:<35}  {what}", spelled(command, state)).trim_end().to_owned() + "\n";
    let total = status.map_or(0, |status| status.servers.len());
    let alive = status.map_or(0, |status| status.servers.iter().filter(|server| server.state == ServerState::Up).count());
    let cluster = match status {
        Some(status) if came == Came::Created => format!("cluster {}", status.cluster_name),
        Some(status) => format!("{} ({alive} of {total} alive)", status.cluster_name),
        None if came == Came::Created => "a cluster".into(),
        None => "the cluster".into(),
    };
    let verb = match came {
        Came::Created => "created",
        Came::Joined => "joined",
        Came::Back => "back in",
        Came::MemberAlready => "was already a member, is running again in",
    };
    let mut text = line(format!("{verb} {cluster}"), format!("state in {}", plan.state));
    if came == Came::MemberAlready {
        text += TOKEN_NOT_USED;
    }
    let peers = status.into_iter().flat_map(|status| &status.servers).filter(|server| server.connected.is_some());
    for peer in peers.take(8) {
        let rtt = peer.rtt_ms.map(|rtt| format!(", rtt {rtt:.1} ms")).unwrap_or_default();
        let mtu = peer.mtu.map(|mtu| format!(", mtu {mtu}")).unwrap_or_default();
        text += &line(format!("connected to {}", peer.name), format!("{}{rtt}{mtu}", peer.connected.as_deref().unwrap_or_default()));
    }
    text += &line(format!("cache of {}", plan.memory.cache_bytes), format!("in {}", plan.cache_dir().display()));
    text += &match plan.mountpoint() {
        Some(path) => line(format!("mounted {}", path.display()), format!("ready in {:.1} s", took.as_secs_f64())),
        None => line("serving without a mount".into(), format!("ready in {:.1} s", took.as_secs_f64())),
    };
    text += &match total {
        0 => next("ctfs status", ""),
        1 => {
            "  note  1 server = 1 copy: losing this disk loses the data.\n".to_owned()
                + &next("ctfs token", "prints the line for the next server")
        }
        2 => "  next  add a third server so that one may fail: metadata needs 2 of 3 to agree.\n".to_owned(),
        _ => next("ctfs status", &format!("shows all {}", counted(total as u64, "server"))),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verbs::status::tests::report;

    fn plan() -> Plan {
        let flags = Choices {
            mountpoint: Some(WirePath("/srv/data".into())),
            cache_size: Some(Share::Bytes(ctfs_types::ByteSize(12 << 30))),
            ..Default::default()
        };
        let sources = Sources { flags, file: Choices::default(), memory: None, config: None, join: None, hostname: "node1".into() };
        Plan::new(Path::new(crate::STATE_DEFAULT), sources).unwrap()
    }

    #[test]
    fn the_first_up_says_what_it_did_and_what_to_type() {
        let mut status = report();
        status.servers.truncate(1);
        let text = summary(Came::Created, &plan(), Some(&status), Duration::from_millis(1840), Path::new(crate::STATE_DEFAULT));
        assert_eq!(
            text,
            "  created cluster brave-otter                state in /var/lib/ctfs\n\
             \x20 cache of 12.0 GiB                          in /var/lib/ctfs/cache\n\
             \x20 mounted /srv/data                          ready in 1.8 s\n\
             \x20 note  1 server = 1 copy: losing this disk loses the data.\n\
             \x20 next  ctfs token                           prints the line for the next server\n"
        );
    }

    #[test]
    fn a_joiner_sees_its_peers_and_their_paths() {
        let mut status = report();
        status.servers.truncate(2);
        let text = summary(Came::Joined, &plan(), Some(&status), Duration::from_secs(2), Path::new("/tmp/b"));
        assert!(text.contains("joined brave-otter (2 of 2 alive)"), "{text}");
        assert!(text.contains("connected to node2                         10.9.0.2:7420, rtt 82.0 ms, mtu 1437\n"), "{text}");
        assert!(text.contains("add a third server"), "{text}");
    }

    #[test]
    fn a_member_that_is_given_a_token_again_hears_that_it_was_one_already() {
        let came = Came::of(true, true);
        let text = summary(came, &plan(), Some(&report()), Duration::from_secs(2), Path::new("/tmp/b"));
        assert!(text.contains("was already a member, is running again in brave-otter (2 of 3 alive)"), "{text}");
        assert!(text.contains("the token was not used") && !text.contains("created") && !text.contains("joined"), "{text}");
        assert_eq!((Came::of(true, false), Came::of(false, true)), (Came::Back, Came::Joined));
    }

    #[test]
    fn a_running_server_is_told_only_of_changes_that_are_possible() {
        let label = |text: &str| Some(text.parse().unwrap());
        let effective = Choices { name: label("a"), zone: label("z"), copies: Some("2".parse().unwrap()), ..plan().memory.effective };
        let state = Path::new("/s");
        for flags in [Choices { zone: label("fra"), ..Default::default() }, Choices { name: label("b"), ..Default::default() }] {
            let problem = differs(state, &flags, &effective).unwrap_err();
            assert!(problem.is(Code::ChoiceDiffers) && problem.try_next.concat().contains("join as a new server"), "{problem:?}");
            assert!(!problem.try_next.concat().contains("then this ctfs up again"), "{problem:?}");
        }
        let copies = Choices { copies: Some("3".parse().unwrap()), ..Default::default() };
        let problem = differs(state, &copies, &effective).unwrap_err();
        assert_eq!(problem.try_next, ["to change the copies: ctfs policy set /srv/data --copies 3", "leave --copies out"]);
        let listen = Choices { listen: Some(SocketAddr::from(([127, 0, 0, 1], 1))), ..Default::default() };
        assert!(differs(state, &listen, &effective).unwrap_err().try_next[0].contains("then this ctfs up again"));
        assert!(differs(state, &Choices::default(), &effective).is_ok());
    }

    #[test]
    fn a_token_is_found_in_the_line_that_printed_it() {
        assert_eq!(token_in("sudo ctfs up /srv/data --join ctfs1-abc\n"), "ctfs1-abc");
        assert_eq!(token_in(" ctfs1-abc\n"), "ctfs1-abc");
        assert_eq!(token_in("hello"), "hello");
        assert_eq!(token_in("\n"), "");
    }
}
