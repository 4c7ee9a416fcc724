//! The pods of this node and their connections.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::Serialize;

use crate::{
    admin::{Console, PodPhase, ShownPod},
    config::WorkloadRef,
    flow::{Carried, Direction, Facts, FlowTable},
    listen::{Probed, Redirection},
};

/// Pods by the uid that the CNI agent gave them.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct PodStates(BTreeMap<Arc<str>, PodState>);

impl PodStates {
    /// `None` where no agent names pods.
    pub(super) fn of(console: &Console) -> Option<Self> {
        if !console.settings.is_shared() {
            return None;
        }
        let pods = console.pods.pods().into_iter();
        let named =
            pods.filter_map(|pod| Some((Arc::clone(pod.uid.as_ref()?), PodState::of(&pod))));
        Some(Self(named.collect()))
    }
}

#[derive(Serialize)]
struct PodState {
    #[serde(skip_serializing_if = "Option::is_none")]
    connections: Option<Connections>,
    info: Info,
    #[serde(skip_serializing_if = "Option::is_none")]
    redirection: Option<Rules>,
    state: &'static str,
}

impl PodState {
    fn of(pod: &ShownPod) -> Self {
        let (state, connections) = match pod.phase {
            PodPhase::Pending => ("Pending", None),
            PodPhase::Up => ("Up", Some(Connections::of(pod.flows.as_deref()))),
        };
        Self {
            connections,
            info: Info::of(&pod.who),
            redirection: pod.probed.map(Rules::of),
            state,
        }
    }
}

/// What the last audit of a pod has found.
#[derive(Serialize)]
struct Rules {
    ipv4: &'static str,
    ipv6: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
}

impl Rules {
    fn of(probed: Probed) -> Self {
        let word = |redirection| match redirection {
            Redirection::Works => "works",
            Redirection::Missing => "missing",
            Redirection::Unknown => "unknown",
        };
        Self {
            ipv4: word(probed.ipv4),
            ipv6: word(probed.ipv6),
            mtu: probed.mtu,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Info {
    name: Arc<str>,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl Info {
    fn of(who: &WorkloadRef) -> Self {
        Self {
            name: Arc::clone(&who.name),
            namespace: Arc::clone(&who.namespace),
            service_account: Arc::clone(&who.service_account),
        }
    }
}

/// Connections that look alike are one.
#[derive(Default, Serialize)]
struct Connections {
    inbound: BTreeSet<Inbound>,
    outbound: BTreeSet<Outbound>,
}

impl Connections {
    fn of(flows: Option<&FlowTable>) -> Self {
        let mut connections = Self::default();
        for flow in flows.into_iter().flat_map(FlowTable::open) {
            connections.add(&flow);
        }
        connections
    }

    fn add(&mut self, flow: &Facts) {
        match flow.direction() {
            Direction::Inbound {
                source,
                destination,
                identity,
                service,
            } => {
                self.inbound.insert(Inbound {
                    actual_dst: destination.to_string(),
                    original_dst: service.clone(),
                    protocol: if identity.is_some() { "HBONE" } else { "TCP" },
                    src: source.to_string(),
                });
            }
            Direction::Outbound {
                source,
                original,
                actual,
                carried,
            } => {
                self.outbound.insert(Outbound {
                    actual_dst: actual.to_string(),
                    original_dst: original.to_string(),
                    protocol: protocol(*carried),
                    src: source.to_string(),
                });
            }
        }
    }
}

/// As istioctl shows it.
pub(in crate::admin) fn protocol(carried: Carried) -> &'static str {
    match carried {
        Carried::Tcp => "TCP",
        // Readers of the dump know three ways; to both pods it is as good as a tunnel.
        Carried::Hbone | Carried::SameNode => "HBONE",
        Carried::DoubleHbone => "DOUBLEHBONE",
    }
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
struct Inbound {
    actual_dst: String,
    original_dst: Option<Arc<str>>,
    protocol: &'static str,
    src: String,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
struct Outbound {
    actual_dst: String,
    original_dst: String,
    protocol: &'static str,
    src: String,
}
