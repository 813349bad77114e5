//! Peers over QUIC: identity, framing, small calls and bulk transfers.
