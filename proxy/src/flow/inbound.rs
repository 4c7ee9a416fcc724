//! What peers send to the pod in HBONE (port 15008): one TLS connection, many CONNECT streams.

use std::{
    error::Error,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cert_agent::{SpiffeId, SvidError, Tracker, peer_id};
use http::StatusCode;
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, timeout_at},
};

use super::{
    Direction, Pod, Stop, accept,
    failure::Failure,
    handshakes::Handshakes,
    parties,
    proxy_header::ProxyHeader,
    report::{self, Guarded, Told},
    table::Entry,
    verdict::authorize,
};
use crate::{
    budget::{Held, Owner},
    listen,
    mesh::Workload,
    policy::{Connection, Permit},
    relay::{self, Socket},
    route::{
        self, Authority, AuthorityError, ClientAddress, InboundQuery, InboundRefusal, InboundRoute,
    },
    telemetry::{
        Access, Attempt, Labels, Limit, Party, Reason, Reporter, Route, Security, Step, Trace,
        TraceContext, TracePhase,
    },
    tunnel::{
        self, AcceptError, Cut, Incoming, Responder, Retirement, ServeError, Stream, Tls,
        headers::Baggage,
    },
};

/// Serves the HBONE listener of `pod`.
pub(super) async fn serve(pod: Arc<Pod>, listener: Arc<TcpListener>, stop: Stop) {
    let shared = pod.shared();
    let handshakes = Handshakes::new(&shared.settings.limits, shared.limits.clone());
    let draining = stop.accept.clone();
    let handle = move |pod, socket, peer| {
        let (handshakes, draining) = (Arc::clone(&handshakes), draining.clone());
        connection(pod, socket, peer, handshakes, draining)
    };
    accept::serve(pod, listener, Reporter::Destination, stop, handle).await;
}

/// One TLS connection, from its handshake until its last stream has ended.
async fn connection(
    pod: Arc<Pod>,
    socket: TcpStream,
    peer: SocketAddr,
    handshakes: Arc<Handshakes>,
    draining: tokio_util::sync::CancellationToken,
) {
    let here = socket.local_addr().ok().map(listen::canonical);
    let slot = handshakes.begin(peer.ip());
    let shaken = tokio::select! {
        biased; // who has to make room does so first
        () = slot.given_way.cancelled() => Err(Refused::Crowded),
        shaken = Box::pin(shake(&pod, socket, peer, here)) => shaken,
    };
    drop(slot);
    let (tls, caller, (age, tracker)) = match shaken {
        Ok(shaken) => shaken,
        Err(refused) => return reject(&pod, (peer, here), refused.reason(), &refused),
    };
    let _held = pod.share().hold(Owner::Tunnel);
    let (caller, settings) = (Arc::new(caller), Arc::clone(&pod.settings().tunnel));
    let cut = {
        let caller = Arc::clone(&caller);
        let first = move || caller.cut.store(true, Ordering::Release);
        Cut::new(tracker, tls.peer_certificates(), first)
    };
    let streams = Streams(Arc::clone(&pod), caller);
    let retire = draining.child_token();
    let serving = Box::pin(tunnel::serve(tls, &settings, retire.clone(), cut, streams));
    match age.retire(&retire, serving).await {
        Ok(()) => {}
        Err(error @ ServeError::PrefaceTimeout(_)) => {
            reject(&pod, (peer, here), Reason::Http2, &error);
        }
        Err(error @ ServeError::Cut) => tracing::info!(%peer, "{error}"),
        Err(error) => {
            if let Some(limit) = error.limit() {
                pod.shared().limits.hit(limit, &peer);
            }
            tracing::debug!(%peer, error = &error as &dyn Error, "HBONE connection ended");
        }
    }
}

/// The streams of a connection.
struct Streams(Arc<Pod>, Arc<Caller>);

impl tunnel::Host for Streams {
    fn carry(&self, incoming: Incoming) -> impl Future<Output = ()> + Send + 'static {
        stream(Arc::clone(&self.0), Arc::clone(&self.1), incoming)
    }

    fn limited(&self, limit: Limit) {
        self.0.shared().limits.hit(limit, &self.1.peer);
    }
}

/// Who is at the other end of a TLS connection, and where it arrived.
#[derive(Debug)]
struct Caller {
    peer: SocketAddr,
    here: SocketAddr,
    identity: SpiffeId,
    /// Whom the caller met.
    shown: SpiffeId,
    /// Whether the connection was cut because the peer's certificate is revoked.
    cut: AtomicBool,
}

impl Caller {
    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    fn enter(&self, pod: &Pod, direction: Direction, access: &Access) -> Entry {
        let shown = Some(self.shown.clone());
        pod.flows().enter(direction, shown, access.meter().watch())
    }

    fn calls(&self, destination: SocketAddr, connect: &tunnel::Connect) -> Direction {
        Direction::Inbound {
            source: self.peer,
            destination,
            identity: Some(self.identity.clone()),
            service: connect.forwarded_host().map(Into::into),
        }
    }
}

/// Why a TLS connection did not come to be.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the local address cannot be read")]
    NoAddress,
    #[error("gave way to newer connections: too many handshakes are under way")]
    Crowded,
    #[error("failed to fetch information about local workload")]
    UnknownLocal,
    #[error("identity error: the local workload has no valid identity")]
    NoIdentity,
    #[error("identity error: no certificate for the local workload within {0:?}")]
    NoCertificate(Duration),
    #[error("identity error")]
    Certificate(#[from] SvidError),
    #[error(transparent)]
    Tls(#[from] AcceptError),
    #[error("the peer's certificate carries no SPIFFE identity")]
    Stranger,
}

impl Refused {
    fn reason(&self) -> Reason {
        match self {
            Self::NoAddress => Reason::NoSocket,
            Self::Crowded => Reason::Overloaded,
            Self::UnknownLocal => Reason::UnknownLocal,
            Self::NoIdentity => Reason::NoIdentity,
            Self::NoCertificate(_) | Self::Certificate(_) => Reason::NoCertificate,
            Self::Tls(error) => error.reason(),
            Self::Stranger => Reason::PeerIdentityMismatch,
        }
    }
}

async fn shake(
    pod: &Pod,
    socket: TcpStream,
    peer: SocketAddr,
    here: Option<SocketAddr>,
) -> Result<(Tls<TcpStream>, Caller, (Retirement, Option<Tracker>)), Refused> {
    let here = here.ok_or(Refused::NoAddress)?;
    let settings = &pod.settings().tunnel;
    let limit = settings.handshake_timeout;
    let deadline = Instant::now() + limit;
    // One limit for all of it: past that, the peer has given up.
    let local = pod.workload_by(deadline).await;
    let local = local.ok_or(Refused::UnknownLocal)?;
    let identity = local.identity().ok_or(Refused::NoIdentity)?;
    let svid = timeout_at(deadline, pod.shared().agent.svid(identity))
        .await
        .map_err(|_| Refused::NoCertificate(limit))??;
    let buffers = &pod.shared().buffers;
    let accepting = tunnel::accept(socket, svid.server_config(), buffers, limit);
    let accepting = async {
        let accepted = timeout_at(deadline, accepting).await;
        accepted.unwrap_or(Err(AcceptError::Timeout(limit)))
    };
    let step = (Step::Handshake, Reporter::Destination);
    let tls = pod.shared().timed(step, accepting).await?;
    let age = Retirement::new(settings.max_age, svid.not_after(), tls.peer_certificates());
    let identity = peer_id(tls.peer_certificates()).ok_or(Refused::Stranger)?;
    Ok((
        tls,
        Caller {
            peer,
            here,
            identity,
            shown: svid.id().clone(),
            cut: AtomicBool::new(false),
        },
        (age, svid.client_tracker()),
    ))
}

/// Carries one CONNECT to the application.
fn stream(
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
    let permit = permit.map_err(Failure::Denied)?;
    let dialled = dial(pod, permit, caller, &decision.route).await;
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
pub(super) struct Arrival<'a> {
    pub(super) peer: SocketAddr,
    /// The HBONE address where it arrived.
    pub(super) here: SocketAddr,
    pub(super) identity: &'a SpiffeId,
    pub(super) authority: &'a Authority,
    /// The record of the peer, if it is of this network and known.
    pub(super) source: Option<&'a Workload>,
    /// What the peer tells of itself.
    pub(super) baggage: Option<&'a Baggage<&'a str>>,
}

/// Reports that a flow has come to `local` by HBONE.
pub(super) fn opened(
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

/// Tells of a connection, or a request on one, that does not become a flow.
pub(super) fn reject(
    pod: &Pod,
    (source, destination): (SocketAddr, Option<SocketAddr>),
    reason: Reason,
    error: &(dyn Error + 'static),
) {
    let attempt = Attempt {
        reporter: Reporter::Destination,
        source,
        destination,
    };
    pod.shared().traffic.reject(attempt, reason, error);
}

/// Bytes of the future of one open stream.
#[cfg(test)]
pub(super) fn budget(_: &Arc<Pod>) -> usize {
    fn size<A, B, C, F: Future>(_: impl Fn(A, B, C) -> F) -> usize {
        size_of::<F>()
    }
    size(stream)
}
