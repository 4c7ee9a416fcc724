//! Follows what peers are trusted for, and counts it.

use std::fmt;

use cert_agent::{RootSourceStatus, TrustBundle};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

/// The source of roots that is a file.
pub(super) const ROOT_FILE: &str = "file";
/// The source of roots that are issuers of OpenBao.
pub(super) const OPENBAO: &str = "openbao";

/// Registers the metrics of `trust`.
pub(super) fn register(trust: &TrustBundle, registry: &mut Registry) {
    registry.register_collector(Box::new(Sources(trust.clone())));
}

#[derive(Debug)]
struct Sources(TrustBundle);

/// How a number of a source is called, explained and found.
type Number = (&'static str, &'static str, fn(&RootSourceStatus) -> u64);

const GAUGES: [Number; 2] = [
    (
        "istio_trust_bundle_roots",
        "Roots that a source of the trust bundle names (unstable).",
        |source| count(source.roots),
    ),
    (
        "istio_trust_bundle_leaving_roots",
        "Roots that a source names no longer, trusted for a while more (unstable).",
        |source| count(source.leaving),
    ),
];

const COUNTERS: [Number; 2] = [
    (
        "istio_trust_bundle_updates",
        "How often a source of the trust bundle was taken over (unstable).",
        |source| source.updates,
    ),
    (
        "istio_trust_bundle_failures",
        "How often a source of the trust bundle was not usable (unstable).",
        |source| source.failures,
    ),
];

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let sources = self.0.sources();
        for (name, help, number) in GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for source in &sources {
                let labels = [("source", source.source)];
                let gauge = ConstGauge::new(i64::try_from(number(source)).unwrap_or(i64::MAX));
                gauge.encode(family.encode_family(&labels)?)?;
            }
        }
        for (name, help, number) in COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for source in &sources {
                let labels = [("source", source.source)];
                ConstCounter::new(number(source)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cert_agent::InProcessCa;

    use super::*;

    #[test]
    fn counts_each_source() {
        let trust = TrustBundle::new(Duration::ZERO);
        let root = InProcessCa::random().unwrap().root().clone();
        trust.update(ROOT_FILE, &[root]).unwrap();
        trust.update(ROOT_FILE, &[]).unwrap_err();
        let mut registry = Registry::default();
        register(&trust, &mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "istio_trust_bundle_roots{source=\"file\"} 1",
            "istio_trust_bundle_leaving_roots{source=\"file\"} 0",
            "istio_trust_bundle_updates_total{source=\"file\"} 1",
            "istio_trust_bundle_failures_total{source=\"file\"} 1",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
