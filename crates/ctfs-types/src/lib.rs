//! The words every other crate of CTFS shares: ids, names, attributes, extents, limits.
//!
//! No behaviour lives here beyond validation and encoding. [`codec`] is the only place in CTFS
//! that names bincode: everything that reaches a disk or a wire goes through it.

pub mod attr;
pub mod bytes;
pub mod codec;
pub mod extent;
pub mod ids;
pub mod limits;
pub mod name;
pub mod octets;
pub mod rules;
pub mod size;
pub mod time;

pub use attr::{Attr, FileKind, FileUse, Holder};
pub use bytes::FileBytes;
pub use extent::{CellIndex, CellSize, Extent, ExtentData};
pub use ids::{ChunkId, Incarnation, Ino, LogIndex, NodeId, RequestId, Stamp};
pub use name::{FileName, InvalidName};
pub use size::ByteSize;
pub use time::Timestamp;
