//! The name of a directory entry.

use std::{borrow::Cow, ffi::OsStr, fmt, os::unix::ffi::OsStrExt};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::limits::NAME_BYTES_MAX;

/// One path component: 1 to 255 bytes, any byte but `/` and NUL, and neither `.` nor `..`.
///
/// Decoding checks the same rules, so a name from the wire is as good as one from the kernel.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileName(Box<[u8]>);

/// Why bytes are not a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    #[error("a name has at least one byte")]
    Empty,
    #[error("a name has at most {NAME_BYTES_MAX} bytes")]
    TooLong,
    #[error("a name holds neither '/' nor NUL")]
    ForbiddenByte,
    #[error("'.' and '..' are not entries")]
    Dots,
}

impl FileName {
    pub fn new(bytes: &[u8]) -> Result<Self, InvalidName> {
        match bytes {
            [] => Err(InvalidName::Empty),
            b"." | b".." => Err(InvalidName::Dots),
            _ if bytes.len() > NAME_BYTES_MAX => Err(InvalidName::TooLong),
            _ if bytes.iter().any(|&b| b == b'/' || b == 0) => Err(InvalidName::ForbiddenByte),
            _ => Ok(Self(bytes.into())),
        }
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn as_os_str(&self) -> &OsStr {
        OsStr::from_bytes(&self.0)
    }
}

impl From<FileName> for Vec<u8> {
    fn from(name: FileName) -> Self {
        name.0.into_vec()
    }
}

impl Serialize for FileName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for FileName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes: Cow<'de, [u8]> = serde_bytes::deserialize(deserializer)?;
        Self::new(&bytes).map_err(de::Error::custom)
    }
}

/// Control characters and bytes outside UTF-8 are escaped, so that a name cannot forge log lines.
impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                if c.is_control() { write!(f, "{}", c.escape_default())? } else { fmt::Write::write_char(f, c)? }
            }
            for b in chunk.invalid() {
                write!(f, "\\x{b:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_255_bytes_not_characters() {
        assert!(FileName::new(&[0xff; 255]).is_ok());
        assert_eq!(FileName::new(&[b'a'; 256]), Err(InvalidName::TooLong));
        assert_eq!(FileName::new("é".repeat(128).as_bytes()), Err(InvalidName::TooLong));
    }

    #[test]
    fn a_name_that_could_leave_its_directory_is_refused() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
            assert!(FileName::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_shown_name_holds_no_control_characters() {
        let name = FileName::new(b"a\x1b[2J\n\xff\xe2\x82\xac").unwrap();
        assert_eq!(name.to_string(), "a\\u{1b}[2J\\n\\xff\u{20ac}");
    }
}
