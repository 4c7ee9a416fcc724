//! Which endpoints a connection may lead to, and why not to the others, for people to read. Judges with the same functions
//! as [`super::outbound`].

use std::{fmt, net::SocketAddr, sync::Arc};

use super::{
    OutboundQuery, Owner, owner,
    upstream::{Place, Purpose, Selection, place, referenced},
};
use crate::mesh::{GatewayAddress, LoadBalancingMode, Service, State, Workload};

/// An endpoint that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fit {
    /// Its target port.
    pub port: u16,
    /// How near it is; higher goes first.
    pub rank: usize,
}

/// Why an endpoint is not chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unfit {
    /// It was tried in vain, for this connection or lately.
    Tried,
    /// It is not healthy.
    Unhealthy,
    /// It has neither an address nor a gateway in front of it.
    NoAddress,
    /// It is on another network, where waypoints of workloads cannot be reached.
    OtherNetwork,
    /// The port of the service leads nowhere there.
    NoTargetPort,
    /// It is not in the place that the service insists on.
    OtherPlace,
    /// Its capacity is 0.
    NoCapacity,
    /// Nearer ones go first.
    Farther,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tried => "tried in vain lately",
            Self::Unhealthy => "unhealthy",
            Self::NoAddress => "no address",
            Self::OtherNetwork => "on another network",
            Self::NoTargetPort => "no such port",
            Self::OtherPlace => "not in the place that the service insists on",
            Self::NoCapacity => "capacity is 0",
            Self::Farther => "nearer endpoints go first",
        })
    }
}

/// What a dialled address means, before one of several endpoints is chosen.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Meaning {
    /// The service that owns the address.
    pub service: Option<Arc<Service>>,
    /// The workload that does, if no service does.
    pub workload: Option<Arc<Workload>>,
    /// Waypoints of either: one of them is on the way.
    pub waypoints: Vec<GatewayAddress>,
    /// Services of the dialled workload that have a waypoint. Who dials a workload goes around it, since it is not the
    /// workload's own.
    pub around: Vec<Arc<Service>>,
    /// Endpoints of the service, or of the service of its only waypoint.
    pub endpoints: Vec<(Arc<Workload>, Result<Fit, Unfit>)>,
    /// To whom a waypoint on the way may lead, and at which address, on the network of the source. At most a
    /// hundred.
    pub behind: Vec<(Arc<Workload>, SocketAddr)>,
}

/// Of workloads behind a waypoint, so many are told of.
const MAX_BEHIND: usize = 100;

/// What `ask.destination` means to its source.
#[must_use]
pub fn meaning(state: &State, ask: &OutboundQuery<'_>) -> Meaning {
    let (source, to) = (ask.source, ask.destination);
    let owner = owner(
        state,
        source.network(),
        to.ip().to_canonical(),
        Some(source.namespace()),
    );
    let (service, workload, waypoints) = match owner {
        Owner::Service(service) => (Some(service), None, service_waypoints(service)),
        Owner::Workload(workload) => (None, Some(workload), Vec::from_iter(workload.waypoint())),
        Owner::Nobody => (None, None, Vec::new()),
    };
    let around = match owner {
        Owner::Workload(workload) if waypoints.is_empty() => guarded(state, workload),
        Owner::Service(_) | Owner::Workload(_) | Owner::Nobody => Vec::new(),
    };
    let selection = |service, port, purpose| Selection {
        state,
        source,
        service,
        port,
        purpose,
        avoid: ask.avoid,
    };
    let purpose = if service.is_some() {
        Purpose::NextHop
    } else {
        Purpose::LocalNextHop
    };
    let behind = match owner {
        _ if waypoints.is_empty() => Vec::new(),
        Owner::Service(service) => reachable(&selection(service, to.port(), Purpose::Target), to),
        Owner::Workload(workload) => vec![(Arc::clone(workload), to)],
        Owner::Nobody => Vec::new(),
    };
    let selection = match (waypoints.as_slice(), service) {
        ([], Some(service)) if !passes_through(service) => {
            Some(selection(service, to.port(), Purpose::Target))
        }
        ([one], _) => match referenced(state, Some(source.namespace()), one) {
            Owner::Service(waypoint) => Some(selection(waypoint, one.hbone_mtls_port, purpose)),
            Owner::Workload(_) | Owner::Nobody => None,
        },
        _ => None,
    };
    Meaning {
        service: service.cloned(),
        workload: workload.cloned(),
        waypoints: waypoints.into_iter().cloned().collect(),
        around,
        endpoints: selection.map(|all| judged(&all)).unwrap_or_default(),
        behind,
    }
}

/// Services of the workload that have a waypoint.
fn guarded(state: &State, workload: &Workload) -> Vec<Arc<Service>> {
    let services = state.services_of(workload).map(|(service, _)| service);
    services
        .filter(|service| !service_waypoints(service).is_empty())
        .cloned()
        .collect()
}

/// The endpoints that may be chosen, where they can be dialled.
fn reachable(selection: &Selection<'_>, to: SocketAddr) -> Vec<(Arc<Workload>, SocketAddr)> {
    let judged = judged(selection).into_iter();
    let near = judged.filter(|(workload, _)| workload.network() == selection.source.network());
    let placed = near.filter_map(|(workload, fit)| {
        let port = fit.ok()?.port;
        let at = match place(&workload, Some(selection.service), to.ip()) {
            Place::At(ip) => SocketAddr::new(ip, port),
            Place::Named(_) | Place::Nowhere => return None,
        };
        Some((workload, at))
    });
    placed.take(MAX_BEHIND).collect()
}

fn passes_through(service: &Service) -> bool {
    service.load_balancing().mode == LoadBalancingMode::Passthrough
}

/// The weighted ones, else the single one.
fn service_waypoints(service: &Service) -> Vec<&GatewayAddress> {
    let weighted = service.weighted_waypoints().iter();
    let weighted: Vec<_> = weighted
        .filter(|one| one.weight > 0)
        .map(|one| &one.waypoint)
        .collect();
    if weighted.is_empty() {
        service.waypoint().into_iter().collect()
    } else {
        weighted
    }
}

fn judged(selection: &Selection<'_>) -> Vec<(Arc<Workload>, Result<Fit, Unfit>)> {
    let endpoints = selection.state.endpoints(selection.service);
    let mut all: Vec<_> = endpoints
        .map(|endpoint| {
            let capacity = endpoint.workload.capacity();
            let fit = selection.judge(&endpoint);
            let fit = fit.and_then(|fit| {
                if capacity == 0 {
                    Err(Unfit::NoCapacity)
                } else {
                    Ok(fit)
                }
            });
            (Arc::clone(endpoint.workload), fit)
        })
        .collect();
    let best = all
        .iter()
        .filter_map(|(_, fit)| fit.ok())
        .map(|fit| fit.rank)
        .max();
    for (_, fit) in &mut all {
        if fit.is_ok_and(|fit| Some(fit.rank) < best) {
            *fit = Err(Unfit::Farther);
        }
    }
    all.sort_by(|(one, _), (other, _)| one.uid().cmp(other.uid()));
    all
}
