//! Who asks: the identity in a request, and what `/proc` says of the thread behind it.

use std::fs;

/// The credentials of the thread that made a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    /// Thread id, as this server sees it; 0 when the thread lives in a pid namespace it cannot see.
    pub pid: u32,
}

/// `CAP_FSETID` in capability(7).
const CAP_FSETID: u32 = 4;

impl Caller {
    /// The server's own work.
    pub const ROOT: Self = Self { uid: 0, gid: 0, pid: 0 };

    /// Whether setgid survives this caller's chmod of a file of group `gid`: chmod(2) clears it
    /// unless the caller is in the group or has CAP_FSETID.
    pub fn keeps_setgid(&self, gid: u32) -> bool {
        if self.uid == 0 || self.gid == gid {
            return true;
        }
        let Some(status) = ThreadStatus::read(self.pid) else { return false };
        status.groups.contains(&gid) || status.effective_capabilities & (1 << CAP_FSETID) != 0
    }
}

/// Whether a thread that waits for a lock shall stop waiting: a signal that it neither blocks nor
/// ignores is pending, or the thread is gone.
///
/// The kernel's own interrupt message does not reach us (fuser 0.18 answers it ENOSYS), so this is
/// asked again and again while the thread waits. A thread we cannot see (0) is never interrupted.
pub fn interrupted(thread: u32) -> bool {
    if thread == 0 {
        return false;
    }
    match ThreadStatus::read(thread) {
        Some(status) => (status.signals_pending & !(status.signals_blocked | status.signals_ignored)) != 0,
        None => true,
    }
}

/// The lines of `/proc/TID/status` we need; format in proc_pid_status(5).
#[derive(Debug, Default, PartialEq, Eq)]
struct ThreadStatus {
    signals_pending: u64,
    signals_blocked: u64,
    signals_ignored: u64,
    effective_capabilities: u64,
    groups: Vec<u32>,
}

impl ThreadStatus {
    fn read(thread: u32) -> Option<Self> {
        if thread == 0 {
            return None;
        }
        // Reading /proc, never the mounted file system: this cannot come back to us.
        fs::read(format!("/proc/{thread}/status")).ok().map(|text| Self::parse(&text))
    }

    fn parse(text: &[u8]) -> Self {
        let mut status = Self::default();
        for line in text.split(|&b| b == b'\n') {
            let Some(colon) = line.iter().position(|&b| b == b':') else { continue };
            let value = String::from_utf8_lossy(&line[colon + 1..]);
            let mask = || u64::from_str_radix(value.trim(), 16).unwrap_or(0);
            match &line[..colon] {
                b"SigPnd" | b"ShdPnd" => status.signals_pending |= mask(),
                b"SigBlk" => status.signals_blocked = mask(),
                b"SigIgn" => status.signals_ignored = mask(),
                b"CapEff" => status.effective_capabilities = mask(),
                b"Groups" => status.groups = value.split_whitespace().filter_map(|gid| gid.parse().ok()).collect(),
                _ => {}
            }
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_without_pending_signals_is_not_interrupted() {
        assert!(!interrupted(rustix::thread::gettid().as_raw_nonzero().get() as u32));
    }

    #[test]
    fn a_thread_that_is_gone_is_interrupted_and_an_invisible_one_is_not() {
        assert!(interrupted(u32::MAX - 1));
        assert!(!interrupted(0));
    }

    #[test]
    fn status_lines_are_understood_whatever_the_program_calls_itself() {
        let text = b"Name:\tSigPnd: ff\nGroups:\t4 27 1000 \nSigPnd:\t0000000000000002\nShdPnd:\t0000000000000100\nSigBlk:\t0000000000000002\nSigIgn:\t0000000000001000\nCapEff:\t0000000000000010\n";
        let status = ThreadStatus::parse(text);
        assert_eq!(status.signals_pending, 0x102);
        assert_eq!(status.signals_blocked, 2);
        assert_eq!(status.groups, [4, 27, 1000]);
        assert_ne!(status.effective_capabilities & (1 << CAP_FSETID), 0);
    }
}
