//! What reporting costs: a flow, a chunk of bytes, a scrape.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a bench may stop at the first fault; criterion's macros carry no docs"
)]

use std::{
    fmt,
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use culvert::telemetry::{
    Exposition, Label, Labels, Meter, Party, Reporter, ResponseFlag, Security, ServiceName, Traffic,
};
use prometheus_client::registry::Registry;
use tokio::time::Instant;

/// Of four samples each.
const LABEL_SETS: usize = 12_500;

criterion_group!(benches, flow, bytes, scrape, slowest_flow);
criterion_main!(benches);

/// Names as the mesh holds them.
struct Names {
    client: Arc<str>,
    principal: Arc<str>,
    namespace: Arc<str>,
    revision: Arc<str>,
    cluster: Arc<str>,
    zone: Arc<str>,
    hostname: Arc<str>,
}

impl Names {
    fn new(client: usize) -> Self {
        Self {
            client: format!("client-{client}").into(),
            principal: "spiffe://cluster.local/ns/shop/sa/client".into(),
            namespace: "shop".into(),
            revision: "latest".into(),
            cluster: "Kubernetes".into(),
            zone: "europe-west1-b".into(),
            hostname: "api.shop.svc.cluster.local".into(),
        }
    }

    fn labels(&self) -> Labels<Label<'_>> {
        let party = Party {
            workload: (&self.client).into(),
            canonical_service: (&self.client).into(),
            canonical_revision: (&self.revision).into(),
            namespace: (&self.namespace).into(),
            principal: (&self.principal).into(),
            app: (&self.client).into(),
            cluster: (&self.cluster).into(),
            region: (&self.zone).into(),
            zone: (&self.zone).into(),
        };
        Labels {
            reporter: Reporter::Source,
            security: Security::MutualTls,
            source: party,
            destination: party,
            service: ServiceName {
                hostname: (&self.hostname).into(),
                namespace: (&self.namespace).into(),
                name: (&self.client).into(),
            },
        }
    }
}

/// A table of so many label sets, each with a flow that has ended: four samples each.
fn table(label_sets: usize) -> Traffic {
    let traffic = Traffic::default();
    for client in 0..label_sets {
        let meter = traffic.open(&Names::new(client).labels());
        meter.received(1_000);
        meter.close(ResponseFlag::None);
    }
    traffic
}

fn flow(criterion: &mut Criterion) {
    let traffic = table(LABEL_SETS);
    let names = Names::new(5_000);
    criterion.bench_function("telemetry/flow opened and closed", |bench| {
        bench.iter(|| {
            let labels = black_box(&names).labels();
            traffic.open(&labels).close(ResponseFlag::None);
        });
    });
}

fn bytes(criterion: &mut Criterion) {
    let traffic = Traffic::default();
    let meter: Meter = traffic.open(&Names::new(0).labels());
    criterion.bench_function("telemetry/bytes counted", |bench| {
        bench.iter(|| meter.received(black_box(16_384)));
    });
}

/// Counts what is written to it.
struct Sink(u64);

impl fmt::Write for Sink {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 += u64::try_from(text.len()).map_err(|_| fmt::Error)?;
        black_box(text);
        Ok(())
    }
}

/// Writes all of a table, and tells how many bytes that were.
fn write(exposition: &Exposition) -> u64 {
    let mut sink = Sink(0);
    exposition.write(&mut sink).unwrap();
    sink.0
}

fn scrape(criterion: &mut Criterion) {
    let exposition = Exposition::new(Registry::default(), table(LABEL_SETS));
    let mut group = criterion.benchmark_group("telemetry");
    let bytes = Throughput::Bytes(write(&exposition));
    group.sample_size(20).throughput(bytes);
    group.bench_function("scrape of 50,000 series", |bench| {
        bench.iter(|| write(&exposition));
    });
    group.finish();
}

/// The longest that one of a thousand flows takes to be opened and closed while somebody scrapes without a pause.
fn slowest_flow(criterion: &mut Criterion) {
    let traffic = table(LABEL_SETS);
    let exposition = Exposition::new(Registry::default(), traffic.clone());
    let names = Names::new(5_000);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                write(&exposition);
            }
        });
        let mut group = criterion.benchmark_group("telemetry");
        group.sample_size(20);
        group.bench_function(
            "slowest of 1,000 flows during scrapes of 50,000 series",
            |bench| {
                bench.iter_custom(|times| {
                    let slowest = |_| {
                        let flows = (0..1_000).map(|_| {
                            let began = Instant::now();
                            traffic.open(&names.labels()).close(ResponseFlag::None);
                            began.elapsed()
                        });
                        flows.max().unwrap_or(Duration::ZERO)
                    };
                    (0..times).map(slowest).sum()
                });
            },
        );
        group.finish();
        done.store(true, Relaxed);
    });
}
