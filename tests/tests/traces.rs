//! Spans of flows, as a collector gets them, and what happens when there is none.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeSet, path::Path, sync::Arc};

use serde_json::Value;
use testkit::{
    Cluster, Collector, Mesh, Node, Pod, PodSpec, ProxyOptions, World,
    collector::Taken,
    stage::Steady,
    traffic::{self, Behaviour},
};

/// `web` on one node, `api` on another; the collector beside `web`.
struct Stage {
    world: World,
    web: Arc<Pod>,
    api: Arc<Pod>,
    home: Arc<Pod>,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        let api = world.node(1).pod(&PodSpec::captured("api")).unwrap();
        let home = world.node(0).pod(&PodSpec::plain("collector")).unwrap();
        let mesh = Mesh::of(&[&web, &api]);
        mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
        Self {
            world,
            web,
            api,
            home,
        }
    }

    async fn start(&self, endpoint: &str, more: &[(&str, &str)]) -> Cluster<'_> {
        let options = |node: &Node| {
            let options = ProxyOptions::new(&self.world, node)
                .env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
                .env("OTEL_EXPORTER_OTLP_HEADERS", "x-token=s3cret")
                .env("OTEL_BSP_SCHEDULE_DELAY", "20");
            let set = |options: ProxyOptions, (key, value): &(&str, &str)| options.env(key, value);
            more.iter().fold(options, set)
        };
        let pods = [&self.web, &self.api];
        Cluster::run(&self.world, options, &pods).await.unwrap()
    }
}

fn named(taken: &[Taken], name: &str) -> Option<Taken> {
    taken.iter().find(|one| one.span.name == name).cloned()
}

/// The names of the phases below a span.
fn phases(taken: &[Taken], parent: &Taken) -> BTreeSet<String> {
    let flow = &parent.span;
    let below = taken
        .iter()
        .map(|one| &one.span)
        .filter(|span| span.parent_span_id == flow.span_id && span.name != "inbound");
    below
        .inspect(|span| {
            assert!(
                span.start_time_unix_nano >= flow.start_time_unix_nano,
                "{span:?}"
            );
            assert!(
                span.end_time_unix_nano <= flow.end_time_unix_nano,
                "{span:?}"
            );
        })
        .map(|span| span.name.clone())
        .collect()
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn both_sides_of_a_flow_tell_one_trace() {
    let stage = Stage::new();
    let collector = Collector::start(&stage.home).unwrap();
    let cluster = stage.start(collector.endpoint(), &[]).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert_eq!(
        stage.web.ask(app.address, b"hello").await.unwrap(),
        b"hello"
    );
    let (source, destination) = collector
        .until("both sides", |taken| {
            Some((named(taken, "outbound")?, named(taken, "inbound")?))
        })
        .await;
    assert_eq!(source.span.trace_id.len(), 16);
    assert_eq!(source.span.trace_id, destination.span.trace_id);
    assert_eq!(destination.span.parent_span_id, source.span.span_id);
    assert!(source.span.parent_span_id.is_empty());
    let taken = collector.taken();
    let made = ["resolve", "connect", "tls", "request"];
    assert_eq!(phases(&taken, &source), names(&made));
    let taken_in = ["resolve", "policy", "connect"];
    assert_eq!(phases(&taken, &destination), names(&taken_in));
    for (index, side) in [&source, &destination].into_iter().enumerate() {
        let events: Vec<_> = side.span.events.iter().map(|event| &*event.name).collect();
        assert_eq!(events, ["accept", "first byte", "close"]);
        let is = |key: &str| side.attribute(key).unwrap_or_default();
        assert_eq!(is("culvert.source.identity"), stage.web.spiffe_id());
        assert_eq!(is("culvert.destination.identity"), stage.api.spiffe_id());
        assert_eq!(is("culvert.bytes_sent"), "5");
        assert_eq!(is("culvert.hbone.authority"), app.address.to_string());
        assert_eq!(side.sender("service.name").unwrap(), "culvert");
        let node = side.sender("k8s.node.name").unwrap();
        assert_eq!(node, stage.world.node(index).name());
        assert_eq!(side.token.as_deref(), Some("s3cret"));
        assert!(side.span.status.as_ref().is_none_or(|it| it.code == 0));
    }
    // The application's connection on the one side, its server's on the other.
    for (side, key) in [(&source, "downstream"), (&destination, "upstream")] {
        let fact = |name: &str| side.attribute(&format!("culvert.{key}.tcp.{name}"));
        assert!(fact("rtt_us").unwrap().parse::<u64>().unwrap() > 0);
        assert_eq!(fact("retransmits").unwrap(), "0");
    }
    // A second flow finds the connection there.
    assert_eq!(
        stage.web.ask(app.address, b"again").await.unwrap(),
        b"again"
    );
    let second = collector
        .until("another trace", |taken| {
            let other = |one: &&Taken| {
                one.span.trace_id != source.span.trace_id && one.span.name == "outbound"
            };
            taken.iter().find(other).cloned()
        })
        .await;
    let reused = ["resolve", "request"];
    assert_eq!(phases(&collector.taken(), &second), names(&reused));
    let log = cluster.proxy(0).log().tail(usize::MAX);
    assert!(!log.contains("s3cret"), "{log}");
    keep(&capture(&taken, &source));
}

/// The trace of a span, as JSON.
fn capture(taken: &[Taken], source: &Taken) -> Value {
    let first = |one: &&Taken| one.span.trace_id == source.span.trace_id;
    let capture: Value = taken.iter().filter(first).map(Value::from).collect();
    for side in ["outbound", "inbound"] {
        let span = |one: &&Value| one["name"] == side;
        let span = capture.as_array().unwrap().iter().find(span).unwrap();
        assert_eq!(span["traceId"], capture[0]["traceId"]);
        assert_eq!(span["spanId"].as_str().unwrap().len(), 16);
    }
    capture
}

/// With `TESTKIT_CAPTURES` set to a directory, the trace is left there for people to look at.
#[expect(
    clippy::disallowed_methods,
    reason = "test runs are steered by the environment"
)]
fn keep(capture: &Value) {
    if let Some(directory) = std::env::var_os("TESTKIT_CAPTURES") {
        let file = Path::new(&directory).join("trace.json");
        std::fs::write(file, format!("{capture:#}\n")).unwrap();
    }
}

#[tokio::test]
async fn failures_are_told_though_nothing_else_is() {
    let stage = Stage::new();
    let collector = Collector::start(&stage.home).unwrap();
    let off = [("OTEL_TRACES_SAMPLER", "always_off")];
    let _cluster = stage.start(collector.endpoint(), &off).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert_eq!(stage.web.ask(app.address, b"fine").await.unwrap(), b"fine");
    // Nobody listens there.
    assert!(stage.web.ask(stage.api.at(9), b"lost").await.is_err());
    let (source, destination) = collector
        .until("both sides", |taken| {
            Some((named(taken, "outbound")?, named(taken, "inbound")?))
        })
        .await;
    assert_eq!(source.span.trace_id, destination.span.trace_id);
    for side in [&source, &destination] {
        let status = side.span.status.as_ref().unwrap();
        assert_eq!(status.code, 2, "an error");
        assert!(!status.message.is_empty());
        assert!(side.attribute("error.type").is_some());
    }
    let traces = collector.taken().into_iter().map(|one| one.span.trace_id);
    let traces: BTreeSet<_> = traces.collect();
    assert_eq!(traces.len(), 1, "the good flow is not told");
}

#[tokio::test]
async fn a_collector_that_answers_nobody_harms_no_flow() {
    let stage = Stage::new();
    let silent = traffic::listen(stage.home.netns(), stage.home.at(4317)).unwrap();
    let endpoint = format!("http://{}", stage.home.at(4317));
    let small = [("OTEL_BSP_MAX_QUEUE_SIZE", "4")];
    let cluster = stage.start(&endpoint, &small).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let traffic = Steady::start(&stage.web, app.address);
    let lost = "culvert_trace_spans_lost_total";
    for node in 0..2 {
        let full = [("reason", "queue_full")];
        let proxy = cluster.proxy(node);
        proxy.metric(lost, &full, |count| count > 400.0).await;
    }
    traffic.end().await;
    drop(silent);
}

#[tokio::test]
async fn without_an_endpoint_there_is_no_trace() {
    let stage = Stage::new();
    let cluster = stage.start("", &[]).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert_eq!(
        stage.web.ask(app.address, b"hello").await.unwrap(),
        b"hello"
    );
    let metrics = cluster.proxy(0).get(15020, "/metrics").await.unwrap().body;
    assert!(!metrics.contains("culvert_trace"), "{metrics}");
}
