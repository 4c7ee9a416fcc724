//! How long the steps of a flow take, as histograms: an observation is two atomic additions.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet},
    metrics::MetricType,
    registry::Registry,
};

use super::labels::{Reporter, Single};

/// Histograms of the steps of flows, one for each side. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Latencies(Arc<[[Histogram; REPORTERS.len()]; STEPS.len()]>);

/// A step that a flow waits for. Only those that succeed are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// TCP to a peer, a workload or the pod's application.
    Connect,
    /// The TLS handshake of an HBONE connection.
    Handshake,
    /// From the opening of a flow to the first byte from its server.
    FirstByte,
}

#[derive(Debug, Default)]
struct Histogram {
    /// One more than there are bounds.
    buckets: [AtomicU64; BOUNDS_MICROS.len() + 1],
    micros: AtomicU64,
}

impl Latencies {
    /// Empty histograms, exported through `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let latencies = Self::default();
        registry.register_collector(Box::new(latencies.clone()));
        latencies
    }

    /// A step was done after `took`.
    pub fn observe(&self, step: Step, reporter: Reporter, took: Duration) {
        let (step, reporter) = (
            step.index(),
            REPORTERS.iter().position(|one| *one == reporter),
        );
        let histogram = reporter.and_then(|reporter| self.0.get(step)?.get(reporter));
        if let Some(histogram) = histogram {
            histogram.observe(took);
        }
    }
}

impl Step {
    fn index(self) -> usize {
        match self {
            Self::Connect => 0,
            Self::Handshake => 1,
            Self::FirstByte => 2,
        }
    }
}

impl Histogram {
    fn observe(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_MICROS.partition_point(|bound| *bound < micros);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Relaxed);
            self.micros.fetch_add(micros, Relaxed);
        }
    }

    /// The sum in seconds, and each bucket with its bound in seconds.
    fn read(&self) -> (f64, Vec<(f64, u64)>) {
        let seconds = |micros| Duration::from_micros(micros).as_secs_f64();
        let bounds = BOUNDS_MICROS.into_iter().map(seconds);
        let counts = self.buckets.iter().map(|count| count.load(Relaxed));
        let buckets = bounds.chain([f64::INFINITY]).zip(counts).collect();
        (seconds(self.micros.load(Relaxed)), buckets)
    }
}

impl Collector for Latencies {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for ((name, help), histograms) in STEPS.into_iter().zip(self.0.iter()) {
            let kind = MetricType::Histogram;
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (reporter, histogram) in REPORTERS.into_iter().zip(histograms) {
                let (sum, buckets) = histogram.read();
                let count = buckets.iter().map(|(_, count)| count).sum();
                family
                    .encode_family(&Single("reporter", reporter.as_str()))?
                    .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
            }
        }
        Ok(())
    }
}

/// By [`Step::index`].
const STEPS: [(&str, &str); 3] = [
    (
        "culvert_connect_duration_seconds",
        "Time until a TCP connection was there, to peers and to applications.",
    ),
    (
        "culvert_tls_handshake_duration_seconds",
        "Time that TLS handshakes with peers took.",
    ),
    (
        "culvert_first_byte_duration_seconds",
        "Time from the opening of a flow to the first byte from its server.",
    ),
];
const REPORTERS: [Reporter; 2] = [Reporter::Source, Reporter::Destination];
/// From a tenth of a millisecond to ten seconds.
const BOUNDS_MICROS: [u64; 16] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observations_land_in_the_bucket_that_bounds_them() {
        let mut registry = Registry::default();
        let latencies = Latencies::register(&mut registry);
        for micros in [0, 100, 101, 9_999_999, 10_000_001] {
            let took = Duration::from_micros(micros);
            latencies.observe(Step::Handshake, Reporter::Destination, took);
        }
        latencies.observe(Step::Connect, Reporter::Source, Duration::MAX);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let tls = "culvert_tls_handshake_duration_seconds";
        for line in [
            format!("# TYPE {tls} histogram"),
            format!("{tls}_count{{reporter=\"destination\"}} 5"),
            format!("{tls}_sum{{reporter=\"destination\"}} 20.000201"),
            format!("{tls}_bucket{{le=\"0.0001\",reporter=\"destination\"}} 2"),
            format!("{tls}_bucket{{le=\"0.00025\",reporter=\"destination\"}} 3"),
            format!("{tls}_bucket{{le=\"10.0\",reporter=\"destination\"}} 4"),
            format!("{tls}_bucket{{le=\"+Inf\",reporter=\"destination\"}} 5"),
            format!("{tls}_count{{reporter=\"source\"}} 0"),
            "culvert_connect_duration_seconds_count{reporter=\"source\"} 1".to_owned(),
        ] {
            assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
        }
    }
}
