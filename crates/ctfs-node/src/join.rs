//! How a server becomes a member: the token's two ends.

use std::{net::SocketAddr, time::{Duration, SystemTime}};

use ctfs_consensus::Consensus;
use ctfs_meta::{Member, MemberState, MetaError, Op, Reply, TokenRecord};
use ctfs_net::{Authority, Identity, JoinToken, NetError, Network};
use ctfs_types::{Incarnation, NodeId, Timestamp};

use crate::{
    messages::{self, JoinReply, JoinRequest},
    problem::Problem,
};

/// How long a joiner waits for an answer: the cluster may be electing a leader.
const JOIN_DEADLINE: Duration = Duration::from_secs(20);

/// Lets servers in: checks the token through the log, signs the key, hands over the cluster.
pub struct Doorman {
    consensus: Consensus,
    authority: Authority,
}

impl Doorman {
    pub fn new(consensus: Consensus, authority: Authority) -> Self {
        Self { consensus, authority }
    }

    /// Answers one join request. `key` and `public_key` were proven by the TLS handshake.
    ///
    /// A key that is a member already is answered without a token: its earlier try died between
    /// the cluster's yes and its own disk.
    ///
    /// # Errors
    /// A [`Problem`] as JSON, so that the joiner can show it as its own.
    pub async fn admit(&self, remote: SocketAddr, key: [u8; 32], public_key: &[u8], request: &[u8]) -> Result<Vec<u8>, String> {
        let reply = match messages::decode::<JoinRequest>(request) {
            Ok(request) => self.decide(remote, key, public_key, request).await,
            Err(why) => Err(Problem::join_refused(&format!("the request does not decode: {why}"))),
        };
        match reply {
            Ok(reply) => Ok(messages::encode(&reply)),
            Err(problem) => {
                tracing::warn!(%remote, code = problem.code, what = problem.what, "refused to let a server in");
                Err(serde_json::to_string(&problem).unwrap_or(problem.what))
            }
        }
    }

    async fn decide(&self, remote: SocketAddr, key: [u8; 32], public_key: &[u8], request: JoinRequest) -> Result<JoinReply, Problem> {
        let node = NodeId(u64::from_be_bytes(key[..8].try_into().expect("eight of 32 bytes")));
        let known = {
            let replica = self.consensus.replica();
            let namespace = replica.read();
            namespace.member(node).map_err(|e| Problem::internal(&e.to_string()))?
        };
        let member = match known {
            Some(member) if member.key == key => member,
            _ => {
                let mut addresses = vec![SocketAddr::new(remote.ip(), request.port).to_string()];
                addresses.extend(request.addresses.into_iter().filter(|a| a.len() <= 256).take(8));
                addresses.dedup();
                let member = Member {
                    node,
                    name: request.name,
                    zone: request.zone,
                    key,
                    addresses,
                    capacity: request.capacity,
                    state: MemberState::Active,
                    incarnation: Incarnation(0),
                    version: request.version,
                    fenced: false,
                    pair: None,
                    joined: Timestamp::from(SystemTime::now()),
                };
                let token = *blake3::hash(&request.secret).as_bytes();
                match self.consensus.propose(Op::Join { token, member: member.clone() }).await {
                    Ok(Ok(Reply::Joined { member })) => member,
                    Ok(Ok(_)) => member,
                    Ok(Err(verdict)) => return Err(refusal(verdict)),
                    Err(error) => return Err(Problem::no_quorum(&error.to_string())),
                }
            }
        };
        let certificate = self.authority.sign(public_key, &node.to_string()).map_err(|e| Problem::internal(&e.to_string()))?;
        let replica = self.consensus.replica();
        let namespace = replica.read();
        let store = |e: ctfs_meta::StoreError| Problem::internal(&e.to_string());
        tracing::info!(peer = %node, name = member.name, "let a server in");
        Ok(JoinReply {
            cluster: namespace.cluster().map_err(store)?.ok_or_else(|| Problem::internal("the cluster has no identity"))?,
            certificate,
            authority_key: self.authority.to_pem(),
            members: namespace.members().map_err(store)?,
        })
    }

    /// Makes a one-time secret and has the cluster remember its hash.
    pub async fn issue(&self, addresses: Vec<String>, ttl: Duration, uses: u32) -> Result<JoinToken, Problem> {
        let secret = JoinToken::new_secret();
        let now = SystemTime::now();
        let expires = Timestamp::from(now + ttl);
        let record = TokenRecord { hash: *blake3::hash(&secret).as_bytes(), expires, uses_left: uses };
        match self.consensus.propose(Op::CreateToken { token: record }).await {
            Ok(Ok(_)) => Ok(JoinToken { ca_hash: self.authority.hash(), addresses, secret, expires }),
            Ok(Err(verdict)) => Err(Problem::internal(&verdict.to_string())),
            Err(error) => Err(Problem::no_quorum(&error.to_string())),
        }
    }
}

fn refusal(verdict: MetaError) -> Problem {
    match verdict {
        MetaError::TokenExpired => Problem::token_expired(),
        MetaError::NoSuchToken => Problem::token_unknown(),
        MetaError::MemberNameTaken(name) => Problem::name_taken(&name),
        MetaError::KeyRemoved => Problem::removed(),
        other => Problem::join_refused(&other.to_string()),
    }
}

/// Asks a cluster to let this server in. The answer comes with the round trip it took.
///
/// # Errors
/// E0107 when nobody answers, E0111 when whoever answers is not the token's cluster, else what
/// the cluster said.
pub async fn ask(token: &JoinToken, identity: &Identity, request: JoinRequest) -> Result<(JoinReply, Duration), Problem> {
    let bytes = messages::encode(&request);
    match Network::join(&token.addresses, token.ca_hash, identity, bytes, JOIN_DEADLINE).await {
        Ok(joined) => {
            let reply = messages::decode(&joined.reply).map_err(|why| Problem::join_refused(&why))?;
            Ok((reply, joined.rtt))
        }
        Err(NetError::Refused(why)) => {
            Err(serde_json::from_str(&why).unwrap_or_else(|_| Problem::join_refused(&why)))
        }
        // A cluster without open tokens refuses strangers inside the handshake, where no sentence
        // can be said; the clock of this server tells the likely reason.
        Err(_) if Timestamp::from(SystemTime::now()) > token.expires => Err(Problem::token_expired()),
        Err(NetError::NotAdmitted) => Err(Problem::token_unknown()),
        Err(NetError::Identity(why)) => Err(Problem::wrong_authority(&why)),
        Err(error) => Err(Problem::cannot_reach(&token.addresses, &error.to_string())),
    }
}
