//! A connection to OpenBao: TCP and TLS with the trust roots as they are at that moment.

use std::{error::Error as _, fmt, io, path::PathBuf, sync::Arc};

use bytes::Bytes;
use http::Uri;
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use crate::{BoxFuture, TlsOptions, file};

/// Where the trust roots of the server come from.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Roots {
    /// A PEM file, read for each connection; it need not be there from the start. If it becomes unusable, what was read
    /// last stays in force.
    File(PathBuf),
    /// The trust store of the operating system.
    System,
    /// PEM text.
    Pem(String),
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::System => f.write_str("System"),
            Self::Pem(text) => write!(f, "Pem({} bytes)", text.len()),
        }
    }
}

/// Opens connections. Tests have one without TCP and TLS.
pub(super) trait Dial: Send + Sync {
    /// Connects to the host and port of `to`.
    fn dial<'a>(&'a self, to: &'a Uri) -> BoxFuture<'a, io::Result<Box<dyn Stream>>>;

    /// Whether a server at `host` that the dialler accepts is one of the cluster of `home`. Roots of an operator's own say
    /// so; those that vouch for everybody's servers do not.
    fn same_cluster(&self, home: &str, host: &str) -> bool;
}

/// A byte stream to the server.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Dials with TLS.
pub(super) struct TlsDialler {
    roots: Roots,
    tls: TlsOptions,
    /// The roots that were last usable, and what was made of them.
    last: Mutex<Option<(Bytes, Arc<ClientConfig>)>>,
}

impl TlsDialler {
    pub(super) fn new(roots: Roots, tls: TlsOptions) -> Self {
        Self {
            roots,
            tls,
            last: Mutex::new(None),
        }
    }

    pub(super) async fn config(&self) -> io::Result<Arc<ClientConfig>> {
        let pem = match &self.roots {
            Roots::System => return system_config(self.tls.clone()).await,
            Roots::Pem(text) => Ok(text.clone().into_bytes()),
            Roots::File(path) => file::read(path, MAX_ROOTS).await,
        };
        let last = self.last.lock().clone();
        let fresh = match (pem, &last) {
            (Ok(pem), Some((known, config))) if *known == pem => return Ok(Arc::clone(config)),
            (Ok(pem), _) => from_pem(&pem)
                .and_then(|roots| client_config(&self.tls, roots))
                .map(|config| (Bytes::from(pem), config)),
            (Err(error), _) => Err(error),
        };
        let error = match fresh {
            Ok((pem, config)) => {
                *self.last.lock() = Some((pem, Arc::clone(&config)));
                return Ok(config);
            }
            Err(error) => error,
        };
        if let Some((_, config)) = last {
            tracing::warn!(roots = ?self.roots, %error, "the trust roots of OpenBao are not usable; the former ones stay");
            return Ok(config);
        }
        let text = format!("cannot use its trust roots, {:?}: {error}", self.roots);
        Err(io::Error::new(error.kind(), text))
    }
}

impl Dial for TlsDialler {
    fn dial<'a>(&'a self, to: &'a Uri) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let config = self.config().await?;
            let host = bare_host(to);
            let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
            let port = to.port_u16().unwrap_or(HTTPS);
            let tcp = TcpStream::connect((host, port)).await?;
            tcp.set_nodelay(true)?;
            let stream = TlsConnector::from(config).connect(name, tcp).await?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }

    fn same_cluster(&self, home: &str, host: &str) -> bool {
        self.roots != Roots::System || home.eq_ignore_ascii_case(host)
    }
}

/// The host without the brackets of an IPv6 address.
pub(super) fn bare_host(uri: &Uri) -> &str {
    let host = uri.host().unwrap_or_default();
    let address = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    address.unwrap_or(host)
}

fn from_pem(pem: &[u8]) -> io::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let added = certificate
            .map_err(|error| error.to_string())
            .and_then(|certificate| roots.add(certificate).map_err(|error| error.to_string()));
        if let Err(error) = added {
            tracing::debug!(error, "a trust root of OpenBao is left out");
        }
    }
    some(roots)
}

async fn system_config(tls: TlsOptions) -> io::Result<Arc<ClientConfig>> {
    let loading = tokio::task::spawn_blocking(rustls_native_certs::load_native_certs);
    let loaded = loading.await.map_err(io::Error::other)?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(loaded.certs);
    client_config(&tls, some(roots)?)
}

fn some(roots: RootCertStore) -> io::Result<RootCertStore> {
    if roots.is_empty() {
        let text = "there is no usable certificate among them";
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(roots)
}

fn client_config(tls: &TlsOptions, roots: RootCertStore) -> io::Result<Arc<ClientConfig>> {
    let mut config = ClientConfig::builder_with_provider(tls.provider())
        .with_protocol_versions(tls.versions())
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// An error and its causes as one line.
pub(super) fn in_full(error: &io::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

const HTTPS: u16 = 443;
/// As much as a whole operating system trusts takes a few hundred KiB.
const MAX_ROOTS: u64 = 4 * 1024 * 1024;
