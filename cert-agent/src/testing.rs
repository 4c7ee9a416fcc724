//! What the tests of several modules share: an authority that can also issue what no authority
//! should, handshakes in memory, and a wall clock that follows tokio's paused one.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
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
    root: CertifiedIssuer<'static, KeyPair>,
    intermediate: Option<CertifiedIssuer<'static, KeyPair>>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let root =
            CertifiedIssuer::self_signed(ca_params(name), KeyPair::generate().unwrap()).unwrap();
        Self {
            root,
            intermediate: None,
        }
    }

    pub(crate) fn with_intermediate(mut self) -> Self {
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::signed_by(ca_params("intermediate"), key, &self.root);
        self.intermediate = Some(issuer.unwrap());
        self
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

    /// A certificate in use.
    pub(crate) fn svid(&self, id: &str, options: &TlsOptions) -> Svid {
        accept(id, self.issue(id), options)
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
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

pub(crate) const HOUR: Duration = Duration::from_secs(3600);
