//! What the records of the mesh say about the two sides of a flow, as labels and as baggage.

use std::sync::Arc;

use cert_agent::SpiffeId;

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
pub(super) fn derived(baggage: Option<&Baggage<String>>) -> Party<Label<'_>> {
    let Some(baggage) = baggage else {
        return Party::default();
    };
    Party {
        workload: baggage.workload.as_str().into(),
        canonical_service: baggage.service.as_str().into(),
        canonical_revision: baggage.revision.as_str().into(),
        namespace: baggage.namespace.as_str().into(),
        principal: Label::default(),
        app: baggage.workload.as_str().into(),
        cluster: baggage.cluster.as_str().into(),
        region: baggage.region.as_str().into(),
        zone: baggage.zone.as_str().into(),
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

/// What a peer is told about `workload`.
pub(super) fn baggage(workload: &Workload) -> Baggage<&str> {
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
    baggage: Option<&Baggage<String>>,
) -> Option<Arc<str>> {
    let told = || {
        baggage
            .map(|baggage| baggage.workload.as_str())
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
