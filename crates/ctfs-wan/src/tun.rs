//! TUN devices in other network namespaces.

use std::{fs::File, os::fd::AsRawFd};

use anyhow::{Context, Result, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Name of the device in each namespace.
const NAME: &[u8] = b"eth0";

/// Makes a TUN device in `namespace`, by its name below /run/netns. It goes with the file.
pub fn open(namespace: &str) -> Result<File> {
    let path = format!("/run/netns/{namespace}");
    // A namespace is a thread's: one of its own for the way there.
    let opened = std::thread::spawn(move || {
        let namespace = File::open(&path).with_context(|| format!("open {path}"))?;
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("enter {path}"))?;
        make()
    });
    opened.join().map_err(|_| anyhow!("the thread in {namespace} broke down"))?
}

fn make() -> Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun").context("open /dev/net/tun")?;
    // SAFETY: all zeros is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which this is, for as long as the call lasts.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if status != 0 {
        return Err(std::io::Error::last_os_error()).context("make a TUN device");
    }
    Ok(file)
}
