//! One flow to a neighbour: the destination's side of it, and the relay that serves both.

use std::{future::poll_fn, net::SocketAddr, sync::Arc};

use cert_agent::{SpiffeId, Svid};
use tokio_util::{sync::CancellationToken, task::task_tracker::TaskTrackerToken};

use super::Neighbour;
use crate::{
    budget::{Held, Owner},
    flow::{
        Direction, Pod,
        failure::Failure,
        inbound::{self, Arrival},
        proxy_header::ProxyHeader,
        report::{self, Guarded, Told},
        table::Entry,
        verdict,
    },
    listen,
    mesh::{Service, Workload},
    policy::{self, Connection, Permit},
    relay::{self, Buffers, Count, Socket},
    route::{self, ClientAddress, Hop, InboundQuery, InboundRoute},
    telemetry::{Access, Meter, Reporter, TraceContext, TracePhase},
    tunnel::{self, Cut},
};

/// What a pod wants of its neighbour.
#[derive(Clone, Copy)]
pub(in crate::flow) struct Errand<'a> {
    /// The client's workload.
    pub(in crate::flow) source: &'a Workload,
    /// The client's address.
    pub(in crate::flow) from: SocketAddr,
    /// What a tunnel would be opened for.
    pub(in crate::flow) hop: &'a Hop,
    /// The service that was dialled.
    pub(in crate::flow) service: Option<&'a Service>,
    /// The client's span.
    pub(in crate::flow) trace: Option<TraceContext>,
}

/// The open end of a flow at its destination.
pub(in crate::flow) struct Visit {
    application: Socket,
    told: Box<Told>,
    cuts: Cuts,
    forced: CancellationToken,
    /// Makes the destination wait for the flow.
    _here: TaskTrackerToken,
    /// What the destination holds, as it would of a tunnel's stream.
    _held: Held,
}

/// Whether the certificate of either side is revoked meanwhile.
struct Cuts {
    server: Cut,
    client: Cut,
}

impl Cuts {
    fn new(source: &Svid, own: &Svid) -> Self {
        Self {
            server: Cut::new(source.server_tracker(), own.chain(), || {}),
            client: Cut::new(own.client_tracker(), source.chain(), || {}),
        }
    }

    async fn fired(self) {
        tokio::select! {
            () = self.server.fired() => {}
            () = self.client.fired() => {}
        }
    }
}

/// Both sides of a flow that may do without a tunnel.
struct Meeting {
    host: Arc<Pod>,
    /// The record of the destination.
    local: Arc<Workload>,
    source: Arc<Svid>,
    own: Arc<Svid>,
}

impl Meeting {
    /// Both sides with their certificates, if these are there and accept each other, and the destination takes another flow.
    fn new(pod: &Pod, neighbour: &Neighbour, errand: Errand<'_>) -> Option<Self> {
        let host = neighbour.pod.upgrade().filter(|it| it.takes_more())?;
        let local = host.known_workload()?;
        let agent = &pod.shared().agent;
        let source = agent.current(errand.source.identity()?)?;
        let own = agent.current(local.identity()?)?;
        let expected = &errand.hop.expected;
        neighbour
            .acquaintances
            .agree(agent, (&source, &own), expected)
            .then_some(Self {
                host,
                local,
                source,
                own,
            })
    }

    /// Where the flow is delivered, if the destination takes it.
    fn route(&self, errand: Errand<'_>) -> Option<InboundRoute> {
        let ask = InboundQuery {
            local: &self.local,
            local_ip: errand.hop.to.ip(),
            authority: &errand.hop.authority,
            forwarded_host: errand.service.map(|service| &**service.hostname()),
            localhost_app_tunnel: self.host.settings().inbound.localhost_app_tunnel,
        };
        let state = self.host.shared().mesh.read();
        let route = route::inbound(&state, &self.host.settings().guard, &ask).ok()?;
        let judged = self.judged(errand, &route);
        let verdict = policy::authorize(&state, &self.local, &judged);
        // One that names policies on their way may have to wait, which a tunnel's end does.
        let is_certain = verdict.is_allowed() && verdict.missing().next().is_none();
        is_certain.then_some(route)
    }

    fn judged(&self, errand: Errand<'_>, route: &InboundRoute) -> Connection<'_> {
        Connection {
            source: errand.from,
            destination: route.destination,
            identity: Some(self.source.id()),
        }
    }

    /// Reports the flow at its destination as the end of a tunnel would, and lists it.
    fn open(&self, errand: Errand<'_>, route: &InboundRoute) -> (Access, Entry) {
        let arrival = Arrival {
            peer: errand.from,
            here: errand.hop.to,
            identity: self.source.id(),
            authority: &errand.hop.authority,
            source: Some(errand.source),
            baggage: None,
        };
        let mut access = inbound::opened(&self.host, &self.local, route, arrival);
        access.without_tunnel();
        let direction = Direction::Inbound {
            source: errand.from,
            destination: route.destination,
            identity: Some(self.source.id().clone()),
            service: errand.service.map(|it| Arc::clone(it.hostname())),
        };
        let entry = self.host.flows().enter(
            direction,
            Some(self.own.id().clone()),
            access.meter().watch(),
        );
        (access, entry)
    }
}

/// Takes the flow to the application of `neighbour`. `None` if a tunnel must be asked instead.
///
/// # Errors
/// If the application cannot be reached, as the end of a tunnel would tell it.
pub(in crate::flow) async fn visit(
    pod: &Pod,
    neighbour: &Neighbour,
    errand: Errand<'_>,
) -> Option<Result<Visit, Failure>> {
    // First the token: a destination that stops from here on waits.
    let here = neighbour.visits.token();
    if neighbour.stop.accept.is_cancelled() {
        return None;
    }
    let meeting = Meeting::new(pod, neighbour, errand)?;
    let route = meeting.route(errand)?;
    let (mut access, entry) = meeting.open(errand, &route);
    // Judged again now that the flow is listed, so that no change is missed.
    let judged = meeting.judged(errand, &route);
    let host = &meeting.host;
    let held = host.share().hold(Owner::Flow);
    let traces = &host.shared().traces;
    let mut trace = traces.begin(Reporter::Destination, errand.trace);
    let permit = verdict::authorize(host, &meeting.local, &judged, &entry).await;
    trace.ended(TracePhase::Policy);
    let reached = match permit {
        Err(refused) => Err(refused),
        Ok(permit) => dial(host, permit, &route, (meeting.source.id(), errand.from)).await,
    };
    trace.ended(TracePhase::Connect);
    access.traced(trace);
    Some(match reached {
        Ok(upstream) => Ok(Visit {
            application: Socket::new(upstream.stream),
            told: Told::new(access, entry, [upstream.port, None]),
            cuts: Cuts::new(&meeting.source, &meeting.own),
            forced: neighbour.stop.force.clone(),
            _here: here,
            _held: held,
        }),
        Err(failure) => {
            let status = failure.status();
            report::close(access, Err(failure));
            Err(Failure::Tunnel(tunnel::ConnectError::Refused(status)))
        }
    })
}

async fn dial(
    host: &Pod,
    permit: Permit,
    route: &InboundRoute,
    (identity, client): (&SpiffeId, SocketAddr),
) -> Result<listen::Upstream, Failure> {
    let from = match route.from {
        ClientAddress::Original => client.ip(),
        ClientAddress::Loopback => route.to.ip(),
    };
    let dialled = host.dial_application(permit, route.to, from).await;
    let mut upstream = dialled.map_err(Failure::Unreachable)?;
    if let Some(target) = &route.proxy_target {
        let header = ProxyHeader::new((client, identity), target);
        let limit = host.settings().sockets.connect_timeout;
        let sent = header.send(&mut upstream.stream, limit).await;
        sent.map_err(Failure::Header)?;
    }
    Ok(upstream)
}

impl Visit {
    /// Moves the bytes of the flow until it ends, and reports that for the destination.
    ///
    /// # Errors
    /// What there is to report for the `source`.
    /// # Cancel safety
    /// Dropping the future resets both connections and reports a flow that was given up.
    pub(in crate::flow) async fn carry(
        self,
        downstream: Socket,
        source: &Told,
        buffers: &Buffers,
    ) -> Result<(), Failure> {
        let Self {
            application,
            told,
            cuts,
            forced,
            _here,
            _held,
        } = self;
        let counts = Both(source.access.meter(), told.access.meter());
        let pump = relay::pump(downstream, application, &counts, buffers);
        let revoked = poll_fn(|cx| told.entry.poll_revoked(cx));
        let (here, there) = tokio::select! {
            biased; // what forbids the flow goes before its bytes
            // To the source, that is a tunnel's stream which the peer took back.
            why = revoked => (Ok(()), Err(Failure::Revoked(why))),
            () = cuts.fired() => (Err(Failure::PeerRevoked), Err(Failure::PeerRevoked)),
            () = forced.cancelled() => return Err(Failure::Relay(HostGone.into())),
            end = Guarded::new(source, pump) => {
                let there = match &end {
                    Err(Failure::Relay(error)) => Err(Failure::Relay(error.to_string().into())),
                    _ => Ok(()),
                };
                (end, there)
            }
        };
        told.close(there);
        here
    }
}

/// Counts for both reporters.
struct Both<'a>(&'a Meter, &'a Meter);

impl Count for Both<'_> {
    fn received(&self, bytes: u64) {
        self.0.received(bytes);
        self.1.received(bytes);
    }

    fn sent(&self, bytes: u64) {
        self.0.sent(bytes);
        self.1.sent(bytes);
    }
}

/// The destination was told to end at once.
#[derive(Debug, thiserror::Error)]
#[error("the pod at the other end is served no longer")]
struct HostGone;
