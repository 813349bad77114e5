//! The one table from errors to what a program sees in `errno`.
//!
//! Exhaustive on purpose: a new error does not compile until someone has decided here.

use ctfs_meta::MetaError;
use ctfs_types::InvalidName;
use libc::c_int;

use crate::FsError;

impl FsError {
    /// The errno the calling program sees, always positive.
    pub fn errno(&self) -> c_int {
        match self {
            Self::Meta(verdict) => meta_errno(verdict),
            Self::Name(why) => match why {
                InvalidName::Empty => libc::ENOENT,
                InvalidName::TooLong => libc::ENAMETOOLONG,
                InvalidName::ForbiddenByte | InvalidName::Dots => libc::EINVAL,
            },
            // Not EAGAIN: programs do not expect it from a regular file and some spin on it.
            Self::NoQuorum { .. } | Self::HolderAway { .. } => libc::EIO,
            Self::Shutdown => libc::ESHUTDOWN,
            Self::Store(_) => libc::EIO,
            Self::ChunkLost { .. } | Self::ChunkUnavailable { .. } => libc::EIO,
            // Not ENOSPC: there is room, the servers that have it are out of reach.
            Self::TooFewCopies { .. } => libc::EIO,
            Self::NoSpace | Self::CacheFull => libc::ENOSPC,
            Self::Cache(_) => libc::EIO,
            Self::LostWrites { .. } | Self::LostLocks(_) => libc::EIO,
            Self::TooBig => libc::EFBIG,
            Self::PastEnd => libc::ENXIO,
            // The kernel walks the path once more on ESTALE, and finds what the name leads to now.
            Self::Stale(_) => libc::ESTALE,
            Self::BadHandle(_) | Self::WrongMode => libc::EBADF,
            Self::Unsupported(_) => libc::EOPNOTSUPP,
            Self::Invalid(_) => libc::EINVAL,
            Self::NotPermitted => libc::EPERM,
            Self::Denied => libc::EACCES,
            Self::ReadOnly => libc::EROFS,
            Self::TooMany(_) => libc::ENFILE,
            Self::Interrupted => libc::EINTR,
            Self::NoLocks => libc::ENOLCK,
        }
    }
}

fn meta_errno(verdict: &MetaError) -> c_int {
    match verdict {
        // See `Stale` above: a name that leads to a gone inode is worth a second walk.
        MetaError::NoSuchInode(_) => libc::ESTALE,
        MetaError::NoSuchEntry { .. } => libc::ENOENT,
        MetaError::Exists { .. } => libc::EEXIST,
        MetaError::NotDirectory(_) => libc::ENOTDIR,
        MetaError::IsDirectory(_) => libc::EISDIR,
        MetaError::NotEmpty(_) => libc::ENOTEMPTY,
        MetaError::UnderItself(_) => libc::EINVAL,
        MetaError::TooManyLinks(_) => libc::EMLINK,
        MetaError::WrongKind(_) => libc::EINVAL,
        MetaError::FileTooBig => libc::EFBIG,
        MetaError::BadTarget => libc::ENAMETOOLONG,
        MetaError::NoSuchXattr => libc::ENODATA,
        MetaError::XattrExists => libc::EEXIST,
        MetaError::XattrTooBig => libc::E2BIG,
        MetaError::BadAcl => libc::EINVAL,
        // Merged again and again without end; the writer must hear that it did not succeed.
        MetaError::CellChanged { .. } => libc::EIO,
        // Waited for in vain: its holder neither answers nor has ended.
        MetaError::Held { .. } => libc::EIO,
        // Retried where they come up; a program that hears of them heard it too late to go on.
        MetaError::Shared(_) | MetaError::SizeChanged(_) => libc::EIO,
        MetaError::QuotaExceeded { .. } => libc::EDQUOT,
        // As between file systems, so that programs copy and remove.
        MetaError::AcrossQuota { .. } => libc::EXDEV,
        MetaError::Locked { .. } => libc::EAGAIN,
        MetaError::Deadlock => libc::EDEADLK,
        MetaError::TooManyWaiters => libc::ENOLCK,
        // Heard by whoever leaves a queue, never by a program.
        MetaError::NotWaiting => libc::EIO,
        MetaError::StaleIncarnation | MetaError::Answered => libc::EIO,
        // Between a server and the metadata, never a program's doing.
        MetaError::NumberNotReserved(_)
        | MetaError::BadReservation(_)
        | MetaError::TooManyReservations
        | MetaError::NotedBefore(_)
        | MetaError::NotTheSuccessor => libc::EIO,
        // The rest answers operators, not programs; listed so that the table stays complete.
        MetaError::AlreadyFounded => libc::EEXIST,
        MetaError::NoSuchToken | MetaError::TokenExpired | MetaError::KeyRemoved => libc::EACCES,
        MetaError::NoSuchMember => libc::ENOENT,
        MetaError::MemberNameTaken(_) => libc::EEXIST,
        MetaError::BadPolicy(_) => libc::EINVAL,
    }
}
