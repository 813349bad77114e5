//! Who this server is: a key pair that never leaves its directory, and a certificate for it.
//!
//! `node.key` (PKCS #8 PEM, mode 0600) and `node.crt` (PEM) live in a 0700 directory. Until the
//! server belongs to a cluster the certificate is signed by its own key; then
//! [`Identity::install`] replaces it by the one the cluster's authority signed.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use ctfs_types::NodeId;
use rcgen::{CertificateParams, DnType, KeyPair, PublicKeyData};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use webpki::EndEntityCert;

use crate::{CaDer, IdentityError, authority::{LEAF_DAYS, set_validity}};

const KEY_FILE: &str = "node.key";
const CERTIFICATE_FILE: &str = "node.crt";

/// BLAKE3 of a public key in DER SubjectPublicKeyInfo form: the whole identity of its holder.
pub fn key_hash(public_key_der: &[u8]) -> [u8; 32] {
    *blake3::hash(public_key_der).as_bytes()
}

/// The number of the server whose key has this hash: its first eight bytes, big endian.
pub fn node_of(key: &[u8; 32]) -> NodeId {
    let [a, b, c, d, e, f, g, h, ..] = *key;
    NodeId(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
}

/// The public key (DER SubjectPublicKeyInfo) a certificate speaks for.
pub(crate) fn public_key_of(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, IdentityError> {
    let parsed = EndEntityCert::try_from(certificate)
        .map_err(|error| IdentityError::Malformed { what: "certificate", why: format!("{error:?}") })?;
    Ok(parsed.subject_public_key_info().as_ref().to_vec())
}

/// The key pair and certificate of this server. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    dir: PathBuf,
    /// PKCS #8, DER.
    private_key: Arc<[u8]>,
    public_key: Arc<[u8]>,
    certificate: CertificateDer<'static>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("node", &self.node()).field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Identity {
    /// Makes a new key in `dir`, which is created with mode 0700 if it does not exist.
    ///
    /// Both files are durable when this returns.
    ///
    /// # Errors
    /// - [`IdentityError::Exists`]: there is a key in `dir`; it is left alone.
    /// - [`IdentityError::Io`]: the directory or a file could not be made.
    pub fn create(dir: &Path) -> Result<Self, IdentityError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at("create directory", dir))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(at("set the mode of", dir))?;
        if dir.join(KEY_FILE).try_exists().map_err(at("look for a key in", dir))? {
            return Err(IdentityError::Exists(dir.to_owned()));
        }
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
        let identity = Self {
            dir: dir.to_owned(),
            private_key: key.serialized_der().into(),
            public_key: key.subject_public_key_info().into(),
            certificate: self_signed(&key)?,
        };
        // The certificate first: a key without one would be an identity that does not load.
        identity.write_certificate()?;
        write_durably(&dir.join(KEY_FILE), key.serialize_pem().as_bytes(), 0o600)?;
        Ok(identity)
    }

    /// Reads the identity in `dir`.
    ///
    /// # Errors
    /// - [`IdentityError::Io`]: a file is missing or unreadable.
    /// - [`IdentityError::Permissions`]: group or others may read the key.
    /// - [`IdentityError::Malformed`], [`IdentityError::OtherKey`]: the files are damaged or do not
    ///   belong together.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let path = dir.join(KEY_FILE);
        let mode = fs::metadata(&path).map_err(at("read", &path))?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Permissions { path, mode });
        }
        let pem = fs::read_to_string(&path).map_err(at("read", &path))?;
        let key = KeyPair::from_pem(&pem)
            .map_err(|error| IdentityError::Malformed { what: "node.key", why: error.to_string() })?;

        let path = dir.join(CERTIFICATE_FILE);
        let pem = fs::read(&path).map_err(at("read", &path))?;
        let certificate = CertificateDer::from_pem_slice(&pem)
            .map_err(|error| IdentityError::Malformed { what: "node.crt", why: error.to_string() })?;
        let public_key = key.subject_public_key_info();
        if public_key_of(&certificate)? != public_key {
            return Err(IdentityError::OtherKey);
        }
        Ok(Self {
            dir: dir.to_owned(),
            private_key: key.serialized_der().into(),
            public_key: public_key.into(),
            certificate,
        })
    }

    /// Whether `dir` holds a key.
    pub fn exists(dir: &Path) -> bool {
        dir.join(KEY_FILE).exists()
    }

    /// The directory the key lives in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn node(&self) -> NodeId {
        node_of(&self.key_hash())
    }

    /// BLAKE3 of the public key: who this server is.
    pub fn key_hash(&self) -> [u8; 32] {
        key_hash(&self.public_key)
    }

    /// The public key as DER SubjectPublicKeyInfo, for [`crate::Authority::sign`].
    pub fn public_key_der(&self) -> &[u8] {
        &self.public_key
    }

    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate
    }

    /// Takes the certificate the cluster's authority signed for this key; durable on return.
    ///
    /// # Errors
    /// - [`IdentityError::OtherKey`]: it speaks for another key.
    /// - [`IdentityError::NotSigned`]: `ca` did not sign it.
    /// - [`IdentityError::Io`]: it could not be stored; the old one stays in use.
    pub fn install(&mut self, certificate_der: &[u8], ca: &CaDer) -> Result<(), IdentityError> {
        let certificate = CertificateDer::from(certificate_der.to_vec());
        if public_key_of(&certificate)? != *self.public_key {
            return Err(IdentityError::OtherKey);
        }
        ca.check(&certificate)?;
        let mut next = self.clone();
        next.certificate = certificate;
        next.write_certificate()?;
        *self = next;
        Ok(())
    }

    /// Whether the certificate in use was signed by `ca`.
    pub fn is_signed_by(&self, ca: &CaDer) -> bool {
        ca.check(&self.certificate).is_ok()
    }

    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.private_key.to_vec()))
    }

    /// A certificate that claims nothing but the key, to show to a cluster we are no member of.
    pub(crate) fn stranger_certificate(&self) -> Result<CertificateDer<'static>, IdentityError> {
        let pkcs8 = PrivatePkcs8KeyDer::from(self.private_key.to_vec());
        self_signed(&KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519)?)
    }

    fn write_certificate(&self) -> Result<(), IdentityError> {
        write_durably(&self.dir.join(CERTIFICATE_FILE), pem("CERTIFICATE", &self.certificate).as_bytes(), 0o644)
    }
}

fn self_signed(key: &KeyPair) -> Result<CertificateDer<'static>, IdentityError> {
    let mut params = CertificateParams::default();
    set_validity(&mut params, LEAF_DAYS);
    params.distinguished_name = rcgen::DistinguishedName::new();
    let node = node_of(&key_hash(&key.subject_public_key_info()));
    params.distinguished_name.push(DnType::CommonName, node.to_string());
    Ok(params.self_signed(key)?.der().clone())
}

/// PEM text of one DER document (RFC 7468).
pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    let base64 = data_encoding::BASE64.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    let mut rest = base64.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = tail;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

/// Replaces `path` by `bytes`, all or nothing, across a crash too.
fn write_durably(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IdentityError> {
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at("remove", &fresh)(error)),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&fresh)
        .map_err(at("create", &fresh))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(at("write", &fresh))?;
    fs::rename(&fresh, path).map_err(at("rename", &fresh))?;
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at("sync", dir))
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_owned();
    move |error| IdentityError::Io { action, path, error }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Authority;

    #[test]
    fn an_identity_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("id");
        let made = Identity::create(&dir).unwrap();
        let read = Identity::load(&dir).unwrap();
        assert_eq!(made.node(), read.node());
        assert_eq!(made.key_hash(), read.key_hash());
        assert_eq!(made.certificate_der(), read.certificate_der());
        assert_eq!(made.node().0.to_be_bytes(), made.key_hash()[..8]);
        assert!(matches!(Identity::create(&dir), Err(IdentityError::Exists(_))));
    }

    #[test]
    fn the_key_is_readable_by_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("id");
        Identity::create(&dir).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&dir.join(KEY_FILE)), 0o600);
        fs::set_permissions(dir.join(KEY_FILE), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Identity::load(&dir), Err(IdentityError::Permissions { mode: 0o640, .. })));
    }

    #[test]
    fn a_certificate_of_another_key_or_authority_is_not_installed() {
        let dir = tempfile::tempdir().unwrap();
        let mut ours = Identity::create(&dir.path().join("a")).unwrap();
        let other = Identity::create(&dir.path().join("b")).unwrap();
        let ca = Authority::create("one").unwrap();
        let foreign = Authority::create("two").unwrap();

        let stolen = ca.sign(other.public_key_der(), "b").unwrap();
        assert!(matches!(ours.install(&stolen, &ca.certificate()), Err(IdentityError::OtherKey)));
        let wrong = foreign.sign(ours.public_key_der(), "a").unwrap();
        assert!(matches!(ours.install(&wrong, &ca.certificate()), Err(IdentityError::NotSigned(_))));
        assert!(!ours.is_signed_by(&ca.certificate()));

        let right = ca.sign(ours.public_key_der(), "a").unwrap();
        ours.install(&right, &ca.certificate()).unwrap();
        assert!(Identity::load(ours.dir()).unwrap().is_signed_by(&ca.certificate()));
    }
}
