//! What the client reports: whether it is connected, how old its knowledge is, what it refused.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::Kind;

/// The families of the client. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics {
    terminations: Family<Reason, Counter>,
    messages: Family<Type, Counter>,
    message_bytes: Family<Type, Counter>,
    connected: Gauge,
    last_response: Gauge,
    rejected_messages: Family<Type, Counter>,
    rejected_resources: Family<Type, Gauge>,
    apply_seconds: Family<Type, Histogram, fn() -> Histogram>,
}

/// Why a stream or an attempt at one ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Ended {
    ConnectionError,
    Error,
    Reconnect,
    Complete,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: Ended,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Type {
    url: &'static str,
}

impl Type {
    fn of(kind: Kind) -> Self {
        Self {
            url: kind.type_url(),
        }
    }
}

impl Metrics {
    /// Zeroes, exported through `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            terminations: Family::default(),
            messages: Family::default(),
            message_bytes: Family::default(),
            connected: Gauge::default(),
            last_response: Gauge::default(),
            rejected_messages: Family::default(),
            rejected_resources: Family::default(),
            apply_seconds: Family::new_with_constructor(apply_histogram),
        };
        metrics.register_traffic(registry);
        metrics.register_health(registry);
        metrics
    }

    fn register_traffic(&self, registry: &mut Registry) {
        registry.register(
            "istio_xds_connection_terminations",
            "Streams to the control plane, and attempts at one, that ended (unstable)",
            self.terminations.clone(),
        );
        registry.register(
            "istio_xds_message",
            "Responses of the control plane (unstable)",
            self.messages.clone(),
        );
        registry.register(
            "istio_xds_message_bytes",
            "Bytes of resources in responses of the control plane (unstable)",
            self.message_bytes.clone(),
        );
    }

    fn register_health(&self, registry: &mut Registry) {
        registry.register(
            "istio_xds_connected",
            "1 while a stream to the control plane is up (unstable)",
            self.connected.clone(),
        );
        registry.register(
            "istio_xds_last_response_timestamp_seconds",
            "When the control plane was last heard, in seconds since 1970; 0 is never (unstable)",
            self.last_response.clone(),
        );
        registry.register(
            "istio_xds_message_rejections",
            "Responses with resources that could not be used (unstable)",
            self.rejected_messages.clone(),
        );
        registry.register(
            "istio_xds_rejected_resources",
            "Resources of the last response that could not be used (unstable)",
            self.rejected_resources.clone(),
        );
        registry.register(
            "istio_xds_apply_duration_seconds",
            "Time to put a response in force (unstable)",
            self.apply_seconds.clone(),
        );
    }

    /// Whether a stream is up.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected.get() == 1
    }

    /// When the control plane was last heard; `None` is never.
    #[must_use]
    pub fn last_response(&self) -> Option<SystemTime> {
        let seconds = u64::try_from(self.last_response.get()).ok()?;
        (seconds > 0).then(|| UNIX_EPOCH + Duration::from_secs(seconds))
    }

    pub(super) fn connected(&self, yes: bool) {
        self.connected.set(yes.into());
    }

    pub(super) fn terminated(&self, reason: Ended) {
        self.terminations.get_or_create(&Reason { reason }).inc();
    }

    pub(super) fn received(&self, kind: Kind, content_bytes: usize) {
        let labels = Type::of(kind);
        self.messages.get_or_create(&labels).inc();
        let bytes = self.message_bytes.get_or_create(&labels);
        bytes.inc_by(content_bytes.try_into().unwrap_or(u64::MAX));
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = now.unwrap_or_default().as_secs();
        self.last_response
            .set(seconds.try_into().unwrap_or(i64::MAX));
    }

    pub(super) fn applied(&self, kind: Kind, rejected: usize, took: Duration) {
        let labels = Type::of(kind);
        if rejected > 0 {
            self.rejected_messages.get_or_create(&labels).inc();
        }
        let count = rejected.try_into().unwrap_or(i64::MAX);
        self.rejected_resources.get_or_create(&labels).set(count);
        let seconds = self.apply_seconds.get_or_create(&labels);
        seconds.observe(took.as_secs_f64());
    }
}

/// From a tenth of a millisecond to a minute and a half.
fn apply_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.000_1, 4.0, 11))
}
