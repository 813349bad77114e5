//! Rules of coherence that a simulation can take out, to show what they are for.
//!
//! Everywhere but in `ctfs-sim` every rule is kept, and [`keeps`] is a constant. The feature `breakable`
//! lets a thread break one.

/// A rule, named after what it demands. Numbers are those of `docs/architecture.md`, "Rules of coherence".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// 1: an acknowledgement waits for no lock that a request of the kernel holds.
    NoticesWaitForNoLock,
    /// 2: a change is answered when every leased server has it.
    AnswersWaitForLeases,
    /// 2: a read shows nothing that others may not show yet.
    ReadsWaitForVisible,
    /// 3: a page of a mapping that is written back late is a write like any other: the file is taken for it first.
    LateStoresTakeTheFile,
    /// 4: a command that goes through the log follows all that happened ahead of it.
    DirectFollowsStreamed,
    /// 4: fsync answers when what it is about is in the log.
    FsyncWaitsForLog,
    /// 4: fsync that goes by the journal answers when the pair has it, too.
    FsyncWaitsForPair,
    /// 5: only what the holder's directories cover happens ahead of the log.
    OnlyCoveredIsAhead,
    /// 6: who waits for a directory gives up its own meanwhile.
    WaitingGivesUp,
    /// 7: taking a directory drops what others keep of anything in it.
    TakingDropsCaches,
    /// 8: who wants a state that has all that was done puts the question to all who hold anything.
    SettlingAsksHolders,
    /// 9: a life that was ended changes nothing more.
    EndedLivesAreRefused,
    /// 9: what a life held is free when all that it left was sent, and not before.
    HeldUntilSent,
    /// 9: what a life is refused because it was ended may still be sent by who takes over.
    RefusalsAreForgotten,
    /// 9: a copy takes nothing more before it is read.
    FencedBeforeRead,
    /// 10: what the metadata have is not sent over newer bytes.
    NotedIsNotSent,
    /// 10: a copy counts when the log names its server.
    PairIsRecorded,
    /// 10: a server is named when it has all of the journal.
    PairHasAll,
    /// 11: a lease hangs on the last heartbeat that a quorum acknowledged.
    LeasesHangOnQuorum,
    /// 12: a request happens once, however often it is asked.
    RequestsHappenOnce,
    /// 13: a life that goes on after an end forgets what its kernel kept.
    NewLifeForgets,
    /// 14: handles through which locks were lost are dead.
    LostLocksEndHandles,
    /// 15: what names a chunk goes through the log, and is not in a journal alone.
    ChunksAreNamedInLog,
    /// 16: who lost its log does not vote on.
    LostLogVotesNot,
    /// 17: a lease ends also while the machine is suspended.
    LeasesCountSuspend,
    /// 18: who is taken back reads alone only after it has what was answered without it.
    ReadmissionCatchesUp,
    /// 19: an inode that is open anywhere stays.
    OpenInodesStay,
}

impl Rule {
    pub const ALL: [Self; 27] = [
        Self::NoticesWaitForNoLock,
        Self::AnswersWaitForLeases,
        Self::ReadsWaitForVisible,
        Self::LateStoresTakeTheFile,
        Self::DirectFollowsStreamed,
        Self::FsyncWaitsForLog,
        Self::FsyncWaitsForPair,
        Self::OnlyCoveredIsAhead,
        Self::WaitingGivesUp,
        Self::TakingDropsCaches,
        Self::SettlingAsksHolders,
        Self::EndedLivesAreRefused,
        Self::HeldUntilSent,
        Self::RefusalsAreForgotten,
        Self::FencedBeforeRead,
        Self::NotedIsNotSent,
        Self::PairIsRecorded,
        Self::PairHasAll,
        Self::LeasesHangOnQuorum,
        Self::RequestsHappenOnce,
        Self::NewLifeForgets,
        Self::LostLocksEndHandles,
        Self::ChunksAreNamedInLog,
        Self::LostLogVotesNot,
        Self::LeasesCountSuspend,
        Self::ReadmissionCatchesUp,
        Self::OpenInodesStay,
    ];
}

/// Whether the rule is kept: always, but where a simulation takes it out.
#[cfg(not(feature = "breakable"))]
#[inline(always)]
pub const fn keeps(_: Rule) -> bool {
    true
}

#[cfg(feature = "breakable")]
pub use breakable::{break_rule, keeps};

#[cfg(feature = "breakable")]
mod breakable {
    use std::cell::Cell;

    use super::Rule;

    thread_local! {
        static BROKEN: Cell<Option<Rule>> = const { Cell::new(None) };
    }

    /// Whether the rule is kept on this thread.
    pub fn keeps(rule: Rule) -> bool {
        BROKEN.get() != Some(rule)
    }

    /// From here on nobody on this thread keeps `rule`, and everybody all others.
    pub fn break_rule(rule: Option<Rule>) {
        BROKEN.set(rule);
    }
}
