//! Who holds memory that goes with traffic and not with the mesh.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
    registry::Registry,
};

use crate::{
    relay::Buffers,
    telemetry::{Traffic, logging::Backlog},
};

/// Exports what these hold, through `registry`.
pub(super) fn register(
    buffers: &Buffers,
    traffic: &Traffic,
    log: Backlog,
    registry: &mut Registry,
) {
    registry.register_collector(Box::new(Owners {
        buffers: buffers.clone(),
        traffic: traffic.clone(),
        log,
    }));
}

/// Looks when scraped.
#[derive(Debug)]
struct Owners {
    buffers: Buffers,
    traffic: Traffic,
    log: Backlog,
}

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
            "Memory that goes with traffic, by owner.",
            None,
            MetricType::Gauge,
        )?;
        for (owner, bytes) in [
            ("idle_relay_buffers", self.buffers.kept_bytes()),
            ("traffic_series", self.traffic.series_bytes()),
            ("log_queue", self.log.bytes()),
        ] {
            family
                .encode_family(&Owner { owner })?
                .encode_gauge(&number(bytes))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::Appetite;

    #[test]
    fn each_owner_is_told() {
        let mut registry = Registry::default();
        let buffers = Buffers::new();
        drop(buffers.take(Appetite::default()));
        let _held = buffers.take(Appetite::at_least(100_000));
        register(
            &buffers,
            &Traffic::default(),
            Backlog::default(),
            &mut registry,
        );
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "culvert_relay_buffers_taken 1",
            "culvert_relay_pipes_taken 0",
            "culvert_spliced_bytes_total 0",
            "culvert_memory_bytes{owner=\"idle_relay_buffers\"} 4096",
            "culvert_memory_bytes{owner=\"traffic_series\"} 0",
            "culvert_memory_bytes{owner=\"log_queue\"} 0",
        ] {
            assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
        }
    }
}
