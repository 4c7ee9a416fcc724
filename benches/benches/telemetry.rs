//! What reporting costs: a flow, a chunk of bytes, a scrape.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a bench may stop at the first fault; criterion's macros carry no docs"
)]

use std::{fmt, hint::black_box, sync::Arc};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use culvert::telemetry::{
    Label, Labels, Meter, Party, Reporter, ResponseFlag, Security, ServiceName, Traffic,
};
use prometheus_client::{encoding::text::encode, registry::Registry};

criterion_group!(benches, flow, bytes, scrape);
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

/// A table of `series` series, each with a flow that has ended.
fn table(series: usize) -> (Registry, Traffic) {
    let mut registry = Registry::default();
    let traffic = Traffic::register(&mut registry);
    for client in 0..series {
        let meter = traffic.open(&Names::new(client).labels());
        meter.received(1_000);
        meter.close(ResponseFlag::None);
    }
    (registry, traffic)
}

fn flow(criterion: &mut Criterion) {
    let (_registry, traffic) = table(10_000);
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

fn scrape(criterion: &mut Criterion) {
    let (registry, _traffic) = table(10_000);
    let write = || {
        let mut sink = Sink(0);
        encode(&mut sink, &registry).unwrap();
        sink.0
    };
    let mut group = criterion.benchmark_group("telemetry");
    group.sample_size(20).throughput(Throughput::Bytes(write()));
    group.bench_function("scrape of 10,000 series", |bench| bench.iter(write));
    group.finish();
}
