//! Real daemons in network namespaces, over real QUIC and a real kernel mount.
//!
//! Each test starts its own cluster through `scripts/cluster` and takes it down again, also when
//! the test is killed: see [`support::Cluster`]. They need root.

mod coherence;
mod data;
mod databases;
mod directories;
mod faults;
mod fidelity;
mod held;
mod input;
mod journal;
mod members;
mod model;
mod posix;
mod programs;
mod quota;
mod sharing;
mod support;
mod tools;
mod tree;
mod wan;
