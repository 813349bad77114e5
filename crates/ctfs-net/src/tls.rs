//! Who is let in: certificate checks and the TLS 1.3 configurations.
//!
//! Host names say nothing here. A peer is its key; the certificate only shows that the cluster's
//! authority knew the key once, and the list of members that it still is welcome.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use ctfs_types::NodeId;
use parking_lot::{Mutex, RwLock};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig,
    SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, TrustAnchor, UnixTime},
    server::{
        NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use crate::{
    CaDer, Identity, IdentityError, NetError, PeerInfo,
    authority::{Role, check_leaf},
    identity::{key_hash, node_of, public_key_of},
};

/// Protocol between members.
pub(crate) const ALPN_MEMBER: &[u8] = b"ctfs/1";
/// Protocol of a stranger with a join request.
pub(crate) const ALPN_JOIN: &[u8] = b"ctfs-join/1";
/// TLS wants a name to dial; ours is the same for everyone and is not checked.
pub(crate) const SERVER_NAME: &str = "ctfs";

/// Whom this server trusts, now. Shared by every handshake.
pub(crate) struct Trust {
    ca: CaDer,
    anchor: TrustAnchor<'static>,
    members: RwLock<BTreeMap<NodeId, PeerInfo>>,
    joining: AtomicBool,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust").field("ca", &self.ca).finish_non_exhaustive()
    }
}

impl Trust {
    pub(crate) fn new(ca: CaDer) -> Result<Self, IdentityError> {
        let anchor = ca.anchor()?;
        Ok(Self { ca, anchor, members: RwLock::new(BTreeMap::new()), joining: AtomicBool::new(false) })
    }

    /// Other servers that are members, by number. Held for writing while connections of removed
    /// members are taken away, so that none slips in between.
    pub(crate) fn members(&self) -> &RwLock<BTreeMap<NodeId, PeerInfo>> {
        &self.members
    }

    pub(crate) fn set_joining(&self, open: bool) {
        self.joining.store(open, Ordering::Release);
    }

    pub(crate) fn joining(&self) -> bool {
        self.joining.load(Ordering::Acquire)
    }

    /// The member this certificate belongs to.
    fn member(&self, leaf: &CertificateDer<'_>, role: Role, now: UnixTime) -> Result<NodeId, IdentityError> {
        check_leaf(&self.anchor, leaf, role, now)?;
        let key = key_hash(&public_key_of(leaf)?);
        let node = node_of(&key);
        match self.members.read().get(&node) {
            Some(peer) if peer.key == key => Ok(node),
            _ => Err(IdentityError::NotSigned(format!("{node} is not a member"))),
        }
    }

    /// The member who dialled us with this certificate.
    pub(crate) fn dialler(&self, leaf: &CertificateDer<'_>) -> Result<NodeId, IdentityError> {
        self.member(leaf, Role::Client, UnixTime::now())
    }
}

fn refuse(why: impl Into<String>) -> rustls::Error {
    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Refused(String);
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Refused(why.into())))))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::ring::default_provider().signature_verification_algorithms
}

/// The part every verifier shares: TLS 1.3 signatures, checked by the crypto provider.
macro_rules! signatures_by_provider {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _certificate: &CertificateDer<'_>,
            _signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(refuse("TLS 1.2 is not spoken here"))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls13_signature(message, certificate, signed, &algorithms())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            algorithms().supported_schemes()
        }
    };
}

/// Server side: members always; strangers, whoever they are, while joining is open.
///
/// Which of the two it was is asked again after the handshake, when the protocol is known.
#[derive(Debug)]
struct Admit(Arc<Trust>);

impl ClientCertVerifier for Admit {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match self.0.member(leaf, Role::Client, now) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(_) if self.0.joining() && public_key_of(leaf).is_ok() => Ok(ClientCertVerified::assertion()),
            Err(why) => Err(refuse(why.to_string())),
        }
    }

    signatures_by_provider!();
}

/// Client side, between members: exactly the server we dialled.
#[derive(Debug)]
struct ExpectMember {
    trust: Arc<Trust>,
    node: NodeId,
}

impl ServerCertVerifier for ExpectMember {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let node = self.trust.member(leaf, Role::Server, now).map_err(|why| refuse(why.to_string()))?;
        if node != self.node {
            return Err(refuse(format!("{node} answered, not {}", self.node)));
        }
        Ok(ServerCertVerified::assertion())
    }

    signatures_by_provider!();
}

/// Client side of a stranger: any server certified by the authority our token names.
#[derive(Debug)]
pub(crate) struct ExpectAuthority {
    ca_hash: [u8; 32],
    refusal: Mutex<Option<String>>,
}

impl ExpectAuthority {
    pub(crate) fn new(ca_hash: [u8; 32]) -> Arc<Self> {
        Arc::new(Self { ca_hash, refusal: Mutex::new(None) })
    }

    /// Why a server was not believed, if one was not.
    pub(crate) fn refusal(&self) -> Option<String> {
        self.refusal.lock().clone()
    }

    fn check(&self, leaf: &CertificateDer<'_>, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), String> {
        let ca = chain
            .iter()
            .find(|certificate| *blake3::hash(certificate).as_bytes() == self.ca_hash)
            .ok_or("the server belongs to another cluster than the token")?;
        let anchor = CaDer::from_der(ca).and_then(|ca| ca.anchor()).map_err(|why| why.to_string())?;
        check_leaf(&anchor, leaf, Role::Server, now).map_err(|why| why.to_string())
    }
}

impl ServerCertVerifier for ExpectAuthority {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.check(leaf, chain, now) {
            Ok(()) => Ok(ServerCertVerified::assertion()),
            Err(why) => {
                *self.refusal.lock() = Some(why.clone());
                Err(refuse(why))
            }
        }
    }

    signatures_by_provider!();
}

/// What a member shows to whoever dials it: both protocols, chain with the authority's certificate.
pub(crate) fn server_config(identity: &Identity, trust: &Arc<Trust>) -> Result<QuicServerConfig, NetError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(crypto)?
        .with_client_cert_verifier(Arc::new(Admit(trust.clone())))
        .with_single_cert(vec![identity.certificate(), trust.ca.certificate()], identity.private_key())
        .map_err(crypto)?;
    config.alpn_protocols = vec![ALPN_MEMBER.to_vec(), ALPN_JOIN.to_vec()];
    // A resumed session would skip the certificate, and early data could be replayed.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    QuicServerConfig::try_from(config).map_err(|error| NetError::Identity(error.to_string()))
}

/// To dial the member `node`.
pub(crate) fn member_config(identity: &Identity, trust: &Arc<Trust>, node: NodeId) -> Result<QuicClientConfig, NetError> {
    let verifier = Arc::new(ExpectMember { trust: trust.clone(), node });
    client_config(verifier, ALPN_MEMBER, identity.certificate(), identity.private_key())
}

/// To dial a cluster we are no member of.
pub(crate) fn join_config(identity: &Identity, verifier: Arc<ExpectAuthority>) -> Result<QuicClientConfig, NetError> {
    client_config(verifier, ALPN_JOIN, identity.stranger_certificate()?, identity.private_key())
}

pub(crate) fn client_config(
    verifier: Arc<dyn ServerCertVerifier>,
    protocol: &[u8],
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<QuicClientConfig, NetError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(crypto)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![certificate], key)
        .map_err(crypto)?;
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    QuicClientConfig::try_from(config).map_err(|error| NetError::Identity(error.to_string()))
}

fn crypto(error: rustls::Error) -> NetError {
    NetError::Identity(error.to_string())
}

/// Protocol and certificate of whoever is at the other end of a completed handshake.
pub(crate) fn handshake_result(connection: &quinn::Connection) -> Option<(Vec<u8>, CertificateDer<'static>)> {
    let data = connection.handshake_data()?.downcast::<quinn::crypto::rustls::HandshakeData>().ok()?;
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    Some((data.protocol?, chain.into_iter().next()?))
}
