//! A member that breaks the protocol loses its connection, and nobody else notices.

use proptest::{collection::vec, prelude::any, strategy::{Strategy, ValueTree}};

use super::*;
use crate::{
    NetError,
    tls::ALPN_MEMBER,
    wire::{self, BulkLengths, FrameHeader, FrameKind, StreamKind},
};

/// Two healthy members, and one with a valid certificate that writes its own bytes.
async fn with_rogue(cluster: &Cluster) -> (Server, Server, Identity) {
    let (a, b) = cluster.pair().await;
    let rogue = cluster.identity();
    a.network.set_members(vec![a.info(), b.info(), info(&rogue, vec![])]);
    (a, b, rogue)
}

fn request(service: u16, len: usize) -> Vec<u8> {
    wire::frame_header(FrameHeader { kind: FrameKind::Request, call: 7, service }, len).to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_bytes_close_the_connection_and_leave_others_working() {
    let cluster = Cluster::new();
    let (a, b, rogue) = with_rogue(&cluster).await;
    let calls = wire::preamble(StreamKind::Calls { class: 1 });
    let bulk = wire::preamble(StreamKind::Bulk);
    let mut reply = request(ECHO, 0);
    reply[4] = 1;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("garbage", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("wrong version", vec![b'C', b'T', 2, 0, 1]),
        ("unknown kind", vec![b'C', b'T', 1, 9, 0]),
        ("join among members", wire::preamble(StreamKind::Join).to_vec()),
        ("four gigabytes", [&calls[..], &[0xff; 4]].concat()),
        ("shorter than its header", [&calls[..], &3u32.to_le_bytes()].concat()),
        ("unknown frame kind", [&calls[..], &11u32.to_le_bytes(), &[77]].concat()),
        ("service of another class", [&calls[..], &request(OTHER_CLASS, 0)].concat()),
        ("a reply as a request", [&calls[..], &reply].concat()),
        ("cut off", [&calls[..], &request(ECHO, 100)].concat()),
        ("cut off preamble", calls[..3].to_vec()),
        ("bulk header of four gigabytes", [&bulk[..], &[0xff; 10]].concat()),
        ("bulk that ends early", [&bulk[..], &wire::bulk_request(ECHO, BulkLengths { header: 5, body: 5 })].concat()),
        (
            "bulk with more than it said",
            [&bulk[..], &wire::bulk_request(ECHO, BulkLengths { header: 0, body: 0 }), b"x"].concat(),
        ),
    ];
    for (what, bytes) in cases {
        let (_endpoint, connection) = raw(&rogue, ALPN_MEMBER, a.network.local_addr()).await.unwrap();
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        let _ = send.finish();
        let end = timeout(LONG, connection.closed()).await.unwrap_or_else(|_| panic!("{what}: not closed"));
        let quinn::ConnectionError::ApplicationClosed(close) = end else { panic!("{what}: {end}") };
        assert_eq!(close.error_code.into_inner(), u64::from(crate::link::PROTOCOL), "{what}");
        assert_eq!(b.echo(&a).await, Ok(b"hello".to_vec()), "{what}");
    }
    assert!(!a.handler.events.borrow().contains(&(false, b.node())));
}

#[tokio::test(flavor = "multi_thread")]
async fn random_bytes_on_a_stream_never_harm_the_server() {
    let cluster = Cluster::new();
    let (a, b, rogue) = with_rogue(&cluster).await;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = (0u8..4, vec(any::<u8>(), 0..200));
    for _ in 0..40 {
        let (kind, noise) = strategy.new_tree(&mut runner).unwrap().current();
        let (_endpoint, connection) = raw(&rogue, ALPN_MEMBER, a.network.local_addr()).await.unwrap();
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        let _ = send.write_all(&[&[b'C', b'T', 1, kind, 1][..], &noise].concat()).await;
        let _ = send.finish();
    }
    assert_eq!(b.echo(&a).await, Ok(b"hello".to_vec()));
    assert!(!a.handler.events.borrow().contains(&(false, b.node())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_calls_is_answered_busy_and_does_not_stop_the_connection() {
    let cluster = Cluster::new();
    let (a, _b, rogue) = with_rogue(&cluster).await;
    let (_endpoint, connection) = raw(&rogue, ALPN_MEMBER, a.network.local_addr()).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let mut flood = wire::preamble(StreamKind::Calls { class: 1 }).to_vec();
    for _ in 0..crate::calls::CALLS_MAX + 1 {
        flood.extend_from_slice(&request(GATED, 0));
    }
    send.write_all(&flood).await.unwrap();
    let mut answer = [0; wire::FRAME_HEADER_BYTES];
    timeout(LONG, recv.read_exact(&mut answer)).await.unwrap().unwrap();
    let (header, _) = wire::decode_frame(&answer).unwrap().unwrap();
    assert_eq!(header.kind, FrameKind::Busy);

    // Another class of the same connection goes on.
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&[&wire::preamble(StreamKind::Calls { class: 2 })[..], &request(OTHER_CLASS, 0)].concat())
        .await
        .unwrap();
    timeout(LONG, recv.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(wire::decode_frame(&answer).unwrap().unwrap().0.kind, FrameKind::Reply);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_transfers_is_answered_busy() {
    let cluster = Cluster::new();
    let (a, _b, rogue) = with_rogue(&cluster).await;
    let (_endpoint, connection) = raw(&rogue, ALPN_MEMBER, a.network.local_addr()).await.unwrap();
    let message = [
        &wire::preamble(StreamKind::Bulk)[..],
        &wire::bulk_request(GATED, BulkLengths { header: 0, body: 3 }),
        b"abc",
    ]
    .concat();
    let mut open = Vec::new();
    for _ in 0..crate::bulk::SERVED_MAX {
        let (mut send, recv) = connection.open_bi().await.unwrap();
        send.write_all(&message).await.unwrap();
        send.finish().unwrap();
        open.push(recv);
    }
    a.handler.until_waiting(crate::bulk::SERVED_MAX).await;
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&message).await.unwrap();
    let mut answer = [0; wire::BULK_REPLY_BYTES];
    timeout(LONG, recv.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(wire::decode_bulk_reply(answer).unwrap().0, wire::Status::Busy);
    assert_eq!(a.handler.handled(), crate::bulk::SERVED_MAX);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fifth_connection_of_a_peer_pushes_out_the_first() {
    let cluster = Cluster::new();
    let (a, _b, rogue) = with_rogue(&cluster).await;
    let mut connections = Vec::new();
    for _ in 0..5 {
        let (endpoint, connection) = raw(&rogue, ALPN_MEMBER, a.network.local_addr()).await.unwrap();
        crate::link::greet(&connection).await.unwrap();
        connections.push((endpoint, connection));
    }
    let end = timeout(LONG, connections[0].1.closed()).await.unwrap();
    assert!(matches!(end, quinn::ConnectionError::ApplicationClosed(c) if c.error_code.into_inner() == u64::from(crate::link::SURPLUS)));
    for (_, connection) in &connections[1..] {
        crate::link::greet(connection).await.unwrap();
    }
    assert_eq!(a.network.peer(rogue.node()).connections, 4);
    assert_eq!(a.handler.events.borrow().iter().filter(|e| **e == (true, rogue.node())).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_answers_nonsense_fails_its_callers_only() {
    let cluster = Cluster::new();
    let (a, b, rogue) = with_rogue(&cluster).await;
    let (_endpoint, connection) = raw(&rogue, ALPN_MEMBER, a.network.local_addr()).await.unwrap();
    a.handler.until(true, rogue.node(), 1).await;
    let network = a.network.clone();
    let to = rogue.node();
    let call = tokio::spawn(async move { network.call(to, ECHO, vec![1; 10], LONG).await });
    let (mut send, mut recv) = timeout(LONG, connection.accept_bi()).await.unwrap().unwrap();
    recv.read_exact(&mut [0; wire::PREAMBLE_BYTES + wire::FRAME_HEADER_BYTES]).await.unwrap();
    send.write_all(&[0xff; 20]).await.unwrap();
    assert_eq!(timeout(LONG, call).await.unwrap().unwrap(), Err(NetError::Closed));
    assert_eq!(b.echo(&a).await, Ok(b"hello".to_vec()));
}
