//! Joining: one request of a stranger, one answer.
//!
//! The stranger checks the cluster first (its authority's certificate against the hash in the
//! token), and shows its secret only then. The cluster has proof that the stranger holds the key it
//! presents, and nothing more; the rest is for [`Handler::join`] to judge.

use std::{
    net::{Ipv6Addr, SocketAddr},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use futures_util::FutureExt;
use quinn::{Connection, Endpoint, EndpointConfig, RecvStream, SendStream, TokioRuntime, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::{
    Handler, Identity, JOIN_BYTES_MAX, JOIN_REPLY_BYTES_MAX, NetError, NetSettings,
    identity::{key_hash, public_key_of},
    link::{Broken, GOODBYE, NOT_A_MEMBER, canonical},
    peer::resolve,
    settings::Admission,
    socket,
    tls::{ExpectAuthority, SERVER_NAME, join_config},
    wire::{self, Status, StreamKind, WireError},
};

/// Time for our handler: it commits through the cluster before it answers.
const HANDLER_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for the answer to arrive before the connection is closed.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(5);

/// A cluster's yes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    pub reply: Vec<u8>,
    /// To the server that answered.
    pub rtt: Duration,
}

/// How asking one server went.
enum Asked {
    /// The cluster has spoken.
    Verdict(Result<Joined, NetError>),
    /// Another server may do better.
    Next(NetError),
}

pub(crate) async fn ask(
    addresses: &[String],
    ca_hash: [u8; 32],
    identity: &Identity,
    request: Vec<u8>,
    deadline: Duration,
) -> Result<Joined, NetError> {
    if request.len() > JOIN_BYTES_MAX {
        return Err(NetError::TooLong);
    }
    let settings = NetSettings { listen: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), ..NetSettings::default() };
    let socket = socket::open(settings.listen, settings.socket_buffer_bytes)?;
    let endpoint = Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime))
        .map_err(|error| NetError::Bind { addr: settings.listen, why: error.to_string() })?;
    let asked = timeout(deadline, async {
        let mut outcome = NetError::Unreachable;
        for address in addresses {
            let Ok(found) = resolve(address, settings.dial_timeout).await else { continue };
            for remote in found {
                match ask_one(&endpoint, &settings, remote, ca_hash, identity, &request).await {
                    Asked::Verdict(verdict) => return verdict,
                    Asked::Next(error) => {
                        info!(%remote, %error, "could not join there");
                        // A reason is worth more than "unreachable" of another address.
                        if outcome == NetError::Unreachable {
                            outcome = error;
                        }
                    }
                }
            }
        }
        Err(outcome)
    })
    .await
    .unwrap_or(Err(NetError::Deadline));
    endpoint.close(VarInt::from_u32(GOODBYE), b"");
    // Lets the goodbye leave; it is a courtesy.
    let _ = timeout(Duration::from_millis(500), endpoint.wait_idle()).await;
    asked
}

async fn ask_one(
    endpoint: &Endpoint,
    settings: &NetSettings,
    remote: SocketAddr,
    ca_hash: [u8; 32],
    identity: &Identity,
    request: &[u8],
) -> Asked {
    let verifier = ExpectAuthority::new(ca_hash);
    let tls = match join_config(identity, verifier.clone()) {
        Ok(tls) => tls,
        Err(error) => return Asked::Verdict(Err(error)),
    };
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(settings.transport(Admission::Dialled));
    let Ok(connecting) = endpoint.connect_with(config, remote, SERVER_NAME) else {
        return Asked::Next(NetError::Unreachable);
    };
    let connection = match timeout(settings.dial_timeout, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(_)) | Err(_) => {
            return Asked::Next(verifier.refusal().map_or(NetError::Unreachable, NetError::Identity));
        }
    };
    match exchange(&connection, request).await {
        Ok((Status::Done, reply)) => Asked::Verdict(Ok(Joined { reply, rtt: connection.rtt() })),
        Ok((Status::Refused, why)) => {
            Asked::Verdict(Err(NetError::Refused(String::from_utf8_lossy(&why).into_owned())))
        }
        Ok((Status::Busy, _)) => Asked::Next(NetError::Busy),
        Err(_) => Asked::Next(match connection.close_reason() {
            // TLS 1.3 tells the dialler late that its certificate was refused.
            Some(quinn::ConnectionError::ConnectionClosed(_)) => NetError::NotAdmitted,
            _ => NetError::Closed,
        }),
    }
}

async fn exchange(connection: &Connection, request: &[u8]) -> Result<(Status, Vec<u8>), Broken> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(|_| Broken::Lost)?;
    let mut message = BytesMut::from(&wire::preamble(StreamKind::Join)[..]);
    message.extend_from_slice(&(request.len() as u32).to_le_bytes());
    message.extend_from_slice(request);
    send.write_all(&message).await?;
    send.finish().map_err(|_| Broken::Lost)?;
    let mut head = [0; wire::JOIN_REPLY_BYTES];
    recv.read_exact(&mut head).await?;
    let (status, len) = wire::decode_join_reply(head)?;
    let reply = recv.read_to_end(len).await.map_err(|_| Broken::Lost)?;
    if reply.len() == len { Ok((status, reply)) } else { Err(WireError::Truncated.into()) }
}

/// Answers the one request of a stranger and closes its connection.
pub(crate) async fn serve(
    connection: Connection,
    leaf: CertificateDer<'static>,
    handler: Arc<dyn Handler>,
    join_timeout: Duration,
) {
    let remote = canonical(connection.remote_address());
    match timeout(join_timeout, read_request(&connection)).await {
        Ok(Ok((send, request))) => match public_key_of(&leaf) {
            Ok(public_key) => answer(send, remote, public_key, request, handler).await,
            Err(error) => warn!(%remote, %error, "stranger without a key"),
        },
        Ok(Err(Broken::Wire(error))) => warn!(%remote, %error, "malformed join request"),
        Ok(Err(Broken::Lost)) | Err(_) => info!(%remote, "no join request came"),
    }
    connection.close(VarInt::from_u32(NOT_A_MEMBER), b"one request is all");
}

async fn read_request(connection: &Connection) -> Result<(SendStream, Vec<u8>), Broken> {
    let (send, mut recv) = connection.accept_bi().await.map_err(|_| Broken::Lost)?;
    let mut head = [0; wire::PREAMBLE_BYTES];
    recv.read_exact(&mut head).await?;
    match wire::decode_preamble(head)? {
        StreamKind::Join => {}
        _ => return Err(WireError::Kind(head[3]).into()),
    }
    let mut len = [0; wire::JOIN_REQUEST_BYTES];
    recv.read_exact(&mut len).await?;
    Ok((send, read_exactly(recv, wire::decode_join_request(len)?).await?))
}

async fn read_exactly(mut recv: RecvStream, len: usize) -> Result<Vec<u8>, Broken> {
    let bytes = recv.read_to_end(len).await.map_err(|_| Broken::Wire(WireError::Trailing))?;
    if bytes.len() == len { Ok(bytes) } else { Err(WireError::Truncated.into()) }
}

async fn answer(
    mut send: SendStream,
    remote: SocketAddr,
    public_key: Vec<u8>,
    request: Vec<u8>,
    handler: Arc<dyn Handler>,
) {
    let handled = handler.join(remote, key_hash(&public_key), public_key, request);
    let handled = timeout(HANDLER_TIMEOUT, AssertUnwindSafe(handled).catch_unwind()).await;
    let (status, reply) = match handled {
        Ok(Ok(Ok(reply))) if reply.len() <= JOIN_REPLY_BYTES_MAX => (Status::Done, reply),
        Ok(Ok(Ok(_))) => (Status::Refused, wire::refusal("the reply is over the limit".to_owned())),
        Ok(Ok(Err(why))) => (Status::Refused, wire::refusal(why)),
        Ok(Err(_)) => (Status::Refused, wire::refusal("the request made its handler panic".to_owned())),
        Err(_) => (Status::Busy, Vec::new()),
    };
    let mut message = wire::join_reply(status, reply.len()).to_vec();
    message.extend_from_slice(&reply);
    // The stranger has to have it before the connection is closed under it.
    let _ = timeout(FAREWELL_TIMEOUT, async {
        send.write_all(&message).await.ok()?;
        send.finish().ok()?;
        send.stopped().await.ok()
    })
    .await;
}
