//! What the pools of all pods hold together.

use std::sync::Arc;

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};

use crate::telemetry::{Latencies, Limits};

/// Gauges that the pools of all pods share, and where they tell how long handshakes take and what was too much.
#[derive(Debug, Clone, Default)]
pub struct PoolMetrics(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    connections: Gauge,
    streams: Gauge,
    waiting: Gauge,
    latencies: Latencies,
    limits: Limits,
}

impl PoolMetrics {
    /// Zeroes, exported through `registry`.
    pub fn register(registry: &mut Registry, latencies: Latencies, limits: Limits) -> Self {
        let shared = Shared {
            latencies,
            limits,
            ..Shared::default()
        };
        registry.register(
            "culvert_pool_connections",
            "HBONE connections to peers, those being opened included",
            shared.connections.clone(),
        );
        registry.register(
            "culvert_pool_streams",
            "Streams on them",
            shared.streams.clone(),
        );
        registry.register(
            "culvert_pool_waiting",
            "Flows that wait for a connection to be opened",
            shared.waiting.clone(),
        );
        Self(Arc::new(shared))
    }

    pub(super) fn latencies(&self) -> &Latencies {
        &self.0.latencies
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Connections held, those being opened included.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.0.connections.get().try_into().unwrap_or(0)
    }

    /// Counts a connection until dropped.
    pub(super) fn connection(&self) -> Counted {
        Counted::new(&self.0.connections)
    }

    /// Counts a flow that waits until dropped.
    pub(super) fn waits(&self) -> Counted {
        Counted::new(&self.0.waiting)
    }

    pub(super) fn streams(&self) -> &Gauge {
        &self.0.streams
    }
}

/// One more, until dropped.
#[must_use = "counts until it is dropped"]
pub(super) struct Counted(Gauge);

impl Counted {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
