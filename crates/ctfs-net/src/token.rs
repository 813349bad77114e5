//! The line an operator pastes on a server that is to join.
//!
//! `ctfs1-` and then, in lower-case base32 without padding: version byte 1, the hash of the
//! authority's certificate (32 bytes), the one-time secret (16), the expiry (seconds since 1970,
//! i64 little endian), the number of addresses (u8), each address (length u8, UTF-8), and the
//! first four bytes of the BLAKE3 of all that. The checksum tells a typing error from an expired
//! or revoked token; it protects against nothing else.

use std::{fmt, str::FromStr, sync::LazyLock};

use ctfs_types::Timestamp;
use data_encoding::{Encoding, Specification};

use crate::TokenError;

const PREFIX: &str = "ctfs1-";
const VERSION: u8 = 1;
const CHECKSUM_BYTES: usize = 4;
/// Longer than any token we make; keeps a pasted file from being worked on.
const TEXT_BYTES_MAX: usize = 128 << 10;

static BASE32: LazyLock<Encoding> = LazyLock::new(|| {
    let mut specification = Specification::new();
    specification.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    specification.encoding().expect("32 distinct symbols make an encoding")
});

/// What a stranger needs to join: whom to trust, where to ask, and what to say.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// BLAKE3 of the certificate of the cluster's authority.
    pub ca_hash: [u8; 32],
    /// `host:port` of members, best first; at most 255, each at most 255 bytes.
    pub addresses: Vec<String>,
    /// Shown to the cluster only after its authority was checked.
    pub secret: [u8; 16],
    /// Whole seconds.
    pub expires: Timestamp,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("addresses", &self.addresses)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

impl JoinToken {
    /// A fresh secret from the system's random source.
    pub fn new_secret() -> [u8; 16] {
        rand::random()
    }

    /// What the cluster remembers of a token: BLAKE3 of its secret.
    pub fn secret_hash(&self) -> [u8; 32] {
        *blake3::hash(&self.secret).as_bytes()
    }

    pub fn expired(&self, now: Timestamp) -> bool {
        now >= self.expires
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&self.ca_hash);
        bytes.extend_from_slice(&self.secret);
        bytes.extend_from_slice(&self.expires.secs.to_le_bytes());
        // What does not fit into the format is left out; other addresses lead to the same cluster.
        let fitting: Vec<&String> = self.addresses.iter().filter(|text| text.len() <= 255).take(255).collect();
        bytes.push(fitting.len() as u8);
        for address in fitting {
            bytes.push(address.len() as u8);
            bytes.extend_from_slice(address.as_bytes());
        }
        let checksum = checksum(&bytes);
        bytes.extend_from_slice(&checksum);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, TokenError> {
        let split = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or(TokenError::Mistyped)?;
        let (body, sum) = bytes.split_at(split);
        if checksum(body) != sum {
            return Err(TokenError::Mistyped);
        }
        let (&version, mut body) = body.split_first().ok_or(TokenError::Malformed)?;
        if version != VERSION {
            return Err(TokenError::Version(version));
        }
        let ca_hash = take(&mut body)?;
        let secret = take(&mut body)?;
        let expires = Timestamp::new(i64::from_le_bytes(take(&mut body)?), 0);
        let [count] = take(&mut body)?;
        let mut addresses = Vec::new();
        for _ in 0..count {
            let [len] = take(&mut body)?;
            let (address, rest) = body.split_at_checked(usize::from(len)).ok_or(TokenError::Malformed)?;
            addresses.push(String::from_utf8(address.to_vec()).map_err(|_| TokenError::Malformed)?);
            body = rest;
        }
        if body.is_empty() { Ok(Self { ca_hash, addresses, secret, expires }) } else { Err(TokenError::Malformed) }
    }
}

fn take<const N: usize>(body: &mut &[u8]) -> Result<[u8; N], TokenError> {
    let (head, rest) = body.split_first_chunk().ok_or(TokenError::Malformed)?;
    *body = rest;
    Ok(*head)
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let [a, b, c, d, ..] = *blake3::hash(bytes).as_bytes();
    [a, b, c, d]
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", BASE32.encode(&self.encode()))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    /// White space around the token is ignored, as pasting adds it.
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let body = text.trim().strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
        if body.len() > TEXT_BYTES_MAX {
            return Err(TokenError::NotAToken);
        }
        Self::decode(&BASE32.decode(body.as_bytes()).map_err(|_| TokenError::Mistyped)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            ca_hash: [7; 32],
            addresses: vec!["one.example:7440".into(), "[fd00::1]:7440".into()],
            secret: [9; 16],
            expires: Timestamp::new(1_800_000_000, 0),
        }
    }

    #[test]
    fn a_token_reads_back() {
        let text = token().to_string();
        assert!(text.starts_with("ctfs1-"));
        assert_eq!(format!("  {text}\n").parse(), Ok(token()));
    }

    #[test]
    fn any_changed_character_is_refused() {
        let text = token().to_string();
        for at in 0..text.len() {
            for other in b"abcdefghijklmnopqrstuvwxyz01234567-A".iter().filter(|&&c| c != text.as_bytes()[at]) {
                let mut bad = text.clone().into_bytes();
                bad[at] = *other;
                let bad = String::from_utf8(bad).unwrap();
                let error = bad.parse::<JoinToken>().unwrap_err();
                let expected = if at < PREFIX.len() { TokenError::NotAToken } else { TokenError::Mistyped };
                assert_eq!(error, expected, "character {at} as {}", *other as char);
            }
        }
    }

    #[test]
    fn a_cut_off_or_doubled_token_is_mistyped() {
        let text = token().to_string();
        for len in PREFIX.len()..text.len() {
            assert_eq!(text[..len].parse::<JoinToken>(), Err(TokenError::Mistyped), "first {len} characters");
        }
        assert_eq!(format!("{text}{text}").parse::<JoinToken>(), Err(TokenError::Mistyped));
    }

    #[test]
    fn a_token_of_a_later_version_is_told_apart() {
        let mut bytes = vec![2, 0, 0];
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum);
        assert_eq!(format!("{PREFIX}{}", BASE32.encode(&bytes)).parse::<JoinToken>(), Err(TokenError::Version(2)));
    }

    #[test]
    fn a_token_does_not_show_its_secret_in_logs() {
        let shown = format!("{:?}", token());
        assert!(!shown.contains("secret") && !shown.contains("9, 9"), "{shown}");
    }

    proptest! {
        #[test]
        fn hostile_tokens_never_panic(text in "(ctfs1-)?[a-z2-7]{0,200}", body in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = text.parse::<JoinToken>();
            let mut sealed = body;
            sealed.insert(0, VERSION);
            let sum = checksum(&sealed);
            sealed.extend_from_slice(&sum);
            let _ = JoinToken::decode(&sealed);
        }

        #[test]
        fn every_token_reads_back(ca_hash: [u8; 32], secret: [u8; 16], secs: i64, addresses in prop::collection::vec("[a-z.]{0,60}:[0-9]{1,5}", 0..5)) {
            let token = JoinToken { ca_hash, addresses, secret, expires: Timestamp::new(secs, 0) };
            prop_assert_eq!(token.to_string().parse(), Ok(token));
        }
    }
}
