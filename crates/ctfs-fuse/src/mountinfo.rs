//! What is mounted where, from `/proc/self/mountinfo`: asking the mountpoint itself could hang.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use rustix::io::Errno;

/// One line of proc_pid_mountinfo(5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountLine {
    pub mountpoint: PathBuf,
    /// Minor device number; for FUSE the number of its connection in `/sys/fs/fuse/connections`.
    pub minor: u32,
    pub fs_type: String,
    pub source: String,
}

impl MountLine {
    /// Whether a daemon of ours made it, alive or dead.
    pub fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }
}

/// Type of our mounts in the table: the one that libfuse writes for a program `ctfs`.
pub(crate) const FS_TYPE: &str = "fuse.ctfs";

/// How long a mount is asked whether somebody serves it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether `path` is a mount whose server has died: then the kernel answers ENOTCONN at once, or ECONNABORTED to
/// who asked while it died. One that lives is in use; one that does not answer is taken for living.
///
/// The size of the file system is asked for, which the kernel does not remember; of the root it still answers the
/// attributes that the dead server gave.
pub fn is_dead(path: &Path) -> bool {
    let (sender, receiver) = mpsc::channel();
    let path = path.to_owned();
    let asking = thread::Builder::new().name("statfs".into()).spawn(move || {
        let answer = rustix::fs::statfs(&path);
        // Who asked may have given up.
        let _ = sender.send(matches!(answer, Err(Errno::NOTCONN | Errno::CONNABORTED)));
    });
    asking.is_ok() && receiver.recv_timeout(PATIENCE).unwrap_or(false)
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
    let source = String::from_utf8_lossy(&unescape(fields.get(dash + 2)?)).into_owned();
    Some(MountLine { mountpoint, minor, fs_type, source })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
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
        assert_eq!((parsed.minor, parsed.fs_type.as_str(), parsed.source.as_str()), (45, "fuse.ctfs", "ctfs"));
        assert!(parsed.is_ours());
    }

    #[test]
    fn an_escape_that_is_none_stays_as_it_is() {
        assert_eq!(unescape(b"a\\134b\\9\\04"), b"a\\b\\9\\04");
    }

    #[test]
    fn garbage_is_no_mount() {
        for line in [&b""[..], b"1 2 3", b"36 35 0:x / /mnt rw - fuse x", b"36 35 0:45 / /mnt rw fuse", b"36 35 0:45 / /mnt rw - fuse"] {
            assert_eq!(parse_line(line), None);
        }
    }

    #[test]
    fn the_root_of_this_machine_is_mounted() {
        assert!(mounted_on(Path::new("/")).unwrap().is_some());
    }
}
