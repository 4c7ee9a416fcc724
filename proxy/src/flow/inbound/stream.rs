//! One CONNECT of a peer: from the request to the application, and back its answer.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use cert_agent::SpiffeId;
use http::StatusCode;
use tokio::net::TcpStream;

use super::{Caller, reject};
use crate::{
    budget::{Held, Owner},
    flow::{
        Pod, accept,
        failure::Failure,
        parties,
        proxy_header::ProxyHeader,
        report::{self, Guarded, Told},
        table::{Entry, Revocation},
        verdict::authorize,
    },
    listen,
    mesh::Workload,
    policy::{Connection, Permit},
    relay::{self, Socket},
    route::{
        self, Authority, AuthorityError, ClientAddress, InboundQuery, InboundRefusal, InboundRoute,
    },
    telemetry::{
        Access, Labels, Party, Reason, Reporter, Route, Security, Trace, TraceContext, TracePhase,
    },
    tunnel::{self, Incoming, Responder, Stream, headers::Baggage},
};

/// Carries one CONNECT to the application.
pub(super) fn carry(
    pod: Arc<Pod>,
    caller: Arc<Caller>,
    incoming: Incoming,
) -> impl Future<Output = ()> + Send {
    // Boxed, so that the space of the set-up is given back before bytes move; and made here, because the future below would
    // keep room for all that it is handed, as long as it lives.
    let set_up = Box::pin(set_up(pod, caller, incoming));
    async move {
        let Some((flow, ends)) = set_up.await else {
            return;
        };
        let end = flow.relay(ends).await;
        let cut = flow.caller.is_cut();
        flow.told.close(report::unless_cut(cut, end));
    }
}

/// A flow that is open.
struct Flow {
    pod: Arc<Pod>,
    caller: Arc<Caller>,
    told: Box<Told>,
    _held: Held,
}

/// What bytes move between.
struct Ends {
    downstream: Stream,
    upstream: Socket,
}

/// Opens a flow, with its ends in a box that is gone before bytes move. `None` if the stream ended here.
async fn set_up(
    pod: Arc<Pod>,
    caller: Arc<Caller>,
    incoming: Incoming,
) -> Option<(Flow, Box<Ends>)> {
    let held = pod.share().hold(Owner::Flow);
    let Opened {
        told,
        downstream,
        upstream,
    } = open(&pod, &caller, incoming).await?;
    let flow = Flow {
        pod,
        caller,
        told,
        _held: held,
    };
    let ends = Box::new(Ends {
        downstream,
        upstream: Socket::new(upstream),
    });
    Some((flow, ends))
}

impl Flow {
    /// Moves bytes until the flow ends. No `async fn`, which would hold the ends twice.
    #[expect(
        clippy::boxed_local,
        reason = "the caller's future would hold what is in the box"
    )]
    fn relay(&self, ends: Box<Ends>) -> Guarded<'_, Stream, Socket> {
        let Ends {
            downstream,
            upstream,
        } = *ends;
        let (told, buffers) = (&*self.told, &self.pod.shared().buffers);
        let pump = relay::pump(downstream, upstream, told.access.meter(), buffers);
        Guarded::new(told, pump)
    }
}

struct Opened {
    told: Box<Told>,
    downstream: Stream,
    upstream: TcpStream,
}

/// Everything up to the first byte. `None` if the stream ended here; it is answered and reported then.
async fn open(pod: &Arc<Pod>, caller: &Caller, incoming: Incoming) -> Option<Opened> {
    let Incoming {
        connect,
        mut responder,
        ..
    } = incoming;
    let mut trace = begin_trace(pod, &connect);
    let decision = match decide(pod, caller, &connect).await {
        Ok(decision) => decision,
        Err(early) => {
            let addresses = (caller.peer, Some(caller.here));
            trace.reject(addresses, early.reason(), &early);
            reject(pod, addresses, early.reason(), &early);
            responder.refuse(early.status());
            return None;
        }
    };
    let source = source(pod, caller, &connect).await;
    let mut access = arrived(pod, caller, source.as_deref(), (&decision, &connect));
    trace.ended(TracePhase::Resolve);
    let destination = decision.route.destination;
    let direction = caller.calls(destination, &connect);
    let entry = caller.enter(pod, direction, &access);
    let dialled = tokio::select! {
        biased;
        dialled = reach(pod, caller, &decision, &entry, &mut trace) => dialled,
        // Nobody is waited for on behalf of a client that waits no longer.
        () = responder.gone() => Err(Failure::Abandoned),
    };
    access.traced(trace);
    let mut upstream = match dialled {
        Ok(upstream) => upstream,
        Err(failure) => {
            if matches!(failure, Failure::Revoked(Revocation::Identity)) {
                // Whatever else comes this way would meet somebody who is gone; a new connection meets who is there.
                caller.retire.cancel();
            }
            responder.refuse(failure.status());
            report::close(access, Err(failure));
            return None;
        }
    };
    match establish(pod, caller, &decision, responder, &mut upstream.stream).await {
        Ok(downstream) => Some(Opened {
            told: Told::new(access, entry, [upstream.port, None]),
            downstream,
            upstream: upstream.stream,
        }),
        Err(failure) => {
            report::close(access, Err(failure));
            None
        }
    }
}

/// The span of a stream, below that of its client.
fn begin_trace(pod: &Pod, connect: &tunnel::Connect) -> Trace {
    let parent = connect.trace().map(|it| TraceContext {
        trace_id: it.trace_id,
        span_id: it.span_id,
        sampled: it.sampled,
    });
    pod.shared().traces.begin(Reporter::Destination, parent)
}

/// Asks the policies, and connects to the application.
async fn reach(
    pod: &Arc<Pod>,
    caller: &Caller,
    decision: &Decision,
    entry: &Entry,
    trace: &mut Trace,
) -> Result<listen::Upstream, Failure> {
    let judged = Connection {
        source: caller.peer,
        destination: decision.route.destination,
        identity: Some(&caller.identity),
    };
    let permit = authorize(pod, &decision.local, &judged, entry).await;
    trace.ended(TracePhase::Policy);
    let dialled = dial(pod, permit?, caller, &decision.route).await;
    trace.ended(TracePhase::Connect);
    dialled
}

/// Where a CONNECT leads.
struct Decision {
    local: Arc<Workload>,
    route: InboundRoute,
    authority: Authority,
}

/// Why a CONNECT is answered before it counts as a flow.
#[derive(Debug, thiserror::Error)]
enum Early {
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Route(#[from] InboundRefusal),
    #[error("the pod has too many open flows")]
    Crowded,
    #[error(transparent)]
    Greedy(#[from] accept::Greedy),
}

impl Early {
    fn reason(&self) -> Reason {
        match self {
            Self::Crowded | Self::Greedy(_) => Reason::Overloaded,
            Self::Authority(_) => Reason::BadRequest,
            Self::Route(refusal) => refusal.reason(),
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Crowded | Self::Greedy(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Authority(_) => StatusCode::BAD_REQUEST,
            Self::Route(refusal) => refusal.status(),
        }
    }
}

async fn decide(pod: &Pod, caller: &Caller, connect: &tunnel::Connect) -> Result<Decision, Early> {
    if !pod.has_room(pod.flows().len()) {
        return Err(Early::Crowded);
    }
    if pod.is_to_blame() {
        return Err(accept::Greedy.into());
    }
    let authority: Authority = connect.authority().parse()?;
    let local = pod.workload().await.ok_or(InboundRefusal::UnknownLocal)?;
    let ask = InboundQuery {
        local: &local,
        local_ip: caller.here.ip(),
        authority: &authority,
        forwarded_host: connect.forwarded_host(),
        localhost_app_tunnel: pod.settings().inbound.localhost_app_tunnel,
    };
    let guard = &pod.settings().guard;
    let route = pod
        .decided(
            || route::inbound(&pod.shared().mesh.read(), guard, &ask),
            |route| route.as_ref().err()?.missing().cloned(),
        )
        .await?;
    Ok(Decision {
        local,
        route,
        authority,
    })
}

/// The workload that calls, if it is of this network and known.
async fn source(pod: &Pod, caller: &Caller, connect: &tunnel::Connect) -> Option<Arc<Workload>> {
    let own = &pod.settings().network;
    let is_foreign = |network: &str| !network.eq_ignore_ascii_case(own);
    if connect.network().is_some_and(is_foreign) {
        return None;
    }
    pod.peer(caller.peer.ip()).await
}

fn arrived(
    pod: &Pod,
    caller: &Caller,
    source: Option<&Workload>,
    (decision, connect): (&Decision, &tunnel::Connect),
) -> Access {
    let baggage = connect.baggage().filter(|_| pod.settings().inbound.baggage);
    let arrival = Arrival {
        peer: caller.peer,
        here: caller.here,
        identity: &caller.identity,
        authority: &decision.authority,
        source,
        baggage: baggage.as_ref(),
    };
    opened(pod, &decision.local, &decision.route, arrival)
}

/// Who a flow comes from, and how it came.
#[derive(Clone, Copy)]
pub(in crate::flow) struct Arrival<'a> {
    pub(in crate::flow) peer: SocketAddr,
    /// The HBONE address where it arrived.
    pub(in crate::flow) here: SocketAddr,
    pub(in crate::flow) identity: &'a SpiffeId,
    pub(in crate::flow) authority: &'a Authority,
    /// The record of the peer, if it is of this network and known.
    pub(in crate::flow) source: Option<&'a Workload>,
    /// What the peer tells of itself.
    pub(in crate::flow) baggage: Option<&'a Baggage<&'a str>>,
}

/// Reports that a flow has come to `local` by HBONE.
pub(in crate::flow) fn opened(
    pod: &Pod,
    local: &Workload,
    route: &InboundRoute,
    arrival: Arrival<'_>,
) -> Access {
    let Arrival {
        source, baggage, ..
    } = arrival;
    let derived = Party {
        principal: arrival.identity.as_str().into(),
        ..parties::derived(baggage)
    };
    let labels = Labels {
        reporter: Reporter::Destination,
        security: Security::MutualTls,
        source: Party::source(Some(derived), source.map(parties::party)),
        destination: parties::party(local),
        service: parties::service_name(route.service.as_deref()),
    };
    Access::open(
        pod.shared().traffic.open(&labels),
        Route {
            source: arrival.peer,
            destination: arrival.here,
            hbone: Some(parties::target(arrival.authority)),
            source_pod: parties::peer_name(source, baggage),
            destination_pod: Some(parties::pod_name(local)),
        },
    )
}

async fn dial(
    pod: &Pod,
    permit: Permit,
    caller: &Caller,
    route: &InboundRoute,
) -> Result<listen::Upstream, Failure> {
    let client: IpAddr = match route.from {
        ClientAddress::Original => caller.peer.ip(),
        ClientAddress::Loopback => route.to.ip(),
    };
    let dialled = pod.dial_application(permit, route.to, client).await;
    dialled.map_err(Failure::Unreachable)
}

/// Answers that the application was reached and, if it sits behind an application tunnel that asks
/// for it, tells it on whose behalf.
async fn establish(
    pod: &Pod,
    caller: &Caller,
    decision: &Decision,
    responder: Responder,
    upstream: &mut TcpStream,
) -> Result<Stream, Failure> {
    let downstream = accept_stream(pod, &decision.local, responder).map_err(Failure::Answer)?;
    if let Some(target) = &decision.route.proxy_target {
        let header = ProxyHeader::new((caller.peer, &caller.identity), target);
        let limit = pod.settings().sockets.connect_timeout;
        header
            .send(upstream, limit)
            .await
            .map_err(Failure::Header)?;
    }
    Ok(downstream)
}

fn accept_stream(
    pod: &Pod,
    local: &Arc<Workload>,
    responder: Responder,
) -> Result<Stream, h2::Error> {
    let tells = pod.settings().inbound.baggage;
    responder.accept(tells.then(|| pod.introduction().of(local)))
}

/// Bytes of the future of one open stream.
#[cfg(test)]
pub(in crate::flow) fn budget(_: &Arc<Pod>) -> usize {
    fn size<A, B, C, F: Future>(_: impl Fn(A, B, C) -> F) -> usize {
        size_of::<F>()
    }
    size(carry)
}
