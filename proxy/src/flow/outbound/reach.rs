//! Dialling what was decided.

use cert_agent::SpiffeId;
use http::{HeaderMap, HeaderValue};
use tokio::net::TcpStream;

use super::plan::{Call, Plan, Way};
use crate::{
    flow::{
        Pod,
        failure::Failure,
        neighbours::{Errand, Visit, visit},
        parties,
    },
    route::{Authority, Hop, InnerHop},
    telemetry::{Access, Label, Labels, Party, Reporter, Route, Security, TraceContext},
    tunnel::{
        self, Nested, Opening, Request,
        headers::{Baggage, Forwarded, TraceParent},
    },
};

/// The other side of a flow.
pub(super) enum Upstream {
    Socket(TcpStream),
    Tunnel(tunnel::Stream, tunnel::Fate),
    Neighbour(Box<Visit>),
}

/// What came of dialling.
pub(super) struct Reached {
    pub(super) upstream: Upstream,
    /// Who is behind the gateway, if there is one and it tells.
    pub(super) far_end: Option<FarEnd>,
    /// When the shared connection came to be, if there is one.
    pub(super) opening: Option<Opening>,
}

/// Somebody of another network, as it told of itself.
pub(super) struct FarEnd {
    /// Headers of its answer.
    headers: HeaderMap,
    identity: Option<SpiffeId>,
}

/// Opens the way that `plan` says.
pub(super) async fn reach(
    pod: &Pod,
    plan: &Plan,
    call: Call,
    context: Option<TraceContext>,
) -> Result<Reached, Failure> {
    let trace = trace_parent(context);
    let (upstream, far_end, opening) = match &plan.way {
        Way::Plain => {
            let dialled = pod.dial(plan.to).await.map_err(Failure::Unreachable)?;
            (Upstream::Socket(dialled.stream), None, None)
        }
        Way::Tunnel(hop) => reach_by_tunnel(pod, plan, call, hop, &trace).await?,
        Way::Neighbour(hop, neighbour) => {
            let errand = Errand {
                source: &plan.source,
                from: call.from,
                hop,
                service: plan.service.as_deref(),
                trace: context,
            };
            match visit(pod, neighbour, errand).await {
                Some(visit) => (Upstream::Neighbour(Box::new(visit?)), None, None),
                None => reach_by_tunnel(pod, plan, call, hop, &trace).await?,
            }
        }
        Way::Nested(outer, inner) => {
            let Nested { answer, peer, .. } =
                reach_through(pod, plan, call, (outer, inner), &trace).await?;
            let far_end = pod.settings().inbound.baggage.then_some(FarEnd {
                headers: answer.headers,
                identity: peer,
            });
            (Upstream::Tunnel(answer.stream, answer.fate), far_end, None)
        }
    };
    Ok(Reached {
        upstream,
        far_end,
        opening,
    })
}

async fn reach_by_tunnel(
    pod: &Pod,
    plan: &Plan,
    call: Call,
    hop: &Hop,
    trace: &TraceParent,
) -> Result<(Upstream, Option<FarEnd>, Option<Opening>), Failure> {
    let request = request(pod, plan, call, trace);
    let (key, request) = (key(plan, call, hop)?, request(&hop.authority)?);
    let answer = pod.pool().connect(&key, &request).await;
    let answer = answer.map_err(Failure::Tunnel)?;
    let opening = answer.opening;
    Ok((Upstream::Tunnel(answer.stream, answer.fate), None, opening))
}

async fn reach_through(
    pod: &Pod,
    plan: &Plan,
    call: Call,
    (outer, inner): (&Hop, &InnerHop),
    trace: &TraceParent,
) -> Result<Nested, Failure> {
    let request = request(pod, plan, call, trace);
    let network = HeaderValue::from_str(&pod.settings().network);
    // A name that no header can hold is as good as none.
    let network = network.unwrap_or(HeaderValue::from_static(""));
    let key = key(plan, call, outer)?;
    let inside = request(&inner.authority)?.from_network(network);
    pod.pool()
        .connect_through(&key, &request(&outer.authority)?, &inner.expected, &inside)
        .await
        .map_err(Failure::Tunnel)
}

/// What the next hop is told: the flow's span, or ids that only its log has.
fn trace_parent(context: Option<TraceContext>) -> TraceParent {
    context.map_or_else(
        || TraceParent::random(&mut rand::rng()),
        |it| TraceParent::new(it.trace_id, it.span_id, it.sampled),
    )
}

fn key(plan: &Plan, call: Call, hop: &Hop) -> Result<tunnel::Key, Failure> {
    Ok(tunnel::Key {
        source: plan.source.identity().ok_or(Failure::NoIdentity)?.clone(),
        expected: std::sync::Arc::clone(&hop.expected),
        destination: hop.to,
        source_ip: call.from.ip(),
    })
}

/// Makes requests for any authority on behalf of one connection.
fn request(
    pod: &Pod,
    plan: &Plan,
    call: Call,
    trace: &TraceParent,
) -> impl Fn(&Authority) -> Result<Request, Failure> + use<> {
    let host = plan.service.as_ref().map(|service| &**service.hostname());
    let baggage = pod.introduction().of(&plan.source);
    let source = call.from;
    let forwarded = Forwarded { source, host }.to_value();
    let trace = trace.to_value();
    move |authority| {
        let (baggage, forwarded) = (baggage.clone(), forwarded.clone());
        Request::new(authority, baggage, forwarded, trace.clone()).map_err(Failure::Tunnel)
    }
}

/// Reports that the route is known.
pub(super) fn opened(pod: &Pod, plan: &Plan, call: Call, far_end: Option<&FarEnd>) -> Access {
    let hop = plan.hop();
    let mut source = parties::party(&plan.source);
    if hop.is_none() {
        source.principal = Label::default();
    }
    let next = plan.destination.as_deref();
    let told = far_end.and_then(|far_end| Some((far_end, Baggage::read(&far_end.headers)?)));
    let (destination, destination_pod) = match &told {
        Some((far_end, baggage)) => {
            let identity = far_end.identity.as_ref();
            let party = Party {
                principal: identity.map(SpiffeId::as_str).into(),
                ..parties::derived(Some(baggage))
            };
            (party, parties::peer_name(None, Some(baggage)))
        }
        None => (
            next.map(parties::party).unwrap_or_default(),
            next.map(parties::pod_name),
        ),
    };
    let labels = Labels {
        reporter: Reporter::Source,
        security: if hop.is_some() {
            Security::MutualTls
        } else {
            Security::Unknown
        },
        source,
        destination,
        service: parties::service_name(plan.service.as_deref()),
    };
    Access::open(
        pod.shared().traffic.open(&labels),
        Route {
            source: call.from,
            destination: plan.to,
            hbone: hop.map(|hop| parties::target(&hop.authority)),
            source_pod: Some(parties::pod_name(&plan.source)),
            destination_pod,
        },
    )
}
