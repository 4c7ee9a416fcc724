//! What the DNS proxy counts.

use std::{sync::Arc, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};

/// The families of the DNS proxy. Exist only where it is on. Clones share them.
#[derive(Debug, Clone)]
pub struct DnsMetrics {
    requests: Family<DnsLabels, Counter>,
    forwarded: Family<DnsLabels, Counter>,
    failures: Family<DnsLabels, Counter>,
    durations: Family<DnsLabels, Histogram, fn() -> Histogram>,
    unanswered: Family<Unanswered, Counter>,
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
    ) -> std::fmt::Result {
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
    /// Zeroes, exported through `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            forwarded: Family::default(),
            failures: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            unanswered: Family::default(),
        };
        registry.register(
            "istio_dns_requests",
            "DNS queries (unstable)",
            metrics.requests.clone(),
        );
        registry.register(
            "istio_dns_upstream_requests",
            "DNS queries that were forwarded (unstable)",
            metrics.forwarded.clone(),
        );
        registry.register(
            "istio_dns_upstream_failures",
            "Forwarded DNS queries without an answer (unstable)",
            metrics.failures.clone(),
        );
        registry.register_with_unit(
            "istio_dns_upstream_request_duration",
            "Time until a forwarded DNS query was answered, or was not (unstable)",
            Unit::Seconds,
            metrics.durations.clone(),
        );
        registry.register(
            "istio_dns_unanswered",
            "DNS queries that were dropped or answered by an error of the proxy itself (unstable)",
            metrics.unanswered.clone(),
        );
        metrics
    }

    /// A query came.
    pub fn requested(&self, labels: &DnsLabels) {
        self.requests.get_or_create(labels).inc();
    }

    /// A query was forwarded, and answered or not after `took`.
    pub fn forwarded(&self, labels: &DnsLabels, answered: bool, took: Duration) {
        self.forwarded.get_or_create(labels).inc();
        if !answered {
            self.failures.get_or_create(labels).inc();
        }
        let seconds = self.durations.get_or_create(labels);
        seconds.observe(took.as_secs_f64());
    }

    /// A query got no answer, or none but an error, for a `reason` out of few.
    pub fn unanswered(&self, reason: &'static str) {
        self.unanswered.get_or_create(&Unanswered { reason }).inc();
    }
}

const SECONDS: [f64; 6] = [0.000_5, 0.001, 0.01, 0.1, 1.0, 5.0];
