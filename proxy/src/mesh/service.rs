//! Services and gateway references.

use std::{fmt, net::IpAddr, sync::Arc};

use cert_agent::SpiffeId;
use ipnet::IpNet;

use super::{PortMap, TargetPort};

/// A name, and possibly virtual addresses, for a set of workloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub(super) key: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) namespace: Arc<str>,
    pub(super) hostname: Arc<str>,
    pub(super) vips: Box<[Vip]>,
    pub(super) cidrs: Box<[Cidr]>,
    pub(super) ports: PortMap,
    pub(super) subject_alt_names: Box<[Arc<str>]>,
    pub(super) identities: Box<[SpiffeId]>,
    pub(super) waypoint: Option<Box<GatewayAddress>>,
    pub(super) weighted_waypoints: Box<[WeightedWaypoint]>,
    pub(super) load_balancing: LoadBalancing,
    pub(super) ip_families: IpFamilies,
    pub(super) canonical: bool,
    pub(super) visibility: Visibility,
}

impl Service {
    /// The primary key, `namespace/hostname`.
    #[must_use]
    pub fn key(&self) -> &Arc<str> {
        &self.key
    }

    /// The short name.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &Arc<str> {
        &self.namespace
    }

    /// The host name.
    #[must_use]
    pub fn hostname(&self) -> &Arc<str> {
        &self.hostname
    }

    /// Whether it goes by this host name, in whatever spelling.
    #[must_use]
    pub fn is_named(&self, hostname: &str) -> bool {
        self.hostname.eq_ignore_ascii_case(hostname)
    }

    /// Virtual host addresses, IPv4-mapped ones in their IPv4 form.
    #[must_use]
    pub fn vips(&self) -> &[Vip] {
        &self.vips
    }

    /// Virtual address ranges.
    #[must_use]
    pub fn cidrs(&self) -> &[Cidr] {
        &self.cidrs
    }

    /// Its ports; target 0 is a named port.
    #[must_use]
    pub fn ports(&self) -> &PortMap {
        &self.ports
    }

    /// Where one of its ports leads; `None` if it has no such port.
    #[must_use]
    pub fn target_port(&self, service_port: u16) -> Option<TargetPort> {
        match self.ports.get(service_port)? {
            0 => Some(TargetPort::Named),
            port => Some(TargetPort::Number(port)),
        }
    }

    /// Further names that its endpoints may present, as they were given.
    #[must_use]
    pub fn subject_alt_names(&self) -> &[Arc<str>] {
        &self.subject_alt_names
    }

    /// Those of [`subject_alt_names`](Self::subject_alt_names) that are identities of the mesh.
    #[must_use]
    pub fn identities(&self) -> &[SpiffeId] {
        &self.identities
    }

    /// The waypoint of traffic that is addressed to the service.
    #[must_use]
    pub fn waypoint(&self) -> Option<&GatewayAddress> {
        self.waypoint.as_deref()
    }

    /// If not empty, one of these is picked per connection by weight.
    #[must_use]
    pub fn weighted_waypoints(&self) -> &[WeightedWaypoint] {
        &self.weighted_waypoints
    }

    /// How an endpoint is chosen.
    #[must_use]
    pub fn load_balancing(&self) -> &LoadBalancing {
        &self.load_balancing
    }

    /// Which endpoints count.
    #[must_use]
    pub fn health_policy(&self) -> HealthPolicy {
        self.load_balancing.health_policy
    }

    /// Address families that its endpoints may be reached by.
    #[must_use]
    pub fn ip_families(&self) -> IpFamilies {
        self.ip_families
    }

    /// Whether it goes before other services of its host name or address.
    #[must_use]
    pub fn canonical(&self) -> bool {
        self.canonical
    }

    /// Which clients may see it.
    #[must_use]
    pub fn visibility(&self) -> Visibility {
        self.visibility
    }

    /// Whether clients of a namespace may see it; a look-up without a client sees everything.
    #[must_use]
    pub fn visible_to(&self, client_namespace: Option<&str>) -> bool {
        match self.visibility {
            Visibility::Public => true,
            Visibility::Namespace => {
                client_namespace.is_none_or(|client| client == &*self.namespace)
            }
        }
    }
}

/// A virtual address in a network.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Vip {
    /// The network; empty is the default network.
    pub network: Arc<str>,
    /// The address.
    pub ip: IpAddr,
}

impl fmt::Display for Vip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

/// A range of virtual addresses in a network.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Cidr {
    /// The network; empty is the default network.
    pub network: Arc<str>,
    /// The range, without host bits.
    pub range: IpNet,
}

/// Where a waypoint or network gateway is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct GatewayAddress {
    /// By address or by name.
    pub destination: Destination,
    /// Its HBONE port.
    pub hbone_mtls_port: u16,
}

impl fmt::Display for GatewayAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.destination, self.hbone_mtls_port)
    }
}

/// What a [`GatewayAddress`] points to. `Display` writes `network/ip` or `namespace/hostname`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Destination {
    /// An address of a service or workload.
    Address {
        /// The network.
        network: Arc<str>,
        /// The address.
        ip: IpAddr,
    },
    /// A host name of a service or workload.
    Host {
        /// The namespace.
        namespace: Arc<str>,
        /// The host name.
        hostname: Arc<str>,
    },
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { network, ip } => write!(f, "{network}/{ip}"),
            Self::Host {
                namespace,
                hostname,
            } => write!(f, "{namespace}/{hostname}"),
        }
    }
}

/// One of several waypoints of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub waypoint: GatewayAddress,
    /// Its share.
    pub weight: u32,
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadBalancing {
    /// What client and endpoint should have in common, most important first.
    pub scopes: Box<[Scope]>,
    /// What the scopes mean.
    pub mode: LoadBalancingMode,
    /// Which endpoints count.
    pub health_policy: HealthPolicy,
}

/// Something that client and endpoint may have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scope {
    /// Region.
    Region,
    /// Zone.
    Zone,
    /// Subzone.
    Subzone,
    /// Node.
    Node,
    /// Cluster.
    Cluster,
    /// Network.
    Network,
}

/// What the scopes of a [`LoadBalancing`] mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LoadBalancingMode {
    /// Nothing.
    Any,
    /// All must match.
    Strict,
    /// The best match wins.
    Failover,
    /// No choice: the dialled address is used.
    Passthrough,
}

/// Which endpoints count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HealthPolicy {
    /// Healthy ones.
    OnlyHealthy,
    /// All.
    AllowAll,
}

/// Address families that endpoints may be reached by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum IpFamilies {
    /// Any: nothing was said.
    Automatic,
    /// IPv4 only.
    Ipv4Only,
    /// IPv6 only.
    Ipv6Only,
    /// Both.
    Dual,
}

/// Which clients may see a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Visibility {
    /// All.
    Public,
    /// Those of its own namespace.
    Namespace,
}
