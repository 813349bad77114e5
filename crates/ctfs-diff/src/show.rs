//! Names, values and times as text that fits one line of any terminal.

use std::fmt::Write;

/// Any bytes as printable text that says them exactly: `\\`, `\n`, `\t`, `\r`, `\xff` for a byte
/// that is not UTF-8, `\u{1b}` for a character that is not for terminals.
pub fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\t' => text.push_str("\\t"),
                '\r' => text.push_str("\\r"),
                other if unfit(other) => text.extend(other.escape_unicode()),
                other => text.push(other),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// Controls, line separators, and marks that turn the direction of what follows.
fn unfit(character: char) -> bool {
    character.is_control() || matches!(character, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// Enough for what people put into xattrs; an ACL label or a capability fits.
const VALUE_SHOWN: usize = 64;

/// The value of an xattr: quoted text, or `0x` and hexadecimal digits; the first 64 bytes of it.
pub fn value(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(VALUE_SHOWN)];
    // A cut may fall into a character; that alone makes no text binary.
    let text = match std::str::from_utf8(shown) {
        Ok(text) => Some(text),
        Err(error) if shown.len() < bytes.len() && error.error_len().is_none() => std::str::from_utf8(&shown[..error.valid_up_to()]).ok(),
        Err(_) => None,
    };
    let mut line = match text {
        Some(text) if !text.contains(unfit) => format!("\"{}\"", escape(text.as_bytes()).replace('"', "\\\"")),
        _ => shown.iter().fold("0x".to_owned(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        }),
    };
    if bytes.len() > VALUE_SHOWN {
        let _ = write!(line, "... ({} bytes)", bytes.len());
    }
    line
}

/// RFC 3339 in UTC with all nine digits; outside the years 0 to 9999, which it cannot say, seconds.
pub fn time(seconds: i64, nanos: u32) -> String {
    const YEAR_0: i64 = -62_167_219_200;
    const YEAR_10000: i64 = 253_402_300_800;
    if !(YEAR_0..YEAR_10000).contains(&seconds) {
        return format!("@{seconds}+{nanos:09}ns");
    }
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{nanos:09}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_is_one_printable_line_that_says_its_bytes() {
        for (bytes, text) in [
            (&b"plain name"[..], "plain name"),
            ("größer 文".as_bytes(), "größer 文"),
            (b"new\nline\ttab\\", "new\\nline\\ttab\\\\"),
            (b"not-utf8-\xff\xfe", "not-utf8-\\xff\\xfe"),
            (b"\x1b[31mred\x7f", "\\u{1b}[31mred\\u{7f}"),
            ("\u{202e}gpj.exe".as_bytes(), "\\u{202e}gpj.exe"),
        ] {
            assert_eq!(escape(bytes), text);
        }
    }

    #[test]
    fn values_are_text_where_they_are_and_cut_where_long() {
        assert_eq!(value(b"a \"quote\""), "\"a \\\"quote\\\"\"");
        assert_eq!(value(&[0, 255]), "0x00ff");
        assert_eq!(value(b""), "\"\"");
        assert_eq!(value("ä".repeat(100).as_bytes()), format!("\"{}\"... (200 bytes)", "ä".repeat(32)));
        assert_eq!(value(format!("x{}", "ä".repeat(100)).as_bytes()), format!("\"x{}\"... (201 bytes)", "ä".repeat(31)));
    }

    #[test]
    fn times_are_told_to_the_nanosecond_also_before_1970_and_beyond_9999() {
        for (seconds, nanos, text) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (-1, 999_999_999, "1969-12-31T23:59:59.999999999Z"),
            (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
            (4_133_980_799, 5, "2100-12-31T23:59:59.000000005Z"),
            (-62_167_219_200, 0, "0000-01-01T00:00:00.000000000Z"),
            (253_402_300_799, 0, "9999-12-31T23:59:59.000000000Z"),
            (253_402_300_800, 7, "@253402300800+000000007ns"),
            (i64::MIN, 0, "@-9223372036854775808+000000000ns"),
        ] {
            assert_eq!(time(seconds, nanos), text);
        }
    }
}
