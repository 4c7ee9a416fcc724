//! Spans: what a flow waited for, in the trace that its source and its destination share.
//!
//! Each side of a flow tells one span, with a child for each phase of its set-up. The source begins the trace and names it
//! in the CONNECT request; the destination goes on with it. Where nobody takes spans nothing is allocated and no clock
//! is read. A flow's task only ever puts its spans into a bounded queue, and loses them if that is full.

mod export;
mod span;

pub use export::{ConnectError, Exporter};
pub use span::{TcpFacts, Trace, TracePhase};

use std::{fmt, sync::Arc};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::sync::mpsc;

use super::Reporter;
use crate::config;

#[allow(
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    missing_docs,
    unnameable_types,
    unreachable_pub,
    unused_qualifications,
    reason = "generated from proto/otlp.proto"
)]
mod proto {
    include!(concat!(
        env!("OUT_DIR"),
        "/opentelemetry.proto.collector.trace.v1.rs"
    ));
}

/// Where spans of flows go. Clones share the queue. By default there is none.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Queue>>);

struct Queue {
    sampler: config::Sampler,
    errors_always: bool,
    spans: mpsc::Sender<Vec<proto::Span>>,
    lost: Lost,
}

/// The ids that tie two spans together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "what a header carries")]
pub struct TraceContext {
    /// The same on every hop.
    pub trace_id: u128,
    /// Of the span that the next one is below.
    pub span_id: u64,
    /// Whether the trace is told.
    pub sampled: bool,
}

/// Spans that were not told, by reason.
#[derive(Debug, Clone, Default)]
struct Lost(Family<LostLabels, Counter>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LostLabels {
    reason: &'static str,
}

impl Lost {
    fn count(&self, reason: &'static str, spans: usize) {
        let counter = self.0.get_or_create(&LostLabels { reason });
        counter.inc_by(u64::try_from(spans).unwrap_or(u64::MAX));
    }
}

impl Traces {
    /// A queue, and who empties it, with what is lost exported through `registry`.
    #[must_use]
    pub fn new(settings: &config::Traces, registry: &mut Registry) -> (Self, Exporter) {
        let (lost, exported) = (Lost::default(), Counter::default());
        registry.register(
            "culvert_trace_spans_lost",
            "Spans that were not told, by reason",
            lost.0.clone(),
        );
        registry.register(
            "culvert_trace_spans_exported",
            "Spans that a collector took",
            exported.clone(),
        );
        // A rate needs a series before the first loss.
        for reason in [QUEUE_FULL, export::REFUSED, export::UNREACHABLE] {
            lost.count(reason, 0);
        }
        let (spans, queued) = mpsc::channel(settings.queue);
        let exporter = Exporter::new(settings, queued, lost.clone(), exported);
        let queue = Queue {
            sampler: settings.sampler,
            errors_always: settings.errors_always,
            spans,
            lost,
        };
        (Self(Some(Arc::new(queue))), exporter)
    }

    /// Begins the span of a flow of the side `reporter`, below that of `parent` if there is one.
    pub fn begin(&self, reporter: Reporter, parent: Option<TraceContext>) -> Trace {
        match &self.0 {
            Some(queue) => Trace::begin(queue, reporter, parent),
            None => Trace::default(),
        }
    }
}

impl Queue {
    fn send(&self, spans: Vec<proto::Span>) {
        let count = spans.len();
        if self.spans.try_send(spans).is_err() {
            self.lost.count(QUEUE_FULL, count);
        }
    }

    /// Whether a trace is told: that of a peer as the peer says, one that begins here by its number.
    fn samples(&self, trace_id: u128, parent: Option<TraceContext>) -> bool {
        if let Some(parent) = parent.filter(|_| self.sampler.follows_parent) {
            return parent.sampled;
        }
        // The lower half, which every sampler of this kind looks at: all hops decide alike.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_precision_loss,
            reason = "the lower half is meant, and 52 bits of it decide"
        )]
        let place = (trace_id as u64) as f64 / u64::MAX as f64;
        self.sampler.ratio >= 1.0 || place < self.sampler.ratio
    }
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traces")
            .field("on", &self.0.is_some())
            .finish()
    }
}

const QUEUE_FULL: &str = "queue_full";

#[cfg(test)]
mod tests;
