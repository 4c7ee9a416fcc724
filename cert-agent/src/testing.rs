//! What the tests of several modules share: an authority that can also issue what no authority
//! should, handshakes in memory, and a wall clock that follows tokio's paused one.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::{
    ClientConfig, ServerConfig,
    pki_types::{CertificateDer, ServerName},
};
use tokio::time::Instant;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::{Clock, KeyedChain, PrivateKey, SanRule, SpiffeId, Svid, TlsOptions, svid::TlsContext};

pub(crate) fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

/// A root, possibly with an intermediate below it that issues.
pub(crate) struct Authority {
    name: String,
    root: CertifiedIssuer<'static, KeyPair>,
    intermediate: Option<CertifiedIssuer<'static, KeyPair>>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let root =
            CertifiedIssuer::self_signed(ca_params(name), KeyPair::generate().unwrap()).unwrap();
        Self {
            name: name.to_owned(),
            root,
            intermediate: None,
        }
    }

    pub(crate) fn with_intermediate(self) -> Self {
        self.with_intermediate_for(&[KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign])
    }

    /// With an intermediate that may be used for this.
    pub(crate) fn with_intermediate_for(mut self, usages: &[KeyUsagePurpose]) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = ca_params(INTERMEDIATE);
        params.key_usages = usages.to_vec();
        let issuer = CertifiedIssuer::signed_by(params, key, &self.root);
        self.intermediate = Some(issuer.unwrap());
        self
    }

    /// Another certificate of the intermediate and its key, with another serial number.
    pub(crate) fn intermediate_again(&self) -> CertificateDer<'static> {
        let mut params = ca_params(INTERMEDIATE);
        params.serial_number = Some(2_u64.into());
        let key = self.intermediate.as_ref().unwrap().key();
        let again = params.signed_by(key, &self.root).unwrap();
        again.der().clone()
    }

    pub(crate) fn root(&self) -> CertificateDer<'static> {
        self.root.der().clone()
    }

    /// A good answer for `id`.
    pub(crate) fn issue(&self, id: &str) -> KeyedChain {
        self.issue_with(&[id], |_| {})
    }

    /// An answer for several names, bent by `bend`. The root is repeated in the chain.
    pub(crate) fn issue_with(
        &self,
        uris: &[&str],
        bend: impl FnOnce(&mut CertificateParams),
    ) -> KeyedChain {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        bend(&mut params);
        let issuer = self.intermediate.as_ref().unwrap_or(&self.root);
        let leaf = params.signed_by(&key, issuer).unwrap();
        let mut chain = vec![leaf.der().clone()];
        chain.extend(self.intermediate.as_ref().map(|it| it.der().clone()));
        chain.push(self.root());
        KeyedChain::new(
            PrivateKey::from_pkcs8_der(key.serialize_der()),
            chain,
            vec![self.root()],
        )
    }

    /// A revocation list of whoever issues leaves here.
    pub(crate) fn crl(&self, revoked: &[&CertificateDer<'_>]) -> Vec<u8> {
        self.crl_for(HOUR + HOUR, revoked)
    }

    /// The same, long out of date.
    pub(crate) fn stale_crl(&self, revoked: &[&CertificateDer<'_>]) -> Vec<u8> {
        self.crl_for(HOUR / 2, revoked)
    }

    /// A revocation list of the root.
    pub(crate) fn root_crl(&self, revoked: &[&CertificateDer<'_>]) -> Vec<u8> {
        crl(&self.name, &self.root, HOUR + HOUR, revoked)
    }

    fn crl_for(&self, life: Duration, revoked: &[&CertificateDer<'_>]) -> Vec<u8> {
        match &self.intermediate {
            Some(intermediate) => crl(INTERMEDIATE, intermediate, life, revoked),
            None => crl(&self.name, &self.root, life, revoked),
        }
    }

    /// A certificate in use.
    pub(crate) fn svid(&self, id: &str, options: &TlsOptions) -> Svid {
        accept(id, self.issue(id), options)
    }
}

/// A list that was made an hour ago and is to be replaced after `life`, whether or not its issuer may make lists.
fn crl(
    name: &str,
    issuer: &CertifiedIssuer<'static, KeyPair>,
    life: Duration,
    revoked: &[&CertificateDer<'_>],
) -> Vec<u8> {
    let key = KeyPair::try_from(issuer.key().serialize_der()).unwrap();
    let issuer = Issuer::new(ca_params(name), key);
    let made = SystemTime::now() - HOUR;
    let params = CertificateRevocationListParams {
        this_update: made.into(),
        next_update: (made + life).into(),
        crl_number: 1_u64.into(),
        issuing_distribution_point: None,
        revoked_certs: revoked
            .iter()
            .map(|certificate| RevokedCertParams {
                serial_number: serial(certificate),
                revocation_time: made.into(),
                reason_code: None,
                invalidity_date: None,
            })
            .collect(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    params.signed_by(&issuer).unwrap().der().to_vec()
}

fn serial(certificate: &CertificateDer<'_>) -> SerialNumber {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).unwrap();
    SerialNumber::from_slice(parsed.raw_serial())
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

pub(crate) fn accept(id: &str, chain: KeyedChain, options: &TlsOptions) -> Svid {
    accept_in(
        &TlsContext::new(options.clone(), SanRule::Requested),
        id,
        chain,
    )
}

pub(crate) fn accept_in(context: &TlsContext, id: &str, chain: KeyedChain) -> Svid {
    Svid::accept(&id.parse().unwrap(), chain, context, SystemTime::now()).unwrap()
}

type Io = tokio::io::DuplexStream;
pub(crate) type Sides = (
    io::Result<server::TlsStream<Io>>,
    io::Result<client::TlsStream<Io>>,
);

/// One handshake in memory; both sides then exchange a byte, so that refusals that TLS 1.3
/// delivers late are seen by the client as well.
pub(crate) async fn handshake(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> Sides {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (near, far) = tokio::io::duplex(64 * 1024);
    let accept = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.write_all(b"!").await?;
        stream.flush().await?;
        Ok(stream)
    };
    let connect = async {
        let name = ServerName::try_from("ignored.example").unwrap();
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        stream.read_exact(&mut [0]).await?;
        Ok(stream)
    };
    tokio::join!(accept, connect)
}

/// Wall-clock time that advances with tokio's clock. Call it on a runtime.
pub(crate) fn paused_clock() -> Clock {
    let (wall, mono) = (SystemTime::now(), Instant::now());
    Clock::new(move || wall + mono.elapsed())
}

pub(crate) const INTERMEDIATE: &str = "intermediate";
pub(crate) const HOUR: Duration = Duration::from_secs(3600);
