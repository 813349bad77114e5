//! Numbers that several crates must agree on, each with its reason.

/// `NAME_MAX` of Linux: bytes in one path component.
pub const NAME_BYTES_MAX: usize = 255;
/// `PATH_MAX` less its NUL: bytes in a symlink target.
pub const SYMLINK_BYTES_MAX: usize = 4095;
/// `XATTR_NAME_MAX` of Linux.
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// `XATTR_SIZE_MAX` of Linux.
pub const XATTR_VALUE_BYTES_MAX: usize = 65536;
/// Hard links to one inode; ext4 allows 65000, and programs know that number.
pub const LINKS_MAX: u32 = 65000;
/// Largest file: 2^63 - 1 bytes is what `off_t` holds; we stop at 2^60 so that sums cannot overflow.
pub const FILE_BYTES_MAX: u64 = 1 << 60;
/// Content up to this size lives in the metadata. Larger saves chunk writes but grows every server's log.
pub const INLINE_BYTES_MAX: usize = 4096;
/// Most bytes a command may encode to; a decoder refuses more before it allocates.
pub const COMMAND_BYTES_MAX: usize = 1 << 20;
/// A wish for a copy of a chunk on every server, however many there are.
pub const COPIES_ON_EVERY: u8 = u8::MAX;
/// Largest chunk: one cell of 8 MiB.
pub const CHUNK_BYTES_MAX: usize = 8 << 20;
