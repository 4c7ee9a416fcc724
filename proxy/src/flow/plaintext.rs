//! A connection that reached the pod without TLS (port 15006).

use std::{net::SocketAddr, sync::Arc};

use tokio::net::TcpStream;

use super::{
    Direction, Pod,
    failure::Failure,
    inbound, parties,
    report::{self, Guarded, Told},
    verdict::authorize,
};
use crate::{
    listen,
    mesh::Workload,
    policy::Connection,
    relay::{self, Socket},
    route::{self, InboundRefusal, InboundRoute, PlaintextQuery},
    telemetry::{Access, Labels, Party, Reporter, Route, Security, TracePhase},
};

/// Carries one connection to the application, if policy allows it for a peer without identity.
pub(super) async fn carry(pod: Arc<Pod>, downstream: TcpStream, peer: SocketAddr) {
    // A connection that is not carried is reset.
    let downstream = Socket::new(downstream);
    // Boxed, so that the space of the set-up is given back before bytes move.
    let Some(opened) = Box::pin(open(&pod, &downstream, peer)).await else {
        return;
    };
    let Opened { told, upstream } = opened;
    let pump = relay::pump(
        downstream,
        Socket::new(upstream),
        told.access.meter(),
        &pod.shared().buffers,
    );
    let end = Guarded::new(&told, pump).await;
    told.close(end);
}

struct Opened {
    told: Box<Told>,
    upstream: TcpStream,
}

/// Everything up to the first byte. `None` if the connection ended here; it is reported then.
async fn open(pod: &Arc<Pod>, downstream: &TcpStream, peer: SocketAddr) -> Option<Opened> {
    let destination = listen::original_destination(downstream).unwrap_or(peer);
    let mut trace = pod.shared().traces.begin(Reporter::Destination, None);
    let (local, route) = match decide(pod, destination).await {
        Ok(decision) => decision,
        Err(refusal) => {
            let addresses = (peer, Some(destination));
            trace.reject(addresses, refusal.reason(), &refusal);
            inbound::reject(pod, addresses, refusal.reason(), &refusal);
            return None;
        }
    };
    // Keeps upstream sockets towards this application off the client's own port.
    let captured = pod.source_ports().register(peer, route.destination);
    let source = pod.peer(peer.ip()).await;
    let mut access = opened(pod, &local, &route, (peer, source.as_deref()));
    trace.ended(TracePhase::Resolve);
    let direction = Direction::Inbound {
        source: peer,
        destination: route.destination,
        identity: None,
        service: None,
    };
    let entry = pod.flows().enter(direction, None, access.meter().watch());
    let connection = Connection {
        source: peer,
        destination: route.destination,
        identity: None,
    };
    let verdict = authorize(pod, &local, &connection, &entry).await;
    trace.ended(TracePhase::Policy);
    let upstream = match verdict {
        Err(refused) => Err(refused),
        Ok(permit) => pod
            .dial_application(permit, route.to, peer.ip())
            .await
            .map_err(Failure::Unreachable),
    };
    if !matches!(upstream, Err(Failure::Denied(_))) {
        trace.ended(TracePhase::Connect);
    }
    access.traced(trace);
    match upstream {
        Ok(upstream) => Some(Opened {
            told: Told::new(access, entry, [upstream.port, captured]),
            upstream: upstream.stream,
        }),
        Err(failure) => {
            report::close(access, Err(failure));
            None
        }
    }
}

async fn decide(
    pod: &Pod,
    destination: SocketAddr,
) -> Result<(Arc<Workload>, InboundRoute), InboundRefusal> {
    if pod.settings().guard.covers(destination.port()) {
        return Err(InboundRefusal::Recursion);
    }
    let local = pod.workload().await.ok_or(InboundRefusal::UnknownLocal)?;
    let ask = PlaintextQuery {
        local: &local,
        destination,
    };
    let route = route::inbound_plaintext(&pod.shared().mesh.read(), &pod.settings().guard, &ask)?;
    Ok((local, route))
}

fn opened(
    pod: &Pod,
    local: &Workload,
    route: &InboundRoute,
    (peer, source): (SocketAddr, Option<&Workload>),
) -> Access {
    let labels = Labels {
        reporter: Reporter::Destination,
        security: Security::Unknown,
        source: Party::source(None, source.map(parties::party)),
        destination: parties::party(local),
        service: parties::service_name(route.service.as_deref()),
    };
    let meter = pod.shared().traffic.open(&labels);
    Access::open(
        meter,
        Route {
            source: peer,
            destination: route.destination,
            hbone: None,
            source_pod: source.map(parties::pod_name),
            destination_pod: Some(parties::pod_name(local)),
        },
    )
}
