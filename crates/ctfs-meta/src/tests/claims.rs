//! The rules one by one; the name of each test is the claim.

mod acl;
mod attrs;
mod bytes;
mod cluster;
mod cuts;
mod holding;
mod lives;
mod lock_waiters;
mod locks;
mod names;
mod numbers;
mod quotas;
mod requests;
mod totals;
