//! The replicated log of CTFS, its store, snapshots and read visibility.
