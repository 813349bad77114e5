//! Several servers of CTFS in one thread, with everything around them simulated from one seed.
//!
//! What runs is the product: `ctfs-consensus` with openraft, its log and its leases, `ctfs-vfs` with
//! delegations and contents, `ctfs-journal`, `ctfs-pair`. Simulated are the network ([`network`]), the disks' pace and
//! what a loss of power takes ([`machine`], the journal's crash disk), the chunk stores ([`chunks`]), the
//! kernels ([`server::kernel`]), and time itself ([`sim`]). Each server has a runtime of its own with a
//! clock that stands still unless the simulation moves it; the simulation runs them in turns of a
//! millisecond. So a crash is dropping a runtime, and a pause is a turn left out.
//!
//! Reading order: [`sim`] (time, servers, faults), [`server`] (how one is wired), [`history`] and
//! [`invariants`] (what is claimed), [`storm`] (a random run), [`scenarios`] (those of the coherence notes).
//!
//! One process runs one simulation: tokio counts the runtimes of a process into their seeds, so only the
//! first of a process is the same again.

pub mod chance;
pub mod chunks;
#[allow(dead_code)] // The journal's own tests use the rest of it.
#[path = "../../ctfs-journal/src/tests/disk.rs"]
mod crash_disk;
pub mod history;
pub mod invariants;
pub mod machine;
pub mod network;
pub mod programs;
pub mod scenarios;
pub mod server;
pub mod shared;
pub mod sim;
pub mod storm;
pub mod trace;

use crash_disk::CrashDisk;
// As the crash disk names them.
use ctfs_journal::{Disk, DiskFile};
