//! What is mounted where, from `/proc/self/mountinfo`: asking the mountpoint itself could hang.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// One line of proc_pid_mountinfo(5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountLine {
    pub mountpoint: PathBuf,
    /// Minor device number; for FUSE the number of its connection in `/sys/fs/fuse/connections`.
    pub minor: u32,
    pub fs_type: String,
}

/// The topmost mount on exactly `path`, if there is one.
pub fn mounted_on(path: &Path) -> io::Result<Option<MountLine>> {
    let text = fs::read("/proc/self/mountinfo")?;
    Ok(parse(&text).rfind(|line| line.mountpoint == path))
}

/// Whether anything is mounted below the mount on `path`, as far as this process sees.
pub fn any_inside(path: &Path) -> io::Result<bool> {
    let text = fs::read("/proc/self/mountinfo")?;
    let inside = |line: MountLine| line.mountpoint != path && line.mountpoint.starts_with(path);
    Ok(parse(&text).any(inside))
}

fn parse(text: &[u8]) -> impl DoubleEndedIterator<Item = MountLine> + '_ {
    text.split(|&b| b == b'\n').filter_map(parse_line)
}

fn parse_line(line: &[u8]) -> Option<MountLine> {
    // 36 35 0:45 / /mnt\040x rw,noatime shared:1 - fuse.ctfs ctfs rw,user_id=0
    let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
    let device = std::str::from_utf8(fields.get(2)?).ok()?;
    let minor = device.split_once(':')?.1.parse().ok()?;
    let mountpoint = PathBuf::from(OsString::from_vec(unescape(fields.get(4)?)));
    let dash = fields.iter().skip(6).position(|field| field == b"-")? + 6;
    let fs_type = String::from_utf8_lossy(fields.get(dash + 1)?).into_owned();
    Some(MountLine { mountpoint, minor, fs_type })
}

/// Space, tab, newline and backslash stand as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| tail.get(..3)).flatten().and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_escapes_and_optional_fields_is_understood() {
        let line = b"36 35 0:45 / /mnt/a\\040b rw,noatime shared:1 master:2 - fuse.ctfs ctfs rw,user_id=0";
        let parsed = parse_line(line).unwrap();
        assert_eq!(parsed.mountpoint, Path::new("/mnt/a b"));
        assert_eq!((parsed.minor, parsed.fs_type.as_str()), (45, "fuse.ctfs"));
    }

    #[test]
    fn garbage_is_no_mount() {
        for line in [&b""[..], b"1 2 3", b"36 35 0:x / /mnt rw - fuse x", b"36 35 0:45 / /mnt rw fuse"] {
            assert_eq!(parse_line(line), None);
        }
    }

    #[test]
    fn the_root_of_this_machine_is_mounted() {
        assert!(mounted_on(Path::new("/")).unwrap().is_some());
    }
}
