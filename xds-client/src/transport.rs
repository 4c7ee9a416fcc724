//! How a gRPC server of the control plane is reached: istiod, and the authority that signs certificates.
//!
//! A [`Target`] holds what was configured. [`Target::connect`] makes a fresh connection each time, with trust roots as they
//! are at that moment, and [`Target::metadata`] tells who is calling, with the token as it is at that moment: both are
//! replaced under a running process. Nothing is kept between two connections, and none is made behind the caller's back.

mod channel;
mod error;
mod tls;

#[cfg(test)]
mod tests;

pub use error::{ConnectError, Step, TokenError};

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Uri, header::AUTHORIZATION};
use parking_lot::Mutex;
use rustls::{
    RootCertStore,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::ServerName,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout_at},
};
use tonic::{metadata::MetadataMap, transport::Channel};

use crate::watch::FileWatch;

/// A server of the control plane, and what is shown to it. `Debug` hides tokens and the values of headers.
///
/// [`Target::new`] fills in what is usual; set the other fields before the first use.
#[non_exhaustive]
pub struct Target {
    /// `https://host:port`; a path is ignored. The host is what TLS asks for (SNI) and what the certificate must show.
    pub uri: Uri,
    /// Who may have signed the certificate of the server.
    pub roots: Roots,
    /// A second name that the certificate may show instead of the host; default none.
    pub alternative_host: Option<String>,
    /// What proves who is calling; default none.
    pub token: Option<Token>,
    /// The cluster that the token comes from.
    pub cluster_id: String,
    /// Extra metadata of each request; default none.
    pub headers: HeaderMap,
    /// Versions of TLS; default [`TlsVersions::Only13`].
    pub versions: TlsVersions,
    /// Cipher suites and groups; default all that aws-lc-rs has.
    pub crypto: Arc<CryptoProvider>,
    /// How often HTTP/2 pings go out while a request is open; default 30 s, `None` for never. istiod ends connections that
    /// are pinged more often than every 15 s, istio-csr those more often than every 5 min.
    pub ping_interval: Option<Duration>,
    watch: FileWatch,
    /// The last usable content of a file of trust roots.
    usable: Mutex<Option<RootCertStore>>,
}

/// Where the trust roots of a server come from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Roots {
    /// A PEM file, read for each connection; it need not be there from the start.
    File(PathBuf),
    /// The trust store of the operating system, read for each connection.
    System,
    /// PEM text.
    Pem(String),
}

/// A bearer token. `Debug` hides a literal.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Token {
    /// A file, read for each request; it need not be there from the start.
    File(PathBuf),
    /// The token itself.
    Literal(String),
}

/// The versions of TLS that are offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum TlsVersions {
    /// TLS 1.3.
    #[default]
    Only13,
    /// TLS 1.2 and 1.3.
    From12,
}

impl Target {
    /// The server at `uri`, trusted by `roots`, seen from the cluster `cluster_id`.
    #[must_use]
    pub fn new(uri: Uri, roots: Roots, cluster_id: impl Into<String>) -> Self {
        Self {
            uri,
            roots,
            alternative_host: None,
            token: None,
            cluster_id: cluster_id.into(),
            headers: HeaderMap::new(),
            versions: TlsVersions::default(),
            crypto: Arc::new(aws_lc_rs::default_provider()),
            ping_interval: Some(PING_INTERVAL),
            watch: FileWatch::default(),
            usable: Mutex::default(),
        }
    }

    /// Makes a new connection: TCP within 5 s, and within 10 s in all the name lookup, TLS and the first word of the server
    /// in HTTP/2. The server is never asked to trust a certificate of ours.
    ///
    /// The channel stands for this one connection: once that ended, each request fails. HTTP/2 pings go out while a request
    /// is open, and end the connection if they are not answered within 10 s. So do 20 s in which nothing that was sent is
    /// acknowledged. Dropping the channel and its requests closes the connection.
    ///
    /// A file of trust roots that has become unusable does not take effect: the roots that it held before stay in force.
    ///
    /// # Errors
    /// [`ConnectError`], which names the server.
    ///
    /// # Cancel safety
    /// The unfinished connection is closed.
    pub async fn connect(&self) -> Result<Channel, ConnectError> {
        self.connect_over(channel::dial(&self.uri)).await
    }

    /// What goes with each request: the token, the cluster and the extra headers. A token wins over an extra header
    /// `authorization` or `clusterid`. Without a token the caller is not authenticated here, and extra headers stand.
    ///
    /// # Errors
    /// If there is no usable token at the moment. The file is read again next time.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn metadata(&self) -> Result<MetadataMap, TokenError> {
        let mut headers = self.headers.clone();
        let cluster = HeaderValue::try_from(&self.cluster_id)
            .map_err(|source| TokenError::ClusterId { source })?;
        match &self.token {
            Some(token) => {
                headers.insert(AUTHORIZATION, token.bearer().await?);
                headers.insert(CLUSTER_ID, cluster);
            }
            None => {
                headers.entry(CLUSTER_ID).or_insert(cluster);
            }
        }
        Ok(MetadataMap::from_headers(headers))
    }

    /// Waits until the file of trust roots differs from what [`Target::connect`] last read, or failed to read: a reason not
    /// to wait longer before the next attempt. Never ends for roots that come from elsewhere. Takes a second at least.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn roots_changed(&self) {
        match &self.roots {
            Roots::File(path) => {
                tokio::time::sleep(LEAST_WAIT).await;
                drop(self.watch.changed(path).await);
            }
            Roots::System | Roots::Pem(_) => std::future::pending().await,
        }
    }

    /// Whether [`Target::connect`] would find the trust roots that it found last, or failed to find.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn is_current(&self) -> bool {
        match &self.roots {
            Roots::File(path) => self.watch.is_told(path).await,
            Roots::System | Roots::Pem(_) => true,
        }
    }

    /// [`Target::connect`] over any transport that `dial` gives.
    async fn connect_over<S>(
        &self,
        dial: impl Future<Output = Result<S, ConnectError>>,
    ) -> Result<Channel, ConnectError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let limits = Limits {
            target: self,
            end: Instant::now() + CONNECT_LIMIT,
        };
        // First, so that a later change of the roots is seen as one, whatever fails next.
        let roots = limits.step(Step::Roots, self.load_roots()).await?;
        let name = self.server_name()?;
        let tls = tls::client_config(self, roots)?;
        let stream = limits.step(Step::Tcp, dial).await?;
        let stream = tls::handshake(self, tls, name, stream);
        let stream = limits.step(Step::Tls, stream).await?;
        let channel = channel::over(stream, self);
        limits.step(Step::Http2, channel).await
    }

    /// The roots as they are now, or those of an earlier moment if a file cannot be used any longer.
    async fn load_roots(&self) -> Result<RootCertStore, ConnectError> {
        let loaded = self.roots.load(&self.watch).await;
        let mut usable = self.usable.lock();
        match (loaded, &*usable) {
            (Err(error), Some(before)) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the trust roots of the control plane are not usable any longer; those of before stay in force"
                );
                Ok(before.clone())
            }
            (Ok(roots), _) => {
                if let Roots::File(_) = self.roots {
                    *usable = Some(roots.clone());
                }
                Ok(roots)
            }
            (Err(error), None) => Err(error),
        }
    }

    fn server_name(&self) -> Result<ServerName<'static>, ConnectError> {
        let uri = || self.uri.clone();
        if self.uri.scheme_str() != Some("https") {
            return Err(ConnectError::NotHttps { uri: uri() });
        }
        let host = self.uri.host().unwrap_or_default();
        let address = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        ServerName::try_from(address.unwrap_or(host).to_owned())
            .map_err(|source| ConnectError::Host { uri: uri(), source })
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("uri", &self.uri)
            .field("roots", &self.roots)
            .field("alternative_host", &self.alternative_host)
            .field("token", &self.token)
            .field("cluster_id", &self.cluster_id)
            .field("headers", &self.headers.keys().collect::<Vec<_>>())
            .field("versions", &self.versions)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Literal(_) => f.write_str("Literal([redacted])"),
        }
    }
}

impl Token {
    async fn bearer(&self) -> Result<HeaderValue, TokenError> {
        let (text, path) = match self {
            Self::Literal(text) => (text.clone(), None),
            Self::File(path) => match tokio::fs::read_to_string(path).await {
                Ok(text) => (text, Some(path)),
                Err(source) => {
                    let path = path.clone();
                    return Err(TokenError::Unreadable { path, source });
                }
            },
        };
        let text = text.trim();
        if text.is_empty() {
            return Err(TokenError::Empty {
                path: path.cloned(),
            });
        }
        let mut value = HeaderValue::try_from(format!("Bearer {text}")).map_err(|source| {
            let path = path.cloned();
            TokenError::Malformed { path, source }
        })?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// The time that a connection has left.
struct Limits<'a> {
    target: &'a Target,
    end: Instant,
}

impl Limits<'_> {
    /// Boxes the work: some of it is large, all of it is rare.
    fn step<T>(
        &self,
        step: Step,
        work: impl Future<Output = Result<T, ConnectError>>,
    ) -> impl Future<Output = Result<T, ConnectError>> {
        let work = Box::pin(timeout_at(self.end, work));
        async move {
            work.await.unwrap_or_else(|_| {
                Err(ConnectError::Timeout {
                    uri: self.target.uri.clone(),
                    step,
                    limit: CONNECT_LIMIT,
                })
            })
        }
    }
}

/// For everything from the roots to the first frame of the server.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Twice what istiod allows.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// Attempts that follow from changes of the trust roots are that far apart.
const LEAST_WAIT: Duration = Duration::from_secs(1);
const CLUSTER_ID: &str = "clusterid";
