//! The outbound decision table, O1 to O12.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rand::Rng;

use super::{
    Authority, HBONE_PORT, InnerHop, LoopGuard, Outbound, Owner, Refusal,
    balance::Choice,
    hop::{Leg, expected, no_way_to},
    owner,
    upstream::{Purpose, Selection, Upstream, Wanted, is_tried, next_hop, referenced},
};
use crate::mesh::{GatewayAddress, LoadBalancingMode, Protocol, Service, State, Workload};

/// What is known of an outbound connection.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::exhaustive_structs, reason = "a query is built by its caller")]
pub struct OutboundQuery<'a> {
    /// The captured pod.
    pub source: &'a Arc<Workload>,
    /// The address from which the application connected.
    pub source_ip: IpAddr,
    /// What the application dialled.
    pub destination: SocketAddr,
    /// Endpoints that were tried for this connection in vain, and are not to be chosen again.
    pub avoid: &'a [Arc<Workload>],
}

/// Decides where a connection goes. The source's record is the caller's to find (O2).
///
/// O3 and O6 are one look-up, in the network of the source; [`crate::route`] tells its order.
pub fn outbound(
    state: &State,
    guard: &LoopGuard,
    ask: &OutboundQuery<'_>,
    rng: &mut impl Rng,
) -> Outbound {
    let to = SocketAddr::new(ask.destination.ip().to_canonical(), ask.destination.port());
    if to.ip().is_loopback() && guard.covers(to.port()) {
        return Outbound::Refuse(Refusal::Recursion); // O1
    }
    let mut decision = Decision {
        state,
        source: ask.source,
        source_ip: ask.source_ip.to_canonical(),
        to,
        avoid: ask.avoid,
        rng,
    };
    let (network, namespace) = (ask.source.network(), ask.source.namespace());
    let outcome = match owner(state, network, to.ip(), Some(namespace)) {
        Owner::Service(service) => decision.service(service),
        Owner::Workload(workload) => decision.workload(workload),
        Owner::Nobody => Ok(Outbound::Passthrough { to, service: None }), // O8
    };
    outcome.unwrap_or_else(Outbound::Refuse)
}

/// The facts that every rule needs.
struct Decision<'a, R> {
    state: &'a State,
    source: &'a Arc<Workload>,
    source_ip: IpAddr,
    to: SocketAddr,
    avoid: &'a [Arc<Workload>],
    rng: &'a mut R,
}

impl<'a, R: Rng> Decision<'a, R> {
    /// O4 to O9, O11, O12: a service was dialled.
    fn service(&mut self, service: &'a Arc<Service>) -> Result<Outbound, Refusal> {
        if let Some(waypoint) = self.service_waypoint(service) {
            let next = self.waypoint(waypoint, Purpose::NextHop)?;
            if self.is_remote(next.workload) {
                return self.across(&next, service); // O4a
            }
            return Leg::waypoint(&next, self.to, Some(service)).place(&next); // O4b
        }
        if service.load_balancing().mode == LoadBalancingMode::Passthrough {
            return Ok(Outbound::Passthrough {
                to: self.to,
                service: Some(Arc::clone(service)),
            });
        }
        let selection = Selection {
            state: self.state,
            source: self.source,
            service,
            port: self.to.port(),
            purpose: Purpose::Target,
            avoid: self.avoid,
        };
        let (workload, port) = selection
            .choose(self.rng)
            .ok_or(Refusal::NoHealthyUpstream(self.to))?; // O7
        let upstream = Upstream {
            workload,
            service: Some(service),
            port,
            near: self.to.ip(),
        };
        if self.is_remote(workload) {
            return self.across(&upstream, service); // O9
        }
        Leg::target(&upstream).place(&upstream)
    }

    /// O10 to O12: a workload was dialled.
    fn workload(&mut self, workload: &'a Arc<Workload>) -> Result<Outbound, Refusal> {
        if self.to.port() == HBONE_PORT && workload.protocol() == Protocol::Hbone {
            // An application, such as a gateway, that makes its tunnels by itself. Within one of ours nobody would take it.
            return Ok(Outbound::Direct {
                to: self.to,
                workload: Arc::clone(workload),
                service: None,
            });
        }
        if let Some(waypoint) = workload.waypoint()
            && !self.source_is(waypoint)
        {
            let next = self.waypoint(waypoint, Purpose::LocalNextHop)?;
            if self.is_remote(next.workload) {
                return Err(no_way_to(next.workload));
            }
            return Leg::waypoint(&next, self.to, None).place(&next); // O10
        }
        let upstream = Upstream {
            workload,
            service: None,
            port: self.to.port(),
            near: self.to.ip(),
        };
        Leg::target(&upstream).place(&upstream)
    }

    /// The waypoint of this connection: one of the weighted ones, else the single one. Weighted ones of which nobody is left to
    /// try give way to the others.
    fn service_waypoint(&mut self, service: &'a Service) -> Option<&'a GatewayAddress> {
        let mut choice = Choice::new();
        for weighted in service.weighted_waypoints() {
            let rank = usize::from(!self.is_tried(&weighted.waypoint));
            choice.offer(&weighted.waypoint, weighted.weight, rank, self.rng);
        }
        choice.into_chosen().or_else(|| service.waypoint())
    }

    /// Whether this connection has tried all that a waypoint leads to, in vain.
    fn is_tried(&mut self, waypoint: &GatewayAddress) -> bool {
        if self.avoid.is_empty() {
            return false;
        }
        let wanted = self.wanted(Purpose::NextHop);
        let next = next_hop(self.state, self.source, waypoint, wanted, self.rng);
        next.is_none_or(|next| is_tried(self.state, self.source, next.workload, self.avoid))
    }

    fn waypoint(
        &mut self,
        reference: &GatewayAddress,
        purpose: Purpose,
    ) -> Result<Upstream<'a>, Refusal> {
        let wanted = self.wanted(purpose);
        next_hop(self.state, self.source, reference, wanted, self.rng)
            .ok_or_else(|| Refusal::UnknownWaypoint(reference.clone()))
    }

    fn wanted(&self, purpose: Purpose) -> Wanted<'a> {
        Wanted {
            purpose,
            dialled: self.to.ip(),
            avoid: self.avoid,
        }
    }

    /// Double HBONE through the gateway in front of `next`. Only its gateway is dialled,
    /// never the chosen workload itself, which may have no address at all.
    fn across(&mut self, next: &Upstream<'_>, service: &Arc<Service>) -> Result<Outbound, Refusal> {
        let reference = next
            .workload
            .network_gateway()
            .ok_or_else(|| no_way_to(next.workload))?;
        let wanted = self.wanted(Purpose::NextHop);
        let gateway = next_hop(self.state, self.source, reference, wanted, self.rng)
            .ok_or_else(|| Refusal::UnknownGateway(reference.clone()))?;
        let authority = Authority::Host {
            name: Arc::clone(service.hostname()),
            port: self.to.port(),
        };
        let inner = InnerHop {
            authority,
            expected: expected(None, Some(next.service.unwrap_or(service))),
            workload: Arc::clone(next.workload),
            service: Arc::clone(service),
        };
        Leg::gateway(&gateway, inner).place(&gateway)
    }

    /// Whether the source is a workload of this waypoint itself: its identity and its address.
    fn source_is(&self, waypoint: &GatewayAddress) -> bool {
        let is_source = |candidate: &Arc<Workload>| {
            candidate.addresses().contains(&self.source_ip)
                && candidate.identity().is_some()
                && candidate.identity() == self.source.identity()
        };
        match referenced(self.state, Some(self.source.namespace()), waypoint) {
            Owner::Service(service) => self
                .state
                .endpoints(service)
                .any(|endpoint| is_source(endpoint.workload)),
            Owner::Workload(workload) => is_source(workload),
            Owner::Nobody => false,
        }
    }

    fn is_remote(&self, workload: &Workload) -> bool {
        workload.network() != self.source.network()
    }
}

#[cfg(test)]
mod tests;
