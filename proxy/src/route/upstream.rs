//! From a service or a workload to one endpoint, its port and its address.

use std::{net::IpAddr, sync::Arc};

use rand::Rng;

use super::{
    Fit, Owner, Unfit,
    balance::{Choice, Rank, rank},
    owner,
};
use crate::mesh::{
    Destination, Endpoint, GatewayAddress, Health, HealthPolicy, IpFamilies, LoadBalancingMode,
    Scope, Service, State, TargetPort, Workload,
};

/// One next hop: who, on which port, and for whose sake.
#[derive(Debug)]
pub(super) struct Upstream<'a> {
    pub(super) workload: &'a Arc<Workload>,
    /// The service whose endpoint it is; absent when the workload itself was named.
    pub(super) service: Option<&'a Arc<Service>>,
    pub(super) port: u16,
    /// The address whose family the hop's own should have.
    pub(super) near: IpAddr,
}

/// Which endpoints qualify, beyond what the service itself asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The application's own target.
    Target,
    /// A waypoint or gateway: one with an application tunnel takes ports its service does not list.
    NextHop,
    /// A waypoint of a workload: as above, and only on the source's network, since nothing but
    /// traffic for a service can cross networks.
    LocalNextHop,
}

/// Chooses among the endpoints of `service` for service port `port`.
pub(super) struct Selection<'a> {
    pub(super) state: &'a State,
    pub(super) source: &'a Workload,
    pub(super) service: &'a Arc<Service>,
    pub(super) port: u16,
    pub(super) purpose: Purpose,
    /// Endpoints that were tried for this connection in vain.
    pub(super) avoid: &'a [Arc<Workload>],
}

impl<'a> Selection<'a> {
    /// One endpoint and its target port: random by capacity, among the best by locality.
    pub(super) fn choose(&self, rng: &mut impl Rng) -> Option<(&'a Arc<Workload>, u16)> {
        let mut choice = Choice::new();
        for endpoint in self.state.endpoints(self.service) {
            if let Ok(Fit { port, rank }) = self.judge(&endpoint) {
                let weight = endpoint.workload.capacity();
                choice.offer((endpoint.workload, port), weight, rank, rng);
            }
        }
        choice.into_chosen()
    }

    /// Whether an endpoint may be chosen.
    pub(super) fn judge(&self, endpoint: &Endpoint<'_>) -> Result<Fit, Unfit> {
        if is_tried(self.state, self.source, endpoint.workload, self.avoid) {
            return Err(Unfit::Tried);
        }
        self.judge_untried(endpoint)
    }

    /// Whether an endpoint may be chosen if neither it nor what leads there was tried.
    fn judge_untried(&self, endpoint: &Endpoint<'_>) -> Result<Fit, Unfit> {
        let workload = endpoint.workload;
        if workload.health() != Health::Healthy
            && self.service.health_policy() != HealthPolicy::AllowAll
        {
            return Err(Unfit::Unhealthy);
        }
        let local = workload.network() == self.source.network();
        let has_address = !workload.addresses().is_empty() || !workload.hostname().is_empty();
        if !has_address && (local || workload.network_gateway().is_none()) {
            return Err(Unfit::NoAddress);
        }
        if !local && self.purpose == Purpose::LocalNextHop {
            return Err(Unfit::OtherNetwork);
        }
        let port = self.target_port(endpoint).ok_or(Unfit::NoTargetPort)?;
        let rank = match self.service.load_balancing().mode {
            LoadBalancingMode::Any | LoadBalancingMode::Passthrough => 0,
            LoadBalancingMode::Strict if !self.rank(workload).complete => {
                return Err(Unfit::OtherPlace);
            }
            LoadBalancingMode::Strict => 0,
            LoadBalancingMode::Failover => self.rank(workload).value,
        };
        Ok(Fit { port, rank })
    }

    /// The endpoint's own mapping, else the service's number, else the port itself where an
    /// application tunnel with a port of its own takes over anyway.
    fn target_port(&self, endpoint: &Endpoint<'_>) -> Option<u16> {
        let tunnel = endpoint.workload.application_tunnel();
        let listed = self.service.target_port(self.port);
        if listed.is_none() && (self.purpose == Purpose::Target || tunnel.is_none()) {
            return None;
        }
        if let Some(port) = endpoint.target_port(self.port) {
            return Some(port);
        }
        match listed {
            Some(TargetPort::Number(port)) => Some(port),
            Some(TargetPort::Named) => None,
            None => tunnel.and_then(|tunnel| tunnel.port).map(|_| self.port),
        }
    }

    fn rank(&self, candidate: &Workload) -> Rank {
        let scopes = &self.service.load_balancing().scopes;
        rank(
            scopes
                .iter()
                .map(|scope| agrees(*scope, self.source, candidate)),
            scopes.first() == Some(&Scope::Network),
        )
    }
}

/// Whether `workload` is one of those that were tried in vain, or is on another network and nobody else leads there.
pub(super) fn is_tried(
    state: &State,
    source: &Workload,
    workload: &Workload,
    tried: &[Arc<Workload>],
) -> bool {
    let is_one = |workload: &Workload| tried.iter().any(|one| one.uid() == workload.uid());
    if is_one(workload) {
        return true;
    }
    let is_remote = !tried.is_empty() && workload.network() != source.network();
    let Some(gateway) = workload.network_gateway().filter(|_| is_remote) else {
        return false;
    };
    match referenced(state, Some(source.namespace()), gateway) {
        Owner::Workload(gateway) => is_one(gateway),
        Owner::Service(service) => {
            let selection = Selection {
                state,
                source,
                service,
                port: gateway.hbone_mtls_port,
                purpose: Purpose::NextHop,
                avoid: tried,
            };
            // What leads to a gateway is not asked for: it might be the gateway itself.
            let is_left = |endpoint: Endpoint<'_>| {
                let workload = endpoint.workload;
                !is_one(workload)
                    && workload.capacity() > 0
                    && selection.judge_untried(&endpoint).is_ok()
            };
            !state.endpoints(service).any(is_left)
        }
        Owner::Nobody => false,
    }
}

fn agrees(scope: Scope, source: &Workload, candidate: &Workload) -> bool {
    match scope {
        Scope::Region => source.region() == candidate.region(),
        Scope::Zone => source.zone() == candidate.zone(),
        Scope::Subzone => source.subzone() == candidate.subzone(),
        Scope::Node => source.node() == candidate.node(),
        Scope::Cluster => source.cluster_id() == candidate.cluster_id(),
        Scope::Network => source.network() == candidate.network(),
    }
}

/// What a next hop is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) purpose: Purpose,
    /// What the application dialled; it decides the address family if the reference is by name.
    pub(super) dialled: IpAddr,
    /// As for [`Selection`].
    pub(super) avoid: &'a [Arc<Workload>],
}

/// Resolves the reference to a waypoint or gateway to one of its workloads.
pub(super) fn next_hop<'a>(
    state: &'a State,
    source: &'a Workload,
    reference: &GatewayAddress,
    wanted: Wanted<'a>,
    rng: &mut impl Rng,
) -> Option<Upstream<'a>> {
    let Wanted {
        purpose,
        dialled,
        avoid,
    } = wanted;
    let near = match &reference.destination {
        Destination::Address { ip, .. } => *ip,
        Destination::Host { .. } => dialled,
    };
    let port = reference.hbone_mtls_port;
    match referenced(state, Some(source.namespace()), reference) {
        Owner::Service(service) => {
            let selection = Selection {
                state,
                source,
                service,
                port,
                purpose,
                avoid,
            };
            let (workload, port) = selection.choose(rng)?;
            Some(Upstream {
                workload,
                service: Some(service),
                port,
                near,
            })
        }
        Owner::Workload(workload) => Some(Upstream {
            workload,
            service: None,
            port,
            near,
        }),
        Owner::Nobody => None,
    }
}

/// Who a reference means. A name means a service of exactly its namespace, else a workload.
pub(super) fn referenced<'a>(
    state: &'a State,
    client_namespace: Option<&str>,
    reference: &GatewayAddress,
) -> Owner<'a> {
    match &reference.destination {
        Destination::Address { network, ip } => owner(state, network, *ip, client_namespace),
        Destination::Host {
            namespace,
            hostname,
        } => {
            let service = state.service(namespace, hostname).map(Owner::Service);
            service
                .or_else(|| {
                    state
                        .workload_by_hostname(namespace, hostname)
                        .map(Owner::Workload)
                })
                .unwrap_or(Owner::Nobody)
        }
    }
}

/// Where a workload can be dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place<'a> {
    At(IpAddr),
    /// Its host name must be resolved first.
    Named(&'a Arc<str>),
    /// Neither: only a network gateway leads there.
    Nowhere,
}

/// The address of a chosen workload: `near` itself if it owns that, else one of its family.
pub(super) fn place<'a>(
    workload: &'a Workload,
    service: Option<&Service>,
    near: IpAddr,
) -> Place<'a> {
    if workload.addresses().contains(&near) {
        return Place::At(near);
    }
    let families = service.map_or(IpFamilies::Automatic, Service::ip_families);
    let mut usable = workload
        .addresses()
        .iter()
        .copied()
        .filter(|ip| match families {
            IpFamilies::Automatic | IpFamilies::Dual => true,
            IpFamilies::Ipv4Only => ip.is_ipv4(),
            IpFamilies::Ipv6Only => ip.is_ipv6(),
        });
    let first = usable.next();
    let same_family = first
        .into_iter()
        .chain(usable)
        .find(|ip| ip.is_ipv4() == near.is_ipv4());
    match same_family.or(first) {
        Some(ip) => Place::At(ip),
        None if workload.hostname().is_empty() => Place::Nowhere,
        None => Place::Named(workload.hostname()),
    }
}
