//! The cluster's certificate authority: what makes a key a member's key.
//!
//! Its certificate is public and its BLAKE3 hash travels in join tokens; its private key signs
//! joiners. Only keys of [`crate::Identity`] (Ed25519) are signed.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SignatureAlgorithm,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, TrustAnchor, UnixTime, pem::PemObject};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::{
    IdentityError,
    identity::{pem, public_key_of},
};

/// A member's certificate outlives every server; leaving is decided by the list of members.
pub(crate) const LEAF_DAYS: u32 = 3653;
/// The authority outlives what it signs.
const CA_DAYS: u32 = 3 * LEAF_DAYS;
/// `ub-common-name` of X.520.
const NAME_BYTES_MAX: usize = 64;

/// An Ed25519 SubjectPublicKeyInfo (RFC 8410) up to the 32 bytes of the key.
const ED25519_SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// The certificate of a cluster's authority, DER. Public.
#[derive(Clone, PartialEq, Eq)]
pub struct CaDer(CertificateDer<'static>);

impl fmt::Debug for CaDer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CaDer({})", data_encoding::HEXLOWER.encode(&self.hash()[..6]))
    }
}

impl CaDer {
    /// # Errors
    /// [`IdentityError::Malformed`]: the bytes are no X.509 certificate.
    pub fn from_der(der: &[u8]) -> Result<Self, IdentityError> {
        let ca = Self(CertificateDer::from(der.to_vec()));
        ca.anchor()?;
        Ok(ca)
    }

    /// Takes the first certificate of a PEM text.
    pub fn from_pem(text: &str) -> Result<Self, IdentityError> {
        let der = CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|error| IdentityError::Malformed { what: "authority certificate", why: error.to_string() })?;
        Self::from_der(&der)
    }

    pub fn to_pem(&self) -> String {
        pem("CERTIFICATE", &self.0)
    }

    pub fn der(&self) -> &[u8] {
        &self.0
    }

    /// BLAKE3 of the certificate: what a join token pins.
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.0).as_bytes()
    }

    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.0.clone()
    }

    pub(crate) fn anchor(&self) -> Result<TrustAnchor<'static>, IdentityError> {
        anchor_from_trusted_cert(&self.0)
            .map(|anchor| anchor.to_owned())
            .map_err(|error| IdentityError::Malformed { what: "authority certificate", why: format!("{error:?}") })
    }

    /// Whether `leaf` is a valid member certificate of this authority, now.
    pub(crate) fn check(&self, leaf: &CertificateDer<'_>) -> Result<(), IdentityError> {
        let anchor = self.anchor()?;
        check_leaf(&anchor, leaf, Role::Client, UnixTime::now())?;
        check_leaf(&anchor, leaf, Role::Server, UnixTime::now())
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Role {
    Client,
    Server,
}

/// Chain, validity and usage of a member certificate; names are not looked at, keys are identity.
pub(crate) fn check_leaf(
    anchor: &TrustAnchor<'_>,
    leaf: &CertificateDer<'_>,
    role: Role,
    now: UnixTime,
) -> Result<(), IdentityError> {
    let usage = match role {
        Role::Client => KeyUsage::client_auth(),
        Role::Server => KeyUsage::server_auth(),
    };
    let refused = |error: webpki::Error| IdentityError::NotSigned(format!("{error:?}"));
    EndEntityCert::try_from(leaf)
        .map_err(refused)?
        .verify_for_usage(
            &[webpki::ring::ED25519],
            std::slice::from_ref(anchor),
            &[],
            now,
            usage,
            None,
            None,
        )
        .map_err(refused)?;
    Ok(())
}

/// The authority itself, private key included.
pub struct Authority {
    certificate: CaDer,
    name: String,
    key: KeyPair,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes the authority of a new cluster.
    ///
    /// # Errors
    /// [`IdentityError::BadName`]: the name is empty or longer than 64 bytes.
    pub fn create(cluster: &str) -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
        let mut params = params(cluster, CA_DAYS)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = CaDer::from_der(params.self_signed(&key)?.der())?;
        Ok(Self { certificate, name: cluster.to_owned(), key })
    }

    /// Certificate and private key in one PEM text. Secret.
    pub fn to_pem(&self) -> String {
        format!("{}{}", self.certificate.to_pem(), self.key.serialize_pem())
    }

    /// Reads what [`Authority::to_pem`] wrote.
    ///
    /// # Errors
    /// [`IdentityError::Malformed`] when a part is missing or damaged, [`IdentityError::OtherKey`]
    /// when the parts do not belong together.
    pub fn from_pem(text: &str) -> Result<Self, IdentityError> {
        let malformed = |why: String| IdentityError::Malformed { what: "authority", why };
        let certificate = CaDer::from_pem(text)?;
        let pkcs8 =
            PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes()).map_err(|error| malformed(error.to_string()))?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519)
            .map_err(|error| malformed(error.to_string()))?;
        if public_key_of(&certificate.0)? != key.subject_public_key_info() {
            return Err(IdentityError::OtherKey);
        }
        let parsed = EndEntityCert::try_from(&certificate.0).map_err(|error| malformed(format!("{error:?}")))?;
        let name = common_name(parsed.subject()).ok_or_else(|| malformed("unexpected subject".to_owned()))?;
        Ok(Self { name, certificate, key })
    }

    /// The cluster's name, as the certificate has it.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn certificate(&self) -> CaDer {
        self.certificate.clone()
    }

    pub fn certificate_der(&self) -> &[u8] {
        self.certificate.der()
    }

    /// BLAKE3 of the certificate: what a join token pins.
    pub fn hash(&self) -> [u8; 32] {
        self.certificate.hash()
    }

    /// Makes the certificate of a member from its public key (DER SubjectPublicKeyInfo).
    ///
    /// Valid from a day ago, because clocks differ, for ten years.
    ///
    /// # Errors
    /// - [`IdentityError::Malformed`]: not an Ed25519 key.
    /// - [`IdentityError::BadName`]: the name is empty or longer than 64 bytes.
    pub fn sign(&self, public_key_der: &[u8], node_name: &str) -> Result<Vec<u8>, IdentityError> {
        let key = PublicKey::parse(public_key_der)?;
        let mut leaf = params(node_name, LEAF_DAYS)?;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let mut own = params(&self.name, CA_DAYS)?;
        own.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let signed = leaf.signed_by(&key, &Issuer::from_params(&own, &self.key))?;
        self.certificate.check(signed.der())?;
        Ok(signed.der().to_vec())
    }
}

/// An Ed25519 public key to be signed.
struct PublicKey([u8; 32]);

impl PublicKey {
    fn parse(spki: &[u8]) -> Result<Self, IdentityError> {
        spki.strip_prefix(&ED25519_SPKI)
            .and_then(|key| key.try_into().ok())
            .map(Self)
            .ok_or_else(|| IdentityError::Malformed { what: "public key", why: "not an Ed25519 key".to_owned() })
    }
}

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ED25519
    }
}

fn params(name: &str, days: u32) -> Result<CertificateParams, IdentityError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(IdentityError::BadName);
    }
    let mut params = CertificateParams::default();
    set_validity(&mut params, days);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}

/// Valid from a day ago, for `days`.
pub(crate) fn set_validity(params: &mut CertificateParams, days: u32) {
    const DAY: Duration = Duration::from_secs(86_400);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(DAY);
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + now.saturating_sub(DAY);
    params.not_after = params.not_before + DAY * days;
}

/// The name in a subject of the one shape [`params`] makes: a single CommonName, UTF8String, of
/// at most 64 bytes, so that every length is one byte.
fn common_name(subject: &[u8]) -> Option<String> {
    let name = subject.get(11..)?;
    let len = u8::try_from(name.len()).ok().filter(|&len| usize::from(len) <= NAME_BYTES_MAX)?;
    let expected = [0x31, len + 9, 0x30, len + 7, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, len];
    (subject[..11] == expected).then(|| String::from_utf8(name.to_vec()).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Identity;

    #[test]
    fn an_authority_survives_its_pem() {
        let made = Authority::create("vélo cluster").unwrap();
        let read = Authority::from_pem(&made.to_pem()).unwrap();
        assert_eq!(read.name(), "vélo cluster");
        assert_eq!(read.hash(), made.hash());
        assert_eq!(CaDer::from_pem(&made.certificate().to_pem()).unwrap(), made.certificate());

        let dir = tempfile::tempdir().unwrap();
        let joiner = Identity::create(dir.path()).unwrap();
        let leaf = CertificateDer::from(read.sign(joiner.public_key_der(), "n1").unwrap());
        made.certificate().check(&leaf).unwrap();
        assert_eq!(public_key_of(&leaf).unwrap(), joiner.public_key_der());
    }

    #[test]
    fn a_member_certificate_cannot_sign_members() {
        let ca = Authority::create("c").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let member = Identity::create(dir.path()).unwrap();
        let leaf = CaDer::from_der(&ca.sign(member.public_key_der(), "n").unwrap()).unwrap();
        let pkcs8 = PrivatePkcs8KeyDer::from(member.private_key().secret_der().to_vec());
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519).unwrap();
        let issuer = params("n", 10).unwrap();
        let forged = params("evil", 10).unwrap();
        let forged = forged.signed_by(&key, &Issuer::from_params(&issuer, &key)).unwrap();
        assert_ne!(leaf.hash(), ca.hash());
        assert!(ca.certificate().check(forged.der()).is_err());
    }

    #[test]
    fn names_and_keys_out_of_range_are_refused() {
        assert!(matches!(Authority::create(""), Err(IdentityError::BadName)));
        assert!(matches!(Authority::create(&"x".repeat(65)), Err(IdentityError::BadName)));
        let ca = Authority::create(&"x".repeat(64)).unwrap();
        assert_eq!(Authority::from_pem(&ca.to_pem()).unwrap().name(), "x".repeat(64));
        assert!(matches!(ca.sign(b"not a key", "n"), Err(IdentityError::Malformed { .. })));
        assert!(Authority::from_pem(&ca.certificate().to_pem()).is_err());
        assert!(Authority::from_pem("").is_err());
    }

    proptest::proptest! {
        #[test]
        fn hostile_certificates_never_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            let _ = CaDer::from_der(&bytes);
            let _ = public_key_of(&CertificateDer::from(bytes.clone()));
            let _ = common_name(&bytes);
            let _ = PublicKey::parse(&bytes);
        }
    }
}
