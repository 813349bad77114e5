//! What the program can ask the daemon.

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use ctfs_meta::{Durability, OnPartition};
use ctfs_types::CellSize;
use serde::{Deserialize, Serialize};

use super::report::{
    CacheDropReport, DfReport, DoneReport, InfoReport, NodesReport, PingReport, PolicyReport, QuotasReport, StatusReport, TokenReport,
};

/// What becomes of one limit of a quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    None,
    Most(u64),
}

/// One thing to do or to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Answered from memory, whatever the cluster does.
    Ping,
    Status,
    Nodes,
    Token {
        ttl_secs: u64,
        uses: u32,
    },
    NodeRemove {
        name: String,
        /// Also when it may hold the last copy of something.
        #[serde(default)]
        force: bool,
    },
    Df {
        path: Option<WirePath>,
    },
    /// `path` is absolute; the daemon strips the mount point.
    Info {
        path: WirePath,
    },
    /// `None` leaves a value as it is; `copies: Some(0)` means automatic.
    PolicySet {
        path: WirePath,
        copies: Option<u8>,
        cell: Option<CellSize>,
        durability: Option<Durability>,
        on_partition: Option<OnPartition>,
    },
    PolicyShow {
        path: WirePath,
    },
    /// `None` leaves a limit as it is.
    QuotaSet {
        path: WirePath,
        bytes: Option<Limit>,
        files: Option<Limit>,
    },
    QuotaClear {
        path: WirePath,
    },
    /// `None`: all.
    QuotaList {
        path: Option<WirePath>,
    },
    CacheDrop,
    /// Has every server put all that it acknowledged into the metadata.
    Sync,
    /// Unmounts; the daemon goes on serving its peers.
    Umount {
        /// Also when programs have files open.
        #[serde(default)]
        force: bool,
    },
    /// Mounts again where the daemon was told to mount at its start, or at `path`.
    Mount {
        path: Option<WirePath>,
    },
    /// Flushes, unmounts, and ends the daemon after the answer is sent.
    Down,
}

/// The answer to a request of the same name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Response {
    Ping(PingReport),
    Status(StatusReport),
    Nodes(NodesReport),
    Token(TokenReport),
    Df(DfReport),
    Info(InfoReport),
    Policy(PolicyReport),
    /// To everything about quotas.
    Quotas(QuotasReport),
    CacheDrop(CacheDropReport),
    /// To everything that only does something.
    Done(DoneReport),
}

/// A path as JSON: text where it is UTF-8, else its bytes as numbers, because a file name on
/// Linux is bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct WirePath(pub PathBuf);

impl WirePath {
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl From<PathBuf> for WirePath {
    fn from(path: PathBuf) -> Self {
        Self(path)
    }
}

impl From<&Path> for WirePath {
    fn from(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

/// Control characters are escaped, so that a name cannot forge lines of output.
impl std::fmt::Display for WirePath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for chunk in self.0.as_os_str().as_bytes().utf8_chunks() {
            for c in chunk.valid().chars() {
                if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
            }
            for b in chunk.invalid() {
                write!(f, "\\x{b:02x}")?;
            }
        }
        Ok(())
    }
}

impl Serialize for WirePath {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => self.0.as_os_str().as_bytes().serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for WirePath {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Spelling {
            Text(String),
            Bytes(Vec<u8>),
        }
        Ok(Self(match Spelling::deserialize(deserializer)? {
            Spelling::Text(text) => PathBuf::from(text),
            Spelling::Bytes(bytes) => PathBuf::from(OsString::from_vec(bytes)),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_as_the_documentation_spells_them() {
        for (text, request) in [
            (r#"{"verb":"ping"}"#, Request::Ping),
            (r#"{"verb":"token","ttl_secs":3600,"uses":1}"#, Request::Token { ttl_secs: 3600, uses: 1 }),
            (r#"{"verb":"node-remove","name":"c","force":false}"#, Request::NodeRemove { name: "c".into(), force: false }),
            (r#"{"verb":"df","path":null}"#, Request::Df { path: None }),
            (r#"{"verb":"cache-drop"}"#, Request::CacheDrop),
            (r#"{"verb":"sync"}"#, Request::Sync),
        ] {
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
        }
    }

    #[test]
    fn a_path_that_is_not_text_survives() {
        let path = WirePath(PathBuf::from(OsString::from_vec(b"/srv/\xff\n".to_vec())));
        let request = Request::Info { path: path.clone() };
        let line = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
        assert_eq!(path.to_string(), "/srv/\\xff\\n");
    }
}
