//! Where a flow comes from and where it goes, as the access log and spans tell it.

use std::{fmt, net::SocketAddr, sync::Arc};

/// What the access log tells beyond the metric labels.
#[derive(Debug, Clone)]
pub struct Route {
    /// The peer that connected, IPv4-mapped addresses unmapped.
    pub source: SocketAddr,
    /// Outbound: the address dialled. Inbound HBONE: the pod's HBONE address. Inbound plaintext:
    /// the original destination.
    pub destination: SocketAddr,
    /// The CONNECT authority, HBONE only.
    pub hbone: Option<HboneTarget>,
    /// Name of the source pod, or workload name of a source known from its baggage; `None` tells
    /// the canonical service.
    pub source_pod: Option<Arc<str>>,
    /// The same for the destination.
    pub destination_pod: Option<Arc<str>>,
}

/// The authority of a CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum HboneTarget {
    /// An address.
    Address(SocketAddr),
    /// A host name and port, across networks.
    Host(Arc<str>, u16),
}

impl fmt::Display for HboneTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host(name, port) => write!(f, "{name}:{port}"),
        }
    }
}
