//! What can go wrong on the way to a stream, in the words of the access log.

use std::{io, sync::Arc, time::Duration};

use cert_agent::IdentityError;
use http::StatusCode;

use super::{flood::Flood, headers::AuthorityError};
use crate::telemetry::{Limit, Reason};

/// Why no connection to a peer could be opened. Every flow that waited for it gets the same.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No answer to SYN.
    #[error("connection timed out, maybe a NetworkPolicy is blocking HBONE port {port}")]
    DialTimeout {
        /// The port that did not answer.
        port: u16,
        /// The error of the dial.
        source: io::Error,
    },
    /// Refused, unreachable, or no local socket.
    #[error("io error")]
    Dial(#[source] io::Error),
    /// Our own certificate could not be had.
    #[error("identity error")]
    Identity(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The peer failed the TLS handshake, or we refused its certificate.
    #[error("io error: TLS handshake")]
    Handshake(#[source] io::Error),
    /// The peer did not finish the TLS handshake.
    #[error("io error: no TLS handshake within {0:?}")]
    HandshakeTimeout(Duration),
    /// HTTP/2 could not be set up.
    #[error("http2 handshake failed")]
    Http2(#[source] h2::Error),
    /// The peer sent no SETTINGS.
    #[error("http2 handshake failed: no SETTINGS within {0:?}")]
    SettingsTimeout(Duration),
    /// The connection ended before it could be used, or the pool is closed.
    #[error("http2 handshake failed: connection closed")]
    Closed,
}

impl OpenError {
    /// What metrics and logs call this failure.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::DialTimeout { .. } => Reason::HboneTimeout,
            Self::Dial(_) => Reason::ConnectRefused,
            Self::Identity(_) => Reason::NoCertificate,
            Self::Handshake(error) => handshake_reason(error),
            Self::HandshakeTimeout(_) => Reason::TlsTimeout,
            Self::Http2(_) | Self::SettingsTimeout(_) | Self::Closed => Reason::Http2,
        }
    }
}

/// Why a CONNECT gave no stream.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// There is no connection to the peer.
    #[error(transparent)]
    Open(#[from] Arc<OpenError>),
    /// The peer answered, but not with 200.
    #[error("http status: {0}")]
    Refused(StatusCode),
    /// The peer did not answer.
    #[error("h2 failed: no answer to CONNECT within {0:?}")]
    AnswerTimeout(Duration),
    /// The stream or its connection broke.
    #[error("h2 failed")]
    Http2(#[source] Arc<h2::Error>),
    /// The request cannot be put into HTTP/2.
    #[error("h2 failed: invalid request")]
    Request(#[source] Arc<http::Error>),
    /// The gateway of the other network did its part, the tunnel inside failed.
    #[error("inner tunnel")]
    Inner(#[source] Box<Self>),
}

impl ConnectError {
    /// Whether this destination, rather than the request or our side, is at fault: another one may do better. That
    /// a policy forbids it (401) is nobody's fault.
    #[must_use]
    pub fn is_of_destination(&self) -> bool {
        match self {
            Self::Open(error) => !matches!(**error, OpenError::Identity(_)),
            Self::Refused(status) => *status == StatusCode::SERVICE_UNAVAILABLE,
            Self::AnswerTimeout(_) | Self::Http2(_) => true,
            Self::Request(_) => false,
            Self::Inner(error) => error.is_of_destination(),
        }
    }

    /// Whether a gateway led to a workload that has not reached its application. The gateway may lead to another one next time.
    #[must_use]
    pub fn is_behind_gateway(&self) -> bool {
        let Self::Inner(error) = self else {
            return false;
        };
        matches!(**error, Self::Refused(StatusCode::SERVICE_UNAVAILABLE))
    }

    /// What metrics and logs call this failure.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Open(error) => error.reason(),
            Self::Refused(StatusCode::UNAUTHORIZED) => Reason::DeniedByPeer,
            Self::Refused(_) => Reason::HttpStatus,
            Self::AnswerTimeout(_) => Reason::AnswerTimeout,
            Self::Http2(_) | Self::Request(_) => Reason::Http2,
            Self::Inner(error) => error.reason(),
        }
    }
}

/// What a failed TLS handshake is called.
pub(super) fn handshake_reason(error: &io::Error) -> Reason {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner {
        Some(error) if IdentityError::find(error).is_some() => Reason::PeerIdentityMismatch,
        Some(rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked)) => {
            Reason::Revoked
        }
        Some(_) | None => Reason::TlsHandshake,
    }
}

impl From<h2::Error> for ConnectError {
    fn from(error: h2::Error) -> Self {
        Self::Http2(Arc::new(error))
    }
}

/// Why a served connection ended other than by its peer's orderly close.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The client sent no HTTP/2 preface.
    #[error("no HTTP/2 preface within {0:?}")]
    PrefaceTimeout(Duration),
    /// The connection broke, or the client broke the protocol.
    #[error("h2 failed")]
    Http2(#[from] h2::Error),
    /// The client did not answer a PING.
    #[error("no PONG within {0:?}")]
    Silent(Duration),
    /// The client keeps the connection busy with nothing.
    #[error("closed: {0}")]
    Flooded(Flood),
    /// The client's certificate was revoked.
    #[error("connection closed: peer certificate revoked by CRL")]
    Cut,
}

impl ServeError {
    /// The limit that was hit, if one was.
    #[must_use]
    pub fn limit(&self) -> Option<Limit> {
        match self {
            Self::Flooded(flood) => Some(flood.limit()),
            Self::Http2(error) => {
                let calm = error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM);
                (calm && error.is_library()).then_some(Limit::Http2)
            }
            Self::PrefaceTimeout(_) | Self::Silent(_) | Self::Cut => None,
        }
    }
}

/// Whether the peer, or its kernel, closed the transport.
pub(super) fn is_hangup(error: &h2::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, UnexpectedEof};
    let kind = error.get_io().map(io::Error::kind);
    kind.is_some_and(|kind| {
        [BrokenPipe, ConnectionReset, NotConnected, UnexpectedEof].contains(&kind)
    })
}

/// A request that is answered with 400 before anybody sees it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Malformed {
    #[error("method {0} instead of CONNECT")]
    Method(http::Method),
    #[error("authority")]
    Authority(#[from] AuthorityError),
}
