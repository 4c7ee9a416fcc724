//! Trust roots, the check of the server's name, and the handshake.

use std::{error::Error, io, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    SupportedProtocolVersion,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
    version::{TLS12, TLS13},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tracing::debug;

use super::{ConnectError, Roots, Target, TlsVersions};
use crate::watch::FileWatch;

impl Roots {
    /// Reads the roots as they are now; single certificates that cannot be used are left out.
    pub(super) async fn load(&self, watch: &FileWatch) -> Result<RootCertStore, ConnectError> {
        match self {
            Self::File(path) => {
                let text = watch.read(path).await.map_err(|source| {
                    let path = path.clone();
                    if source.kind() == io::ErrorKind::NotFound {
                        ConnectError::NoRootFile { path }
                    } else {
                        ConnectError::RootFile { path, source }
                    }
                })?;
                store(from_pem(&text), || path.display().to_string())
            }
            Self::System => store(from_system().await, || {
                "the trust store of the operating system".to_owned()
            }),
            Self::Pem(text) => store(from_pem(text.as_bytes()), || {
                "the configured PEM text".to_owned()
            }),
        }
    }
}

type Found = Result<CertificateDer<'static>, Box<dyn Error + Send + Sync>>;

fn from_pem(text: &[u8]) -> Vec<Found> {
    CertificateDer::pem_slice_iter(text)
        .map(|found| found.map_err(Into::into))
        .collect()
}

async fn from_system() -> Vec<Found> {
    match tokio::task::spawn_blocking(rustls_native_certs::load_native_certs).await {
        Ok(loaded) => {
            let faults = loaded.errors.into_iter().map(|error| Err(error.into()));
            loaded.certs.into_iter().map(Ok).chain(faults).collect()
        }
        Err(ended) => vec![Err(ended.into())],
    }
}

fn store(found: Vec<Found>, origin: impl Fn() -> String) -> Result<RootCertStore, ConnectError> {
    let mut roots = RootCertStore::empty();
    let mut first_fault = None;
    for certificate in found {
        let added = certificate.and_then(|certificate| Ok(roots.add(certificate)?));
        if let Err(error) = added {
            debug!(
                origin = origin(),
                error = &*error as &dyn Error,
                "a trust root is left out"
            );
            first_fault.get_or_insert(error);
        }
    }
    if roots.is_empty() {
        return Err(ConnectError::NoRoots {
            origin: origin(),
            source: first_fault,
        });
    }
    Ok(roots)
}

/// A configuration for one connection to `target`: nothing is resumed.
pub(super) fn client_config(
    target: &Target,
    roots: RootCertStore,
) -> Result<Arc<ClientConfig>, ConnectError> {
    let versions: &[&SupportedProtocolVersion] = match target.versions {
        TlsVersions::Only13 => &[&TLS13],
        TlsVersions::From12 => &[&TLS13, &TLS12],
    };
    let tls = |source| ConnectError::Tls { source };
    let crypto = || Arc::clone(&target.crypto);
    let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), crypto())
        .build()
        .map_err(|error| tls(rustls::Error::General(error.to_string())))?;
    let alternative = target.alternative_host.clone().map(ServerName::try_from);
    let verifier = Verifier {
        webpki,
        alternative: alternative
            .transpose()
            .map_err(|error| tls(rustls::Error::General(error.to_string())))?,
    };
    let mut config = ClientConfig::builder_with_provider(crypto())
        .with_protocol_versions(versions)
        .map_err(tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// A server that agrees to no protocol at all is taken to speak HTTP/2, which its first frame has to show.
pub(super) async fn handshake<S>(
    target: &Target,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    stream: S,
) -> Result<TlsStream<S>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let session = TlsConnector::from(config).connect(name, stream).await;
    session.map_err(|source| ConnectError::Handshake {
        uri: target.uri.clone(),
        source,
    })
}

/// The usual checks, with a second name that is tried if the first is the only thing wrong.
#[derive(Debug)]
struct Verifier {
    webpki: Arc<WebPkiServerVerifier>,
    alternative: Option<ServerName<'static>>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let check = |name: &ServerName<'_>| {
            self.webpki
                .verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
        };
        let verdict = check(server_name);
        match (&verdict, &self.alternative) {
            (
                Err(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName
                    | CertificateError::NotValidForNameContext { .. },
                )),
                Some(alternative),
            ) => check(alternative).or(verdict),
            _ => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}
