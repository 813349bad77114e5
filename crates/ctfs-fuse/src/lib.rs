//! The kernel interface of CTFS.
