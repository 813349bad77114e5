//! The addresses of this server's network interfaces.

use std::{
    ffi::CStr,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Addresses peers may try, VPN and LAN alike; loopback and link-local ones are left out unless
/// there is nothing else.
pub fn addresses() -> Vec<IpAddr> {
    let all = interface_addresses();
    let public: Vec<IpAddr> = all.iter().copied().filter(|ip| !ip.is_loopback() && !is_link_local(ip)).collect();
    if public.is_empty() { vec![IpAddr::V4(Ipv4Addr::LOCALHOST)] } else { public }
}

fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn interface_addresses() -> Vec<IpAddr> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: getifaddrs fills `list` or fails; it is freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut next = list;
    while !next.is_null() {
        // SAFETY: `next` is an element of the list getifaddrs made, alive until freeifaddrs.
        let entry = unsafe { &*next };
        next = entry.ifa_next;
        // SAFETY: ifa_name is a NUL-terminated string of the same list.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) };
        let container_bridge = [&b"docker"[..], b"cni", b"veth", b"cali", b"flannel", b"podman"]
            .iter()
            .any(|prefix| name.to_bytes().starts_with(prefix));
        if entry.ifa_addr.is_null() || container_bridge {
            continue;
        }
        // SAFETY: a non-null ifa_addr points to a sockaddr whose family tells its real type.
        let family = i32::from(unsafe { (*entry.ifa_addr).sa_family });
        if family == libc::AF_INET {
            // SAFETY: AF_INET means sockaddr_in.
            let address = unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in>() };
            found.push(IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr))));
        } else if family == libc::AF_INET6 {
            // SAFETY: AF_INET6 means sockaddr_in6.
            let address = unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in6>() };
            found.push(IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr)));
        }
    }
    // SAFETY: `list` came from getifaddrs and nothing refers to it any more.
    unsafe { libc::freeifaddrs(list) };
    found
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_always_an_address_to_offer() {
        assert!(!super::addresses().is_empty());
    }
}
