//! What can be chosen about a server, as types that only hold valid values.
//!
//! [`Choices`] has one field for each choice, `None` where nothing was said. Flags, the
//! configuration file and what an earlier `up` remembered are each one `Choices`.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use ctfs_node::{RTT_MAX, admin::WirePath};
use ctfs_types::ByteSize;
use serde::{Deserialize, Serialize};

/// Everything that can be said about a server, in one place it can be said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Choices {
    pub mountpoint: Option<WirePath>,
    /// Serve peers without a mount.
    pub no_mount: Option<bool>,
    pub name: Option<Label>,
    pub zone: Option<Label>,
    pub listen: Option<SocketAddr>,
    pub advertise: Option<Vec<HostPort>>,
    pub cache_dir: Option<WirePath>,
    pub cache_size: Option<Share>,
    pub capacity: Option<Share>,
    pub copies: Option<Copies>,
    pub away_after: Option<Duration>,
    pub gc_grace: Option<Duration>,
    pub rtt: Option<Rtt>,
    pub log_level: Option<String>,
    pub log_format: Option<LogFormat>,
}

impl Choices {
    /// `self` where it says something, else `weaker`.
    pub fn or(self, weaker: Self) -> Self {
        // Saying where to mount also says that there is a mount, and the other way round.
        let (mountpoint, no_mount) = match (self.mountpoint, self.no_mount) {
            (Some(path), no_mount) => (Some(path), no_mount.or(Some(false))),
            (None, no_mount) => (weaker.mountpoint, no_mount.or(weaker.no_mount)),
        };
        Self {
            mountpoint,
            no_mount,
            name: self.name.or(weaker.name),
            zone: self.zone.or(weaker.zone),
            listen: self.listen.or(weaker.listen),
            advertise: self.advertise.or(weaker.advertise),
            cache_dir: self.cache_dir.or(weaker.cache_dir),
            cache_size: self.cache_size.or(weaker.cache_size),
            capacity: self.capacity.or(weaker.capacity),
            copies: self.copies.or(weaker.copies),
            away_after: self.away_after.or(weaker.away_after),
            gc_grace: self.gc_grace.or(weaker.gc_grace),
            rtt: self.rtt.or(weaker.rtt),
            log_level: self.log_level.or(weaker.log_level),
            log_format: self.log_format.or(weaker.log_format),
        }
    }
}

/// A number of things.
pub fn count(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number; write digits alone, e.g. 1000000"))
}

/// A size, or a share of the free space where it will be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Share {
    Bytes(ByteSize),
    Percent(u8),
}

impl Share {
    /// In bytes, where `free` bytes are free.
    pub fn of(self, free: u64) -> ByteSize {
        match self {
            Self::Bytes(size) => size,
            Self::Percent(percent) => ByteSize((u128::from(free) * u128::from(percent) / 100) as u64),
        }
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().strip_suffix('%') {
            Some(number) => match number.trim().parse::<u8>() {
                // The last tenth stays free: logs, snapshots and other people live there too.
                Ok(percent @ 1..=90) => Ok(Self::Percent(percent)),
                _ => Err(format!("{text:?} is not a share; write 1% to 90%")),
            },
            None => text.parse().map(Self::Bytes).map_err(|error| format!("{error}, or a share such as 40%")),
        }
    }
}

impl fmt::Display for Share {
    /// Exact, so that reading it again gives the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(size) => write!(f, "{}", size.0),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl TryFrom<String> for Share {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Share> for String {
    fn from(share: Share) -> Self {
        share.to_string()
    }
}

/// The name of a server or zone: 1 to 63 letters, digits, `-`, `_` and `.`, so that it can stand
/// in a table, a log line and a command without quotes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Label(String);

impl Label {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The nearest label to a text from elsewhere, such as the host name.
    pub fn nearest(text: &str) -> Self {
        let first = text.split('.').next().unwrap_or_default();
        let clean: String = first.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' }).take(63).collect();
        clean.trim_matches('-').parse().unwrap_or_else(|_| Self("server".into()))
    }
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = (1..=63).contains(&text.len())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !text.starts_with(['-', '.']);
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!("{text:?} is not a name; write 1 to 63 letters, digits, '-', '_' or '.'"))
        }
    }
}

impl TryFrom<String> for Label {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Label> for String {
    fn from(label: Label) -> Self {
        label.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `host:port` at which others reach this server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPort(String);

impl HostPort {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not an address; write HOST:PORT, e.g. 10.9.0.1:7420 or [fd00::1]:7420");
        if let Ok(address) = text.parse::<SocketAddr>() {
            return if address.port() == 0 || address.ip().is_unspecified() { Err(bad()) } else { Ok(Self(text.to_owned())) };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let named = (1..=253).contains(&host.len()) && host.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c));
        if named && port.parse::<u16>().is_ok_and(|port| port != 0) { Ok(Self(text.to_owned())) } else { Err(bad()) }
    }
}

impl TryFrom<String> for HostPort {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<HostPort> for String {
    fn from(address: HostPort) -> Self {
        address.0
    }
}

/// How many servers hold each chunk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Copies(u8);

impl Copies {
    /// 0 means automatic.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl FromStr for Copies {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse::<u8>()) {
            ("auto", _) => Ok(Self(0)),
            (_, Ok(copies @ 1..=8)) => Ok(Self(copies)),
            _ => Err(format!("{text:?} is not a number of copies; write auto or 1 to 8")),
        }
    }
}

impl TryFrom<String> for Copies {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Copies> for String {
    fn from(copies: Copies) -> Self {
        copies.to_string()
    }
}

impl fmt::Display for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { f.write_str("auto") } else { write!(f, "{}", self.0) }
    }
}

/// The slowest round trip between the servers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Rtt {
    /// As measured in the life before.
    #[default]
    Auto,
    Known(Duration),
}

impl FromStr for Rtt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let limits = Duration::from_millis(1)..=RTT_MAX;
        match (text, duration(text)) {
            ("auto", _) => Ok(Self::Auto),
            (_, Ok(rtt)) if limits.contains(&rtt) => Ok(Self::Known(rtt)),
            _ => Err(format!("{text:?} is not a round trip; write auto, or 1ms to {}", humantime::format_duration(RTT_MAX))),
        }
    }
}

impl TryFrom<String> for Rtt {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Rtt> for String {
    fn from(rtt: Rtt) -> Self {
        match rtt {
            Rtt::Auto => "auto".into(),
            Rtt::Known(rtt) => humantime::format_duration(rtt).to_string(),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("{text:?} is not a log format; write text or json")),
        }
    }
}

/// Reads `10m`, `1h 30m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| format!("{text:?} is not a time; write a number with a unit, e.g. 30s, 10m or 1h"))
}

/// Reads a directory: made absolute now, because the daemon works in `/`.
pub fn absolute(text: &str) -> Result<PathBuf, String> {
    std::path::absolute(text).map_err(|error| format!("{text:?} is not a path: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_reads_as_size_or_percent_and_spells_itself_exactly() {
        assert_eq!("40%".parse::<Share>().unwrap().of(1000), ByteSize(400));
        assert_eq!("64GiB".parse::<Share>().unwrap().of(1), ByteSize(64 << 30));
        for text in ["40%", "68719476736"] {
            assert_eq!(text.parse::<Share>().unwrap().to_string(), text);
        }
        for bad in ["0%", "91%", "-1%", "lots", "%"] {
            assert!(bad.parse::<Share>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_round_trip_is_automatic_or_a_short_time_and_spells_itself() {
        for text in ["auto", "80ms", "250ms"] {
            assert_eq!(String::from(text.parse::<Rtt>().unwrap()), text);
        }
        for bad in ["0ms", "251ms", "2s", "80", "fast"] {
            assert!(bad.parse::<Rtt>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_needs_no_quotes_anywhere() {
        for good in ["a", "node-1", "fra.rack_2", &"x".repeat(63)] {
            assert!(good.parse::<Label>().is_ok(), "{good}");
        }
        for bad in ["", "a b", "-x", ".", "a\n", "é", &"x".repeat(64)] {
            assert!(bad.parse::<Label>().is_err(), "{bad}");
        }
        assert_eq!(Label::nearest("Web_1.example.org").as_str(), "Web-1");
        assert_eq!(Label::nearest("...").as_str(), "server");
    }

    #[test]
    fn an_advertised_address_can_be_dialled() {
        for good in ["10.9.0.1:7420", "[fd00::1]:7420", "node1.example.org:7420"] {
            assert!(good.parse::<HostPort>().is_ok(), "{good}");
        }
        for bad in ["10.9.0.1", "0.0.0.0:7420", "10.9.0.1:0", "fd00::1:7420", "a b:1", ":7420"] {
            assert!(bad.parse::<HostPort>().is_err(), "{bad}");
        }
    }

    #[test]
    fn naming_a_mount_point_overrules_a_remembered_no_mount_and_the_other_way_round() {
        let path = Choices { mountpoint: Some(WirePath("/a".into())), ..Default::default() };
        let none = Choices { no_mount: Some(true), ..Default::default() };
        let both = path.clone().or(none.clone());
        assert_eq!((both.mountpoint.is_some(), both.no_mount), (true, Some(false)));
        assert_eq!(none.or(path).no_mount, Some(true));
    }
}
