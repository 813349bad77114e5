//! Numbers of the network, and the transport they make.

use std::{
    net::{Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt, congestion::CubicConfig};

/// Port on which servers answer unless told otherwise.
pub const DEFAULT_PORT: u16 = 7420;

/// Flow control of one stream: a whole 8 MiB transfer fits without waiting for credit.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// Flow control of a connection; see [`crate::link::BULK_WINDOW_BYTES`] for who may use how much.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// What someone may send before we know who it is.
const STRANGER_WINDOW_BYTES: u32 = 64 << 10;
/// Streams a member may have open: 16 transfers each way and the call streams, with room.
pub(crate) const STREAMS_MAX: u32 = 256;
/// Bytes of ours that may wait for acknowledgement. Above the peer's connection window, so that
/// the window, which bulk shares fairly, is what limits.
const SEND_WINDOW_BYTES: u64 = 64 << 20;
/// UDP payload that fits an Ethernet path (1500 less IPv6 and UDP headers); discovery probes up to it.
const UDP_PAYLOAD_BYTES_MAX: u16 = 1452;
/// UDP payload QUIC asks of every path (RFC 9000 section 14); fits a path MTU of 1280 with headers.
const UDP_PAYLOAD_BYTES_MIN: u16 = 1200;

/// Numbers and addresses of one [`crate::Network`].
#[derive(Debug, Clone)]
pub struct NetSettings {
    /// Where to listen; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// A connection from which nothing came for this long is dead.
    pub idle_timeout: Duration,
    /// How often an idle connection is exercised; several fit into `idle_timeout`.
    pub keep_alive: Duration,
    /// Time for one address to complete a connection.
    pub dial_timeout: Duration,
    /// First pause after a failed dial; doubles up to `backoff_max`, with jitter.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// Time for whoever dialled us to complete a handshake.
    pub handshake_timeout: Duration,
    /// Time for a stranger to send its join request.
    pub join_timeout: Duration,
    /// Socket buffers to ask the kernel for, bytes.
    pub socket_buffer_bytes: usize,
}

impl Default for NetSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv6Addr::UNSPECIFIED, DEFAULT_PORT)),
            // Equal to a lease: who is silent for longer has no say any more.
            idle_timeout: Duration::from_secs(3),
            keep_alive: Duration::from_millis(500),
            dial_timeout: Duration::from_secs(2),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(2),
            handshake_timeout: Duration::from_secs(5),
            join_timeout: Duration::from_secs(10),
            // A burst of 8 MiB is 60 ms of a gigabit link, longer than this process is ever off the CPU.
            socket_buffer_bytes: 8 << 20,
        }
    }
}

/// Who the other side of a connection is when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// We dialled: the certificate is checked before the first byte.
    Dialled,
    /// We were dialled: small limits until the handshake says by whom.
    Accepted,
}

impl NetSettings {
    pub(crate) fn transport(&self, admission: Admission) -> Arc<TransportConfig> {
        let mut transport = TransportConfig::default();
        let idle = IdleTimeout::try_from(self.idle_timeout).unwrap_or_else(|_| VarInt::from_u32(3_000).into());
        transport.max_idle_timeout(Some(idle));
        transport.keep_alive_interval(Some(self.keep_alive));
        transport.congestion_controller_factory(Arc::new(CubicConfig::default()));
        transport.initial_mtu(UDP_PAYLOAD_BYTES_MIN);
        transport.min_mtu(UDP_PAYLOAD_BYTES_MIN);
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(UDP_PAYLOAD_BYTES_MAX);
        transport.mtu_discovery_config(Some(discovery));
        // Servers are 1 to 150 ms apart; the default of 333 ms makes a lost first packet cost a second.
        transport.initial_rtt(Duration::from_millis(100));
        transport.stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES));
        transport.send_window(SEND_WINDOW_BYTES);
        transport.max_concurrent_uni_streams(VarInt::from_u32(0));
        transport.datagram_receive_buffer_size(None);
        let (window, streams) = match admission {
            Admission::Dialled => (CONNECTION_WINDOW_BYTES, STREAMS_MAX),
            Admission::Accepted => (STRANGER_WINDOW_BYTES, 1),
        };
        transport.receive_window(VarInt::from_u32(window));
        transport.max_concurrent_bidi_streams(VarInt::from_u32(streams));
        Arc::new(transport)
    }
}
