//! A connection that the pod's application made (port 15001).

mod plan;
mod reach;

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};

use super::{
    Direction, Pod,
    failure::{Failure, Remedy},
    report::{self, Guarded, Told},
    table::Entry,
};
use crate::{
    listen,
    mesh::Workload,
    relay::{self, Socket},
    telemetry::{Access, Attempt, Reason, Reporter, Trace, TracePhase},
    tunnel::Opening,
};
pub(super) use plan::Call;
use plan::{Plan, Unplanned, decide};
use reach::{FarEnd, Reached, Upstream, opened, reach};

/// Carries one redirected connection to where `route` says.
pub(super) fn carry(
    pod: Arc<Pod>,
    downstream: TcpStream,
    peer: SocketAddr,
) -> impl Future<Output = ()> + Send {
    let to = listen::original_destination(&downstream).unwrap_or(peer);
    carry_to(pod, downstream, Call { from: peer, to })
}

/// Carries one connection to where `route` says.
pub(super) async fn carry_to(pod: Arc<Pod>, downstream: TcpStream, call: Call) {
    if listen::is_probe(call.to) {
        return;
    }
    // A connection that is not carried is reset.
    let downstream = Socket::new(downstream);
    // Boxed, so that the space of the set-up is given back before bytes move.
    let Some(opened) = Box::pin(open(&pod, call)).await else {
        return;
    };
    let Opened { told, upstream } = opened;
    let (meter, buffers) = (told.access.meter(), &pod.shared().buffers);
    let end = match upstream {
        Upstream::Socket(stream) => {
            let pump = relay::pump(downstream, Socket::new(stream), meter, buffers);
            Guarded::new(&told, pump).await
        }
        Upstream::Tunnel(stream, fate) => {
            let pump = relay::pump(downstream, stream, meter, buffers);
            let end = Guarded::new(&told, pump).await;
            report::unless_cut(fate.is_cut(), end)
        }
        // Boxed, since its space is not for those that go through a tunnel.
        Upstream::Neighbour(visit) => Box::pin(visit.carry(downstream, &told, buffers)).await,
    };
    told.close(end);
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
    (access, entry)
}

/// Attempts after the first.
const MAX_RETRIES: usize = 2;
