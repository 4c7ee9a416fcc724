//! A connection that the pod's application made (port 15001).

mod plan;
mod reach;

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};

use super::{
    Direction, Pod,
    failure::{Failure, Remedy},
    report::{self, Guarded, Told},
    table::{Entry, Revocation},
};
use crate::{
    listen,
    mesh::Workload,
    relay::{self, Socket},
    telemetry::{Access, Attempt, Reason, Reporter, Trace, TracePhase},
    tunnel::{Fate, Opening, Stream},
};
use plan::{Call, Plan, Unplanned, decide};
use reach::{FarEnd, Reached, Upstream, opened, reach};

/// Carries one redirected connection to where `route` says.
pub(super) fn carry(
    pod: Arc<Pod>,
    downstream: TcpStream,
    peer: SocketAddr,
) -> impl Future<Output = ()> + Send {
    let to = listen::original_destination(&downstream).unwrap_or(peer);
    carry_to(pod, downstream, (peer, to))
}

/// Carries one connection to where `route` says. It came from the first address, and is meant for the second.
pub(super) fn carry_to(
    pod: Arc<Pod>,
    downstream: TcpStream,
    (from, to): (SocketAddr, SocketAddr),
) -> impl Future<Output = ()> + Send {
    let here = downstream.local_addr().ok().map(listen::canonical);
    let call = Call { from, to, here };
    // Boxed, so that the space of the set-up is given back before bytes move; and made here, because the future below would
    // keep room for all that it is handed, as long as it lives.
    let set_up = Box::pin(set_up(pod, downstream, call));
    async move {
        let Some((flow, ends)) = set_up.await else {
            return;
        };
        let end = flow.relay(ends).await;
        flow.told.close(end);
    }
}

/// A flow that is open.
struct Flow {
    pod: Arc<Pod>,
    told: Box<Told>,
}

/// What bytes move between.
struct Ends {
    downstream: Socket,
    upstream: Upstream,
}

/// Opens a flow, with its ends in a box that is gone before bytes move. `None` if the connection ended here.
async fn set_up(pod: Arc<Pod>, downstream: TcpStream, call: Call) -> Option<(Flow, Box<Ends>)> {
    if listen::is_probe(call.to) {
        return None;
    }
    // A connection that is not carried is reset.
    let downstream = Socket::new(downstream);
    let Opened { told, upstream } = open(&pod, call).await?;
    let ends = Box::new(Ends {
        downstream,
        upstream,
    });
    Some((Flow { pod, told }, ends))
}

impl Flow {
    /// Moves bytes until the flow ends. No `async fn`, which would hold the ends twice.
    #[expect(
        clippy::boxed_local,
        reason = "the caller's future would hold what is in the box"
    )]
    fn relay(&self, ends: Box<Ends>) -> Relaying<'_> {
        let Ends {
            downstream,
            upstream,
        } = *ends;
        let (told, buffers) = (&*self.told, &self.pod.shared().buffers);
        let meter = told.access.meter();
        match upstream {
            Upstream::Socket(stream) => {
                let pump = relay::pump(downstream, Socket::new(stream), meter, buffers);
                Relaying::Socket(Guarded::new(told, pump))
            }
            Upstream::Tunnel(stream, fate) => {
                let pump = relay::pump(downstream, stream, meter, buffers);
                Relaying::Tunnel(Guarded::new(told, pump), fate)
            }
            // Boxed, since its space is not for those that go through a tunnel.
            Upstream::Neighbour(visit) => {
                Relaying::Neighbour(Box::pin(visit.carry(downstream, told, buffers)))
            }
        }
    }
}

/// Bytes on their way.
enum Relaying<'a> {
    Socket(Guarded<'a, Socket, Socket>),
    Tunnel(Guarded<'a, Socket, Stream>, Fate),
    Neighbour(BoxFuture<'a, Result<(), Failure>>),
}

impl Future for Relaying<'_> {
    type Output = Result<(), Failure>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Socket(relaying) => Pin::new(relaying).poll(cx),
            Self::Tunnel(relaying, fate) => Pin::new(relaying)
                .poll(cx)
                .map(|end| report::unless_cut(fate.is_cut(), end)),
            Self::Neighbour(relaying) => relaying.as_mut().poll(cx),
        }
    }
}

struct Opened {
    told: Box<Told>,
    upstream: Upstream,
}

/// Everything up to the first byte. `None` if the connection ended here; it is reported then.
///
/// An endpoint of a service that cannot be reached is no end: nothing was delivered yet, so another one is tried.
async fn open(pod: &Arc<Pod>, call: Call) -> Option<Opened> {
    let (began, ends) = (Instant::now(), (call.from, Some(call.to)));
    let mut trace = pod.shared().traces.begin(Reporter::Source, None);
    let mut tried = Vec::new();
    for retries in 0.. {
        let plan = match decide_again_if_silent(pod, call, &tried).await {
            Ok(plan) => plan,
            Err(Unplanned { reason, error }) => {
                trace.reject(ends, reason, &*error);
                // What was tried in vain is reported; that nothing is left to try is no news.
                if retries == 0 {
                    let attempt = Attempt {
                        reporter: Reporter::Source,
                        source: call.from,
                        destination: Some(call.to),
                    };
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
            trace.reject(ends, Reason::NoHealthyUpstream, &NobodyLeft);
            return None;
        }
        if retries > 0 {
            pod.shared().traffic.retried();
        }
        let out_of_time = began.elapsed() >= pod.settings().sockets.connect_timeout;
        let last = retries >= MAX_RETRIES || out_of_time;
        trace.ended(TracePhase::Resolve);
        match attempt(pod, &plan, call, (!last).then_some(&*tried), &mut trace).await {
            Ok(opened) => return Some(opened),
            Err(Remedy::None) => return None,
            Err(_) if last => return None,
            Err(Remedy::AnotherEndpoint) => tried.extend(plan.destination),
            Err(Remedy::AnyEndpoint) => {}
        }
    }
    None
}

/// Decides, and once more if that leads to an endpoint that did not answer lately while there is another one.
async fn decide_again_if_silent(
    pod: &Pod,
    call: Call,
    tried: &[Arc<Workload>],
) -> Result<Plan, Unplanned> {
    let plan = decide(pod, call, tried).await?;
    let Some(endpoint) = &plan.destination else {
        return Ok(plan);
    };
    let mut avoid = pod.flows().silent().instead_of(endpoint);
    if avoid.is_empty() {
        return Ok(plan);
    }
    avoid.extend_from_slice(tried);
    if !plan.has_alternative(pod, call, Some(&avoid)) {
        return Ok(plan);
    }
    decide(pod, call, &avoid).await
}

/// Every endpoint was tried, in vain.
#[derive(Debug, thiserror::Error)]
#[error("no endpoint is left to try")]
struct NobodyLeft;

/// One attempt, reported if it fails. `tried` is there if another one may follow: then it gets no more than half of the time
/// that a connection may take, if there is somebody else to try.
async fn attempt(
    pod: &Arc<Pod>,
    plan: &Plan,
    call: Call,
    tried: Option<&[Arc<Workload>]>,
    trace: &mut Trace,
) -> Result<Opened, Remedy> {
    // Only the far end of a nested tunnel can tell who it is.
    let early = (!plan.is_nested()).then(|| begin(pod, plan, call, None));
    let reaching = reach(pod, plan, call, trace.context());
    tokio::pin!(reaching);
    let (to, limit) = (plan.to, pod.settings().sockets.connect_timeout / 2);
    let reached = match timeout(limit, &mut reaching).await {
        Ok(reached) => reached,
        Err(_) if plan.has_alternative(pod, call, tried) => {
            Err(Failure::Unreachable(listen::ConnectError::Timeout {
                to,
                limit,
            }))
        }
        Err(_) => reaching.await,
    };
    let far_end = reached.as_ref().ok().and_then(|it| it.far_end.as_ref());
    let opening = reached.as_ref().ok().and_then(|it| it.opening);
    note(trace, opening);
    let (mut access, entry) = early.unwrap_or_else(|| begin(pod, plan, call, far_end));
    if let Ok(Reached {
        upstream: Upstream::Neighbour(_),
        ..
    }) = &reached
    {
        access.without_tunnel();
        pod.shared().traffic.without_tunnel();
    }
    match reached {
        Ok(Reached { upstream, .. }) => {
            if let Some(endpoint) = &plan.destination {
                pod.flows().silent().forget(endpoint);
            }
            access.traced(std::mem::take(trace));
            Ok(Opened {
                told: Told::new(access, entry, [None, None]),
                upstream,
            })
        }
        Err(failure) => {
            let remedy = failure.remedy();
            if failure.is_silence()
                && let Some(endpoint) = &plan.destination
            {
                pod.flows().silent().note(endpoint);
            }
            if tried.is_none() || remedy == Remedy::None {
                access.traced(std::mem::take(trace));
            }
            report::close(access, Err(failure));
            Err(remedy)
        }
    }
}

/// Notes how long the connection took; what was there before the flow took none of its time.
fn note(trace: &mut Trace, opening: Option<Opening>) {
    if let Some(opening) = opening {
        trace.took_place(TracePhase::Connect, (opening.began, opening.connected));
        trace.took_place(TracePhase::Tls, (opening.connected, opening.shaken));
        trace.ended(TracePhase::Request);
    } else {
        trace.ended(TracePhase::Connect);
    }
}

/// Reports that the route is known, and lists the flow.
fn begin(pod: &Pod, plan: &Plan, call: Call, far_end: Option<&FarEnd>) -> (Access, Entry) {
    let access = opened(pod, plan, call, far_end);
    let direction = Direction::Outbound {
        source: call.from,
        original: call.to,
        actual: plan.to,
        carried: plan.carried(),
    };
    let shown = plan.hop().and_then(|_| plan.source.identity()).cloned();
    let watch = access.meter().watch();
    let entry = pod.flows().enter(direction, shown, watch);
    // Before it was listed, nobody could end it for a pod that is somebody else by now.
    if let Some(local) = pod.known_workload()
        && entry.facts().is_disowned(&local)
    {
        entry.facts().revoke(Revocation::Identity);
    }
    (access, entry)
}

/// Attempts after the first.
const MAX_RETRIES: usize = 2;
