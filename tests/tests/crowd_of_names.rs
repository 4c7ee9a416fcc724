//! What the proxy tells stays bounded, and telling it costs no traffic: names without end, scrapers, a log nobody reads.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    fs::{File, OpenOptions},
    time::Duration,
};

use futures_util::future::join_all;
use testkit::{
    Cluster, Metrics, Proxy, ProxyOptions,
    proxy::STATS_PORT,
    raw::RawClient,
    stage::ForeignClient,
    traffic::{self, Behaviour},
    wait,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// One flow of a workload of another network that nobody has heard of before.
async fn flow(client: &RawClient, target: &str, name: usize) {
    let baggage = format!(
        "k8s.namespace.name=ns-{},k8s.pod.name=job-{name},service.name=job-{name}",
        name % 3
    );
    let headers = [("baggage", &*baggage), ("x-forwarded-network", "elsewhere")];
    let mut tunnel = client.tunnel_with(target, &headers).await.unwrap();
    tunnel.finish().unwrap();
    tunnel.read_to_end().await.unwrap();
}

/// Flows under these names, forty at a time.
async fn flows(client: &RawClient, target: &str, names: impl Iterator<Item = usize>) {
    let names: Vec<usize> = names.collect();
    for some in names.chunks(40) {
        join_all(some.iter().map(|name| flow(client, target, *name))).await;
    }
}

fn one(metrics: &Metrics, name: &str) -> f64 {
    let all: Vec<_> = metrics.series(name, &[]).collect();
    assert_eq!(all.len(), 1, "{name}: {all:?}");
    all[0].value
}

/// Waits until what series took has gone back to the system, and not only to the allocator.
async fn returned(proxy: &Proxy<'_>, before: u64) {
    let back = async || {
        let now = proxy.resident_bytes().ok()?;
        (now < before + RETURNED_BYTES).then_some(())
    };
    wait::until(wait::SOON, "memory returns", back).await;
}

const OPENED: &str = "istio_tcp_connections_opened_total";
/// What a burst may leave behind.
const KEPT_BYTES: u64 = 48 << 20;
/// What may stay of it once nothing is kept any longer.
const RETURNED_BYTES: u64 = 8 << 20;

#[tokio::test]
async fn ten_thousand_flows_of_changing_names_stay_within_the_ceiling_and_are_forgotten() {
    const SERIES: f64 = 256.0 + 4.0;
    let foreign = ForeignClient::new().unwrap();
    let env = [
        ("METRICS_MAX_SERIES", "256"),
        ("METRICS_IDLE", "4s"),
        ("RUST_LOG", "warn"),
    ];
    let cluster = foreign.cluster_with(&env).await.unwrap();
    let proxy = cluster.proxy(0);
    let _app = foreign.api.serve(8080, Behaviour::Sink).unwrap();
    let (client, target) = (foreign.client().await, foreign.target(8080));
    flows(&client, &target, 0..40).await;
    let before = proxy.resident_bytes().unwrap();

    let mut largest = 0;
    for round in 0..10 {
        // Five hundred names at a time, and fifty of them change each round.
        let names = (0..1_000).map(|flow| round * 50 + flow % 500);
        flows(&client, &target, names).await;
        let answer = proxy.get(STATS_PORT, "/metrics").await.unwrap();
        largest = largest.max(answer.body.len());
        let metrics = Metrics::parse(&answer.body).unwrap();
        let series = one(&metrics, "culvert_traffic_series");
        assert!((100.0..=SERIES).contains(&series), "{series}");
        assert!(metrics.series(OPENED, &[]).count() <= 260);
        assert!(
            metrics.sum(
                "culvert_traffic_flows_folded_total",
                &[("into", "namespace")]
            ) > 0.0
        );
        let other = [
            ("source_workload", "other"),
            ("source_canonical_service", "other"),
        ];
        assert!(metrics.sum(OPENED, &other) > 0.0);
        assert!(
            metrics
                .series(OPENED, &other)
                .all(|one| one.labels["source_workload_namespace"].starts_with("ns-"))
        );
    }
    // Four samples of 27 labels each.
    assert!(largest < 260 * 4 * 1_200 + 100_000, "{largest} bytes");
    let after = proxy.resident_bytes().unwrap();
    assert!(after < before + KEPT_BYTES, "{before} bytes, then {after}");

    drop(client);
    proxy
        .metric("culvert_traffic_series", &[], |series| series == 0.0)
        .await;
    let exposition = proxy.get(STATS_PORT, "/metrics").await.unwrap().body;
    assert!(exposition.len() < largest / 4, "{} bytes", exposition.len());
    let metrics = Metrics::parse(&exposition).unwrap();
    assert_eq!(metrics.series(OPENED, &[]).count(), 0);
    returned(proxy, before).await;
    assert!(one(&metrics, "culvert_traffic_series_evicted_total") >= 256.0);
    // What comes back begins anew.
    let client = foreign.client().await;
    flow(&client, &target, 7).await;
    let metrics = proxy.metrics().await.unwrap();
    assert_eq!(one(&metrics, OPENED), 1.0);
}

#[tokio::test]
async fn twenty_scrapers_that_do_not_read_and_twenty_that_do_hold_up_no_flow() {
    let foreign = ForeignClient::new().unwrap();
    let cluster = foreign.cluster_with(&[("RUST_LOG", "warn")]).await.unwrap();
    let proxy = cluster.proxy(0);
    let _sink = foreign.api.serve(8080, Behaviour::Sink).unwrap();
    let _echo = foreign.api.serve(8081, Behaviour::Echo).unwrap();
    let (client, target) = (foreign.client().await, foreign.target(8080));
    flows(&client, &target, 0..600).await;

    let _silent = silent_scrapers(&foreign).await;
    let reading = join_all((0..20).map(|_| proxy.get(STATS_PORT, "/metrics")));
    let carrying = async {
        let mut tunnel = client.tunnel(&foreign.target(8081)).await.unwrap();
        for name in 0..200 {
            tunnel.ping(b"works").await.unwrap();
            // Names that are new need the table that is being read.
            flow(&client, &target, 10_000 + name).await;
        }
    };
    let (read, ()) = tokio::join!(reading, wait::within(wait::SOON, "flows go on", carrying));
    for answer in read {
        let body = answer.unwrap().body;
        assert!(body.ends_with("# EOF\n"));
        assert!(body.matches("istio_tcp_connections_opened_total{").count() >= 600);
    }
}

/// Twenty scrapers that have the beginning of their answers and read no further.
async fn silent_scrapers(foreign: &ForeignClient) -> Vec<TcpStream> {
    let netns = foreign.world.node(0).proxy_netns();
    let stats = ([127, 0, 0, 1], STATS_PORT).into();
    let mut silent = Vec::new();
    for _ in 0..20 {
        let mut stream = traffic::connect(netns, stats).await.unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut start = [0; 15];
        stream.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 200 OK");
        silent.push(stream);
    }
    silent
}

/// A proxy whose standard output is a pipe, with the end that nobody reads.
async fn unread<'a>(foreign: &'a ForeignClient, env: &[(&str, &str)]) -> (Cluster<'a>, File) {
    let mesh_file = ProxyOptions::mesh_file(&foreign.world);
    foreign.mesh().write(&mesh_file).unwrap();
    let pipe = foreign.world.file("stdout");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Open for both, so that the proxy's own opening does not wait for a reader.
    let mut both = OpenOptions::new();
    let never_read = both.read(true).write(true).open(&pipe).unwrap();
    let redirected = format!("exec \"$0\" \"$@\" > {}", pipe.display());
    let options = |node: &testkit::Node| {
        let options = ProxyOptions::new(&foreign.world, node)
            .env("RUST_LOG", "trace")
            .wrapped(&["sh", "-c", &redirected]);
        let set = |options: ProxyOptions, (key, value): &(&str, &str)| options.env(key, value);
        env.iter().fold(options, set)
    };
    let pods = [&foreign.api];
    let cluster = Cluster::run(&foreign.world, options, &pods).await;
    (cluster.unwrap(), never_read)
}

#[tokio::test]
async fn a_log_that_nobody_reads_costs_records_and_no_traffic() {
    let foreign = ForeignClient::new().unwrap();
    let (cluster, _never_read) = unread(&foreign, &[]).await;
    let _sink = foreign.api.serve(8080, Behaviour::Sink).unwrap();
    let _echo = foreign.api.serve(8081, Behaviour::Echo).unwrap();
    let client = foreign.client().await;
    let mut tunnel = client.tunnel(&foreign.target(8081)).await.unwrap();
    let dropped = async || {
        let metrics = cluster.proxy(0).metrics().await.unwrap();
        one(&metrics, "culvert_log_records_dropped_total")
    };
    let target = foreign.target(8080);
    let carrying = async {
        let mut round = 0;
        while dropped().await == 0.0 {
            flows(&client, &target, round..round + 400).await;
            tunnel.ping(b"still works").await.unwrap();
            round += 400;
        }
        tunnel.ping(b"and after that").await.unwrap();
        flow(&client, &target, 0).await;
    };
    wait::within(Duration::from_secs(60), "records are dropped", carrying).await;
}

#[tokio::test]
async fn blocked_log_silent_collector_and_scrapers_at_once_cost_no_flow() {
    let foreign = ForeignClient::new().unwrap();
    // It takes connections and says nothing.
    let _silent = traffic::listen(foreign.peer.netns(), foreign.peer.at(4317)).unwrap();
    let endpoint = format!("http://{}", foreign.peer.at(4317));
    let env = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &*endpoint),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "16"),
    ];
    let (cluster, _never_read) = unread(&foreign, &env).await;
    let proxy = cluster.proxy(0);
    let _sink = foreign.api.serve(8080, Behaviour::Sink).unwrap();
    let _echo = foreign.api.serve(8081, Behaviour::Echo).unwrap();
    let (client, target) = (foreign.client().await, foreign.target(8080));
    let mut tunnel = client.tunnel(&foreign.target(8081)).await.unwrap();
    flows(&client, &target, 0..200).await;
    let _stalled = silent_scrapers(&foreign).await;
    let carrying = async {
        let mut lost = [0.0; 2];
        while lost.contains(&0.0) {
            let scrapes = join_all((0..20).map(|_| proxy.get(STATS_PORT, "/metrics")));
            let (scraped, ()) = tokio::join!(scrapes, flows(&client, &target, 0..200));
            tunnel.ping(b"still works").await.unwrap();
            let bodies: Vec<String> = scraped.into_iter().map(|one| one.unwrap().body).collect();
            assert!(bodies.iter().all(|body| body.ends_with("# EOF\n")));
            let metrics = Metrics::parse(&bodies[0]).unwrap();
            lost = [
                metrics.sum("culvert_log_records_dropped_total", &[]),
                metrics.sum("culvert_trace_spans_lost_total", &[]),
            ];
        }
        tunnel.ping(b"and after that").await.unwrap();
        flow(&client, &target, 0).await;
    };
    let limit = Duration::from_secs(90);
    wait::within(limit, "records and spans are lost, and counted", carrying).await;
}
