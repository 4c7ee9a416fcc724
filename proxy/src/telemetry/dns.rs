//! What the DNS proxy counts.

mod silence;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family as Registered, histogram::Histogram},
    registry::{Registry, Unit},
};

use self::silence::Silence;
use super::{
    labels::OTHER,
    tallies::{Family, Tallies},
};
use crate::config::Metrics;

/// The families of the DNS proxy. Exist only where it is on. Clones share them.
#[derive(Debug, Clone)]
pub struct DnsMetrics {
    queries: Arc<Tallies<DnsLabels, Queries>>,
    unanswered: Registered<Unanswered, Counter>,
    silence: Arc<Silence>,
}

/// Queries of one kind.
#[derive(Debug)]
struct Queries {
    all: Counter,
    forwarded: Counter,
    failures: Counter,
    durations: Histogram,
}

impl Default for Queries {
    fn default() -> Self {
        Self {
            all: Counter::default(),
            forwarded: Counter::default(),
            failures: Counter::default(),
            durations: Histogram::new(SECONDS),
        }
    }
}

/// What tells one series from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(clippy::exhaustive_structs, reason = "put together by `dns`")]
pub struct DnsLabels {
    /// The type that is asked for, in lower case; `unknown` if it has no name or cannot be read.
    pub request_query_type: &'static str,
    /// How the query came.
    pub request_protocol: DnsProtocol,
    /// Canonical service of the client; `unknown` if it is not known.
    pub source_canonical_service: Arc<str>,
    /// Its revision.
    pub source_canonical_revision: Arc<str>,
}

/// How a query came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "DNS has no third")]
pub enum DnsProtocol {
    /// In a datagram.
    Udp,
    /// Over a connection.
    Tcp,
}

impl EncodeLabelValue for DnsProtocol {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>,
    ) -> fmt::Result {
        match self {
            Self::Udp => "udp".encode(encoder),
            Self::Tcp => "tcp".encode(encoder),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Unanswered {
    reason: &'static str,
}

impl DnsMetrics {
    /// Zeroes, exported through `registry`. There are as many label sets as `settings` allow.
    pub fn register(registry: &mut Registry, settings: Metrics) -> Self {
        let metrics = Self {
            queries: Arc::new(Tallies::new(settings)),
            unanswered: Registered::default(),
            silence: Arc::default(),
        };
        registry.register_collector(Box::new(metrics.clone()));
        registry.register(
            "istio_dns_unanswered",
            "DNS queries that were dropped or answered by an error of the proxy itself (unstable)",
            metrics.unanswered.clone(),
        );
        metrics
    }

    /// A query came.
    pub fn requested(&self, labels: &DnsLabels) {
        self.count(labels, |queries| {
            queries.all.inc();
        });
    }

    /// A query was forwarded, and answered or not after `took`.
    pub fn forwarded(&self, labels: &DnsLabels, answered: bool, took: Duration) {
        self.count(labels, |queries| {
            queries.forwarded.inc();
            if !answered {
                queries.failures.inc();
            }
            queries.durations.observe(took.as_secs_f64());
        });
        self.silence.note(answered);
    }

    /// Since when no query that was forwarded is answered; `None` while they are.
    #[must_use]
    pub fn silent_since(&self) -> Option<SystemTime> {
        self.silence.since()
    }

    /// A query got no answer, or none but an error, for a `reason` out of few.
    pub fn unanswered(&self, reason: &'static str) {
        self.unanswered.get_or_create(&Unanswered { reason }).inc();
    }

    /// Forgets label sets of which nothing came for the configured time. Never ends.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn evict_idle(&self) {
        self.queries.evict_idle().await;
    }

    fn count(&self, labels: &DnsLabels, count: impl Fn(&Queries)) {
        let other = |labels: &DnsLabels| DnsLabels {
            source_canonical_service: OTHER.into(),
            source_canonical_revision: OTHER.into(),
            ..labels.clone()
        };
        self.queries.count(labels, other, count);
    }
}

impl Collector for DnsMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.queries.read();
        let family = |name, help| Family {
            name,
            help,
            unit: None,
        };
        let requests = family("istio_dns_requests", "DNS queries (unstable).");
        all.encode(&mut encoder, &requests, |queries| counted(&queries.all))?;
        let forwarded = family(
            "istio_dns_upstream_requests",
            "DNS queries that were forwarded (unstable).",
        );
        all.encode(&mut encoder, &forwarded, |queries| {
            counted(&queries.forwarded)
        })?;
        let failures = family(
            "istio_dns_upstream_failures",
            "Forwarded DNS queries without an answer (unstable).",
        );
        all.encode(&mut encoder, &failures, |queries| {
            counted(&queries.failures)
        })?;
        let durations = Family {
            name: "istio_dns_upstream_request_duration",
            help: "Time until a forwarded DNS query was answered, or was not (unstable).",
            unit: Some(Unit::Seconds),
        };
        all.encode(&mut encoder, &durations, |queries| {
            counted(&queries.forwarded).map(|_| &queries.durations)
        })
    }
}

/// `counter`, unless it never counted anything.
fn counted(counter: &Counter) -> Option<&Counter> {
    (counter.get() > 0).then_some(counter)
}

const SECONDS: [f64; 6] = [0.000_5, 0.001, 0.01, 0.1, 1.0, 5.0];

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(service: &str) -> DnsLabels {
        DnsLabels {
            request_query_type: "a",
            request_protocol: DnsProtocol::Udp,
            source_canonical_service: service.into(),
            source_canonical_revision: "v1".into(),
        }
    }

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn each_family_tells_what_it_counted_and_no_more() {
        let mut registry = Registry::default();
        let metrics = DnsMetrics::register(&mut registry, Metrics::default());
        assert!(!text(&registry).contains("istio_dns_upstream"));
        metrics.requested(&labels("web"));
        assert!(!text(&registry).contains("istio_dns_upstream"));
        for (service, answered) in [("api", true), ("api", false), ("we\"b", true)] {
            metrics.requested(&labels(service));
            metrics.forwarded(&labels(service), answered, Duration::from_millis(5));
        }
        let text = text(&registry);
        let common = |service| {
            format!(
                "request_query_type=\"a\",request_protocol=\"udp\",source_canonical_service=\"{service}\",\
                 source_canonical_revision=\"v1\""
            )
        };
        for line in [
            "# TYPE istio_dns_requests counter".to_owned(),
            "# HELP istio_dns_upstream_requests DNS queries that were forwarded (unstable)."
                .to_owned(),
            "# UNIT istio_dns_upstream_request_duration_seconds seconds".to_owned(),
            format!("istio_dns_requests_total{{{}}} 1", common("web")),
            format!("istio_dns_requests_total{{{}}} 2", common("api")),
            format!(
                "istio_dns_upstream_requests_total{{{}}} 1",
                common("we\\\"b")
            ),
            format!("istio_dns_upstream_failures_total{{{}}} 1", common("api")),
            format!(
                "istio_dns_upstream_request_duration_seconds_bucket{{le=\"0.01\",{}}} 2",
                common("api")
            ),
        ] {
            assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
        }
        assert_eq!(
            text.matches("istio_dns_upstream_failures_total{").count(),
            1
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_asks_any_longer_is_forgotten_and_too_many_are_other() {
        let mut registry = Registry::default();
        let idle = Duration::from_secs(60);
        let settings = Metrics {
            max_series: 64,
            idle: Some(idle),
            ..Metrics::default()
        };
        let metrics = DnsMetrics::register(&mut registry, settings);
        for pod in 0..1000 {
            metrics.requested(&labels(&format!("pod-{pod}")));
        }
        let told = text(&registry);
        assert_eq!(told.matches("istio_dns_requests_total{").count(), 65);
        assert!(told.contains(
            "source_canonical_service=\"other\",source_canonical_revision=\"other\"} 936"
        ));
        let evicting = tokio::time::timeout(idle * 2, metrics.evict_idle());
        assert!(evicting.await.is_err());
        assert!(!text(&registry).contains("istio_dns_requests"));
    }
}
