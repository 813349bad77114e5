//! What someone who is no member can reach, which is next to nothing, and how one becomes one.

use super::*;
use crate::{
    JOIN_BYTES_MAX, NetError,
    tls::{ALPN_JOIN, ALPN_MEMBER},
    wire::{self, StreamKind},
};

/// Whether the server closes this connection; a call frame is put on it meanwhile.
async fn is_turned_away(connection: &quinn::Connection) {
    if let Ok((mut send, _recv)) = connection.open_bi().await {
        let _ = send.write_all(&wire::preamble(StreamKind::Calls { class: 1 })).await;
        let header = wire::FrameHeader { kind: wire::FrameKind::Request, call: 1, service: ECHO };
        let _ = send.write_all(&wire::frame_header(header, 0)).await;
        timeout(LONG, connection.closed()).await.expect("the server closes the connection");
    }
}

async fn is_refused(server: &Server, identity: &Identity, protocol: &[u8]) {
    if let Ok((_endpoint, connection)) = raw(identity, protocol, server.network.local_addr()).await {
        is_turned_away(&connection).await;
    }
    assert_eq!(server.handler.handled(), 0);
    assert_eq!(server.handler.joined(), 0);
    assert!(server.handler.events.borrow().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_is_refused_before_any_handler_hears_of_it() {
    let cluster = Cluster::new();
    let a = cluster.server().await;
    let stranger = cluster.stranger();
    is_refused(&a, &stranger, ALPN_MEMBER).await;
    is_refused(&a, &stranger, ALPN_JOIN).await;
    // Joining opens the join protocol and no other.
    a.network.set_joining(true);
    is_refused(&a, &stranger, ALPN_MEMBER).await;
    is_refused(&a, &stranger, b"h3").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_without_membership_is_not_enough() {
    let cluster = Cluster::new();
    let a = cluster.server().await;
    is_refused(&a, &cluster.identity(), ALPN_MEMBER).await;
    a.network.set_joining(true);
    is_refused(&a, &cluster.identity(), ALPN_MEMBER).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_key_with_a_certificate_of_another_authority_is_refused() {
    let cluster = Cluster::new();
    let other = Authority::create("test").unwrap();
    let a = cluster.server().await;
    let mut identity = cluster.stranger();
    let certificate = other.sign(identity.public_key_der(), "node").unwrap();
    identity.install(&certificate, &other.certificate()).unwrap();
    a.network.set_members(vec![info(&identity, vec![])]);
    is_refused(&a, &identity, ALPN_MEMBER).await;
    a.network.set_joining(true);
    is_refused(&a, &identity, ALPN_MEMBER).await;

    let bound = Network::bind(settings(), identity, cluster.ca.certificate(), Recorder::new()).await;
    assert!(matches!(bound.err(), Some(NetError::Identity(_))), "nor does such a server start");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stolen_certificate_without_its_key_is_refused() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server().await, cluster.identity());
    a.network.set_members(vec![info(&b, vec![])]);
    let thief = cluster.stranger();
    // rustls checks that key and certificate fit before it dials, so the pair is built by hand.
    let key = rustls::crypto::ring::sign::any_supported_type(&thief.private_key()).unwrap();
    let certified = Arc::new(rustls::sign::CertifiedKey::new(vec![b.certificate()], key));
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible))
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)));
    tls.alpn_protocols = vec![ALPN_MEMBER.to_vec()];
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(tls));
    if let Ok(connection) = endpoint.connect_with(config, a.network.local_addr(), "ctfs").unwrap().await {
        is_turned_away(&connection).await;
    }
    assert_eq!(a.handler.handled(), 0);
    assert!(a.handler.events.borrow().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_with_the_right_hash_joins_and_becomes_a_member() {
    let cluster = Cluster::new();
    let a = cluster.server().await;
    a.network.set_joining(true);
    let dead = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let addresses = vec![dead.local_addr().unwrap().to_string(), a.network.local_addr().to_string()];
    let mut joiner = cluster.stranger();
    let joined = Network::join(&addresses, cluster.ca.hash(), &joiner, b"secret".to_vec(), LONG).await.unwrap();
    assert_eq!(joined.reply, [&joiner.key_hash()[..], b"secret"].concat());
    assert!(!joined.rtt.is_zero(), "the way to the cluster is measured");
    assert_eq!(a.handler.joined(), 1);

    let certificate = cluster.ca.sign(joiner.public_key_der(), "b").unwrap();
    joiner.install(&certificate, &cluster.ca.certificate()).unwrap();
    let b = cluster.start(joiner).await;
    a.network.set_members(vec![a.info(), b.info()]);
    b.network.set_members(vec![a.info(), b.info()]);
    assert_eq!(a.echo(&b).await, Ok(b"hello".to_vec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_is_not_shown_to_another_cluster() {
    let cluster = Cluster::new();
    let a = cluster.server().await;
    a.network.set_joining(true);
    let addresses = [a.network.local_addr().to_string()];
    let wrong = Authority::create("test").unwrap().hash();
    let refused = Network::join(&addresses, wrong, &cluster.stranger(), b"secret".to_vec(), LONG).await;
    assert!(matches!(&refused, Err(NetError::Identity(why)) if why.contains("another cluster")), "{refused:?}");
    assert_eq!(a.handler.joined(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_not_joining_lets_nobody_in() {
    let cluster = Cluster::new();
    let a = cluster.server().await;
    let addresses = [a.network.local_addr().to_string()];
    let stranger = cluster.stranger();
    let refused = Network::join(&addresses, cluster.ca.hash(), &stranger, b"secret".to_vec(), LONG).await;
    assert_eq!(refused, Err(NetError::NotAdmitted));
    a.network.set_joining(true);
    a.network.set_joining(false);
    let refused = Network::join(&addresses, cluster.ca.hash(), &stranger, b"secret".to_vec(), LONG).await;
    assert_eq!(refused, Err(NetError::NotAdmitted));
    assert_eq!(a.handler.joined(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_join_says_why() {
    let cluster = Cluster::new();
    let a = cluster.server().await;
    a.network.set_joining(true);
    let addresses = [a.network.local_addr().to_string()];
    let stranger = cluster.stranger();
    let refused = Network::join(&addresses, cluster.ca.hash(), &stranger, b"bad secret".to_vec(), LONG).await;
    assert_eq!(refused, Err(NetError::Refused("unknown token".to_owned())));
    let long = Network::join(&addresses, cluster.ca.hash(), &stranger, vec![0; JOIN_BYTES_MAX + 1], LONG).await;
    assert_eq!(long, Err(NetError::TooLong));
    let longest = Network::join(&addresses, cluster.ca.hash(), &stranger, vec![0; JOIN_BYTES_MAX], LONG).await;
    assert_eq!(longest.unwrap().reply.len(), 32 + JOIN_BYTES_MAX);
    let nobody = Network::join(&[], cluster.ca.hash(), &stranger, vec![], LONG).await;
    assert_eq!(nobody, Err(NetError::Unreachable));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_connection_serves_one_request_and_nothing_else() {
    let cluster = Cluster::new();
    let a = cluster.server().await;
    a.network.set_joining(true);
    let stranger = cluster.stranger();
    let address = a.network.local_addr();

    // A call in place of a join request.
    let (_endpoint, connection) = raw(&stranger, ALPN_JOIN, address).await.unwrap();
    is_turned_away(&connection).await;
    // A length over the limit.
    let (_endpoint, connection) = raw(&stranger, ALPN_JOIN, address).await.unwrap();
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(&[&wire::preamble(StreamKind::Join)[..], &[0xff; 4]].concat()).await.unwrap();
    timeout(LONG, connection.closed()).await.unwrap();
    assert_eq!((a.handler.handled(), a.handler.joined()), (0, 0));

    // One good request; there is no credit for a second stream, and the connection ends.
    let (_endpoint, connection) = raw(&stranger, ALPN_JOIN, address).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&[&wire::preamble(StreamKind::Join)[..], &2u32.to_le_bytes(), b"hi"].concat()).await.unwrap();
    send.finish().unwrap();
    assert_eq!(recv.read_to_end(100).await.unwrap().len(), 5 + 32 + 2);
    timeout(LONG, connection.closed()).await.unwrap();
    assert_eq!(a.handler.joined(), 1);
}
