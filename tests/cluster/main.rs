//! Real daemons in network namespaces, over real QUIC and a real kernel mount.
//!
//! Each test starts its own cluster through `scripts/cluster` and takes it down again, also when
//! the test is killed: see [`support::Cluster`]. They need root.

mod data;
mod faults;
mod fidelity;
mod input;
mod members;
mod programs;
mod support;
mod tree;
