//! `/debug/flows` and `/debug/refusals`: open connections, and those that did not come to be.

use std::{
    fmt,
    io::{self, BufWriter, Write},
    net::SocketAddr,
    sync::Arc,
};

use serde::Serialize;

use super::{
    Pods, ShownPod,
    dump::{Each, pods::protocol},
    when,
};
use crate::{
    config::WorkloadRef,
    flow::{Direction, Facts, FlowTable},
    telemetry::{Names, Phase, Reason, Refusal, Refusals, Reporter, Security},
};

/// Writes up to `most` open flows of all pods, the youngest of each pod last.
pub(super) fn write_open(pods: &dyn Pods, most: usize, out: impl Write) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(super::stream::CHUNK_BYTES, out);
    let pods = pods.pods();
    let tables = || {
        pods.iter()
            .filter_map(|pod| Some((pod, pod.flows.as_ref()?)))
    };
    let of_pod = |(pod, table): (_, &Arc<FlowTable>)| {
        let open = table.open().into_iter();
        open.map(move |facts| Flow::of(pod, &facts))
    };
    let all = Open {
        total: tables().map(|(_, table)| table.len()).sum(),
        flows: Each(|| tables().flat_map(of_pod).take(most)),
    };
    serde_json::to_writer(&mut out, &all)?;
    out.flush()
}

#[derive(Serialize)]
struct Open<F: Serialize> {
    /// How many there are, shown or not.
    total: usize,
    flows: F,
}

/// One open flow.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Flow {
    pub(super) age_ms: u64,
    pub(super) bytes_received: u64,
    pub(super) bytes_sent: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) destination: Option<Side>,
    /// The address that was dialled for an outbound flow; that of the application for an inbound one.
    pub(super) dialled: SocketAddr,
    pub(super) direction: &'static str,
    /// What the application, or the peer, asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) original: Option<String>,
    pub(super) pod: Side,
    /// What policies said, for inbound flows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) policy: Option<String>,
    pub(super) route: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) service: Option<Arc<str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source: Option<Side>,
    pub(super) source_address: SocketAddr,
}

/// One end of a flow.
#[derive(Serialize)]
pub(super) struct Side {
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<Arc<str>>,
    name: Arc<str>,
    namespace: Arc<str>,
}

impl Flow {
    pub(super) fn of(pod: &ShownPod, facts: &Facts) -> Self {
        let labels = facts.watch().labels();
        let (received, sent) = facts.watch().totals();
        let (direction, source_address, original, dialled, route) = way(facts.direction());
        let sides = Sides::of(labels);
        Self {
            age_ms: u64::try_from(facts.age().as_millis()).unwrap_or(u64::MAX),
            bytes_received: received,
            bytes_sent: sent,
            destination: sides.destination,
            dialled,
            direction,
            original,
            pod: Side::named(&pod.who),
            policy: facts.verdict().map(|note| match &note.policy {
                Some(policy) => format!("{}: {policy}", note.event),
                None => note.event.to_string(),
            }),
            route,
            service: labels.service.hostname.clone(),
            source: sides.source,
            source_address,
        }
    }
}

/// Direction, client, what was asked for, what is dialled, and how the bytes travel.
fn way(
    direction: &Direction,
) -> (
    &'static str,
    SocketAddr,
    Option<String>,
    SocketAddr,
    &'static str,
) {
    match direction {
        Direction::Outbound {
            source,
            original,
            actual,
            carried,
        } => {
            let original = Some(original.to_string());
            ("outbound", *source, original, *actual, protocol(*carried))
        }
        Direction::Inbound {
            source,
            destination,
            identity,
            service,
        } => {
            let route = if identity.is_some() { "HBONE" } else { "TCP" };
            let original = service.as_deref().map(str::to_owned);
            ("inbound", *source, original, *destination, route)
        }
    }
}

struct Sides {
    source: Option<Side>,
    destination: Option<Side>,
}

impl Sides {
    /// Both sides as far as they are known; identities only where they were proven.
    fn of(labels: &Names) -> Self {
        let proven = labels.security == Security::MutualTls;
        let [source, destination] = [&labels.source, &labels.destination].map(|party| {
            let name = party
                .workload
                .clone()
                .or_else(|| party.canonical_service.clone());
            let identity = party.principal.clone().filter(|_| proven);
            (name.is_some() || identity.is_some()).then(|| Side {
                identity,
                name: name.unwrap_or_default(),
                namespace: party.namespace.clone().unwrap_or_default(),
            })
        });
        Self {
            source,
            destination,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

impl Side {
    fn named(who: &WorkloadRef) -> Self {
        Self {
            identity: None,
            name: Arc::clone(&who.name),
            namespace: Arc::clone(&who.namespace),
        }
    }
}

/// Connections that were refused or failed of late, latest first.
#[derive(Serialize)]
pub(super) struct Recent {
    refusals: Vec<Shown>,
}

impl Recent {
    pub(super) fn of(refusals: &Refusals) -> Self {
        let recent = refusals.recent();
        Self {
            refusals: recent.iter().map(|refusal| Shown::of(refusal)).collect(),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Shown {
    pub(super) at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) destination: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) destination_name: Option<Arc<str>>,
    pub(super) direction: &'static str,
    pub(super) error: Box<str>,
    /// Whether it was counted as opened before.
    pub(super) opened: bool,
    pub(super) reason: Reason,
    pub(super) source: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source_pod: Option<Arc<str>>,
}

impl Shown {
    pub(super) fn of(refusal: &Refusal) -> Self {
        Self {
            at: when::rfc3339(refusal.at),
            destination: refusal.destination,
            destination_name: refusal.destination_name.clone(),
            direction: match refusal.reporter {
                Reporter::Source => "outbound",
                Reporter::Destination => "inbound",
            },
            error: refusal.error.clone(),
            opened: refusal.phase == Phase::Opened,
            reason: refusal.reason,
            source: refusal.source,
            source_pod: refusal.source_pod.clone(),
        }
    }
}
