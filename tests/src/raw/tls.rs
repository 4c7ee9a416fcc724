//! TLS with any certificate, on either side, that reports whom it met instead of judging.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::Context;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{
        CryptoProvider, SupportedKxGroup, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{ParsedCertificate, WebPkiClientVerifier},
    version::{TLS12, TLS13},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::{ca::Identity, sys::Netns, traffic, wait::SOON};

/// How a raw client introduces itself.
#[derive(Debug, Clone)]
pub struct Hello {
    identity: Option<Identity>,
    alpn: Vec<Vec<u8>>,
    version: &'static SupportedProtocolVersion,
    groups: Vec<&'static dyn SupportedKxGroup>,
    server_name: Option<ServerName<'static>>,
    trusted: Option<Arc<RootCertStore>>,
}

impl Hello {
    /// As a well-behaved peer: TLS 1.3, ALPN `h2`, this certificate.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        Self {
            identity: Some(identity.clone()),
            ..Self::anonymous()
        }
    }

    /// Without a certificate.
    #[must_use]
    pub fn anonymous() -> Self {
        Self {
            identity: None,
            alpn: vec![b"h2".to_vec()],
            version: &TLS13,
            groups: aws_lc_rs::DEFAULT_KX_GROUPS.to_vec(),
            server_name: None,
            trusted: None,
        }
    }

    /// Taking only servers whose chain, as they present it, leads to `root`: what ztunnel asks of a server besides its name.
    ///
    /// # Panics
    /// When it cannot be a root.
    #[must_use]
    pub fn trusting(self, root: &CertificateDer<'static>) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        Self {
            trusted: Some(Arc::new(roots)),
            ..self
        }
    }

    /// Offering other protocols, or none.
    #[must_use]
    pub fn alpn(self, protocols: &[&str]) -> Self {
        Self {
            alpn: protocols
                .iter()
                .map(|protocol| protocol.as_bytes().to_vec())
                .collect(),
            ..self
        }
    }

    /// Offering TLS 1.2 only.
    #[must_use]
    pub fn tls12(self) -> Self {
        Self {
            version: &TLS12,
            ..self
        }
    }

    /// Offering these groups only.
    #[must_use]
    pub fn groups(self, groups: &[&'static dyn SupportedKxGroup]) -> Self {
        Self {
            groups: groups.to_vec(),
            ..self
        }
    }

    /// Asking for a server of this name, as Envoy and browsers may; no name is sent otherwise.
    ///
    /// # Panics
    /// When it cannot be one.
    #[must_use]
    pub fn server_name(self, name: &str) -> Self {
        Self {
            server_name: Some(name.to_owned().try_into().unwrap()),
            ..self
        }
    }

    /// Connects from inside a namespace and shakes hands.
    ///
    /// With TLS 1.3 a server's dislike of the certificate shows only at the first read.
    ///
    /// # Errors
    /// When TCP or TLS fails within ten seconds.
    pub async fn connect(
        &self,
        netns: &Netns,
        to: SocketAddr,
    ) -> anyhow::Result<client::TlsStream<TcpStream>> {
        let connect = traffic::connect(netns, to);
        let socket = tokio::time::timeout(SOON, connect).await?.context("TCP")?;
        self.shake(socket, to.ip()).await
    }

    /// Shakes hands over a connection to `server`.
    ///
    /// # Errors
    /// When TLS fails within ten seconds.
    pub async fn shake<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        server: IpAddr,
    ) -> anyhow::Result<client::TlsStream<S>> {
        let address = || ServerName::IpAddress(server.into());
        let name = self.server_name.clone().unwrap_or_else(address);
        let connector = TlsConnector::from(Arc::new(self.config()?));
        let connect = connector.connect(name, stream);
        tokio::time::timeout(SOON, connect).await?.context("TLS")
    }

    fn config(&self) -> anyhow::Result<ClientConfig> {
        let verifier = Arc::new(AnyName {
            provider: Arc::new(aws_lc_rs::default_provider()),
            trusted: self.trusted.clone(),
        });
        let provider = CryptoProvider {
            kx_groups: self.groups.clone(),
            ..aws_lc_rs::default_provider()
        };
        let builder = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[self.version])?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &self.identity {
            Some(identity) => {
                builder.with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols.clone_from(&self.alpn);
        config.enable_sni = self.server_name.is_some();
        Ok(config)
    }
}

/// A TLS 1.3 server with this certificate that wants a client certificate of `root`.
///
/// # Errors
/// When the certificate and key do not fit.
pub fn acceptor(
    identity: &Identity,
    root: &CertificateDer<'static>,
) -> anyhow::Result<TlsAcceptor> {
    let mut roots = RootCertStore::empty();
    roots.add(root.clone())?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let clients =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The settings of a TLS 1.3 server that wants no client certificate.
///
/// # Errors
/// When the certificate and key do not fit.
pub fn server_tls(identity: &Identity) -> anyhow::Result<Arc<ServerConfig>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// The SPIFFE URI of the server that a client met.
#[must_use]
pub fn server_id<S>(stream: &client::TlsStream<S>) -> Option<String> {
    uri_name(stream.get_ref().1.peer_certificates()?.first()?)
}

/// The SPIFFE URI of the client that a server met.
#[must_use]
pub fn client_id(stream: &server::TlsStream<TcpStream>) -> Option<String> {
    uri_name(stream.get_ref().1.peer_certificates()?.first()?)
}

fn uri_name(leaf: &CertificateDer<'_>) -> Option<String> {
    let (_, leaf) = X509Certificate::from_der(leaf).ok()?;
    let names = leaf.subject_alternative_name().ok()??;
    let mut names = names.value.general_names.iter();
    names.find_map(|name| {
        let GeneralName::URI(uri) = name else {
            return None;
        };
        Some((*uri).to_owned())
    })
}

/// Takes any server, or any of these roots; a test looks at its certificate itself.
#[derive(Debug)]
struct AnyName {
    provider: Arc<CryptoProvider>,
    trusted: Option<Arc<RootCertStore>>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.trusted {
            let leaf = ParsedCertificate::try_from(end_entity)?;
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(
                &leaf,
                roots,
                intermediates,
                now,
                algorithms,
            )?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}
