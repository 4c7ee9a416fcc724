//! Certificates of the test mesh: a root that proxies share through files, and leaves of any kind for raw peers.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A certificate authority: `FAKE_CA_ROOT_CERT` and `FAKE_CA_ROOT_KEY`.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    root_pem: String,
}

/// A leaf certificate with its key.
#[derive(Debug)]
pub struct Identity {
    /// The leaf; the root signed it.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

impl Authority {
    /// Makes a root with a fresh key.
    ///
    /// # Errors
    /// When key generation or signing fails.
    pub fn new(common_name: &str) -> anyhow::Result<Self> {
        let (params, key) = (Self::params(common_name), KeyPair::generate()?);
        let root = params.self_signed(&key)?;
        Ok(Self::of(&root, params, key))
    }

    /// Makes an authority below this one, which has the place of a root in everything that it does.
    ///
    /// # Errors
    /// When key generation or signing fails.
    pub fn subordinate(&self, common_name: &str) -> anyhow::Result<Self> {
        let (params, key) = (Self::params(common_name), KeyPair::generate()?);
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Self::of(&certificate, params, key))
    }

    /// The same authority once more.
    ///
    /// # Errors
    /// When its key cannot be copied.
    pub fn duplicate(&self) -> anyhow::Result<Self> {
        let key = KeyPair::from_pem(&self.issuer.key().serialize_pem())?;
        Ok(Self {
            issuer: Issuer::from_ca_cert_der(&self.root, key)?,
            root: self.root.clone(),
            root_pem: self.root_pem.clone(),
        })
    }

    fn params(common_name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }

    fn of(certificate: &Certificate, params: CertificateParams, key: KeyPair) -> Self {
        Self {
            root: certificate.der().clone(),
            root_pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// The root certificate.
    #[must_use]
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// The root certificate as PEM.
    #[must_use]
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// Where [`Authority::write`] puts certificate and key.
    #[must_use]
    pub fn files(directory: &Path) -> (PathBuf, PathBuf) {
        (
            directory.join("root-cert.pem"),
            directory.join("root-key.pem"),
        )
    }

    /// Writes certificate and PKCS#8 key as PEM.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn write(&self, directory: &Path) -> anyhow::Result<()> {
        let (cert, key) = Self::files(directory);
        std::fs::write(&cert, &self.root_pem).context("root certificate")?;
        std::fs::write(&key, self.issuer.key().serialize_pem()).context("root key")
    }

    /// A certificate with one URI name, valid now.
    ///
    /// # Errors
    /// When the URI is not ASCII or signing fails.
    pub fn issue(&self, spiffe_id: &str) -> anyhow::Result<Identity> {
        self.sign(&Self::leaf(spiffe_id)?)
    }

    /// As [`Authority::issue`], but it ended years ago.
    ///
    /// # Errors
    /// As [`Authority::issue`].
    pub fn issue_expired(&self, spiffe_id: &str) -> anyhow::Result<Identity> {
        let mut params = Self::leaf(spiffe_id)?;
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2020, 1, 2);
        self.sign(&params)
    }

    /// A server certificate for host names and addresses, valid now.
    ///
    /// # Errors
    /// When a name is not ASCII or signing fails.
    pub fn issue_server(&self, names: &[String]) -> anyhow::Result<Identity> {
        let mut params = CertificateParams::new(names)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(&params)
    }

    /// A certificate for somebody's key, as PEM.
    ///
    /// # Errors
    /// When signing fails.
    pub fn certify(
        &self,
        params: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> anyhow::Result<String> {
        Ok(params.signed_by(key, &self.issuer)?.pem())
    }

    /// As [`Authority::issue`], but it ends after `life`.
    ///
    /// # Errors
    /// As [`Authority::issue`].
    pub fn issue_for(&self, spiffe_id: &str, life: Duration) -> anyhow::Result<Identity> {
        let mut params = Self::leaf(spiffe_id)?;
        params.not_after = (SystemTime::now() + life).into();
        self.sign(&params)
    }

    /// A list as PEM that revokes these certificates of this authority.
    ///
    /// # Errors
    /// When a certificate does not parse, or signing fails.
    pub fn crl(&self, revoked: &[&CertificateDer<'_>]) -> anyhow::Result<String> {
        let now = SystemTime::now();
        let one = |certificate: &&CertificateDer<'_>| {
            let (_, parsed) = X509Certificate::from_der(certificate)?;
            anyhow::Ok(RevokedCertParams {
                serial_number: SerialNumber::from_slice(parsed.raw_serial()),
                revocation_time: now.into(),
                reason_code: None,
                invalidity_date: None,
            })
        };
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_secs(3600)).into(),
            crl_number: 1_u64.into(),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(one).collect::<anyhow::Result<_>>()?,
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.issuer)?.pem()?)
    }

    fn leaf(spiffe_id: &str) -> anyhow::Result<CertificateParams> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(spiffe_id.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        Ok(params)
    }

    fn sign(&self, params: &CertificateParams) -> anyhow::Result<Identity> {
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.issuer)?;
        Ok(Identity {
            chain: vec![leaf.der().clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        })
    }
}
