//! Look-ups of host names on behalf of connections.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::labels::{Label, LabelValue, Party};

/// Counts resolutions of workloads that are known by a host name only. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct OnDemandDns(Family<Series, Counter>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Series {
    source_workload: Arc<str>,
    source_canonical_service: Arc<str>,
    source_canonical_revision: Arc<str>,
    source_workload_namespace: Arc<str>,
    source_principal: Arc<str>,
    source_app: Arc<str>,
    source_version: Arc<str>,
    source_cluster: Arc<str>,
    hostname: Arc<str>,
}

impl OnDemandDns {
    /// Nothing counted yet, exported through `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metric = Self::default();
        registry.register(
            "istio_on_demand_dns",
            "Resolutions of workloads that are known by a host name only (unstable)",
            metric.0.clone(),
        );
        metric
    }

    /// `source` has `hostname` resolved.
    pub fn resolving(&self, source: &Party<Label<'_>>, hostname: &Arc<str>) {
        let text = |label: Label<'_>| Arc::from(label.value());
        let revision: Arc<str> = text(source.canonical_revision);
        let series = Series {
            source_workload: text(source.workload),
            source_canonical_service: text(source.canonical_service),
            source_canonical_revision: Arc::clone(&revision),
            source_workload_namespace: text(source.namespace),
            source_principal: text(source.principal),
            source_app: text(source.app),
            source_version: revision,
            source_cluster: text(source.cluster),
            hostname: Arc::clone(hostname),
        };
        self.0.get_or_create(&series).inc();
    }
}
