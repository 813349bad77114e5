//! What a server will be: flags, file and memory added up, every value decided.
//!
//! [`Memory`] is kept in `STATE/up.json` once a server has come up, so that `ctfs up` without
//! options brings the same server back. Flags are remembered, values from the configuration file
//! are not: what is taken out of the file is gone. Name, zone and cache directory are what the
//! cluster and the disk know this server by, so they stay as first chosen.

use std::{
    fs,
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use ctfs_net::JoinToken;
use ctfs_node::{
    NodeSettings,
    admin::WirePath,
    problem::{Code, Problem},
};
use ctfs_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::{
    choices::{Choices, Copies, HostPort, Label, LogFormat, Rtt, Share},
    mounts,
};

/// UDP port when none is chosen.
pub const PORT_DEFAULT: u16 = 7420;
const CACHE_DEFAULT: Share = Share::Percent(10);
/// With the cache's tenth, a tenth of the free space stays free.
const CAPACITY_DEFAULT: Share = Share::Percent(80);
/// Less holds no more than a few open files.
const CACHE_BYTES_MIN: u64 = 16 << 20;
/// A server away for less is most likely being restarted.
const AWAY_AFTER_DEFAULT: Duration = Duration::from_secs(600);
const GC_GRACE_DEFAULT: Duration = Duration::from_secs(600);
/// A writer's flush must fit into half of the grace time, or its new chunks could be collected
/// before it commits them.
const GC_GRACE_MIN: Duration = Duration::from_secs(60);

const MEMORY_NAME: &str = "up.json";
const MEMORY_VERSION: u32 = 1;
const MEMORY_BYTES_MAX: u64 = 1 << 20;

/// What an earlier `up` left in the state directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    pub version: u32,
    /// What flags have said, in all `up`s together.
    pub flags: Choices,
    /// What the server was last started with, every value filled in.
    pub effective: Choices,
    /// The shares of free space above, as they came out: the server's own files must not shrink them.
    pub cache_bytes: ByteSize,
    pub capacity_bytes: ByteSize,
    /// The configuration file, if one was named.
    pub config: Option<WirePath>,
}

impl Memory {
    /// What the state directory remembers; `None` before the first `up` succeeded.
    pub fn load(state: &Path) -> Result<Option<Self>, Problem> {
        let path = state.join(MEMORY_NAME);
        match fs::metadata(&path) {
            Ok(meta) if meta.len() > MEMORY_BYTES_MAX => return Err(Problem::damaged(&path, "it is far too long")),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Problem::io(&format!("read {}", path.display()), &error)),
        }
        let text = fs::read(&path).map_err(|error| Problem::io(&format!("read {}", path.display()), &error))?;
        let damaged = |why: String| {
            Problem::new(Code::StateDamaged, format!("{} is not readable", path.display()))
                .why(why)
                .try_next(format!("mv {0} {0}.bad    then run up again with all options", path.display()))
        };
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        match value["version"].as_u64() {
            Some(version) if version > u64::from(MEMORY_VERSION) => {
                return Err(Problem::state_newer(state, u8::try_from(version).unwrap_or(u8::MAX), MEMORY_VERSION as u8));
            }
            _ => serde_json::from_value(value).map(Some).map_err(|error| damaged(error.to_string())),
        }
    }

    /// Replaces the file so that a crash leaves the old one or the new one.
    pub fn save(&self, state: &Path) -> Result<(), Problem> {
        let path = state.join(MEMORY_NAME);
        let temporary = state.join("up.json.new");
        let text = serde_json::to_vec_pretty(self).map_err(|error| Problem::internal(&error.to_string()))?;
        let write = || {
            let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            fs::File::open(state)?.sync_all()
        };
        write().map_err(|error: io::Error| Problem::io(&format!("write {}", path.display()), &error))
    }

    /// Where it mounts; `None` for a server without a mount.
    pub fn mountpoint(&self) -> Option<&Path> {
        match self.effective.no_mount {
            Some(true) => None,
            _ => self.effective.mountpoint.as_ref().map(WirePath::as_path),
        }
    }
}

/// A server with every value decided; what `up` hands to the daemon it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub state: WirePath,
    /// Becomes `up.json` once the server is up.
    pub memory: Memory,
    /// The token's text. It travels in a pipe, never in arguments or files.
    pub join: Option<String>,
}

/// What goes into a [`Plan`], strongest first.
pub struct Sources {
    pub flags: Choices,
    pub file: Choices,
    pub memory: Option<Memory>,
    pub config: Option<PathBuf>,
    pub join: Option<String>,
    pub hostname: String,
}

impl Plan {
    /// Decides every value. Creates nothing.
    ///
    /// # Errors
    /// E0121 where a choice contradicts what this server is known by, E0133 where one is missing
    /// or makes no sense, E0110 for a token that is none.
    pub fn new(state: &Path, sources: Sources) -> Result<Self, Problem> {
        let Sources { flags, file, memory, config, join, hostname } = sources;
        if let Some(token) = &join {
            token.parse::<JoinToken>().map_err(|error| Problem::token_mistyped(&error.to_string()))?;
        }
        let asked = flags.clone().or(file);
        if let Some(memory) = &memory {
            fixed(state, &asked, &memory.effective)?;
        }
        let remembered = memory.as_ref().map(|memory| memory.flags.clone()).unwrap_or_default();
        let flags = flags.or(remembered.clone());
        let merged = asked.or(remembered);
        let known = memory.as_ref().map(|memory| memory.effective.clone()).unwrap_or_default();

        let no_mount = merged.no_mount.unwrap_or(false);
        if !no_mount && merged.mountpoint.is_none() {
            return Err(Problem::new(Code::InvalidArgument, "where should the file system be mounted?")
                .try_next("ctfs up /srv/data")
                .try_next("or without a mount: ctfs up --no-mount"));
        }
        let name = merged.name.or(known.name).unwrap_or_else(|| Label::nearest(&hostname));
        let zone = merged.zone.or(known.zone).unwrap_or_else(|| Label::nearest("default"));
        let cache_dir = merged.cache_dir.or(known.cache_dir).unwrap_or_else(|| WirePath(state.join("cache")));

        // A share keeps the bytes it came to first, else each start would take it of what is left.
        let settle = |share: Share, before: Option<(Option<Share>, ByteSize)>, dir: &Path| match before {
            Some((Some(spelled), bytes)) if spelled == share => Ok(bytes),
            _ => mounts::free_bytes(dir).map(|free| share.of(free)),
        };
        let cache_size = merged.cache_size.unwrap_or(CACHE_DEFAULT);
        let capacity = merged.capacity.unwrap_or(CAPACITY_DEFAULT);
        let before = memory.as_ref();
        let mut cache_bytes = settle(cache_size, before.map(|m| (m.effective.cache_size, m.cache_bytes)), cache_dir.as_path())?;
        let capacity_bytes = settle(capacity, before.map(|m| (m.effective.capacity, m.capacity_bytes)), state)?;
        match cache_size {
            Share::Percent(_) => cache_bytes = cache_bytes.max(ByteSize(CACHE_BYTES_MIN)),
            Share::Bytes(size) if size.0 < CACHE_BYTES_MIN => {
                return Err(Problem::new(Code::InvalidArgument, format!("a cache of {size} is too small"))
                    .try_next(format!("give it at least {}", ByteSize(CACHE_BYTES_MIN))));
            }
            Share::Bytes(_) => {}
        }
        let gc_grace = merged.gc_grace.unwrap_or(GC_GRACE_DEFAULT);
        if gc_grace < GC_GRACE_MIN {
            return Err(Problem::new(Code::InvalidArgument, "gc_grace is at least 1m")
                .why("chunks of a write in progress could be collected before it ends"));
        }

        let effective = Choices {
            mountpoint: if no_mount { None } else { merged.mountpoint },
            no_mount: Some(no_mount),
            name: Some(name),
            zone: Some(zone),
            listen: Some(merged.listen.unwrap_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT_DEFAULT)))),
            advertise: Some(merged.advertise.unwrap_or_default()),
            cache_dir: Some(cache_dir),
            cache_size: Some(cache_size),
            capacity: Some(capacity),
            copies: Some(merged.copies.unwrap_or_default()),
            away_after: Some(merged.away_after.unwrap_or(AWAY_AFTER_DEFAULT)),
            gc_grace: Some(gc_grace),
            rtt: Some(merged.rtt.unwrap_or_default()),
            log_level: merged.log_level,
            log_format: merged.log_format,
        };
        let config = config.map(WirePath).or_else(|| memory.and_then(|memory| memory.config));
        let memory = Memory { version: MEMORY_VERSION, flags, effective, cache_bytes, capacity_bytes, config };
        Ok(Self { state: WirePath(state.to_owned()), memory, join })
    }

    pub fn state(&self) -> &Path {
        self.state.as_path()
    }

    pub fn log_level(&self) -> &str {
        self.memory.effective.log_level.as_deref().unwrap_or("info")
    }

    pub fn log_format(&self) -> LogFormat {
        self.memory.effective.log_format.unwrap_or_default()
    }

    pub fn mountpoint(&self) -> Option<&Path> {
        self.memory.mountpoint()
    }

    pub fn cache_dir(&self) -> PathBuf {
        self.memory.effective.cache_dir.clone().map_or_else(|| self.state().join("cache"), |dir| dir.0)
    }

    /// What the node is started with.
    pub fn settings(&self) -> Result<NodeSettings, Problem> {
        let missing = |what: &str| Problem::internal(&format!("the plan has no {what}"));
        let chosen = self.memory.effective.clone();
        let join = match &self.join {
            Some(token) => Some(token.parse::<JoinToken>().map_err(|error| Problem::token_mistyped(&error.to_string()))?),
            None => None,
        };
        Ok(NodeSettings {
            state: self.state.0.clone(),
            cache_dir: self.cache_dir(),
            cache_size: self.memory.cache_bytes,
            name: chosen.name.ok_or_else(|| missing("name"))?.into(),
            zone: chosen.zone.ok_or_else(|| missing("zone"))?.into(),
            listen: chosen.listen.ok_or_else(|| missing("address"))?,
            advertise: chosen.advertise.unwrap_or_default().into_iter().map(String::from).collect(),
            mountpoint: self.mountpoint().map(Path::to_owned),
            capacity: self.memory.capacity_bytes,
            copies: chosen.copies.unwrap_or_default().number(),
            away_after: chosen.away_after.unwrap_or(AWAY_AFTER_DEFAULT),
            gc_grace: chosen.gc_grace.unwrap_or(GC_GRACE_DEFAULT),
            rtt: match chosen.rtt.unwrap_or_default() {
                Rtt::Auto => None,
                Rtt::Known(rtt) => Some(rtt),
            },
            join,
            threads: std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 16),
        })
    }
}

/// Refuses choices that contradict what this server is known by.
///
/// # Errors
/// E0121.
pub fn fixed(state: &Path, asked: &Choices, known: &Choices) -> Result<(), Problem> {
    for (what, asked, known) in [("name", &asked.name, &known.name), ("zone", &asked.zone, &known.zone)] {
        if let (Some(asked), Some(known)) = (asked, known)
            && asked != known
        {
            return Err(Problem::new(Code::ChoiceDiffers, format!("this server's {what} is {known}, not {asked}"))
                .why(format!("the cluster knows it by that since it joined (state in {})", state.display()))
                .try_next(format!("leave --{what} out"))
                .try_next("or join as a new server: ctfs down, move the state directory away, ctfs up --join TOKEN; then remove the old one"));
        }
    }
    Ok(())
}

/// Where flags given now differ from what a running daemon was started with, a line each.
pub fn differences(flags: &Choices, effective: &Choices) -> Vec<String> {
    fn differs<T: PartialEq>(asked: &Option<T>, known: &Option<T>) -> bool {
        asked.is_some() && asked != known
    }
    let path = |path: &Option<WirePath>| path.as_ref().map(|path| WirePath(mounts::resolved(path.as_path())));
    let shown = |path: &Option<WirePath>| path.as_ref().map_or("none".into(), ToString::to_string);
    let label = |label: &Option<Label>| label.as_ref().map(ToString::to_string).unwrap_or_default();
    let share = |share: &Option<Share>| match share {
        Some(Share::Bytes(size)) => size.to_string(),
        Some(share) => share.to_string(),
        None => "the default".into(),
    };
    let addresses = |list: &Option<Vec<HostPort>>| match list.as_deref() {
        None | Some([]) => "its interfaces' addresses".to_owned(),
        Some(list) => list.iter().map(HostPort::as_str).collect::<Vec<_>>().join(", "),
    };
    let mut lines = Vec::new();
    let mut note = |differs: bool, what: &str, is: String, asked: String| {
        if differs {
            lines.push(format!("{what} is {is}, not {asked}"));
        }
    };
    if flags.no_mount == Some(true) {
        note(effective.mountpoint.is_some(), "the mount point", shown(&effective.mountpoint), "none".into());
    }
    note(differs(&path(&flags.mountpoint), &path(&effective.mountpoint)), "the mount point", shown(&effective.mountpoint), shown(&flags.mountpoint));
    note(differs(&flags.name, &effective.name), "the name", label(&effective.name), label(&flags.name));
    note(differs(&flags.zone, &effective.zone), "the zone", label(&effective.zone), label(&flags.zone));
    note(
        differs(&flags.listen, &effective.listen),
        "the listening address",
        effective.listen.map(|a| a.to_string()).unwrap_or_default(),
        flags.listen.map(|a| a.to_string()).unwrap_or_default(),
    );
    note(differs(&flags.advertise, &effective.advertise), "the advertised address", addresses(&effective.advertise), addresses(&flags.advertise));
    note(differs(&path(&flags.cache_dir), &path(&effective.cache_dir)), "the cache directory", shown(&effective.cache_dir), shown(&flags.cache_dir));
    note(differs(&flags.cache_size, &effective.cache_size), "the cache size", share(&effective.cache_size), share(&flags.cache_size));
    note(differs(&flags.capacity, &effective.capacity), "the capacity", share(&effective.capacity), share(&flags.capacity));
    note(
        differs(&flags.copies, &effective.copies),
        "the number of copies",
        effective.copies.map(|c: Copies| c.to_string()).unwrap_or_default(),
        flags.copies.map(|c: Copies| c.to_string()).unwrap_or_default(),
    );
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(flags: Choices, file: Choices, memory: Option<Memory>) -> Sources {
        Sources { flags, file, memory, config: None, join: None, hostname: "host.example.org".into() }
    }

    fn mounting(path: &str) -> Choices {
        Choices { mountpoint: Some(WirePath(path.into())), ..Default::default() }
    }

    fn label(text: &str) -> Option<Label> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn defaults_fill_what_nobody_chose() {
        let dir = tempfile::tempdir().unwrap();
        let plan = Plan::new(dir.path(), sources(mounting("/srv/data"), Choices::default(), None)).unwrap();
        let settings = plan.settings().unwrap();
        assert_eq!((settings.name.as_str(), settings.zone.as_str()), ("host", "default"));
        assert_eq!(settings.listen.to_string(), "0.0.0.0:7420");
        assert_eq!(settings.cache_dir, dir.path().join("cache"));
        assert_eq!(settings.mountpoint.as_deref(), Some(Path::new("/srv/data")));
        assert!(settings.cache_size.0 >= CACHE_BYTES_MIN && settings.capacity > settings.cache_size);
        assert_eq!((settings.copies, settings.join.is_none()), (0, true));
    }

    #[test]
    fn flags_beat_the_file_beats_memory_beats_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let listen = |port: u16| Some(SocketAddr::from(([127, 0, 0, 1], port)));
        let flags = Choices { listen: listen(1), ..mounting("/a") };
        let first = Plan::new(dir.path(), sources(flags, Choices::default(), None)).unwrap();
        let memory = || Some(first.memory.clone());

        let port = |flags: Choices, file: Choices| {
            Plan::new(dir.path(), sources(flags, file, memory())).unwrap().settings().unwrap().listen.port()
        };
        let file = Choices { listen: listen(2), ..Default::default() };
        assert_eq!(port(Choices::default(), Choices::default()), 1);
        assert_eq!(port(Choices::default(), file.clone()), 2);
        assert_eq!(port(Choices { listen: listen(3), ..Default::default() }, file), 3);
    }

    #[test]
    fn up_without_options_brings_the_same_server_back() {
        let dir = tempfile::tempdir().unwrap();
        let flags = Choices { name: label("a"), zone: label("z"), cache_size: Some(Share::Percent(5)), ..mounting("/a") };
        let first = Plan::new(dir.path(), sources(flags, Choices::default(), None)).unwrap();
        first.memory.save(dir.path()).unwrap();
        let memory = Memory::load(dir.path()).unwrap();
        assert_eq!(memory.as_ref(), Some(&first.memory));
        let again = Plan::new(dir.path(), Sources { hostname: "renamed".into(), ..sources(Choices::default(), Choices::default(), memory) }).unwrap();
        assert_eq!(again, first);
    }

    #[test]
    fn name_and_zone_cannot_change_once_the_cluster_knows_them() {
        let dir = tempfile::tempdir().unwrap();
        let first = Plan::new(dir.path(), sources(Choices { name: label("a"), ..mounting("/a") }, Choices::default(), None)).unwrap();
        for other in [Choices { name: label("b"), ..Default::default() }, Choices { zone: label("fra"), ..Default::default() }] {
            for (flags, file) in [(other.clone(), Choices::default()), (Choices::default(), other)] {
                let problem = Plan::new(dir.path(), sources(flags, file, Some(first.memory.clone()))).unwrap_err();
                assert!(problem.is(Code::ChoiceDiffers), "{problem}");
            }
        }
    }

    #[test]
    fn a_plan_without_a_place_to_mount_asks_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let problem = Plan::new(dir.path(), sources(Choices::default(), Choices::default(), None)).unwrap_err();
        assert_eq!(problem.exit, 2);
        let none = Choices { no_mount: Some(true), ..Default::default() };
        let plan = Plan::new(dir.path(), sources(none, Choices::default(), None)).unwrap();
        assert_eq!(plan.settings().unwrap().mountpoint, None);
    }

    #[test]
    fn a_token_that_is_none_is_refused_before_anything_happens() {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources { join: Some("hello".into()), ..sources(mounting("/a"), Choices::default(), None) };
        assert_eq!(Plan::new(dir.path(), sources).unwrap_err().code, "E0110");
    }

    #[test]
    fn a_tiny_cache_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let flags = Choices { cache_size: Some(Share::Bytes(ByteSize(1000))), ..mounting("/a") };
        assert!(Plan::new(dir.path(), sources(flags, Choices::default(), None)).unwrap_err().is(Code::InvalidArgument));
    }

    #[test]
    fn memory_of_a_newer_program_is_refused_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("up.json"), r#"{"version":2}"#).unwrap();
        assert!(Memory::load(dir.path()).unwrap_err().is(Code::StateNewer));
        fs::write(dir.path().join("up.json"), "{").unwrap();
        assert!(Memory::load(dir.path()).unwrap_err().is(Code::StateDamaged));
    }

    #[test]
    fn only_flags_that_differ_from_the_running_server_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let plan = Plan::new(dir.path(), sources(mounting("/srv/nope"), Choices::default(), None)).unwrap();
        let effective = &plan.memory.effective;
        assert!(differences(&Choices::default(), effective).is_empty());
        assert!(differences(&mounting("/srv/nope"), effective).is_empty());
        assert_eq!(differences(&mounting("/srv/other"), effective), ["the mount point is /srv/nope, not /srv/other"]);
        let sized = Choices { cache_size: Some(Share::Percent(50)), ..Default::default() };
        assert_eq!(differences(&sized, effective), ["the cache size is 10%, not 50%"]);
    }
}
