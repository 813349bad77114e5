//! The UDP socket under a network.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt},
};
use tracing::warn;

use crate::NetError;

/// Opens a socket on `listen`. On `[::]` it serves IPv4 too, and falls back to `0.0.0.0` where the
/// kernel has no IPv6.
pub(crate) fn open(listen: SocketAddr, buffer_bytes: usize) -> Result<UdpSocket, NetError> {
    let opened = match open_one(listen) {
        Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if listen.is_ipv6() && listen.ip().is_unspecified() => {
            open_one(SocketAddr::from((Ipv4Addr::UNSPECIFIED, listen.port())))
        }
        other => other,
    };
    let socket = opened.map_err(|errno| NetError::Bind { addr: listen, why: explain(errno) })?;
    raise_buffers(&socket, buffer_bytes);
    Ok(socket)
}

fn open_one(listen: SocketAddr) -> Result<UdpSocket, Errno> {
    let family = if listen.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    if listen.is_ipv6() && listen.ip().is_unspecified() {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    bind(&socket, &listen)?;
    Ok(UdpSocket::from(socket))
}

fn explain(errno: Errno) -> String {
    match errno {
        Errno::ADDRINUSE => "another program listens there already".to_owned(),
        Errno::ACCESS => "ports below 1024 need privileges".to_owned(),
        Errno::ADDRNOTAVAIL => "this machine does not have that address".to_owned(),
        other => io::Error::from(other).to_string(),
    }
}

/// Best effort: the forced variant needs CAP_NET_ADMIN, the plain one is capped by
/// `net.core.rmem_max` and `wmem_max`.
fn raise_buffers(socket: &UdpSocket, bytes: usize) {
    let receive = sockopt::set_socket_recv_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(socket, bytes));
    let send = sockopt::set_socket_send_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_send_buffer_size(socket, bytes));
    if let Err(errno) = receive.and(send) {
        warn!(error = %io::Error::from(errno), "cannot raise the socket buffers");
    }
}
