//! A certificate authority inside the process, for tests and demonstrations.
//!
//! Whoever can read its root key can become every workload: never for a mesh that guards
//! something. Nothing here warns about that at run time; the caller that turns it on does.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use rand::RngExt;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use zeroize::Zeroizing;

use crate::{BoxFuture, Clock, ObtainError, Retry, SignedChain, Signer, SigningRequest};

/// Signs every request that it is given, with a root of its own or one that processes share.
pub struct InProcessCa {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    lifetime: Duration,
    clock: Clock,
}

impl InProcessCa {
    /// A CA with a fresh random root, which nothing outside this process will trust.
    ///
    /// # Errors
    /// If no key can be generated.
    pub fn random() -> Result<Self, InProcessCaError> {
        let root = RootPair::generate("in-process CA")?;
        Self::from_pem(&root.certificate_pem, &root.key_pem)
    }

    /// A CA with the root of a PEM certificate and its PEM PKCS#8 key. Processes that are given
    /// the same pair trust each other.
    ///
    /// # Errors
    /// If either does not parse, the two do not belong together, or the certificate is no CA's.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, InProcessCaError> {
        let root = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(InProcessCaError::Certificate)?;
        let key = KeyPair::from_pem(key_pem).map_err(InProcessCaError::Key)?;
        check_pair(&root, &key)?;
        Ok(Self {
            issuer: Issuer::from_ca_cert_der(&root, key).map_err(InProcessCaError::Root)?,
            root,
            lifetime: DEFAULT_LIFETIME,
            clock: Clock::system(),
        })
    }

    /// Issues certificates that end `lifetime` from now; 24 hours if never said.
    #[must_use]
    pub fn with_lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// Reads the time from `clock` instead of the system's.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// The root that peers must trust.
    #[must_use]
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    fn issue(&self, request: SigningRequest<'_>) -> Result<SignedChain, rcgen::Error> {
        let csr = CertificateSigningRequestParams::from_der(request.csr)?;
        let now = self.clock.now();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(request.id.as_str().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(random_serial());
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + self.lifetime).into();
        let leaf = params.signed_by(&csr.public_key, &self.issuer)?;
        Ok(SignedChain::new(
            vec![leaf.der().clone()],
            vec![self.root.clone()],
        ))
    }
}

impl Signer for InProcessCa {
    fn sign<'a>(
        &'a self,
        request: SigningRequest<'a>,
    ) -> BoxFuture<'a, Result<SignedChain, ObtainError>> {
        let signed = self.issue(request).map_err(|error| {
            ObtainError::refused(format!("CSR signing error ({error})"), Retry::Slowly)
        });
        Box::pin(std::future::ready(signed))
    }
}

impl fmt::Debug for InProcessCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InProcessCa")
            .field("lifetime", &self.lifetime)
            .finish_non_exhaustive()
    }
}

/// A root certificate and its key as PEM texts, to be written to files that processes share.
#[non_exhaustive]
pub struct RootPair {
    /// The certificate.
    pub certificate_pem: String,
    /// The key as PKCS#8. Wiped when dropped; write it readable for its owner only.
    pub key_pem: Zeroizing<String>,
}

impl RootPair {
    /// Makes a self-signed ECDSA P-256 root, valid for ten years, with `name` as its common name.
    ///
    /// # Errors
    /// If no key can be generated.
    pub fn generate(name: &str) -> Result<Self, InProcessCaError> {
        let key = Zeroizing::new(KeyPair::generate().map_err(InProcessCaError::Key)?);
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(random_serial());
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + ROOT_LIFETIME).into();
        let certificate = params.self_signed(&*key).map_err(InProcessCaError::Root)?;
        Ok(Self {
            certificate_pem: certificate.pem(),
            key_pem: Zeroizing::new(key.serialize_pem()),
        })
    }
}

impl fmt::Debug for RootPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootPair")
            .field("certificate_pem", &self.certificate_pem)
            .field("key_pem", &"<hidden>")
            .finish()
    }
}

/// Why there is no in-process CA.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InProcessCaError {
    /// The certificate is not PEM.
    #[error("the root certificate is not a PEM certificate")]
    Certificate(#[source] rustls_pki_types::pem::Error),
    /// The key does not parse or cannot be made.
    #[error("the root key is not a usable PEM PKCS#8 key")]
    Key(#[source] rcgen::Error),
    /// The certificate cannot be used for issuing.
    #[error("the root certificate is unusable")]
    Root(#[source] rcgen::Error),
    /// The certificate does not say that it is a CA's.
    #[error("the root certificate is not the certificate of a CA")]
    NotACa,
    /// The two files are of different pairs.
    #[error("the root certificate and the root key do not belong together")]
    Mismatch,
}

fn check_pair(root: &CertificateDer<'_>, key: &KeyPair) -> Result<(), InProcessCaError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(root)
        .map_err(|_| InProcessCaError::Root(rcgen::Error::CouldNotParseCertificate))?;
    if !parsed.is_ca() {
        return Err(InProcessCaError::NotACa);
    }
    if *parsed.public_key().subject_public_key.data != *key.public_key_raw() {
        return Err(InProcessCaError::Mismatch);
    }
    Ok(())
}

/// 127 random bits: positive, and never the same twice.
fn random_serial() -> SerialNumber {
    let serial: u128 = rand::rng().random();
    SerialNumber::from_slice(&(serial >> 1).to_be_bytes())
}

/// What istiod grants unless asked for less.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Peers whose clocks are behind accept a new certificate at once.
const BACKDATED: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CsrSource, Source, SpiffeId, Svid, TlsOptions, svid::TlsContext};

    fn id() -> SpiffeId {
        "spiffe://td/ns/n/sa/a".parse().unwrap()
    }

    async fn issue(ca: InProcessCa) -> Svid {
        let chain = CsrSource::new(ca).obtain(&id()).await.unwrap();
        let context = TlsContext::new(TlsOptions::default(), crate::SanRule::Requested);
        Svid::accept(&id(), chain, &context, SystemTime::now()).unwrap()
    }

    #[tokio::test]
    async fn issues_what_the_checks_accept() {
        let svid = issue(InProcessCa::random().unwrap()).await;
        assert_eq!(*svid.id(), id());
        let life = svid.remaining(SystemTime::now()).as_secs();
        assert!((86_390..=86_400).contains(&life), "{life}");
        let (_, leaf) = x509_parser::parse_x509_certificate(&svid.chain()[0]).unwrap();
        assert!(leaf.subject_alternative_name().unwrap().unwrap().critical);
        assert_eq!(leaf.subject().iter().count(), 0);
        assert!(!leaf.is_ca());
    }

    #[tokio::test]
    async fn processes_given_one_pair_share_the_root() {
        let pair = RootPair::generate("shared").unwrap();
        let one = InProcessCa::from_pem(&pair.certificate_pem, &pair.key_pem).unwrap();
        let two = InProcessCa::from_pem(&pair.certificate_pem, &pair.key_pem).unwrap();
        assert_eq!(issue(one).await.roots(), issue(two).await.roots());
        let other = InProcessCa::random().unwrap();
        assert_ne!(
            other.root().as_ref(),
            InProcessCa::random().unwrap().root().as_ref()
        );
    }

    #[test]
    fn refuses_files_that_do_not_fit() {
        let one = RootPair::generate("one").unwrap();
        let two = RootPair::generate("two").unwrap();
        let mixed = InProcessCa::from_pem(&one.certificate_pem, &two.key_pem);
        assert!(matches!(mixed, Err(InProcessCaError::Mismatch)));
        let garbage = InProcessCa::from_pem("garbage", &one.key_pem);
        assert!(matches!(garbage, Err(InProcessCaError::Certificate(_))));
        let garbage = InProcessCa::from_pem(&one.certificate_pem, "garbage");
        assert!(matches!(garbage, Err(InProcessCaError::Key(_))));
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::default().self_signed(&key).unwrap();
        let leaf = InProcessCa::from_pem(&leaf.pem(), &key.serialize_pem());
        assert!(matches!(leaf, Err(InProcessCaError::NotACa)));
    }

    #[test]
    fn debug_hides_the_key() {
        let pair = RootPair::generate("x").unwrap();
        let text = format!("{pair:?}");
        assert!(text.contains("<hidden>") && !text.contains("PRIVATE KEY"));
    }
}
