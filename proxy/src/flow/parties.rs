//! What the records of the mesh say about the two sides of a flow, as labels and as baggage.

use std::sync::Arc;

use cert_agent::SpiffeId;
use http::HeaderValue;
use parking_lot::Mutex;

use crate::{
    mesh::{Service, Workload, WorkloadType},
    route::Authority,
    telemetry::{HboneTarget, Label, Party, ServiceName},
    tunnel::headers::{Baggage, WorkloadKind},
};

/// The labels of a known workload. The principal is the identity in its record.
pub(super) fn party(workload: &Workload) -> Party<Label<'_>> {
    Party {
        workload: workload.workload_name().into(),
        canonical_service: workload.canonical_name().into(),
        canonical_revision: workload.canonical_revision().into(),
        namespace: workload.namespace().into(),
        principal: workload.identity().map(SpiffeId::as_str).into(),
        app: workload.canonical_name().into(),
        cluster: workload.cluster_id().into(),
        region: workload.region().into(),
        zone: workload.zone().into(),
    }
}

/// The labels of a peer that is known by its baggage only.
pub(super) fn derived<'a>(baggage: Option<&Baggage<&'a str>>) -> Party<Label<'a>> {
    let Some(baggage) = baggage else {
        return Party::default();
    };
    Party {
        workload: baggage.workload.into(),
        canonical_service: baggage.service.into(),
        canonical_revision: baggage.revision.into(),
        namespace: baggage.namespace.into(),
        principal: Label::default(),
        app: baggage.workload.into(),
        cluster: baggage.cluster.into(),
        region: baggage.region.into(),
        zone: baggage.zone.into(),
    }
}

/// The labels of a service; all absent without one.
pub(super) fn service_name(service: Option<&Service>) -> ServiceName<Label<'_>> {
    service.map_or_else(ServiceName::default, |service| ServiceName {
        hostname: service.hostname().into(),
        namespace: service.namespace().into(),
        name: service.name().into(),
    })
}

/// What a pod tells all peers of itself: its baggage, written once per record and not for each flow.
#[derive(Debug, Default)]
pub(super) struct Introduction(Mutex<Option<(Arc<Workload>, HeaderValue)>>);

impl Introduction {
    /// What is told while `local` is the pod's record.
    pub(super) fn of(&self, local: &Arc<Workload>) -> HeaderValue {
        let mut written = self.0.lock();
        match &*written {
            Some((of, value)) if Arc::ptr_eq(of, local) => value.clone(),
            _ => {
                let value = baggage(local).to_value();
                *written = Some((Arc::clone(local), value.clone()));
                value
            }
        }
    }
}

fn baggage(workload: &Workload) -> Baggage<&str> {
    Baggage {
        cluster: workload.cluster_id(),
        namespace: workload.namespace(),
        kind: match workload.workload_type() {
            WorkloadType::Deployment => WorkloadKind::Deployment,
            WorkloadType::CronJob => WorkloadKind::CronJob,
            WorkloadType::Pod => WorkloadKind::Pod,
            WorkloadType::Job => WorkloadKind::Job,
        },
        workload: workload.workload_name(),
        service: workload.canonical_name(),
        revision: workload.canonical_revision(),
        region: workload.region(),
        zone: workload.zone(),
    }
}

/// The pod's name, as the access log tells it.
pub(super) fn pod_name(workload: &Workload) -> Arc<str> {
    workload.name().into()
}

/// The name of a peer in the access log: that of its record, else what its baggage says.
pub(super) fn peer_name(
    workload: Option<&Workload>,
    baggage: Option<&Baggage<&str>>,
) -> Option<Arc<str>> {
    let told = || {
        baggage
            .map(|baggage| baggage.workload)
            .filter(|name| !name.is_empty())
            .map(Into::into)
    };
    workload.map(pod_name).or_else(told)
}

/// An authority as the access log tells it.
pub(super) fn target(authority: &Authority) -> HboneTarget {
    match authority {
        Authority::Address(address) => HboneTarget::Address(*address),
        Authority::Host { name, port } => HboneTarget::Host(Arc::clone(name), *port),
    }
}
