//! How often what somebody asked for was too much.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, NoLabelSet},
    metrics::MetricType,
    registry::Registry,
};
use tokio::time::Instant;

use super::labels::label;

/// Counts how often each limit was hit, and logs it once in a while. Clones share.
#[derive(Debug, Clone, Default)]
pub struct Limits(Arc<[Hits; Limit::ALL.len()]>);

/// What is bounded, beyond the waits that all have limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// Descriptors of the process, but for those that are kept for control work: nothing is accepted or dialled.
    Descriptors,
    /// Connections and flows of one pod: no further one is accepted, a stream is refused.
    FlowsPerPod,
    /// TLS handshakes under way in one pod: the oldest gives way.
    HandshakesPerPod,
    /// Those of one peer's address in one pod: its oldest gives way.
    HandshakesPerPeer,
    /// Frames of a peer that carry nothing: its connection ends.
    ControlFrames,
    /// Streams that a peer opened and reset: its connection ends.
    Resets,
    /// Streams that a peer may have open on one connection: a further one is refused.
    Streams,
    /// The header list of a request: the stream is refused.
    HeaderBytes,
    /// What the HTTP/2 library bounds by itself, such as CONTINUATION and empty DATA frames: the connection ends.
    Http2,
}

impl Limit {
    const ALL: [Self; 9] = [
        Self::Descriptors,
        Self::FlowsPerPod,
        Self::HandshakesPerPod,
        Self::HandshakesPerPeer,
        Self::ControlFrames,
        Self::Resets,
        Self::Streams,
        Self::HeaderBytes,
        Self::Http2,
    ];

    /// The value of the label `limit`, and of the log's field.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::FlowsPerPod => "flows_per_pod",
            Self::HandshakesPerPod => "handshakes_per_pod",
            Self::HandshakesPerPeer => "handshakes_per_peer",
            Self::ControlFrames => "control_frames",
            Self::Resets => "resets",
            Self::Streams => "streams",
            Self::HeaderBytes => "header_bytes",
            Self::Http2 => "http2",
        }
    }
}

#[derive(Debug, Default)]
struct Hits {
    count: AtomicU64,
    told: Mutex<Option<Instant>>,
}

impl Limits {
    /// Zeroes, exported through `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let limits = Self::default();
        registry.register_collector(Box::new(limits.clone()));
        limits
    }

    /// `limit` was hit; `who` by, a pod or a peer, is told in the log, at most once in ten seconds for each limit.
    pub fn hit(&self, limit: Limit, who: &dyn fmt::Display) {
        let Some((_, hits)) = self.all().find(|(one, _)| *one == limit) else {
            return;
        };
        let count = hits.count.fetch_add(1, Relaxed) + 1;
        let now = Instant::now();
        let mut told = hits.told.lock();
        if told.is_none_or(|told| now - told >= QUIET) {
            *told = Some(now);
            drop(told);
            tracing::warn!(limit = limit.as_str(), %who, count, "a limit was hit");
        }
    }

    /// How often `limit` was hit.
    #[must_use]
    pub fn hits(&self, limit: Limit) -> u64 {
        let hits = self.all().find(|(one, _)| *one == limit);
        hits.map_or(0, |(_, hits)| hits.count.load(Relaxed))
    }

    fn all(&self) -> impl Iterator<Item = (Limit, &Hits)> {
        Limit::ALL.into_iter().zip(&*self.0)
    }
}

impl Collector for Limits {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = encoder.encode_descriptor(
            "culvert_limits_hit",
            "How often a limit was hit.",
            None,
            MetricType::Counter,
        )?;
        for (limit, hits) in self.all() {
            family
                .encode_family(&limit)?
                .encode_counter::<NoLabelSet, _, u64>(&hits.count.load(Relaxed), None)?;
        }
        Ok(())
    }
}

impl EncodeLabelSet for Limit {
    fn encode(&self, set: &mut LabelSetEncoder<'_>) -> fmt::Result {
        label(set, "limit", self.as_str())
    }
}

/// How long the log is silent about a limit after a line.
const QUIET: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_told_of_each_limit() {
        let readme = include_str!("../../../README.md");
        let family = readme
            .lines()
            .find(|line| line.starts_with("| `culvert_limits_hit_total`"));
        for limit in Limit::ALL {
            assert!(
                family.unwrap().contains(&format!("`{}`", limit.as_str())),
                "{limit:?}"
            );
        }
    }

    #[test]
    fn hits_are_counted_by_limit() {
        let mut registry = Registry::default();
        let limits = Limits::register(&mut registry);
        limits.hit(Limit::Resets, &"10.0.0.1");
        limits.hit(Limit::Resets, &"10.0.0.2");
        assert_eq!(
            (limits.hits(Limit::Resets), limits.hits(Limit::Http2)),
            (2, 0)
        );
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "culvert_limits_hit_total{limit=\"resets\"} 2",
            "culvert_limits_hit_total{limit=\"descriptors\"} 0",
        ] {
            assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
        }
    }
}
