//! Tests of the namespace.
//!
//! [`model`] is a naive file system next to the real one, compared after every step by
//! [`namespace_vs_model`]; [`lock_model`] does the same for locks, byte by byte. [`determinism`]
//! holds replicas against each other, [`interleaved`] logs that carry other commands between. [`two_servers`] has commands happen ahead of the log. [`claims`] are the single rules, each under its own name.

mod claims;
mod determinism;
mod golden;
mod harness;
mod interleaved;
mod lock_model;
mod model;
mod namespace_vs_model;
mod observe;
mod steps;
mod two_servers;
