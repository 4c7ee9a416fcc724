//! What metrics and access log tell of traffic, and how much of it is kept.

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

/// What the access log tells, within what the filter of `RUST_LOG` lets through.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct AccessLog {
    /// `ACCESS_LOG_NAMESPACES`: flows with neither side in one of them are not told; `None` tells all.
    pub namespaces: Option<Box<[Box<str>]>>,
    /// `ACCESS_LOG_SAMPLING`: of a hundred flows without failure, so many are told. Failures always are.
    pub sampled: u8,
    /// `ACCESS_LOG_PROGRESS`: how often an open flow is told of; `None` is never.
    #[serde(serialize_with = "show::optional_duration")]
    pub progress: Option<Duration>,
}

impl Default for AccessLog {
    /// All flows, when they open and when they end.
    fn default() -> Self {
        Self {
            namespaces: None,
            sampled: 100,
            progress: None,
        }
    }
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
