//! Chunks of CTFS: split, hash, cache tier, chunk store, placement.
