//! Who holds memory, and how it is held against the budget.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
    registry::Registry,
};

use crate::{
    budget::{self, Relief, Shares},
    flow::Shared,
    mesh::Mesh,
    relay::Buffers,
    telemetry::{Traffic, logging::Backlog},
    tunnel::PoolMetrics,
};

/// Exports what these hold, and how it is held against `budget` bytes, through `registry`.
pub(super) fn register(
    shared: &Shared,
    log: Backlog,
    budget: Option<u64>,
    registry: &mut Registry,
) {
    registry.register_collector(Box::new(Owners {
        budget,
        buffers: shared.buffers.clone(),
        traffic: shared.traffic.clone(),
        mesh: shared.mesh.clone(),
        pools: shared.pools.clone(),
        shares: shared.shares.clone(),
        log,
    }));
}

/// Looks when scraped.
#[derive(Debug)]
struct Owners {
    budget: Option<u64>,
    buffers: Buffers,
    traffic: Traffic,
    mesh: Mesh,
    pools: PoolMetrics,
    shares: Shares,
    log: Backlog,
}

impl Owners {
    /// Those of flows, tunnels and state are estimates by number.
    fn bytes(&self) -> [(&'static str, usize); 7] {
        let counts = self.mesh.read().counts();
        let records = counts.workloads + counts.services + counts.policies;
        let pooled = self.pools.connections() * budget::Owner::Tunnel.bytes();
        let accepted = self.shares.bytes(budget::Owner::Tunnel);
        [
            ("relay_buffers", self.buffers.taken_bytes()),
            ("idle_relay_buffers", self.buffers.kept_bytes()),
            ("tunnels", accepted + pooled),
            ("flows", self.shares.bytes(budget::Owner::Flow)),
            ("state", records * RECORD_BYTES),
            ("traffic_series", self.traffic.series_bytes()),
            ("log_queue", self.log.bytes()),
        ]
    }

    fn encode_budget(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        if let Some(bytes) = self.budget {
            let (name, help) = ("culvert_memory_budget_bytes", "The memory budget.");
            encoder
                .encode_descriptor(name, help, None, MetricType::Gauge)?
                .encode_gauge(&bytes)?;
        }
        let name = "culvert_memory_pressure";
        let help = "How short memory is: 0 calm, 1 tight, 2 critical.";
        encoder
            .encode_descriptor(name, help, None, MetricType::Gauge)?
            .encode_gauge(&u64::from(budget::pressure().steps()))?;
        let mut family = encoder.encode_descriptor(
            "culvert_memory_relief",
            "What was done because memory was short.",
            None,
            MetricType::Counter,
        )?;
        for relief in Relief::ALL {
            family
                .encode_family(&[("relief", relief.as_str())])?
                .encode_counter::<NoLabelSet, _, u64>(&relief.counted(), None)?;
        }
        Ok(())
    }
}

/// What a record of the mesh takes on the average, with its part of the indexes; see `benches`.
const RECORD_BYTES: usize = 400;

#[derive(Debug, EncodeLabelSet)]
struct Owner {
    owner: &'static str,
}

impl Collector for Owners {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let number = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let taken = number(self.buffers.taken());
        encoder
            .encode_descriptor(
                "culvert_relay_buffers_taken",
                "Buffers that hold bytes on their way.",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&taken)?;
        encoder
            .encode_descriptor(
                "culvert_relay_pipes_taken",
                "Pipes that hold bytes on their way between two sockets.",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&number(self.buffers.pipes_taken()))?;
        encoder
            .encode_descriptor(
                "culvert_spliced_bytes",
                "Bytes that went from socket to socket without being copied.",
                None,
                MetricType::Counter,
            )?
            .encode_counter::<NoLabelSet, _, u64>(&self.buffers.spliced_bytes(), None)?;
        let mut family = encoder.encode_descriptor(
            "culvert_memory_bytes",
            "Memory by owner; those of flows, tunnels and state are estimates.",
            None,
            MetricType::Gauge,
        )?;
        for (owner, bytes) in self.bytes() {
            family
                .encode_family(&Owner { owner })?
                .encode_gauge(&number(bytes))?;
        }
        self.encode_budget(&mut encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{mesh::View, relay::Appetite};

    #[test]
    fn each_owner_is_told() {
        let mut registry = Registry::default();
        let buffers = Buffers::new();
        drop(buffers.take(Appetite::default()));
        let _held = buffers.take(Appetite::at_least(100_000));
        let shares = Shares::default();
        let pod = shares.pod();
        let _flow = pod.hold(budget::Owner::Flow);
        let _tunnel = pod.hold(budget::Owner::Tunnel);
        registry.register_collector(Box::new(Owners {
            budget: Some(1 << 30),
            buffers,
            shares,
            traffic: Traffic::default(),
            mesh: Mesh::new(View {
                node_name: None,
                network: "".into(),
                cluster_id: "c".into(),
            }),
            pools: PoolMetrics::default(),
            log: Backlog::default(),
        }));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "culvert_relay_buffers_taken 1",
            "culvert_relay_pipes_taken 0",
            "culvert_spliced_bytes_total 0",
            "culvert_memory_bytes{owner=\"relay_buffers\"} 262144",
            "culvert_memory_bytes{owner=\"flows\"} 4096",
            "culvert_memory_bytes{owner=\"tunnels\"} 32768",
            "culvert_memory_bytes{owner=\"state\"} 0",
            "culvert_memory_budget_bytes 1073741824",
            "culvert_memory_pressure 0",
            "culvert_memory_relief_total{relief=\"flow_refused\"} 0",
            "culvert_memory_bytes{owner=\"idle_relay_buffers\"} 4096",
            "culvert_memory_bytes{owner=\"traffic_series\"} 0",
            "culvert_memory_bytes{owner=\"log_queue\"} 0",
        ] {
            assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
        }
    }
}
