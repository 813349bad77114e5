//! What members can do with each other.

use std::time::Instant;

use tokio::{net::UdpSocket, task::JoinSet};

use super::*;
use crate::{BULK_BODY_BYTES_MAX, CALL_BYTES_MAX, NetError};

#[tokio::test(flavor = "multi_thread")]
async fn members_call_each_other_both_ways() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));
    assert_eq!(b.echo(&a).await, Ok(b"hello".to_vec()));
    assert_eq!((a.handler.handled(), b.handler.handled()), (1, 1));
    assert_eq!(a.echo(&a).await, Ok(b"hello".to_vec()), "a server reaches itself");

    let status = a.network.peer(b.node());
    assert!(status.connected && status.rtt.is_some() && status.since.is_some());
    assert!(status.sent_bytes > 0 && status.received_bytes > 0);
    assert!((1200..=1452).contains(&status.mtu.unwrap()), "{:?}", status.mtu);
    assert!(status.remote.unwrap().ip().is_loopback());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_serves_both_directions() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server().await, cluster.server().await);
    // B knows no address of A, so all there can be is what A dialled.
    b.network.set_members(vec![info(&a.identity, vec![])]);
    a.network.set_members(vec![b.info()]);
    b.handler.until(true, a.node(), 1).await;
    assert_eq!(b.echo(&a).await, Ok(b"hello".to_vec()));
    assert_eq!(b.network.peer(a.node()).connections, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_handler_says_reaches_the_caller() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    let call = |service| a.network.call(b.node(), service, vec![1], LONG);
    assert_eq!(call(REFUSE).await, Err(NetError::Refused("no, thank you".to_owned())));
    assert!(matches!(call(PANIC).await, Err(NetError::Refused(why)) if why.contains("panic")));
    assert!(matches!(call(HUGE).await, Err(NetError::Refused(why)) if why.contains("over the limit")));
    assert_eq!(call(OTHER_CLASS).await, Ok(vec![1]));
    let bulk = a.network.bulk(b.node(), REFUSE, vec![], Bytes::new(), LONG).await;
    assert_eq!(bulk, Err(NetError::Refused("no, thank you".to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_up_to_the_limit_pass_and_longer_ones_are_not_sent() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    let payload: Vec<u8> = (0..CALL_BYTES_MAX).map(|i| (i % 251) as u8).collect();
    assert_eq!(a.network.call(b.node(), ECHO, payload.clone(), LONG).await, Ok(payload));
    let over = a.network.call(b.node(), ECHO, vec![0; CALL_BYTES_MAX + 1], LONG).await;
    assert_eq!(over, Err(NetError::TooLong));

    let body = Bytes::from((0..BULK_BODY_BYTES_MAX).map(|i| (i % 253) as u8).collect::<Vec<u8>>());
    let back = a.network.bulk(b.node(), ECHO, vec![7; 65536], body.clone(), LONG).await.unwrap();
    assert_eq!(back, (vec![7; 65536], body));
    let empty = a.network.bulk(b.node(), ECHO, vec![], Bytes::new(), LONG).await;
    assert_eq!(empty, Ok((vec![], Bytes::new())));
    let over = Bytes::from(vec![0; BULK_BODY_BYTES_MAX + 1]);
    assert_eq!(a.network.bulk(b.node(), ECHO, vec![], over, LONG).await, Err(NetError::TooLong));
    let over = vec![0; 65537];
    assert_eq!(a.network.bulk(b.node(), ECHO, over, Bytes::new(), LONG).await, Err(NetError::TooLong));
    assert_eq!(b.handler.handled(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_ends_at_its_deadline_and_slow_ones_do_not_block_others() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    let started = Instant::now();
    let late = a.network.call(b.node(), GATED, vec![], Duration::from_millis(200)).await;
    assert_eq!(late, Err(NetError::Deadline));
    assert!(started.elapsed() >= Duration::from_millis(200));
    let late = a.network.bulk(b.node(), GATED, vec![], Bytes::new(), Duration::from_millis(200)).await;
    assert_eq!(late, Err(NetError::Deadline));
    // The gated call is still in the handler's hands.
    assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_calls_at_once_get_their_own_answers() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    let mut calls = JoinSet::new();
    for i in 0..3000u32 {
        let network = a.network.clone();
        let to = b.node();
        calls.spawn(async move {
            let payload = [&i.to_le_bytes()[..], &vec![i as u8; (i as usize * 37) % 40_000]].concat();
            assert_eq!(network.call(to, ECHO, payload.clone(), LONG).await, Ok(payload));
        });
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_call_is_not_blocked_behind_bulk() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    let body = Bytes::from(vec![5u8; 8 << 20]);
    let done = Arc::new(AtomicUsize::new(0));
    let mut transfers = JoinSet::new();
    for _ in 0..24 {
        let (network, to, body, done) = (a.network.clone(), b.node(), body.clone(), done.clone());
        transfers.spawn(async move {
            let (_, back) = network.bulk(to, ECHO, vec![], body.clone(), LONG * 4).await.unwrap();
            done.fetch_add(1, Ordering::SeqCst);
            assert!(back == body);
        });
    }
    // Under way, and far from done: 384 MiB both ways.
    transfers.join_next().await.unwrap().unwrap();
    for _ in 0..5 {
        assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));
    }
    assert!(done.load(Ordering::SeqCst) < 24, "the small calls waited for all bulk transfers");
    while let Some(transfer) = transfers.join_next().await {
        transfer.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_that_a_handler_sits_on_leaves_room_for_small_calls() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    let mut transfers = JoinSet::new();
    for _ in 0..16 {
        let (network, to) = (a.network.clone(), b.node());
        transfers.spawn(async move { network.bulk(to, GATED, vec![], Bytes::from(vec![1; 8 << 20]), LONG * 4).await });
    }
    b.handler.until_waiting(16).await;
    let payload = vec![2; CALL_BYTES_MAX];
    assert_eq!(a.network.call(b.node(), ECHO, payload.clone(), LONG).await, Ok(payload));
    b.handler.gate.send_replace(true);
    while let Some(transfer) = transfers.join_next().await {
        transfer.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn given_up_transfers_leave_the_connection_usable() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    let body = Bytes::from(vec![5u8; 8 << 20]);
    for millis in [0, 1, 2, 3, 5, 8, 13, 21, 34] {
        let _ = a.network.bulk(b.node(), ECHO, vec![], body.clone(), Duration::from_millis(millis)).await;
        let _ = a.network.call(b.node(), ECHO, vec![0; 1 << 20], Duration::from_millis(millis)).await;
    }
    assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));
    assert_eq!(a.network.bulk(b.node(), ECHO, vec![], body.clone(), LONG).await, Ok((vec![], body)));
    assert!(!a.handler.events.borrow().contains(&(false, b.node())), "the connection broke");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_peer_is_unreachable_and_further_calls_fail_at_once() {
    let cluster = Cluster::new();
    let (a, gone) = (cluster.server().await, cluster.identity());
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    a.network.set_members(vec![info(&gone, vec![socket.local_addr().unwrap().to_string()])]);
    assert_eq!(a.network.call(gone.node(), ECHO, vec![], LONG).await, Err(NetError::Unreachable));
    assert!(a.network.peer(gone.node()).last_error.is_some());
    let started = Instant::now();
    for _ in 0..100 {
        assert_eq!(a.network.call(gone.node(), ECHO, vec![], LONG).await, Err(NetError::Unreachable));
    }
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    let nobody = a.network.call(NodeId(1), ECHO, vec![], LONG).await;
    assert_eq!(nobody, Err(NetError::Unreachable));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_removed_while_it_was_down_learns_it_from_its_peers() {
    let cluster = Cluster::new();
    let (a, removed) = (cluster.server().await, cluster.server().await);
    removed.network.set_members(vec![a.info()]);
    assert!(removed.network.call(a.identity.node(), ECHO, vec![], LONG).await.is_err());
    assert!(removed.network.peer(a.identity.node()).refuses_us);

    let silent = cluster.identity();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    removed.network.set_members(vec![info(&silent, vec![socket.local_addr().unwrap().to_string()])]);
    assert!(removed.network.call(silent.node(), ECHO, vec![], LONG).await.is_err());
    assert!(!removed.network.peer(silent.node()).refuses_us, "silence is no refusal");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_address_does_not_hide_a_live_one() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server().await, cluster.server().await);
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let dead = socket.local_addr().unwrap().to_string();
    b.network.set_members(vec![info(&a.identity, vec![])]);
    let addresses = vec![dead, "no port".to_owned(), format!("localhost:{}", b.network.local_addr().port())];
    a.network.set_members(vec![info(&b.identity, addresses)]);
    assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_member_at_the_address_is_not_taken_for_the_one_dialled() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    let c = cluster.identity();
    let posing = info(&c, vec![b.network.local_addr().to_string()]);
    a.network.set_members(vec![b.info(), posing]);
    assert_eq!(a.network.call(c.node(), ECHO, vec![], LONG).await, Err(NetError::Unreachable));
    let why = a.network.peer(c.node()).last_error.unwrap();
    assert!(why.contains("answered, not"), "{why}");
    assert_eq!(b.handler.handled(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_restarts_on_another_port_is_found_again() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    b.network.close().await;
    a.handler.until(false, b.node(), 1).await;

    let reborn = cluster.start(b.identity.clone()).await;
    assert_ne!(reborn.network.local_addr(), b.network.local_addr());
    reborn.network.set_members(vec![a.info()]);
    // A still knows the old address only; B comes to it.
    a.handler.until(true, b.node(), 2).await;
    assert_eq!(a.echo(&reborn).await, Ok(b"hello".to_vec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_dies_without_a_word_is_noticed_and_its_callers_hear_of_it() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server().await, cluster.server().await);
    let relay = Relay::start(b.network.local_addr(), usize::MAX).await;
    b.network.set_members(vec![info(&a.identity, vec![])]);
    a.network.set_members(vec![info(&b.identity, vec![relay.address.to_string()])]);
    b.handler.until(true, a.node(), 1).await;
    assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));

    let network = a.network.clone();
    let to = b.node();
    let pending = tokio::spawn(async move { network.call(to, GATED, vec![], LONG).await });
    b.handler.until_waiting(1).await;
    drop(relay);
    assert_eq!(pending.await.unwrap(), Err(NetError::Closed));
    a.handler.until(false, b.node(), 1).await;
    b.handler.until(false, a.node(), 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_member_is_cut_off_on_its_live_connection() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    assert_eq!(b.echo(&a).await, Ok(b"hello".to_vec()));
    let network = b.network.clone();
    let to = a.node();
    let pending = tokio::spawn(async move { network.call(to, GATED, vec![], LONG).await });
    a.handler.until_waiting(1).await;

    a.network.set_members(vec![a.info()]);
    assert!(a.handler.events.borrow().contains(&(false, b.node())), "the handler heard before the call returned");
    assert_eq!(pending.await.unwrap(), Err(NetError::Closed));
    let handled = a.handler.handled();
    assert!(matches!(b.echo(&a).await, Err(NetError::Unreachable | NetError::Closed)));
    assert_eq!(b.echo(&a).await, Err(NetError::Unreachable));
    assert_eq!(a.echo(&b).await, Err(NetError::Unreachable));
    assert_eq!(a.handler.handled(), handled);
    assert!(!a.network.peer(b.node()).connected);

    // Welcome again, it finds its way back.
    a.network.set_members(vec![a.info(), b.info()]);
    a.handler.until(true, b.node(), 2).await;
    assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_key_changed_is_cut_off() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    let mut other = b.info();
    other.key[31] ^= 1;
    a.network.set_members(vec![other]);
    assert!(!a.network.peer(b.node()).connected);
    assert_eq!(a.echo(&b).await, Err(NetError::Unreachable));
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_ends_calls_under_way() {
    let cluster = Cluster::new();
    let (a, b) = cluster.pair().await;
    let network = a.network.clone();
    let to = b.node();
    let pending = tokio::spawn(async move { network.call(to, GATED, vec![], LONG).await });
    b.handler.until_waiting(1).await;
    a.network.close().await;
    assert_eq!(pending.await.unwrap(), Err(NetError::Closed));
    assert_eq!(a.echo(&b).await, Err(NetError::Unreachable));
    b.handler.until(false, a.node(), 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_in_use_is_named_when_binding() {
    let cluster = Cluster::new();
    let a = cluster.server().await;
    let settings = NetSettings { listen: a.network.local_addr(), ..NetSettings::default() };
    let second =
        Network::bind(settings, cluster.identity(), cluster.ca.certificate(), Recorder::new()).await.err().unwrap();
    assert_eq!(
        second,
        NetError::Bind { addr: a.network.local_addr(), why: "another program listens there already".to_owned() }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_on_all_addresses_serves_ipv4_too() {
    let cluster = Cluster::new();
    let handler = Recorder::new();
    let identity = cluster.identity();
    let settings = NetSettings { listen: "[::]:0".parse().unwrap(), ..NetSettings::default() };
    let network = Network::bind(settings, identity.clone(), cluster.ca.certificate(), handler.clone()).await.unwrap();
    let all = Server { network, handler, identity };
    let b = cluster.server().await;
    all.network.set_members(vec![b.info()]);
    let address = format!("127.0.0.1:{}", all.network.local_addr().port());
    b.network.set_members(vec![info(&all.identity, vec![address])]);
    assert_eq!(b.echo(&all).await, Ok(b"hello".to_vec()));
    assert_eq!(all.echo(&b).await, Ok(b"hello".to_vec()));
    assert!(all.network.peer(b.node()).remote.unwrap().is_ipv4());
}

/// On a slow path what is under way takes seconds. QUIC grants connection credit to bytes that are
/// merely buffered, so without a window of its own bulk would take all credit and every small call
/// would wait for megabytes to drain.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_call_is_not_blocked_behind_bulk_on_a_slow_path() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server().await, cluster.server().await);
    let relay = Relay::start_paced(b.network.local_addr(), usize::MAX, 16 << 20).await;
    b.network.set_members(vec![info(&a.identity, vec![])]);
    a.network.set_members(vec![info(&b.identity, vec![relay.address.to_string()])]);
    assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));

    let mut transfers = JoinSet::new();
    for _ in 0..10 {
        let (network, to) = (a.network.clone(), b.node());
        transfers.spawn(async move { network.bulk(to, SINK, vec![], Bytes::from(vec![1; 8 << 20]), LONG * 4).await });
    }
    let started = Instant::now();
    let mut slowest = Duration::ZERO;
    while !transfers.is_empty() {
        let asked = Instant::now();
        assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));
        slowest = slowest.max(asked.elapsed());
        while let Some(transfer) = transfers.try_join_next() {
            transfer.unwrap().unwrap();
        }
    }
    let whole = started.elapsed();
    assert!(slowest < Duration::from_secs(1) && slowest < whole / 2, "slowest call {slowest:?}, bulk {whole:?}");
}

/// A path between two servers that passes only datagrams of up to `largest` bytes.
struct Relay {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    async fn start(to: SocketAddr, largest: usize) -> Self {
        Self::start_paced(to, largest, u64::MAX).await
    }

    /// Passes about `rate` bytes a second upwards; what does not fit the socket's buffer is lost.
    async fn start_paced(to: SocketAddr, largest: usize, rate: u64) -> Self {
        let outside = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let inside = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = outside.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let (mut up, mut down) = (vec![0; 65536], vec![0; 65536]);
            let mut client = None;
            let (started, mut passed) = (Instant::now(), 0u64);
            loop {
                let due = Duration::from_secs_f64(passed as f64 / rate as f64);
                if due > started.elapsed() + Duration::from_millis(2) {
                    tokio::time::sleep(due - started.elapsed()).await;
                }
                // A full socket loses the datagram, as networks do.
                tokio::select! {
                    Ok((len, from)) = outside.recv_from(&mut up) => {
                        client = Some(from);
                        passed += len as u64;
                        if len <= largest { let _ = inside.send_to(&up[..len], to).await; }
                    }
                    Ok((len, _)) = inside.recv_from(&mut down) => {
                        if let Some(client) = client && len <= largest {
                            let _ = outside.send_to(&down[..len], client).await;
                        }
                    }
                }
            }
        });
        Self { address, task }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_mtu_of_1280_is_enough() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server().await, cluster.server().await);
    // 1280 less the headers of IPv6 and UDP.
    let relay = Relay::start(b.network.local_addr(), 1232).await;
    b.network.set_members(vec![info(&a.identity, vec![])]);
    a.network.set_members(vec![info(&b.identity, vec![relay.address.to_string()])]);
    assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));
    let body = Bytes::from(vec![3; 2 << 20]);
    assert_eq!(a.network.bulk(b.node(), ECHO, vec![], body.clone(), LONG).await, Ok((vec![], body)));
    assert_eq!(a.network.call(b.node(), ECHO, vec![4; 300_000], LONG).await, Ok(vec![4; 300_000]));
    let mtu = a.network.peer(b.node()).mtu.unwrap();
    assert!((1200..=1232).contains(&mtu), "{mtu}");
}
