//! What the metrics tell of traffic, and how much of it is kept.

use std::time::Duration;

use serde::Serialize;

use super::show;

/// Labels and bounds of the traffic metrics.
#[derive(Debug, Clone, Copy, Serialize)]
#[non_exhaustive]
pub struct Metrics {
    /// `METRICS_LABELS`.
    pub labels: LabelProfile,
    /// `METRICS_MAX_SERIES`: label sets of traffic that are kept, at least 64.
    pub max_series: usize,
    /// `METRICS_IDLE`: how long a label set without open flows is kept; `None` is for ever.
    #[serde(serialize_with = "show::optional_duration")]
    pub idle: Option<Duration>,
}

/// Which labels a traffic series has. A smaller profile is a subset of the larger ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[expect(
    clippy::exhaustive_enums,
    reason = "each label names the smallest profile that has it"
)]
pub enum LabelProfile {
    /// Workloads, namespaces and service: what Istio's dashboards read.
    Minimal,
    /// What Kiali reads besides: canonical services, identities, clusters.
    Kiali,
    /// All of Istio's labels.
    Full,
}

impl Default for Metrics {
    /// All labels, 10,000 label sets, half an hour.
    fn default() -> Self {
        Self {
            labels: LabelProfile::Full,
            max_series: 10_000,
            idle: Some(Duration::from_mins(30)),
        }
    }
}
