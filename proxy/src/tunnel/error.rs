//! What can go wrong on the way to a stream, in the words of the access log.

use std::{io, sync::Arc, time::Duration};

use http::StatusCode;

use super::headers::AuthorityError;
use crate::telemetry::ResponseFlag;

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
    /// The flag of this failure in metrics and logs.
    #[must_use]
    pub const fn flag(&self) -> ResponseFlag {
        match self {
            Self::DialTimeout { .. } => ResponseFlag::NetworkPolicy,
            Self::Dial(_) | Self::Handshake(_) | Self::HandshakeTimeout(_) => ResponseFlag::Connect,
            Self::Identity(_) => ResponseFlag::IdentityError,
            Self::Http2(_) | Self::SettingsTimeout(_) | Self::Closed => {
                ResponseFlag::H2HandshakeFailure
            }
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
        }
    }

    /// The flag of this failure in metrics and logs.
    #[must_use]
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::Open(error) => error.flag(),
            Self::Refused(_) => ResponseFlag::Connect,
            Self::AnswerTimeout(_) | Self::Http2(_) | Self::Request(_) => {
                ResponseFlag::H2HandshakeFailure
            }
        }
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
    /// The client's certificate was revoked.
    #[error("connection closed: peer certificate revoked by CRL")]
    Cut,
}

/// A request that is answered with 400 before anybody sees it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Malformed {
    #[error("method {0} instead of CONNECT")]
    Method(http::Method),
    #[error("authority")]
    Authority(#[from] AuthorityError),
}
