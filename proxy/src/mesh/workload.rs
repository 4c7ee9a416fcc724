//! Workloads, stored so that the pods of one deployment share all they have in common.

use std::{
    fmt,
    hash::{Hash, Hasher},
    net::IpAddr,
    sync::Arc,
};

use cert_agent::SpiffeId;
use hashbrown::Equivalent;

use super::{GatewayAddress, PortMap};

/// A running instance: a pod, a virtual machine, an external endpoint or a gateway that stands for several.
///
/// The record itself holds only what differs between the pods of a deployment on one node: under 100 bytes and the
/// text of its uid.
#[derive(Clone, PartialEq, Eq)]
pub struct Workload {
    /// The uid, followed by the name unless the uid ends with it anyway.
    pub(super) text: Box<str>,
    pub(super) uid_end: u32,
    pub(super) name_start: u32,
    pub(super) profile: Arc<Profile>,
    pub(super) place: Arc<Place>,
    pub(super) addresses: Addresses,
    pub(super) capacity: u32,
    pub(super) health: Health,
}

impl Workload {
    /// The primary key, such as `Kubernetes//Pod/shop/cart-5d-abc`.
    #[must_use]
    pub fn uid(&self) -> &str {
        // The bounds were made together with the text.
        self.text.get(..self.uid_end as usize).unwrap_or_default()
    }

    /// The pod name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.text
            .get(self.name_start as usize..)
            .unwrap_or_default()
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &Arc<str> {
        &self.profile.account.namespace
    }

    /// The trust domain of its identity; `cluster.local` if none was given.
    #[must_use]
    pub fn trust_domain(&self) -> &Arc<str> {
        &self.profile.account.trust_domain
    }

    /// The service account of its identity; `default` if none was given.
    #[must_use]
    pub fn service_account(&self) -> &Arc<str> {
        &self.profile.account.service_account
    }

    /// Its identity; `None` if namespace, trust domain or service account hold what no SPIFFE id may hold. Such a
    /// workload can own no certificate, so nothing must be taken for it by identity.
    #[must_use]
    pub fn identity(&self) -> Option<&SpiffeId> {
        self.profile.account.identity.as_ref()
    }

    /// The network of all its addresses; empty is the default network.
    #[must_use]
    pub fn network(&self) -> &Arc<str> {
        &self.profile.network
    }

    /// A name to be resolved at connect time when there are no addresses; may be empty.
    #[must_use]
    pub fn hostname(&self) -> &Arc<str> {
        &self.profile.hostname
    }

    /// The node it runs on; may be empty.
    #[must_use]
    pub fn node(&self) -> &Arc<str> {
        &self.place.node
    }

    /// Region of the node; may be empty.
    #[must_use]
    pub fn region(&self) -> &Arc<str> {
        &self.place.region
    }

    /// Zone of the node; may be empty.
    #[must_use]
    pub fn zone(&self) -> &Arc<str> {
        &self.place.zone
    }

    /// Subzone of the node; may be empty.
    #[must_use]
    pub fn subzone(&self) -> &Arc<str> {
        &self.place.subzone
    }

    /// The canonical service, for telemetry; may be empty.
    #[must_use]
    pub fn canonical_name(&self) -> &Arc<str> {
        &self.profile.canonical_name
    }

    /// The revision of the canonical service, for telemetry; may be empty.
    #[must_use]
    pub fn canonical_revision(&self) -> &Arc<str> {
        &self.profile.canonical_revision
    }

    /// The name of the owner, for telemetry; may be empty.
    #[must_use]
    pub fn workload_name(&self) -> &Arc<str> {
        &self.profile.workload_name
    }

    /// The kind of the owner, for telemetry.
    #[must_use]
    pub fn workload_type(&self) -> WorkloadType {
        self.profile.workload_type
    }

    /// The cluster; `Kubernetes` if none was given.
    #[must_use]
    pub fn cluster_id(&self) -> &Arc<str> {
        &self.profile.cluster_id
    }

    /// Its addresses, IPv4-mapped ones in their IPv4 form.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        match &self.addresses {
            Addresses::One(ip) => std::slice::from_ref(ip),
            Addresses::Other(ips) => ips,
        }
    }

    /// How to reach it.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.profile.protocol
    }

    /// Whether a service that asks for health may choose it. Traffic to its own address does not ask.
    #[must_use]
    pub fn health(&self) -> Health {
        self.health
    }

    /// Weight in load balancing; 0 is never chosen.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The waypoint of traffic that is addressed to the workload.
    #[must_use]
    pub fn waypoint(&self) -> Option<&GatewayAddress> {
        self.profile.waypoint.as_deref()
    }

    /// The gateway into its network, for clients of other networks.
    #[must_use]
    pub fn network_gateway(&self) -> Option<&GatewayAddress> {
        self.profile.network_gateway.as_deref()
    }

    /// How tunnel facts are handed to it.
    #[must_use]
    pub fn application_tunnel(&self) -> Option<ApplicationTunnel> {
        self.profile.application_tunnel
    }

    /// Whether the application ends the tunnel itself.
    #[must_use]
    pub fn native_tunnel(&self) -> bool {
        self.profile.native_tunnel
    }

    /// Whether its addresses are its own.
    #[must_use]
    pub fn network_mode(&self) -> NetworkMode {
        self.profile.network_mode
    }

    /// Keys of the policies that it names, known or not.
    #[must_use]
    pub fn authorization_policies(&self) -> &[Arc<str>] {
        &self.profile.policies
    }

    /// `namespace/hostname` and own port mapping of each service that it belongs to, known or not, sorted by key.
    #[must_use]
    pub fn links(&self) -> &[Link] {
        &self.profile.links
    }

    /// Whether look-ups by address may find it.
    pub(super) fn owns_addresses(&self) -> bool {
        match self.profile.network_mode {
            NetworkMode::Standard => true,
            NetworkMode::HostNetwork => false,
        }
    }

    /// Precedence where several workloads have one address: pods before the rest, then tunnelled ones.
    pub(super) fn rank(&self) -> (bool, bool) {
        (
            self.uid().contains("//Pod/"),
            self.protocol() == Protocol::Hbone,
        )
    }
}

impl fmt::Debug for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workload")
            .field("uid", &self.uid())
            .field("addresses", &self.addresses())
            .field("health", &self.health)
            .finish_non_exhaustive()
    }
}

/// Nearly every workload has one address, which then needs no allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Addresses {
    One(IpAddr),
    Other(Box<[IpAddr]>),
}

/// What the pods of one deployment have in common.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Profile {
    pub(super) account: Arc<Account>,
    pub(super) network: Arc<str>,
    pub(super) hostname: Arc<str>,
    pub(super) canonical_name: Arc<str>,
    pub(super) canonical_revision: Arc<str>,
    pub(super) workload_name: Arc<str>,
    pub(super) cluster_id: Arc<str>,
    pub(super) links: Box<[Link]>,
    pub(super) policies: Box<[Arc<str>]>,
    pub(super) waypoint: Option<Arc<GatewayAddress>>,
    pub(super) network_gateway: Option<Arc<GatewayAddress>>,
    pub(super) application_tunnel: Option<ApplicationTunnel>,
    pub(super) workload_type: WorkloadType,
    pub(super) protocol: Protocol,
    pub(super) network_mode: NetworkMode,
    pub(super) native_tunnel: bool,
}

/// Who the pods of one service account are. Equal by its names: the identity follows from them.
#[derive(Debug)]
pub(super) struct Account {
    pub(super) trust_domain: Arc<str>,
    pub(super) namespace: Arc<str>,
    pub(super) service_account: Arc<str>,
    pub(super) identity: Option<SpiffeId>,
}

/// The names of an [`Account`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct AccountNames<'a> {
    pub(super) trust_domain: &'a str,
    pub(super) namespace: &'a str,
    pub(super) service_account: &'a str,
}

impl Account {
    fn names(&self) -> AccountNames<'_> {
        AccountNames {
            trust_domain: &self.trust_domain,
            namespace: &self.namespace,
            service_account: &self.service_account,
        }
    }
}

impl PartialEq for Account {
    fn eq(&self, other: &Self) -> bool {
        self.names() == other.names()
    }
}

impl Eq for Account {}

impl Hash for Account {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.names().hash(state);
    }
}

impl Equivalent<Account> for AccountNames<'_> {
    fn equivalent(&self, account: &Account) -> bool {
        *self == account.names()
    }
}

/// Where the pods of one node run.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) node: Arc<str>,
    pub(super) region: Arc<str>,
    pub(super) zone: Arc<str>,
    pub(super) subzone: Arc<str>,
}

/// Membership of a workload in a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Link {
    /// `namespace/hostname` of the service.
    pub service: Arc<str>,
    /// The workload's own port mapping.
    pub ports: PortMap,
}

/// How to reach a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// Plain TCP.
    Tcp,
    /// HBONE.
    Hbone,
}

/// Whether a workload may be chosen as an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Health {
    /// It may.
    Healthy,
    /// Only where the service allows it.
    Unhealthy,
}

/// Whether the addresses of a workload are its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NetworkMode {
    /// They are.
    Standard,
    /// They are the node's, so an address does not tell the workload.
    HostNetwork,
}

/// Kind of the owner of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WorkloadType {
    /// Deployment, and everything not listed here.
    Deployment,
    /// Cron job.
    CronJob,
    /// Bare pod.
    Pod,
    /// Job.
    Job,
}

impl WorkloadType {
    /// As telemetry spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// How tunnel facts are handed to a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct ApplicationTunnel {
    /// The protocol of the hand-over.
    pub protocol: TunnelProtocol,
    /// Where to deliver; `None` keeps the port of the request.
    pub port: Option<u16>,
}

/// The protocol of an [`ApplicationTunnel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TunnelProtocol {
    /// Bytes only.
    None,
    /// PROXY protocol.
    Proxy,
}
