//! Why a flow failed, in the one vocabulary of log, metric and status.

use std::error::Error;

use http::StatusCode;

use super::{proxy_header::HeaderError, table::Revocation};
use crate::{
    listen,
    policy::Denied,
    relay::{Ending, Outcome},
    telemetry::Reason,
    tunnel,
};

/// Why a flow that was counted as opened failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// A policy of the destination forbids it.
    #[error("connection closed due to policy rejection")]
    Denied(#[source] Denied),
    /// It may no longer be what was allowed when it began.
    #[error(transparent)]
    Revoked(Revocation),
    /// The certificate of the tunnel's peer was revoked while the flow ran.
    #[error("connection closed: peer certificate revoked by CRL")]
    PeerRevoked,
    /// The application, or a destination outside the mesh, could not be reached.
    #[error("connection failed")]
    Unreachable(#[source] listen::ConnectError),
    /// The application was reached, but not told whom it serves.
    #[error(transparent)]
    Header(HeaderError),
    /// No tunnel to the next hop.
    #[error(transparent)]
    Tunnel(tunnel::ConnectError),
    /// The peer went away before the flow was established.
    #[error("h2 failed")]
    Answer(#[source] h2::Error),
    /// The client gave up before the application answered.
    #[error("the client gave up before the connection was established")]
    Abandoned,
    /// Our own workload has no identity that a certificate could carry.
    #[error("identity error: the local workload has no valid identity")]
    NoIdentity,
    /// A side broke while bytes moved.
    #[error(transparent)]
    Relay(Box<dyn Error + Send + Sync>),
}

/// What may help after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Nothing.
    None,
    /// An endpoint other than the one that was chosen.
    AnotherEndpoint,
    /// Any endpoint: what was chosen was a gateway, and what failed is behind it.
    AnyEndpoint,
}

impl Failure {
    /// The failure that an ended relay amounts to, if it does.
    pub(super) fn of(outcome: Outcome) -> Option<Self> {
        match outcome.ending {
            Ending::Clean | Ending::Reset => None,
            Ending::Failed(error) => Some(Self::Relay(error)),
        }
    }

    /// What may be tried in its place, as long as no byte was delivered.
    pub(super) fn remedy(&self) -> Remedy {
        let is_of_endpoint = match self {
            Self::Tunnel(error) if error.is_behind_gateway() => return Remedy::AnyEndpoint,
            Self::Unreachable(error) => error.is_of_destination(),
            Self::Tunnel(error) => error.is_of_destination(),
            Self::Denied(_)
            | Self::Revoked(_)
            | Self::PeerRevoked
            | Self::Header(_)
            | Self::Answer(_)
            | Self::Abandoned
            | Self::NoIdentity
            | Self::Relay(_) => false,
        };
        if is_of_endpoint {
            Remedy::AnotherEndpoint
        } else {
            Remedy::None
        }
    }

    /// Whether the destination has not answered, in whatever way.
    pub(super) fn is_silence(&self) -> bool {
        matches!(
            self.reason(),
            Reason::ConnectTimeout
                | Reason::HboneTimeout
                | Reason::TlsTimeout
                | Reason::AnswerTimeout
        )
    }

    /// What metrics and logs call it.
    pub(super) fn reason(&self) -> Reason {
        match self {
            Self::Denied(_) => Reason::PolicyDenied,
            Self::Revoked(Revocation::Policy(_)) => Reason::PolicyChanged,
            Self::Revoked(Revocation::Identity) => Reason::IdentityChanged,
            Self::PeerRevoked => Reason::Revoked,
            Self::Unreachable(error) => error.reason(),
            Self::Header(_) => Reason::ProxyHeader,
            Self::Tunnel(error) => error.reason(),
            Self::Answer(_) => Reason::Http2,
            Self::Abandoned => Reason::ClientGone,
            Self::NoIdentity => Reason::NoIdentity,
            Self::Relay(_) => Reason::Broken,
        }
    }

    /// What the peer of a CONNECT is answered.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Denied(_) | Self::Revoked(_) => StatusCode::UNAUTHORIZED,
            Self::Unreachable(_)
            | Self::Header(_)
            | Self::Tunnel(_)
            | Self::Answer(_)
            | Self::Abandoned
            | Self::NoIdentity
            | Self::PeerRevoked
            | Self::Relay(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}
