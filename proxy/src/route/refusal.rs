//! Why a connection goes nowhere, in the words that operators search their logs for.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::StatusCode;

use crate::{
    mesh::{Destination, GatewayAddress},
    telemetry::Reason,
};

/// Why an outbound connection is closed. All of these happen before anything is dialled: they are
/// told by one early-deny line and move no traffic metric.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The application dialled a port of this proxy on loopback (O1).
    #[error("attempted recursive call to ourselves")]
    Recursion,
    /// The source has no record in the mesh state, and waiting for one was in vain (O2).
    #[error("failed to fetch information about local workload")]
    UnknownLocal,
    /// The service has no endpoint for this port that may be used (O7).
    #[error("no healthy upstream: {0}")]
    NoHealthyUpstream(SocketAddr),
    /// The waypoint is not known or has no usable endpoint; traffic never goes around it.
    #[error("unknown waypoint: {0}")]
    UnknownWaypoint(GatewayAddress),
    /// The network gateway is not known or has no usable endpoint.
    #[error("unknown network gateway: {0}")]
    UnknownGateway(GatewayAddress),
    /// The workload is on another network and names no gateway, or has no address at all.
    #[error("no valid routing destination for workload: {0}")]
    NoValidDestination(Arc<str>),
    /// The host name of the workload yields no address.
    #[error("no ip addresses were resolved for workload: {0}")]
    Unresolved(Arc<str>),
}

impl Refusal {
    /// What metrics and logs call it.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Recursion => Reason::Recursion,
            Self::UnknownLocal => Reason::UnknownLocal,
            Self::NoHealthyUpstream(_) => Reason::NoHealthyUpstream,
            Self::UnknownWaypoint(_) => Reason::UnknownWaypoint,
            Self::UnknownGateway(_) => Reason::UnknownGateway,
            Self::NoValidDestination(_) => Reason::NoRoute,
            Self::Unresolved(_) => Reason::Unresolved,
        }
    }

    /// What would have to be known to decide otherwise.
    #[must_use]
    pub fn missing(&self) -> Option<&Destination> {
        match self {
            Self::UnknownWaypoint(reference) | Self::UnknownGateway(reference) => {
                Some(&reference.destination)
            }
            Self::Recursion
            | Self::UnknownLocal
            | Self::NoHealthyUpstream(_)
            | Self::NoValidDestination(_)
            | Self::Unresolved(_) => None,
        }
    }
}

/// Why an inbound connection or CONNECT is refused before policy is asked. Every variant is an
/// early deny: one log line, no traffic metric. Over HBONE it is answered with [`Self::status`];
/// a plaintext connection is just closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InboundRefusal {
    /// The destination workload has no record in the mesh state, and waiting was in vain.
    #[error("failed to fetch information about local workload")]
    UnknownLocal,
    /// The authority names an address that is neither this pod nor served by it (I4).
    #[error("ip mismatch: {local} != {named}")]
    IpMismatch {
        /// Where the connection arrived.
        local: IpAddr,
        /// What the authority names.
        named: IpAddr,
        /// What would have to be known to decide otherwise: the owner of that address, or its waypoint.
        missing: Option<Destination>,
    },
    /// The authority names a host that no service visible here has (I5).
    #[error("unknown service host: {host}")]
    UnknownHost {
        /// Host of the authority.
        host: Arc<str>,
        /// A service of this name to which the pod says to belong.
        missing: Option<Destination>,
    },
    /// The authority names a service of which the pod is neither an endpoint nor a waypoint.
    #[error("not served here: {host}")]
    ForeignHost {
        /// Host of the authority.
        host: Arc<str>,
        /// What would have to be known to decide otherwise: its waypoint.
        missing: Option<Destination>,
    },
    /// The service exists, but this port leads nowhere in this pod (I5).
    #[error("no target port for {host}:{port}")]
    NoTargetPort {
        /// Host of the authority.
        host: Arc<str>,
        /// Service port of the authority.
        port: u16,
    },
    /// The destination is a port of this proxy (I6).
    #[error("attempted recursive call to ourselves")]
    Recursion,
    /// A PROXY header must name a virtual address, and the service has none (I7).
    #[error("no virtual address to name in the PROXY header: {0}")]
    NoVirtualAddress(Arc<str>),
}

impl InboundRefusal {
    /// What metrics and logs call it.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::UnknownLocal => Reason::UnknownLocal,
            Self::IpMismatch { .. } => Reason::IpMismatch,
            Self::UnknownHost { .. } | Self::ForeignHost { .. } => Reason::UnknownHost,
            Self::NoTargetPort { .. } => Reason::NoTargetPort,
            Self::Recursion => Reason::Recursion,
            Self::NoVirtualAddress(_) => Reason::NoVirtualAddress,
        }
    }

    /// What would have to be known to decide otherwise.
    #[must_use]
    pub fn missing(&self) -> Option<&Destination> {
        match self {
            Self::IpMismatch { missing, .. }
            | Self::UnknownHost { missing, .. }
            | Self::ForeignHost { missing, .. } => missing.as_ref(),
            Self::UnknownLocal
            | Self::NoTargetPort { .. }
            | Self::Recursion
            | Self::NoVirtualAddress(_) => None,
        }
    }

    /// The status of the answer to the CONNECT.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::IpMismatch { .. } | Self::ForeignHost { .. } => StatusCode::BAD_REQUEST,
            Self::UnknownLocal
            | Self::UnknownHost { .. }
            | Self::NoTargetPort { .. }
            | Self::Recursion
            | Self::NoVirtualAddress(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}
