//! What can go wrong on the way to a server.

use std::{error::Error, fmt, io, path::PathBuf, time::Duration};

use http::{Uri, header::InvalidHeaderValue};
use rustls::pki_types::InvalidDnsNameError;

/// Why there is no connection. All but [`ConnectError::NotHttps`] and [`ConnectError::Host`] may be gone at the next attempt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address has another scheme.
    #[error("{uri} is not reached without TLS: write https:// in place of the scheme")]
    NotHttps {
        /// The address.
        uri: Uri,
    },
    /// The host can stand in no certificate.
    #[error("the host of {uri} is neither a DNS name nor an IP address")]
    Host {
        /// The address.
        uri: Uri,
        /// Why.
        source: InvalidDnsNameError,
    },
    /// There is no file of trust roots, or not yet.
    #[error(
        "there is no file {} with the trust roots of the control plane: mount them there (ConfigMap \
         istio-ca-root-cert), or configure another path, SYSTEM, or the PEM text itself", path.display()
    )]
    NoRootFile {
        /// The configured path.
        path: PathBuf,
    },
    /// The file of trust roots cannot be read.
    #[error("cannot read the trust roots of the control plane in {}", path.display())]
    RootFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing could be trusted.
    #[error(
        "there is no usable certificate in {origin}, where the trust roots of the control plane should be"
    )]
    NoRoots {
        /// What was searched.
        origin: String,
        /// The first fault that was found there, if any.
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    /// The versions of TLS and the cryptography do not go together.
    #[error("TLS cannot be set up as configured")]
    Tls {
        /// Why.
        source: rustls::Error,
    },
    /// The name was not found, or the server did not accept a connection.
    #[error("cannot reach {uri}")]
    Tcp {
        /// The server.
        uri: Uri,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The certificate is not to be trusted, is for other names, or the server speaks no TLS.
    #[error("no TLS session with {uri}")]
    Handshake {
        /// The server.
        uri: Uri,
        /// Why.
        source: io::Error,
    },
    /// The server closed the connection in place of a first frame.
    #[error("{uri} ended the connection before it spoke HTTP/2: is this the gRPC port?")]
    Closed {
        /// The server.
        uri: Uri,
    },
    /// HTTP/2 could not be started.
    #[error("no HTTP/2 connection with {uri}")]
    Http2 {
        /// The server.
        uri: Uri,
        /// Why.
        source: tonic::transport::Error,
    },
    /// All took too long.
    #[error("no connection with {uri} within {limit:?}: still waiting for {step}")]
    Timeout {
        /// The server.
        uri: Uri,
        /// What was being waited for.
        step: Step,
        /// How long it may take in all.
        limit: Duration,
    },
}

impl ConnectError {
    /// Whether the fault is on this side, in what is configured or mounted, and not with the server or the way to it.
    #[must_use]
    pub const fn is_local(&self) -> bool {
        match self {
            Self::NotHttps { .. }
            | Self::Host { .. }
            | Self::NoRootFile { .. }
            | Self::RootFile { .. }
            | Self::NoRoots { .. }
            | Self::Tls { .. } => true,
            Self::Timeout { step, .. } => matches!(step, Step::Roots),
            Self::Tcp { .. }
            | Self::Handshake { .. }
            | Self::Closed { .. }
            | Self::Http2 { .. } => false,
        }
    }
}

/// What a connection is made of, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Reading the trust roots.
    Roots,
    /// Looking up the name, and TCP.
    Tcp,
    /// The TLS handshake.
    Tls,
    /// The first frame of the server.
    Http2,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Roots => "the trust roots to be read",
            Self::Tcp => "the name lookup or TCP",
            Self::Tls => "the TLS handshake",
            Self::Http2 => "the server to speak HTTP/2",
        })
    }
}

/// Why it cannot be told who is calling. No text holds the token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token in {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is nothing but white space.
    #[error("the token {} is empty", origin(path.as_ref()))]
    Empty {
        /// The file, none for a literal.
        path: Option<PathBuf>,
    },
    /// The token has characters that cannot stand in a header.
    #[error("the token {} is not one line of visible ASCII", origin(path.as_ref()))]
    Malformed {
        /// The file, none for a literal.
        path: Option<PathBuf>,
        /// Why.
        source: InvalidHeaderValue,
    },
    /// The cluster has a name that cannot stand in a header.
    #[error("the cluster id is not one line of visible ASCII")]
    ClusterId {
        /// Why.
        source: InvalidHeaderValue,
    },
}

fn origin(path: Option<&PathBuf>) -> String {
    path.map_or_else(
        || "in the configuration".to_owned(),
        |path| format!("in {}", path.display()),
    )
}
