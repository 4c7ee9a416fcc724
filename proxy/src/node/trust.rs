//! Follows what peers are trusted for, and counts it.

use std::fmt::{self, Write as _};

use aws_lc_rs::digest;
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
        encode_roots(&sources, &mut encoder)?;
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

/// Which roots they are, by the hash that tools for certificates show.
fn encode_roots(sources: &[RootSourceStatus], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let help = "1 for each root that a source of the trust bundle names (unstable).";
    let name = "istio_trust_bundle_root";
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for source in sources {
        for root in source.named.iter().take(MOST_ROOTS) {
            let fingerprint = digest::digest(&digest::SHA256, root);
            let mut text = String::with_capacity(64);
            for byte in fingerprint.as_ref() {
                write!(text, "{byte:02x}")?;
            }
            let labels = [("source", source.source), ("sha256", &text)];
            ConstGauge::new(1_i64).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// More than a mesh has; what exceeds it has no series of its own.
const MOST_ROOTS: usize = 32;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cert_agent::InProcessCa;

    use super::*;

    #[test]
    fn counts_each_source() {
        let trust = TrustBundle::new(Duration::ZERO);
        let root = InProcessCa::random().unwrap().root().clone();
        let fingerprint = digest::digest(&digest::SHA256, &root);
        let fingerprint: String = fingerprint
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        trust.update(ROOT_FILE, &[root]).unwrap();
        trust.update(ROOT_FILE, &[]).unwrap_err();
        let mut registry = Registry::default();
        register(&trust, &mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "istio_trust_bundle_roots{source=\"file\"} 1",
            &format!("istio_trust_bundle_root{{source=\"file\",sha256=\"{fingerprint}\"}} 1"),
            "istio_trust_bundle_leaving_roots{source=\"file\"} 0",
            "istio_trust_bundle_updates_total{source=\"file\"} 1",
            "istio_trust_bundle_failures_total{source=\"file\"} 1",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
