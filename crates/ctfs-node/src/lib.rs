//! One CTFS server: wiring, apply loop, repair, garbage collection, admin.

pub mod admin;
pub mod problem;
