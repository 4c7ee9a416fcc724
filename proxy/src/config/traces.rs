//! Spans of flows, and who takes them.

use std::{path::PathBuf, time::Duration};

use serde::Serialize;

use super::{Header, show};

/// Where spans go, and which.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Traces {
    /// `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, else `OTEL_EXPORTER_OTLP_ENDPOINT`: a collector of OTLP over gRPC.
    #[serde(serialize_with = "show::text")]
    pub endpoint: http::Uri,
    /// `OTEL_EXPORTER_OTLP_CERTIFICATE`: trust roots of an https endpoint; `None` stands for those of the system.
    pub roots: Option<PathBuf>,
    /// `OTEL_EXPORTER_OTLP_HEADERS`.
    pub headers: Vec<Header>,
    /// `OTEL_SERVICE_NAME`, default `culvert`.
    pub service: String,
    /// `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG`.
    pub sampler: Sampler,
    /// `TRACES_ERRORS_ALWAYS`, default true: flows that fail are told even if they were not sampled.
    pub errors_always: bool,
    /// `OTEL_BSP_MAX_QUEUE_SIZE`, default 2048: flows whose spans wait to be sent.
    pub queue: usize,
    /// `OTEL_BSP_SCHEDULE_DELAY`, default 5 s: the longest wait for a batch to fill.
    #[serde(serialize_with = "show::duration")]
    pub delay: Duration,
}

/// Which traces are told.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Sampler {
    /// This part of those that begin here: 0 to 1.
    pub ratio: f64,
    /// Whether a trace that a peer began is told if the peer tells it.
    pub follows_parent: bool,
}

impl Sampler {
    /// A sampler of these properties.
    #[must_use]
    pub const fn new(ratio: f64, follows_parent: bool) -> Self {
        Self {
            ratio,
            follows_parent,
        }
    }
}
