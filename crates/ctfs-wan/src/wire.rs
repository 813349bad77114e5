//! Packets on their way.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    net::Ipv4Addr,
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, Instant},
};

use anyhow::Result;

/// Packets under way to one server. At 1500 bytes 24 MiB, which is 2.5 Gbit/s over a round trip of
/// 150 ms; what comes when it is full is dropped, as a router would.
const PACKETS_MAX: usize = 16_384;
/// Longer than any packet of a device with the usual MTU; a longer one is cut off by the kernel
/// and dropped by its receiver.
const PACKET_BYTES_MAX: usize = 65_535;

/// A packet and when it came.
type Sent = (Instant, Vec<u8>);

/// Where each address is, and how far.
pub struct Wire {
    ends: Arc<RwLock<BTreeMap<Ipv4Addr, SyncSender<Sent>>>>,
    /// Microseconds one way.
    delay: Arc<AtomicU64>,
}

impl Wire {
    pub fn new(rtt: Duration) -> Self {
        let wire = Self { ends: Arc::default(), delay: Arc::default() };
        wire.set_rtt(rtt);
        wire
    }

    /// Counts also for what is under way.
    pub fn set_rtt(&self, rtt: Duration) {
        self.delay.store(u64::try_from(rtt.as_micros() / 2).unwrap_or(u64::MAX), Relaxed);
    }

    /// From now on `address` is behind `device`. Both threads end when the device is gone.
    pub fn attach(&self, address: Ipv4Addr, device: File) -> Result<()> {
        let (sender, packets) = sync_channel(PACKETS_MAX);
        let (out, delay, ends) = (device.try_clone()?, self.delay.clone(), self.ends.clone());
        self.ends.write().unwrap_or_else(|broken| broken.into_inner()).insert(address, sender);
        std::thread::Builder::new().name(format!("to {address}")).spawn(move || deliver(&packets, out, &delay))?;
        std::thread::Builder::new().name(format!("from {address}")).spawn(move || collect(device, &ends))?;
        Ok(())
    }
}

/// Reads what a server sends.
fn collect(mut device: impl Read, ends: &RwLock<BTreeMap<Ipv4Addr, SyncSender<Sent>>>) {
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    // A device whose namespace is gone fails for good.
    while let Ok(length) = device.read(&mut buffer) {
        let packet = &buffer[..length];
        let now = Instant::now();
        let ends = ends.read().unwrap_or_else(|broken| broken.into_inner());
        let Some(end) = destination(packet).and_then(|address| ends.get(&address)) else { continue };
        match end.try_send((now, packet.to_vec())) {
            // Full, or the server behind it is gone: lost on the way.
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }
}

/// Writes what is for one server, each packet when its time has come. Packets of equal delay come
/// due in the order they came in, so a queue is all that is needed.
fn deliver(packets: &Receiver<Sent>, mut device: impl Write, delay: &AtomicU64) {
    while let Ok((came, packet)) = packets.recv() {
        let due = came + Duration::from_micros(delay.load(Relaxed));
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // A device that is down takes nothing: lost on the way.
        let _ = device.write(&packet);
    }
}

/// Destination of an IPv4 packet, RFC 791 section 3.1.
fn destination(packet: &[u8]) -> Option<Ipv4Addr> {
    let version = packet.first()? >> 4;
    let address: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    (version == 4).then(|| Ipv4Addr::from(address))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    const TO: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 2);

    fn packet(number: u8) -> Vec<u8> {
        let mut packet = vec![0; 21];
        packet[0] = 0x45;
        packet[16..20].copy_from_slice(&TO.octets());
        packet[20] = number;
        packet
    }

    /// A device that gives these packets, then is gone.
    struct Gives(std::vec::IntoIter<Vec<u8>>);

    impl Read for Gives {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let packet = self.0.next().ok_or(std::io::ErrorKind::NotFound)?;
            buffer[..packet.len()].copy_from_slice(&packet);
            Ok(packet.len())
        }
    }

    struct Takes(Sender<(Instant, Vec<u8>)>);

    impl Write for Takes {
        fn write(&mut self, packet: &[u8]) -> std::io::Result<usize> {
            let _ = self.0.send((Instant::now(), packet.to_vec()));
            Ok(packet.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn packets_arrive_half_a_round_trip_later_in_their_order() {
        let (sender, packets) = sync_channel(PACKETS_MAX);
        let ends = RwLock::new(BTreeMap::from([(TO, sender)]));
        let before = Instant::now();
        collect(Gives((0..100).map(packet).collect::<Vec<_>>().into_iter()), &ends);
        drop(ends);
        let (arrived, arrivals) = channel();
        deliver(&packets, Takes(arrived), &AtomicU64::new(20_000));
        let arrivals: Vec<_> = arrivals.iter().collect();
        assert_eq!(arrivals.iter().map(|(_, packet)| packet[20]).collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
        assert!(arrivals.iter().all(|(at, _)| *at >= before + Duration::from_millis(20)));
    }

    #[test]
    fn what_is_for_nobody_or_for_a_full_queue_is_dropped() {
        let (sender, packets) = sync_channel(2);
        let ends = RwLock::new(BTreeMap::from([(TO, sender)]));
        let mut foreign = packet(9);
        foreign[16] = 11;
        collect(Gives(vec![foreign, vec![], vec![0x60; 40], packet(0), packet(1), packet(2)].into_iter()), &ends);
        drop(ends);
        assert_eq!(packets.iter().map(|(_, packet)| packet[20]).collect::<Vec<_>>(), [0, 1]);
    }
}
