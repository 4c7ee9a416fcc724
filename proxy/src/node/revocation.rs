//! Counts what revocation lists hold and what they lead to.

use std::fmt;

use cert_agent::{Revocations, SideCounts};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

/// The source of revocation lists that is a file.
pub(super) const CRL_FILE: &str = "file";

/// The source of revocation lists that is OpenBao.
pub(super) const OPENBAO: &str = "openbao";

/// Registers the metrics of `revocations`; none are shown while it is off.
pub(super) fn register(revocations: &Revocations, registry: &mut Registry) {
    if revocations.is_armed() {
        registry.register_collector(Box::new(Counted(revocations.clone())));
    }
}

#[derive(Debug)]
struct Counted(Revocations);

impl Collector for Counted {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let status = self.0.status().unwrap_or_default();
        let sided = [
            (
                "istio_crl_policy_rejections",
                "Handshakes refused and tunnels closed because a certificate of the peer is revoked",
                status.rejections,
            ),
            (
                "istio_crl_untracked_connections",
                "Tunnels that are not checked again when revocation lists change",
                status.untracked,
            ),
        ];
        for (
            name,
            help,
            SideCounts {
                source,
                destination,
                ..
            },
        ) in sided
        {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (reporter, count) in [("source", source), ("destination", destination)] {
                let labels = [("reporter", reporter)];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        let reloads = [("loaded", status.updates), ("failed", status.failures)];
        let help = "How often revocation lists were loaded, or not usable (unstable).";
        let mut family =
            encoder.encode_descriptor("istio_crl_reloads", help, None, MetricType::Counter)?;
        for (result, count) in reloads {
            let labels = [("result", result)];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        let held = [
            (
                "istio_crl_lists",
                "Revocation lists in force (unstable).",
                status.lists,
            ),
            (
                "istio_crl_revoked_certificates",
                "Certificates that revocation lists name (unstable).",
                status.revoked,
            ),
        ];
        for (name, help, count) in held {
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exposition(revocations: &Revocations) -> String {
        let mut registry = Registry::default();
        register(revocations, &mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn shows_every_count_from_the_start() {
        let revocations = Revocations::armed();
        revocations.update(CRL_FILE, b"").unwrap();
        revocations.update(CRL_FILE, b"garbage").unwrap_err();
        let text = exposition(&revocations);
        for line in [
            "istio_crl_policy_rejections_total{reporter=\"source\"} 0",
            "istio_crl_policy_rejections_total{reporter=\"destination\"} 0",
            "istio_crl_untracked_connections_total{reporter=\"source\"} 0",
            "istio_crl_reloads_total{result=\"loaded\"} 1",
            "istio_crl_reloads_total{result=\"failed\"} 1",
            "istio_crl_lists 0",
            "istio_crl_revoked_certificates 0",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    #[test]
    fn shows_nothing_while_off() {
        assert!(!exposition(&Revocations::off()).contains("istio_crl"));
    }
}
