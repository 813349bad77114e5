//! The configuration file: TOML, every key optional, unknown keys are errors.
//!
//! [`KEYS`] is the whole list of keys. The file is first walked for keys that are not in it, so
//! that a typing error is reported with its line and the key it was meant to be; then the values
//! are read.

use std::{
    fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ctfs_node::{
    admin::WirePath,
    problem::{Code, Problem},
};
use serde::{Deserialize, Deserializer};
use toml::de::{DeTable, DeValue};

use crate::choices::{self, Choices, Copies, HostPort, Label, LogFormat, Rtt, Share};

/// Read when it exists and no other is named.
pub const DEFAULT_PATH: &str = "/etc/ctfs/ctfs.toml";

/// A file of settings is a page; more than this is not one.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Every section with its keys.
pub const KEYS: &[(&str, &[&str])] = &[
    ("node", &["name", "zone"]),
    ("net", &["listen", "advertise"]),
    ("cache", &["dir", "size"]),
    ("data", &["copies", "capacity", "away_after", "gc_grace"]),
    ("consensus", &["rtt"]),
    ("mount", &["path"]),
    ("log", &["level", "format"]),
];

/// One thing that is wrong in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// From 1; `None` when it concerns the whole file.
    pub line: Option<usize>,
    pub what: String,
    pub suggestion: Option<String>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.what)
    }
}

/// Reads the file at `path`, or the default one if it exists.
///
/// # Errors
/// E0116 with the line and a suggestion, E0100 when a named file cannot be read.
pub fn load(path: Option<&Path>) -> Result<Choices, Problem> {
    let default = Path::new(DEFAULT_PATH);
    if path.is_none() && !default.exists() {
        return Ok(Choices::default());
    }
    let path = path.unwrap_or(default);
    let text = read(path)?;
    parse(&text).map_err(|faults| problem(path, &faults))
}

/// The text of a configuration file.
pub fn read(path: &Path) -> Result<String, Problem> {
    let fail = |error: std::io::Error| Problem::io(&format!("read configuration {}", path.display()), &error);
    if fs::metadata(path).map_err(fail)?.len() > FILE_BYTES_MAX {
        return Err(Problem::new(Code::ConfigInvalid, format!("{} is too long for a configuration", path.display())));
    }
    fs::read_to_string(path).map_err(fail)
}

/// All faults of a file as one problem, the first one on top.
pub fn problem(path: &Path, faults: &[Fault]) -> Problem {
    let first = faults.first().map(ToString::to_string).unwrap_or_default();
    let mut problem = Problem::new(Code::ConfigInvalid, format!("configuration {} {first}", path.display()));
    let others: Vec<_> = faults.iter().skip(1).map(ToString::to_string).collect();
    problem.why = others.join("\n");
    for suggestion in faults.iter().filter_map(|fault| fault.suggestion.as_ref()) {
        problem = problem.try_next(suggestion);
    }
    problem
}

/// Reads a configuration.
///
/// # Errors
/// Every unknown key, or else the first wrong value.
pub fn parse(text: &str) -> Result<Choices, Vec<Fault>> {
    let broken = |error: toml::de::Error| {
        // The message of a wrong value repeats the source below its first line.
        let what = error.message().lines().next().unwrap_or("not readable").to_owned();
        vec![Fault { line: error.span().map(|span| line_at(text, span.start)), what, suggestion: None }]
    };
    let table = DeTable::parse(text).map_err(broken)?;
    let faults = unknown_keys(text, table.get_ref());
    if !faults.is_empty() {
        return Err(faults);
    }
    let file: File = toml::from_str(text).map_err(broken)?;
    Ok(file.into())
}

fn line_at(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|&&b| b == b'\n').count() + 1
}

fn unknown_keys(text: &str, root: &DeTable<'_>) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (section, value) in root {
        let line = Some(line_at(text, section.span().start));
        let name: &str = section.get_ref();
        let Some((_, keys)) = KEYS.iter().find(|(known, _)| *known == name) else {
            let (what, suggestion) = match value.get_ref() {
                DeValue::Table(_) => {
                    let near = nearest(name, KEYS.iter().map(|(known, _)| *known));
                    (format!("unknown section [{name}]"), near.map(|near| format!("did you mean [{near}]?")))
                }
                _ => (format!("unknown key `{name}` outside of any section"), home_of(name)),
            };
            faults.push(Fault { line, what, suggestion });
            continue;
        };
        let DeValue::Table(table) = value.get_ref() else {
            faults.push(Fault { line, what: format!("`{name}` is a section"), suggestion: Some(format!("write [{name}] on a line of its own")) });
            continue;
        };
        for key in table.keys() {
            let name_of_key: &str = key.get_ref();
            if keys.contains(&name_of_key) {
                continue;
            }
            let suggestion = nearest(name_of_key, keys.iter().copied())
                .map(|near| format!("did you mean `{near}`?"))
                .or_else(|| home_of(name_of_key))
                .or_else(|| Some(format!("[{name}] has: {}", keys.join(", "))));
            faults.push(Fault {
                line: Some(line_at(text, key.span().start)),
                what: format!("unknown key `{name_of_key}` in [{name}]"),
                suggestion,
            });
        }
    }
    faults.sort_by_key(|fault| fault.line);
    faults
}

/// The section where a key with nearly this name lives.
fn home_of(key: &str) -> Option<String> {
    KEYS.iter().find_map(|(section, keys)| {
        let near = nearest(key, keys.iter().copied()).or_else(|| {
            // `cache_size` was meant to be `size` in [cache].
            let rest = key.strip_prefix(section)?.trim_start_matches(['_', '-', '.']);
            keys.iter().copied().find(|known| *known == rest)
        })?;
        Some(format!("did you mean `{near}` in [{section}]?"))
    })
}

/// The known word that `word` is probably a typing error of.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let (score, best) = known.map(|candidate| (strsim::jaro_winkler(word, candidate), candidate)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    // Below this, English words look alike by chance.
    (score > 0.82).then_some(best)
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    node: NodeSection,
    net: NetSection,
    cache: CacheSection,
    data: DataSection,
    consensus: ConsensusSection,
    mount: MountSection,
    log: LogSection,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct NodeSection {
    #[serde(deserialize_with = "text")]
    name: Option<Label>,
    #[serde(deserialize_with = "text")]
    zone: Option<Label>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct NetSection {
    #[serde(deserialize_with = "text")]
    listen: Option<SocketAddr>,
    advertise: Option<Advertise>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "an address HOST:PORT, or a list of them")]
enum Advertise {
    One(HostPort),
    Many(Vec<HostPort>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct CacheSection {
    #[serde(deserialize_with = "directory")]
    dir: Option<PathBuf>,
    #[serde(deserialize_with = "text")]
    size: Option<Share>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct DataSection {
    #[serde(deserialize_with = "text")]
    copies: Option<Copies>,
    #[serde(deserialize_with = "text")]
    capacity: Option<Share>,
    #[serde(deserialize_with = "time")]
    away_after: Option<Duration>,
    #[serde(deserialize_with = "time")]
    gc_grace: Option<Duration>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ConsensusSection {
    #[serde(deserialize_with = "text")]
    rtt: Option<Rtt>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct MountSection {
    #[serde(deserialize_with = "directory")]
    path: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct LogSection {
    level: Option<String>,
    #[serde(deserialize_with = "text")]
    format: Option<LogFormat>,
}

impl From<File> for Choices {
    fn from(file: File) -> Self {
        Self {
            mountpoint: file.mount.path.map(WirePath),
            no_mount: None,
            name: file.node.name,
            zone: file.node.zone,
            listen: file.net.listen,
            advertise: file.net.advertise.map(|advertise| match advertise {
                Advertise::One(address) => vec![address],
                Advertise::Many(addresses) => addresses,
            }),
            cache_dir: file.cache.dir.map(WirePath),
            cache_size: file.cache.size,
            capacity: file.data.capacity,
            copies: file.data.copies,
            away_after: file.data.away_after,
            gc_grace: file.data.gc_grace,
            rtt: file.consensus.rtt,
            log_level: file.log.level,
            log_format: file.log.format,
        }
    }
}

/// A text or whole number, so that `size = 4096` and `copies = 3` need no quotes.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a text or a number")]
enum Scalar {
    Text(String),
    Number(u64),
}

fn scalar<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match Scalar::deserialize(deserializer)? {
        Scalar::Text(text) => text,
        Scalar::Number(number) => number.to_string(),
    })
}

fn text<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(deserializer: D) -> Result<Option<T>, D::Error> {
    let text = scalar(deserializer)?;
    text.parse().map(Some).map_err(|error| serde::de::Error::custom(format!("{error}")))
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    choices::duration(&scalar(deserializer)?).map(Some).map_err(serde::de::Error::custom)
}

/// A relative path in a file would mean something else wherever the program is started.
fn directory<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::from(String::deserialize(deserializer)?);
    if path.is_absolute() { Ok(Some(path)) } else { Err(serde::de::Error::custom(format!("{} is not an absolute path", path.display()))) }
}

#[cfg(test)]
mod tests {
    use ctfs_types::ByteSize;

    use super::*;

    #[test]
    fn every_key_is_read() {
        let choices = parse(
            r#"
            [node]
            name = "node1"
            zone = "nyc"
            [net]
            listen = "0.0.0.0:7420"
            advertise = ["10.9.0.1:7420", "node1.example.org:7420"]
            [cache]
            dir = "/var/cache/ctfs"
            size = "40%"
            [data]
            copies = 3
            capacity = "1TiB"
            away_after = "10m"
            gc_grace = "1h 30m"
            [consensus]
            rtt = "80ms"
            [mount]
            path = "/srv/data"
            [log]
            level = "debug"
            format = "json"
            "#,
        )
        .unwrap();
        assert_eq!(choices.name.unwrap().as_str(), "node1");
        assert_eq!(choices.zone.unwrap().as_str(), "nyc");
        assert_eq!(choices.listen.unwrap().port(), 7420);
        assert_eq!(choices.advertise.unwrap().len(), 2);
        assert_eq!(choices.cache_dir.unwrap().0, Path::new("/var/cache/ctfs"));
        assert_eq!(choices.cache_size, Some(Share::Percent(40)));
        assert_eq!(choices.copies.unwrap().number(), 3);
        assert_eq!(choices.capacity, Some(Share::Bytes(ByteSize(1 << 40))));
        assert_eq!(choices.away_after, Some(Duration::from_secs(600)));
        assert_eq!(choices.gc_grace, Some(Duration::from_secs(5400)));
        assert_eq!(choices.rtt, Some(Rtt::Known(Duration::from_millis(80))));
        assert_eq!(choices.mountpoint.unwrap().0, Path::new("/srv/data"));
        assert_eq!(choices.log_level.as_deref(), Some("debug"));
        assert_eq!(choices.log_format, Some(LogFormat::Json));
    }

    #[test]
    fn an_empty_file_chooses_nothing() {
        assert_eq!(parse("").unwrap(), Choices::default());
        assert_eq!(parse("[net]\nadvertise = \"a:1\"\n").unwrap().advertise.unwrap().len(), 1);
    }

    fn faults(text: &str) -> Vec<(Option<usize>, String, Option<String>)> {
        parse(text).unwrap_err().into_iter().map(|fault| (fault.line, fault.what, fault.suggestion)).collect()
    }

    #[test]
    fn an_unknown_key_is_reported_with_its_line_and_what_was_meant() {
        assert_eq!(
            faults("[node]\nname = \"a\"\n\n[cache]\nsizee = \"1GiB\"\n"),
            [(Some(5), "unknown key `sizee` in [cache]".into(), Some("did you mean `size`?".into()))]
        );
        assert_eq!(faults("[nett]\n"), [(Some(1), "unknown section [nett]".into(), Some("did you mean [net]?".into()))]);
        assert_eq!(
            faults("\ncache_size = 1\n"),
            [(Some(2), "unknown key `cache_size` outside of any section".into(), Some("did you mean `size` in [cache]?".into()))]
        );
        assert_eq!(
            faults("[node]\nlisten = \"x\"\n"),
            [(Some(2), "unknown key `listen` in [node]".into(), Some("did you mean `listen` in [net]?".into()))]
        );
        assert_eq!(
            faults("[mount]\nzzz = 1\n"),
            [(Some(2), "unknown key `zzz` in [mount]".into(), Some("[mount] has: path".into()))]
        );
    }

    #[test]
    fn all_unknown_keys_are_reported_at_once_in_order() {
        let lines: Vec<_> = faults("[log]\nlevle = 1\n[node]\nzonee = 1\nnam = 1\n").into_iter().map(|fault| fault.0).collect();
        assert_eq!(lines, [Some(2), Some(4), Some(5)]);
    }

    #[test]
    fn a_wrong_value_is_reported_with_its_line() {
        for (text, line, part) in [
            ("[cache]\nsize = \"lots\"\n", 2, "not a size"),
            ("[node]\n\nname = \"a b\"\n", 3, "not a name"),
            ("[data]\ncopies = 0\n", 2, "not a number of copies"),
            ("[data]\naway_after = \"soon\"\n", 2, "not a time"),
            ("[net]\nlisten = \"7420\"\n", 2, "socket address"),
            ("[net]\nadvertise = \"here\"\n", 2, "HOST:PORT"),
            ("[consensus]\nrtt = \"2s\"\n", 2, "not a round trip"),
            ("[mount]\npath = \"srv\"\n", 2, "absolute"),
            ("[log]\nformat = \"xml\"\n", 2, "log format"),
            ("[node\n", 1, ""),
            ("node = 3\n", 1, "is a section"),
        ] {
            let fault = &parse(text).unwrap_err()[0];
            assert_eq!(fault.line, Some(line), "{text:?}: {fault}");
            assert!(fault.what.contains(part), "{text:?}: {fault}");
        }
    }

    #[test]
    fn the_problem_names_file_line_and_suggestion() {
        let problem = problem(Path::new("/etc/ctfs/ctfs.toml"), &parse("[node]\nnmae = \"a\"\n").unwrap_err());
        assert_eq!(problem.code, "E0116");
        assert_eq!(problem.what, "configuration /etc/ctfs/ctfs.toml line 2: unknown key `nmae` in [node]");
        assert_eq!(problem.try_next, ["did you mean `name`?"]);
    }

    #[test]
    fn the_list_of_keys_is_the_list_the_values_are_read_with() {
        for (section, keys) in KEYS {
            for key in *keys {
                // A wrong type is refused, but never as an unknown key.
                let fault = &parse(&format!("[{section}]\n{key} = true\n")).unwrap_err()[0];
                assert!(!fault.what.contains("unknown"), "{fault}");
            }
        }
    }
}
