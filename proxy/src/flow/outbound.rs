//! A connection that the pod's application made (port 15001).

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};

use super::{
    Carried, Direction, Pod,
    failure::Failure,
    parties,
    report::{self, Guarded, Told},
};
use crate::{
    listen,
    mesh::{Service, Workload},
    relay,
    route::{self, Hop, Outbound, OutboundQuery, Refusal},
    telemetry::{self, Access, Attempt, Labels, Reason, Reporter, Route, Security},
    tunnel::{
        self,
        headers::{Forwarded, TraceParent},
    },
};

/// Carries one connection to where `route` says.
pub(super) async fn carry(pod: Arc<Pod>, downstream: TcpStream, peer: SocketAddr) {
    // Boxed, so that the space of the set-up is given back before bytes move.
    let Some(opened) = Box::pin(open(&pod, &downstream, peer)).await else {
        return;
    };
    let Opened { told, upstream } = opened;
    let (meter, buffers) = (told.access.meter(), &pod.shared().buffers);
    let end = match upstream {
        Upstream::Socket(stream) => {
            Guarded::new(&told.entry, relay::pump(downstream, stream, meter, buffers)).await
        }
        Upstream::Tunnel(stream, fate) => {
            let pump = relay::pump(downstream, stream, meter, buffers);
            let end = Guarded::new(&told.entry, pump).await;
            report::unless_cut(fate.is_cut(), end)
        }
    };
    told.close(end);
}

struct Opened {
    told: Box<Told>,
    upstream: Upstream,
}

enum Upstream {
    Socket(TcpStream),
    Tunnel(tunnel::Stream, tunnel::Fate),
}

/// A decision that can be carried, with what the reports tell of it.
struct Plan {
    source: Arc<Workload>,
    /// The address that is dialled.
    to: SocketAddr,
    destination: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    hop: Option<Hop>,
}

/// Everything up to the first byte. `None` if the connection ended here; it is reported then.
///
/// An endpoint of a service that cannot be reached is no end: nothing was delivered yet, so another one is tried.
async fn open(pod: &Arc<Pod>, downstream: &TcpStream, peer: SocketAddr) -> Option<Opened> {
    let original = listen::original_destination(downstream).unwrap_or(peer);
    let began = Instant::now();
    let mut tried = Vec::new();
    loop {
        let plan = match decide(pod, (peer, original), &tried).await {
            Ok(plan) => plan,
            Err(refusal) => {
                // What was tried in vain is reported; that nothing is left to try is no news.
                if tried.is_empty() {
                    let attempt = Attempt {
                        reporter: Reporter::Source,
                        source: peer,
                        destination: Some(original),
                    };
                    let Unplanned { reason, error } = refusal;
                    pod.shared().traffic.reject(attempt, reason, &*error);
                }
                return None;
            }
        };
        if plan
            .destination
            .as_ref()
            .is_some_and(|one| tried.contains(one))
        {
            return None;
        }
        if !tried.is_empty() {
            pod.shared().traffic.retried();
        }
        let out_of_time = began.elapsed() >= pod.settings().sockets.connect_timeout;
        let last = tried.len() >= MAX_RETRIES || out_of_time;
        match attempt(pod, &plan, (peer, original), (!last).then_some(&*tried)).await {
            Ok(opened) => return Some(opened),
            Err(Finality::MayTryAnother) if !last => tried.extend(plan.destination),
            Err(Finality::MayTryAnother | Finality::Final) => return None,
        }
    }
}

/// Whether a failed attempt was the last one.
enum Finality {
    Final,
    MayTryAnother,
}

/// One attempt, reported if it fails. `tried` is there if another one may follow: then it gets no more than half of the time
/// that a connection may take, if there is somebody else to try.
async fn attempt(
    pod: &Arc<Pod>,
    plan: &Plan,
    (peer, original): (SocketAddr, SocketAddr),
    tried: Option<&[Arc<Workload>]>,
) -> Result<Opened, Finality> {
    let access = opened(pod, plan, peer);
    let carried = if plan.hop.is_some() {
        Carried::Hbone
    } else {
        Carried::Tcp
    };
    let direction = Direction::Outbound {
        source: peer,
        original,
        actual: plan.to,
        carried,
    };
    let entry = pod.flows().enter(direction, access.meter().watch());
    let reaching = async {
        match &plan.hop {
            None => pod
                .dial(plan.to)
                .await
                .map(|up| Upstream::Socket(up.stream))
                .map_err(Failure::Unreachable),
            Some(hop) => tunnel_to(pod, plan, hop, peer)
                .await
                .map(|answer| Upstream::Tunnel(answer.stream, answer.fate)),
        }
    };
    tokio::pin!(reaching);
    let (to, limit) = (plan.to, pod.settings().sockets.connect_timeout / 2);
    let upstream = match timeout(limit, &mut reaching).await {
        Ok(reached) => reached,
        Err(_) if plan.has_alternative(pod, (peer, original), tried) => {
            Err(Failure::Unreachable(listen::ConnectError::Timeout {
                to,
                limit,
            }))
        }
        Err(_) => reaching.await,
    };
    match upstream {
        Ok(upstream) => Ok(Opened {
            told: Told::new(access, entry, [None, None]),
            upstream,
        }),
        Err(failure) => {
            let finality = if failure.is_of_endpoint() {
                Finality::MayTryAnother
            } else {
                Finality::Final
            };
            report::close(access, Err(failure));
            Err(finality)
        }
    }
}

impl Plan {
    /// Whether the same decision without this destination, and without those in `tried`, leads to another one.
    fn has_alternative(
        &self,
        pod: &Pod,
        (peer, original): (SocketAddr, SocketAddr),
        tried: Option<&[Arc<Workload>]>,
    ) -> bool {
        let (Some(tried), Some(chosen)) = (tried, &self.destination) else {
            return false;
        };
        let avoid: Vec<_> = tried.iter().chain([chosen]).map(Arc::clone).collect();
        let ask = OutboundQuery {
            source: &self.source,
            source_ip: peer.ip(),
            destination: original,
            avoid: &avoid,
        };
        let guard = &pod.settings().guard;
        let state = pod.shared().mesh.read();
        match route::outbound(&state, guard, &ask, &mut rand::rng()) {
            Outbound::Direct { workload, .. } => workload != *chosen,
            Outbound::Hbone(hop) => hop.workload != *chosen,
            Outbound::Passthrough { .. }
            | Outbound::Nested { .. }
            | Outbound::Resolve(_)
            | Outbound::Refuse(_) => false,
        }
    }
}

/// Why there is no plan.
struct Unplanned {
    reason: Reason,
    error: Box<dyn std::error::Error + Send + Sync>,
}

impl From<Refusal> for Unplanned {
    fn from(refusal: Refusal) -> Self {
        Self {
            reason: refusal.reason(),
            error: refusal.into(),
        }
    }
}

impl From<Failure> for Unplanned {
    fn from(failure: Failure) -> Self {
        Self {
            reason: failure.reason(),
            error: failure.into(),
        }
    }
}

async fn decide(
    pod: &Pod,
    (peer, original): (SocketAddr, SocketAddr),
    avoid: &[Arc<Workload>],
) -> Result<Plan, Unplanned> {
    let guard = &pod.settings().guard;
    if original.ip().is_loopback() && guard.covers(original.port()) {
        return Err(Refusal::Recursion.into());
    }
    let source = pod.workload().await.ok_or(Refusal::UnknownLocal)?;
    let ask = OutboundQuery {
        source: &source,
        source_ip: peer.ip(),
        destination: original,
        avoid,
    };
    let outbound = pod
        .decided(
            || route::outbound(&pod.shared().mesh.read(), guard, &ask, &mut rand::rng()),
            |outbound| outbound.missing(&source),
        )
        .await;
    let plan = |to, destination, service, hop| Plan {
        source: Arc::clone(&source),
        to,
        destination,
        service,
        hop,
    };
    match outbound {
        Outbound::Passthrough { to, service } => Ok(plan(to, None, service, None)),
        Outbound::Direct {
            to,
            workload,
            service,
        } => Ok(plan(to, Some(workload), service, None)),
        Outbound::Hbone(hop) => Ok(plan(
            hop.to,
            Some(Arc::clone(&hop.workload)),
            hop.service.clone(),
            Some(hop),
        )),
        Outbound::Nested { .. } => {
            Err(Failure::Uncarried("a tunnel within a tunnel to another network").into())
        }
        Outbound::Resolve(_) => {
            Err(Failure::Uncarried("a workload that is known by a host name only").into())
        }
        Outbound::Refuse(refusal) => Err(refusal.into()),
    }
}

async fn tunnel_to(
    pod: &Pod,
    plan: &Plan,
    hop: &Hop,
    peer: SocketAddr,
) -> Result<tunnel::Answer, Failure> {
    let key = tunnel::Key {
        source: plan.source.identity().ok_or(Failure::NoIdentity)?.clone(),
        expected: Arc::clone(&hop.expected),
        destination: hop.to,
        source_ip: peer.ip(),
    };
    let host = plan.service.as_ref().map(|service| &**service.hostname());
    let request = tunnel::Request::new(
        &hop.authority.to_string(),
        parties::baggage(&plan.source).to_value(),
        Forwarded { source: peer, host }.to_value(),
        TraceParent::random(&mut rand::rng()).to_value(),
    )
    .map_err(Failure::Tunnel)?;
    pod.pool()
        .connect(&key, &request)
        .await
        .map_err(Failure::Tunnel)
}

fn opened(pod: &Pod, plan: &Plan, peer: SocketAddr) -> Access {
    let proven = plan.hop.is_some();
    let mut source = parties::party(&plan.source);
    if !proven {
        source.principal = telemetry::Label::default();
    }
    let labels = Labels {
        reporter: Reporter::Source,
        security: if proven {
            Security::MutualTls
        } else {
            Security::Unknown
        },
        source,
        destination: plan
            .destination
            .as_deref()
            .map(parties::party)
            .unwrap_or_default(),
        service: parties::service_name(plan.service.as_deref()),
    };
    Access::open(
        pod.shared().traffic.open(&labels),
        Route {
            source: peer,
            destination: plan.to,
            hbone: plan.hop.as_ref().map(|hop| parties::target(&hop.authority)),
            source_pod: Some(parties::pod_name(&plan.source)),
            destination_pod: plan.destination.as_deref().map(parties::pod_name),
        },
    )
}

/// Endpoints that are tried after the first.
const MAX_RETRIES: usize = 2;
