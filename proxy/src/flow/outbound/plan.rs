//! The decision of `route`, made ready to be carried.

use std::{error::Error, net::SocketAddr, sync::Arc};

use crate::{
    flow::{Carried, Pod, neighbours::Neighbour, parties},
    mesh::{Service, Workload},
    resolve::ResolveError,
    route::{self, Hop, InnerHop, LoopGuard, Outbound, OutboundQuery, Refusal},
    telemetry::Reason,
};

/// What the application did.
#[derive(Debug, Clone, Copy)]
pub(in crate::flow) struct Call {
    /// The application's own address.
    pub(in crate::flow) from: SocketAddr,
    /// What it dialled.
    pub(in crate::flow) to: SocketAddr,
    /// Where the connection arrived. That is another address unless it was not redirected.
    pub(in crate::flow) here: Option<SocketAddr>,
}

impl Call {
    /// Whether the application dialled this proxy: its loopback, or an address of the pod, from where nothing is redirected. Such
    /// an address may be one of which nobody has told; dialled again, it would lead here without end.
    fn is_recursive(&self, guard: &LoopGuard) -> bool {
        let is_here = self.to.ip().is_loopback() || self.here == Some(self.to);
        is_here && guard.covers(self.to.port())
    }
}

/// A decision that can be carried, with what the reports tell of it.
pub(super) struct Plan {
    pub(super) source: Arc<Workload>,
    /// The address that is dialled.
    pub(super) to: SocketAddr,
    /// Who is there, as far as that is known.
    pub(super) destination: Option<Arc<Workload>>,
    /// The service that was dialled.
    pub(super) service: Option<Arc<Service>>,
    pub(super) way: Way,
}

/// How the bytes get there.
pub(super) enum Way {
    Plain,
    Tunnel(Hop),
    /// As a tunnel would, to a pod of this process.
    Neighbour(Hop, Arc<Neighbour>),
    Nested(Hop, InnerHop),
}

impl Plan {
    pub(super) fn is_nested(&self) -> bool {
        matches!(self.way, Way::Nested(..))
    }

    pub(super) fn carried(&self) -> Carried {
        match self.way {
            Way::Plain => Carried::Tcp,
            Way::Tunnel(_) => Carried::Hbone,
            Way::Neighbour(..) => Carried::SameNode,
            Way::Nested(..) => Carried::DoubleHbone,
        }
    }

    /// The hop that is dialled, unless that is done in plaintext.
    pub(super) fn hop(&self) -> Option<&Hop> {
        match &self.way {
            Way::Plain => None,
            Way::Tunnel(hop) | Way::Neighbour(hop, _) | Way::Nested(hop, _) => Some(hop),
        }
    }

    /// Whether the same decision without this destination, and without those in `tried`, leads to another one.
    pub(super) fn has_alternative(
        &self,
        pod: &Pod,
        call: Call,
        tried: Option<&[Arc<Workload>]>,
    ) -> bool {
        let (Some(tried), Some(chosen)) = (tried, &self.destination) else {
            return false;
        };
        let avoid: Vec<_> = tried.iter().chain([chosen]).map(Arc::clone).collect();
        let ask = OutboundQuery {
            source: &self.source,
            source_ip: call.from.ip(),
            destination: call.to,
            avoid: &avoid,
        };
        let guard = &pod.settings().guard;
        let state = pod.shared().mesh.read();
        match route::outbound(&state, guard, &ask, &mut rand::rng()) {
            Outbound::Direct { workload, .. } => workload != *chosen,
            Outbound::Hbone(hop) | Outbound::Nested { outer: hop, .. } => hop.workload != *chosen,
            Outbound::Resolve(lookup) => lookup.workload() != chosen,
            Outbound::Passthrough { .. } | Outbound::Refuse(_) => false,
        }
    }
}

/// Why there is no plan.
pub(super) struct Unplanned {
    pub(super) reason: Reason,
    pub(super) error: Box<dyn Error + Send + Sync>,
}

impl From<Refusal> for Unplanned {
    fn from(refusal: Refusal) -> Self {
        Self {
            reason: refusal.reason(),
            error: refusal.into(),
        }
    }
}

/// Decides, and waits for what the decision needs.
pub(super) async fn decide(
    pod: &Pod,
    call: Call,
    avoid: &[Arc<Workload>],
) -> Result<Plan, Unplanned> {
    let guard = &pod.settings().guard;
    if call.is_recursive(guard) {
        return Err(Refusal::Recursion.into());
    }
    let source = pod.workload().await.ok_or(Refusal::UnknownLocal)?;
    let ask = OutboundQuery {
        source: &source,
        source_ip: call.from.ip(),
        destination: call.to,
        avoid,
    };
    let outbound = pod
        .decided(
            || route::outbound(&pod.shared().mesh.read(), guard, &ask, &mut rand::rng()),
            |outbound| outbound.missing(&source),
        )
        .await;
    let outbound = resolved(pod, &source, outbound).await?;
    let plan = |to, destination, service, way| Plan {
        source: Arc::clone(&source),
        to,
        destination,
        service,
        way,
    };
    let through = |hop: &Hop| (hop.to, Some(Arc::clone(&hop.workload)), hop.service.clone());
    match outbound {
        Outbound::Passthrough { to, service } => Ok(plan(to, None, service, Way::Plain)),
        Outbound::Direct {
            to,
            workload,
            service,
        } => Ok(plan(to, Some(workload), service, Way::Plain)),
        Outbound::Hbone(hop) => {
            let (to, workload, service) = through(&hop);
            let client = (&*source, call.from.ip());
            let way = match pod.shared().neighbours.find(pod, client, &hop) {
                Some(neighbour) => Way::Neighbour(hop, neighbour),
                None => Way::Tunnel(hop),
            };
            Ok(plan(to, workload, service, way))
        }
        Outbound::Nested { outer, inner } => {
            let (to, workload, service) = through(&outer);
            Ok(plan(to, workload, service, Way::Nested(outer, inner)))
        }
        Outbound::Resolve(lookup) => Err(lookup.unresolved().into()),
        Outbound::Refuse(refusal) => Err(refusal.into()),
    }
}

/// Completes a decision that lacks the address of a host name.
async fn resolved(pod: &Pod, source: &Workload, outbound: Outbound) -> Result<Outbound, Unplanned> {
    let Outbound::Resolve(lookup) = outbound else {
        return Ok(outbound);
    };
    let (shared, host) = (pod.shared(), lookup.hostname());
    shared.resolutions.resolving(&parties::party(source), host);
    let limit = pod.settings().sockets.connect_timeout / 2;
    match shared.resolver.addresses(host, limit).await {
        Ok(addresses) => Ok(lookup.resolved(&addresses, &mut rand::rng())),
        Err(source) => {
            let refusal = lookup.unresolved();
            Err(Unplanned {
                reason: refusal.reason(),
                error: Box::new(Unresolved { refusal, source }),
            })
        }
    }
}

/// A refusal with the cause that only the resolver knows.
#[derive(Debug, thiserror::Error)]
#[error("{refusal}")]
struct Unresolved {
    refusal: Refusal,
    source: ResolveError,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::tests::pod_with;

    #[tokio::test(start_paused = true)]
    async fn who_dials_the_proxy_at_an_address_of_the_pod_is_refused() {
        let (pod, at) = (pod_with(None), |port| {
            SocketAddr::from(([10, 7, 7, 7], port))
        });
        let redirected = Some(SocketAddr::from(([127, 0, 0, 1], 15001)));
        for (to, here, reason) in [
            (at(15001), Some(at(15001)), Reason::Recursion),
            (at(15008), Some(at(15008)), Reason::Recursion),
            // The same port of somebody else is nothing special, and neither is another port of the pod.
            (at(15001), redirected, Reason::UnknownLocal),
            (at(80), Some(at(80)), Reason::UnknownLocal),
        ] {
            let from = at(40000);
            let decided = decide(&pod, Call { from, to, here }, &[]).await;
            let refused = decided.err().map(|unplanned| unplanned.reason);
            assert_eq!(refused, Some(reason), "{to} at {here:?}");
        }
    }
}
