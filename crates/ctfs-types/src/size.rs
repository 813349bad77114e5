//! A number of bytes that people read and write.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Bytes, written with IEC units: `64GiB`, `1.5TiB`, `4096`. `G` means GiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSize {
    #[error("{0:?} is not a size; write a number with an optional unit, e.g. 512MiB or 64GiB")]
    NotASize(String),
    #[error("{0:?} is too much; the largest size is below 16 EiB")]
    TooMuch(String),
}

const UNITS: [(&str, u32); 6] = [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl FromStr for ByteSize {
    type Err = InvalidSize;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || InvalidSize::NotASize(text.to_owned());
        let much = || InvalidSize::TooMuch(text.to_owned());
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = (&trimmed[..split], trimmed[split..].trim());
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            unit => UNITS
                .iter()
                .find(|(name, _)| {
                    let name = name.to_ascii_lowercase();
                    unit == name || unit == &name[..1] || unit == format!("{}b", &name[..1])
                })
                .ok_or_else(bad)?
                .1,
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(1 << shift).map(Self).ok_or_else(much);
        }
        let value = number.parse::<f64>().map_err(|_| bad())? * (1u64 << shift) as f64;
        if value.is_finite() && value < u64::MAX as f64 { Ok(Self(value as u64)) } else { Err(much()) }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, shift) in UNITS {
            if self.0 >= 1 << shift {
                return write!(f, "{:.1} {name}", self.0 as f64 / (1u64 << shift) as f64);
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("64GiB", 64 << 30), ("120G", 120 << 30), ("1.5 TiB", 3 << 39), ("10mb", 10 << 20)] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for bad in ["", "GiB", "-1", "12 parsecs", "99999999999EiB", "1.2.3G"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        assert!(matches!("17EiB".parse::<ByteSize>(), Err(InvalidSize::TooMuch(_))));
    }
}
