//! How much the node knows, counted when it is asked for.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
    registry::Registry,
};

use crate::mesh::{Counts, Mesh};

/// Registers `istio_mesh_resources` and `culvert_state_age_seconds`.
pub(super) fn register(mesh: &Mesh, registry: &mut Registry) {
    registry.register_collector(Box::new(Held(mesh.clone())));
}

#[derive(Debug)]
struct Held(Mesh);

impl Collector for Held {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Counts {
            workloads,
            services,
            staged_services,
            policies,
            ..
        } = self.0.read().counts();
        let mut family = encoder.encode_descriptor(
            "istio_mesh_resources",
            "Resources of the mesh that are in force (unstable).",
            None,
            MetricType::Gauge,
        )?;
        for (kind, count) in [
            ("workload", workloads),
            ("service", services),
            ("staged_service", staged_services),
            ("policy", policies),
        ] {
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            gauge.encode(family.encode_family(&[("kind", kind)])?)?;
        }
        let told = self.0.read().recalled();
        let age = told.map(|told| told.elapsed().unwrap_or_default());
        let age = ConstGauge::new(age.map_or(0.0, |age| age.as_secs_f64()));
        age.encode(encoder.encode_descriptor(
            "culvert_state_age_seconds",
            "Age of the state that is served from disk; 0 when the control plane has answered.",
            None,
            MetricType::Gauge,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use xds_client::local;

    use super::*;
    use crate::mesh::View;

    #[test]
    fn counts_what_is_held() {
        let mesh = Mesh::new(View {
            node_name: None,
            network: "".into(),
            cluster_id: "Kubernetes".into(),
        });
        let text = "services: [{name: a, namespace: b, hostname: a.b, vips: [], ports: {80: 80}}]";
        mesh.load(&local::parse(text).unwrap());
        let mut registry = Registry::default();
        register(&mesh, &mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "istio_mesh_resources{kind=\"workload\"} 0",
            "istio_mesh_resources{kind=\"service\"} 1",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
