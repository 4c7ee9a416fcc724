//! What an agent does and holds, as metrics. Series of an identity go with its entry.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
    },
    metrics::{
        MetricType,
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::{Agent, snapshot::Overview};
use crate::{ObtainError, Retry, SpiffeId};

/// What an agent counts.
#[derive(Debug)]
pub(super) struct Metrics {
    fetches: Counter,
    errors: Family<Reason, Counter>,
    call_seconds: Histogram,
    waiting: Gauge,
}

/// Why an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Failure {
    /// No key or request could be made.
    Request,
    /// The authority was not reached, or refused for now.
    Unavailable,
    /// The authority named a time to come again.
    Throttled,
    /// The authority refuses until somebody changes something.
    Denied,
    /// The answer was no good.
    Rejected,
    /// No answer in time.
    Deadline,
    /// The source panicked.
    Panic,
}

impl Failure {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Unavailable,
        Self::Throttled,
        Self::Denied,
        Self::Rejected,
        Self::Deadline,
        Self::Panic,
    ];

    pub(super) const fn of(error: &ObtainError) -> Self {
        match error {
            ObtainError::Csr(_) => Self::Request,
            ObtainError::Unreachable(_) => Self::Unavailable,
            ObtainError::Rejected(_) => Self::Rejected,
            ObtainError::Deadline(_) => Self::Deadline,
            ObtainError::Refused { retry, .. } => match retry {
                Retry::Soon => Self::Unavailable,
                Retry::After(_) => Self::Throttled,
                Retry::Slowly => Self::Denied,
            },
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Unavailable => "unavailable",
            Self::Throttled => "throttled",
            Self::Denied => "denied",
            Self::Rejected => "rejected",
            Self::Deadline => "deadline",
            Self::Panic => "panic",
        }
    }
}

impl EncodeLabelValue for Failure {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        EncodeLabelValue::encode(&self.as_str(), encoder)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: Failure,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let metrics = Self {
            fetches: Counter::default(),
            errors: Family::default(),
            // From 10 ms to three minutes.
            call_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 15)),
            waiting: Gauge::default(),
        };
        // A rate needs a series before the first error.
        for reason in Failure::ALL {
            drop(metrics.errors.get_or_create(&Reason { reason }));
        }
        metrics
    }

    /// A call of the source has ended, or its time was up.
    pub(super) fn called(&self, took: Duration) {
        self.call_seconds.observe(took.as_secs_f64());
    }

    pub(super) fn succeeded(&self) {
        self.fetches.inc();
    }

    pub(super) fn failed(&self, reason: Failure) {
        self.fetches.inc();
        self.errors.get_or_create(&Reason { reason }).inc();
    }

    /// Counts a waiting connection until dropped.
    pub(super) fn waiting(&self) -> Waiting<'_> {
        self.waiting.inc();
        Waiting(&self.waiting)
    }
}

/// A connection waits for a certificate.
pub(super) struct Waiting<'a>(&'a Gauge);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

pub(super) fn register(agent: &Agent, registry: &mut Registry) {
    let metrics = &agent.0.metrics;
    registry.register(
        "istio_certificate_fetches",
        "Attempts to obtain a certificate that have ended (unstable)",
        metrics.fetches.clone(),
    );
    registry.register(
        "istio_certificate_fetch_errors",
        "Attempts to obtain a certificate that failed (unstable)",
        metrics.errors.clone(),
    );
    registry.register(
        "istio_certificate_call_duration_seconds",
        "Time that calls of the certificate authority took, failed ones included (unstable)",
        metrics.call_seconds.clone(),
    );
    registry.register(
        "istio_certificate_waiting_connections",
        "Connections that wait for a certificate (unstable)",
        metrics.waiting.clone(),
    );
    registry.register_collector(Box::new(Identities(agent.clone())));
}

/// Looks at every identity when asked.
#[derive(Debug)]
struct Identities(Agent);

impl Collector for Identities {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut overviews = self.0.0.overviews();
        overviews.truncate(MAX_IDENTITIES);
        times(
            &mut encoder,
            "istio_certificate_expiry_timestamp_seconds",
            "When the certificate of an identity ends, in seconds since 1970 (unstable).",
            &overviews,
            |overview| Some(overview.svid.as_ref()?.not_after()),
        )?;
        times(
            &mut encoder,
            "istio_certificate_last_renewal_timestamp_seconds",
            "When the certificate of an identity was obtained, in seconds since 1970 (unstable).",
            &overviews,
            |overview| overview.obtained_at,
        )?;
        let mut family = encoder.encode_descriptor(
            "istio_certificate_state",
            "1 for the state that an identity is in (unstable).",
            None,
            MetricType::Gauge,
        )?;
        for (id, overview) in &overviews {
            let labels = [
                ("identity", id.as_str()),
                ("state", overview.stage.as_str()),
            ];
            ConstGauge::new(1).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// One family of points in time, for the identities that have one.
fn times(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    overviews: &[(SpiffeId, Overview)],
    time: impl Fn(&Overview) -> Option<SystemTime>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (id, overview) in overviews {
        if let Some(time) = time(overview) {
            let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            let seconds = i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX);
            let labels = [("identity", id.as_str())];
            ConstGauge::new(seconds).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

/// More than a node has workload identities; what exceeds it has no series of its own.
const MAX_IDENTITIES: usize = 1000;
