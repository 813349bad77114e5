//! File system semantics of CTFS: operations, handles, errno.
