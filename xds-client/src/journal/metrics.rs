//! What a journal reports.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

/// The families of a journal. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct JournalMetrics {
    kept: Gauge,
    bytes: Gauge,
    failures: Counter,
    unusable: Counter,
    late: Counter,
}

impl JournalMetrics {
    /// Zeroes, exported through `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "culvert_state_kept",
            "1 while what the control plane told is on disk",
            metrics.kept.clone(),
        );
        registry.register(
            "culvert_state_bytes",
            "Bytes of the state on disk",
            metrics.bytes.clone(),
        );
        registry.register(
            "culvert_state_failures",
            "How often the state could not be kept and was removed",
            metrics.failures.clone(),
        );
        registry.register(
            "culvert_state_unusable",
            "States found on disk that could not be used",
            metrics.unusable.clone(),
        );
        registry.register(
            "culvert_state_late",
            "Responses that were answered before they were on disk",
            metrics.late.clone(),
        );
        metrics
    }

    pub(super) fn size(&self, bytes: Option<u64>) {
        self.kept.set(bytes.is_some().into());
        let bytes = i64::try_from(bytes.unwrap_or_default());
        self.bytes.set(bytes.unwrap_or(i64::MAX));
    }

    pub(super) fn failed(&self) {
        self.failures.inc();
    }

    pub(super) fn unusable(&self) {
        self.unusable.inc();
    }

    pub(super) fn late(&self) {
        self.late.inc();
    }
}
