//! Look-ups of host names on behalf of connections.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet},
    metrics::counter::Counter,
    registry::Registry,
};

use super::{
    labels::{Label, LabelValue, OTHER, Party},
    tallies::{Family, Tallies},
};
use crate::config::Metrics;

/// Counts resolutions of workloads that are known by a host name only. Clones share it.
#[derive(Debug, Clone)]
pub struct OnDemandDns(Arc<Tallies<Series, Counter>>);

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
    /// Nothing counted yet, exported through `registry`. There are as many label sets as `settings` allow.
    pub fn register(registry: &mut Registry, settings: Metrics) -> Self {
        let metric = Self(Arc::new(Tallies::new(settings)));
        registry.register_collector(Box::new(metric.clone()));
        metric
    }

    /// Forgets label sets of which nothing was resolved for the configured time. Never ends.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn evict_idle(&self) {
        self.0.evict_idle().await;
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
        let counted = |counter: &Counter| {
            counter.inc();
        };
        self.0.count(&series, |_| Series::other(), counted);
    }
}

impl Series {
    /// What stands for all that are too many.
    fn other() -> Self {
        let other = || Arc::<str>::from(OTHER);
        Self {
            source_workload: other(),
            source_canonical_service: other(),
            source_canonical_revision: other(),
            source_workload_namespace: other(),
            source_principal: other(),
            source_app: other(),
            source_version: other(),
            source_cluster: other(),
            hostname: other(),
        }
    }
}

impl Collector for OnDemandDns {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let family = Family {
            name: "istio_on_demand_dns",
            help: "Resolutions of workloads that are known by a host name only (unstable).",
            unit: None,
        };
        let all = self.0.read();
        all.encode(&mut encoder, &family, |counter: &Counter| Some(counter))
    }
}
