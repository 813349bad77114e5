//! A long line between servers in network namespaces of one machine, for tests and benchmarks.
//!
//! ```text
//! ctfs-wan run SOCKET 50ms               the line; asked through SOCKET, until it is told to end
//! ctfs-wan tell SOCKET attach NS ADDR    gives the namespace NS a device eth0; ADDR is behind it
//! ctfs-wan tell SOCKET rtt 150ms         how long a round trip takes from now on
//! ctfs-wan tell SOCKET end
//! ```
//!
//! netem is not in every kernel, so the delay is made here. Each namespace gets a TUN device instead
//! of a veth; a packet read from one is written, half a round trip later, to that of its destination.
//! Nothing is rewritten, so QUIC sees the addresses that the servers have, can move between them and
//! find its MTU; a TUN device without offloads hands over what GSO put together as the single
//! packets a wire would carry, with their checksums.
//!
//! Order is kept for each destination, also when the round trip changes. There is no limit on
//! bandwidth but the speed of this program, and no loss but where a queue is full.

mod tun;
mod wire;

use std::{
    io::{BufRead, BufReader, Write},
    net::Ipv4Addr,
    os::unix::net::{UnixListener, UnixStream},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use wire::Wire;

/// A round trip longer than this is a slip of the keyboard.
const RTT_MAX: Duration = Duration::from_secs(2);
/// Whoever asks on the socket is a script on the same machine.
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["run", socket, rtt] => run(socket, round_trip(rtt)?),
        ["tell", socket, ref message @ ..] if !message.is_empty() => tell(socket, &message.join(" ")),
        _ => bail!("usage: ctfs-wan run SOCKET RTT | ctfs-wan tell SOCKET attach NS ADDR | rtt RTT | end"),
    }
}

fn round_trip(text: &str) -> Result<Duration> {
    let rtt = humantime::parse_duration(text).with_context(|| format!("{text:?} is not a time"))?;
    if rtt > RTT_MAX {
        bail!("{text} is longer than {RTT_MAX:?}");
    }
    Ok(rtt)
}

fn run(socket: &str, rtt: Duration) -> Result<()> {
    let listener = UnixListener::bind(socket).with_context(|| format!("bind {socket}"))?;
    let wire = Wire::new(rtt);
    for stream in listener.incoming() {
        // Whoever hangs up half way is not answered; the line goes on.
        if stream.map_err(anyhow::Error::from).and_then(|stream| serve(&wire, stream)).unwrap_or(false) {
            break;
        }
    }
    std::fs::remove_file(socket).with_context(|| format!("remove {socket}"))
}

/// One question; whether the line shall end. The answer is sent when what was asked is so.
fn serve(wire: &Wire, stream: UnixStream) -> Result<bool> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    let mut end = false;
    let done = match line.split_whitespace().collect::<Vec<_>>()[..] {
        ["attach", namespace, address] => address
            .parse::<Ipv4Addr>()
            .with_context(|| format!("{address:?} is no IPv4 address"))
            .and_then(|address| wire.attach(address, tun::open(namespace)?)),
        ["rtt", rtt] => round_trip(rtt).map(|rtt| wire.set_rtt(rtt)),
        ["end"] => {
            end = true;
            Ok(())
        }
        _ => Err(anyhow::anyhow!("{line:?} says nothing here")),
    };
    let answer = done.map_or_else(|error| format!("{error:#}"), |()| "ok".to_owned());
    (&stream).write_all(format!("{answer}\n").as_bytes())?;
    Ok(end)
}

fn tell(socket: &str, message: &str) -> Result<()> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("connect to {socket}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{message}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    match answer.trim() {
        "ok" => Ok(()),
        why => bail!("{message}: {why}"),
    }
}
