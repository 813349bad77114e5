//! What must hold in every run, one invariant in a file.
//!
//! | Invariant | File | Source |
//! | --- | --- | --- |
//! | histories of names, attributes, locks and appends are linearizable | [`linearizable`] with [`names`], [`attributes`], [`locks`], [`appends`] | `docs/semantics.md`, coherence rules 2, 7, 11 to 13, 18 |
//! | no read under a lease, or from a kernel's cache, shows the past | [`names`] and [`attributes`]: their readers are the kernels | rules 2, 7, 13, 17 |
//! | a file or directory has one holder at a time | [`holders`] | rules 5, 7, 9 |
//! | who held a lock and was cut off writes nothing more under it | [`locks`] | rule 14 |
//! | what fsync acknowledged stays | [`fsync`], [`prefix`] | rules 4, 9, 10, 15 |
//! | a crash leaves a prefix | [`prefix`] | rule 4 |
//! | equal logs make equal replicas | [`replicas`] | `docs/architecture.md`, invariant 5 |

pub mod appends;
pub mod attributes;
pub mod fsync;
pub mod holders;
pub mod linearizable;
pub mod locks;
pub mod names;
pub mod prefix;
pub mod replicas;
