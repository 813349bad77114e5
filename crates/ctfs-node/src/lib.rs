//! One CTFS server: wiring, apply loop, repair, garbage collection, admin.
