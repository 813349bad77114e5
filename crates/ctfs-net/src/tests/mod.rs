//! Real servers on loopback, and what strangers and broken peers can do to them.

mod golden;
mod hostile;
mod members;
mod strangers;

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_types::NodeId;
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tempfile::TempDir;
use tokio::{sync::watch, time::timeout};

use crate::{Authority, Handler, Identity, NetSettings, Network, PeerInfo, settings::Admission, tls};

/// Much longer than anything here takes, also on a busy machine.
const LONG: Duration = Duration::from_secs(30);

const ECHO: u16 = 0x0101;
const REFUSE: u16 = 0x0102;
/// Answers when the test opens the gate.
const GATED: u16 = 0x0103;
const PANIC: u16 = 0x0104;
const HUGE: u16 = 0x0105;
/// Takes a bulk body and gives nothing back.
const SINK: u16 = 0x0106;
/// Another class than the rest.
const OTHER_CLASS: u16 = 0x0201;

/// Counts what reaches it.
struct Recorder {
    calls: AtomicUsize,
    joins: AtomicUsize,
    gate: watch::Sender<bool>,
    /// Gated requests in hand.
    waiting: watch::Sender<usize>,
    events: watch::Sender<Vec<(bool, NodeId)>>,
}

impl Recorder {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            calls: AtomicUsize::new(0),
            joins: AtomicUsize::new(0),
            gate: watch::Sender::new(false),
            waiting: watch::Sender::new(0),
            events: watch::Sender::new(Vec::new()),
        })
    }

    async fn behind_gate(&self) {
        self.waiting.send_modify(|count| *count += 1);
        self.gate.subscribe().wait_for(|open| *open).await.unwrap();
    }

    async fn until_waiting(&self, count: usize) {
        timeout(LONG, self.waiting.subscribe().wait_for(|now| *now >= count)).await.unwrap().unwrap();
    }

    /// Until the handler was told `count` times that `peer` came (or went).
    async fn until(&self, came: bool, peer: NodeId, count: usize) {
        let seen = |events: &Vec<(bool, NodeId)>| events.iter().filter(|e| **e == (came, peer)).count() >= count;
        timeout(LONG, self.events.subscribe().wait_for(seen)).await.expect("the event comes in time").unwrap();
    }

    fn handled(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn joined(&self) -> usize {
        self.joins.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Handler for Recorder {
    async fn call(&self, _from: NodeId, service: u16, payload: Vec<u8>) -> Result<Vec<u8>, String> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        match service {
            REFUSE => Err("no, thank you".to_owned()),
            PANIC => panic!("as asked"),
            HUGE => Ok(vec![0; crate::CALL_BYTES_MAX + 1]),
            GATED => {
                self.behind_gate().await;
                Ok(payload)
            }
            _ => Ok(payload),
        }
    }

    async fn bulk(&self, _from: NodeId, service: u16, header: Vec<u8>, body: Bytes) -> Result<(Vec<u8>, Bytes), String> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        match service {
            REFUSE => Err("no, thank you".to_owned()),
            SINK => Ok((header, Bytes::new())),
            GATED => {
                self.behind_gate().await;
                Ok((header, body))
            }
            _ => Ok((header, body)),
        }
    }

    async fn join(
        &self,
        _remote: SocketAddr,
        key: [u8; 32],
        public_key_der: Vec<u8>,
        request: Vec<u8>,
    ) -> Result<Vec<u8>, String> {
        self.joins.fetch_add(1, Ordering::SeqCst);
        assert_eq!(key, crate::key_hash(&public_key_der));
        if request == b"bad secret" { Err("unknown token".to_owned()) } else { Ok([&key[..], &request].concat()) }
    }

    fn connected(&self, peer: NodeId, _remote: SocketAddr) {
        self.events.send_modify(|events| events.push((true, peer)));
    }

    fn disconnected(&self, peer: NodeId) {
        self.events.send_modify(|events| events.push((false, peer)));
    }
}

/// A server under test.
struct Server {
    network: Network,
    handler: Arc<Recorder>,
    identity: Identity,
}

impl Server {
    fn node(&self) -> NodeId {
        self.identity.node()
    }

    fn info(&self) -> PeerInfo {
        info(&self.identity, vec![self.network.local_addr().to_string()])
    }

    async fn echo(&self, to: &Server) -> Result<Vec<u8>, crate::NetError> {
        self.network.call(to.node(), ECHO, b"hello".to_vec(), LONG).await
    }
}

fn info(identity: &Identity, addresses: Vec<String>) -> PeerInfo {
    PeerInfo { node: identity.node(), key: identity.key_hash(), addresses }
}

fn settings() -> NetSettings {
    NetSettings { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), ..NetSettings::default() }
}

/// A cluster's authority and a place for keys.
struct Cluster {
    ca: Authority,
    dir: TempDir,
    made: AtomicUsize,
}

impl Cluster {
    fn new() -> Self {
        Self { ca: Authority::create("test").unwrap(), dir: tempfile::tempdir().unwrap(), made: AtomicUsize::new(0) }
    }

    /// A key of nobody in particular.
    fn stranger(&self) -> Identity {
        let number = self.made.fetch_add(1, Ordering::SeqCst);
        Identity::create(&self.dir.path().join(number.to_string())).unwrap()
    }

    /// A key the authority has signed.
    fn identity(&self) -> Identity {
        let mut identity = self.stranger();
        let certificate = self.ca.sign(identity.public_key_der(), "node").unwrap();
        identity.install(&certificate, &self.ca.certificate()).unwrap();
        identity
    }

    async fn start(&self, identity: Identity) -> Server {
        let handler = Recorder::new();
        let network =
            Network::bind(settings(), identity.clone(), self.ca.certificate(), handler.clone()).await.unwrap();
        Server { network, handler, identity }
    }

    async fn server(&self) -> Server {
        self.start(self.identity()).await
    }

    /// Two servers that know each other and are connected.
    async fn pair(&self) -> (Server, Server) {
        let (a, b) = (self.server().await, self.server().await);
        for server in [&a, &b] {
            server.network.set_members(vec![a.info(), b.info()]);
        }
        a.handler.until(true, b.node(), 1).await;
        b.handler.until(true, a.node(), 1).await;
        (a, b)
    }
}

/// A client that believes any server.
#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// A plain QUIC connection with this key and certificate, free to misbehave.
async fn raw(identity: &Identity, protocol: &[u8], to: SocketAddr) -> Result<(quinn::Endpoint, quinn::Connection), String> {
    let endpoint = quinn::Endpoint::client(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let tls =
        tls::client_config(Arc::new(Gullible), protocol, identity.certificate(), identity.private_key()).unwrap();
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(NetSettings::default().transport(Admission::Dialled));
    let connection = endpoint.connect_with(config, to, "ctfs").unwrap().await.map_err(|error| error.to_string())?;
    Ok((endpoint, connection))
}
