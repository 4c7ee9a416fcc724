//! What the proxy tells: readiness, metrics and logs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use testkit::{
    Agent, Cluster, Line, Mesh, Metrics, Pod, PodSpec, ProxyOptions, World, http,
    metrics::Sample,
    proxy::{READINESS_PORT, STATS_PORT},
    traffic::Behaviour,
    wait,
};

const TRAFFIC: [&str; 4] = [
    "istio_tcp_connections_opened_total",
    "istio_tcp_connections_closed_total",
    "istio_tcp_received_bytes_total",
    "istio_tcp_sent_bytes_total",
];

/// `web` has asked the service of `api` once: five bytes there, twenty-two back.
struct Asked {
    world: World,
    web: Arc<Pod>,
    api: Arc<Pod>,
    mesh: Mesh,
    vip: SocketAddr,
}

impl Asked {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        let api = world.node(1).pod(&PodSpec::captured("api")).unwrap();
        let mut mesh = Mesh::of(&[&web, &api]);
        let vip = SocketAddr::new(IpAddr::from([10, 96, 0, 1]), 80);
        mesh.service("api", vip.ip(), &[(80, 8080)], &[&api]);
        mesh.workload(&web)
            .set("locality", "{region: eu, zone: eu-a, subzone: ''}");
        Self {
            world,
            web,
            api,
            mesh,
            vip,
        }
    }

    async fn start(&self, env: &[(&str, &str)]) -> Cluster<'_> {
        let env: BTreeMap<_, _> = env.iter().copied().collect();
        Cluster::start_with(&self.world, &self.mesh, &[&self.web, &self.api], &env)
            .await
            .unwrap()
    }

    /// The closing access lines of both sides.
    async fn ask(&self, cluster: &Cluster<'_>) -> [Line; 2] {
        let app = self.api.serve(8080, Behaviour::Sink).unwrap();
        assert_eq!(self.web.ask(self.vip, b"hello").await.unwrap().len(), 18);
        assert_eq!(app.peers().len(), 1);
        let complete = |line: &Line| line.is_access("connection complete");
        [
            cluster.proxy(0).log().wait("source", complete).await,
            cluster.proxy(1).log().wait("destination", complete).await,
        ]
    }
}

fn expected_labels(reporter: &str) -> BTreeMap<&str, &str> {
    BTreeMap::from([
        ("reporter", reporter),
        ("source_workload", "web-deploy"),
        ("source_canonical_service", "web-app"),
        ("source_canonical_revision", "v1"),
        ("source_workload_namespace", "shop"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
        ("source_app", "web-app"),
        ("source_version", "v1"),
        ("source_cluster", "Kubernetes"),
        ("destination_service", "api.shop.svc.cluster.local"),
        ("destination_service_namespace", "shop"),
        ("destination_service_name", "api"),
        ("destination_workload", "api-deploy"),
        ("destination_canonical_service", "api-app"),
        ("destination_canonical_revision", "v1"),
        ("destination_workload_namespace", "shop"),
        (
            "destination_principal",
            "spiffe://cluster.local/ns/shop/sa/api",
        ),
        ("destination_app", "api-app"),
        ("destination_version", "v1"),
        ("destination_cluster", "Kubernetes"),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
        ("source_region", "eu"),
        ("source_zone", "eu-a"),
        ("destination_region", "unknown"),
        ("destination_zone", "unknown"),
    ])
}

fn only<'a>(metrics: &'a Metrics, name: &'a str) -> &'a Sample {
    let all: Vec<&Sample> = metrics.series(name, &[]).collect();
    assert_eq!(all.len(), 1, "{name}: {all:?}");
    all[0]
}

#[tokio::test]
async fn both_sides_count_a_connection_under_the_full_label_set() {
    let asked = Asked::new();
    let cluster = asked.start(&[]).await;
    asked.ask(&cluster).await;
    for (node, reporter) in [(0, "source"), (1, "destination")] {
        let metrics = cluster.proxy(node).metrics().await.unwrap();
        for (name, value) in TRAFFIC.into_iter().zip([1.0, 1.0, 5.0, 18.0]) {
            let sample = only(&metrics, name);
            assert_eq!(sample.value, value, "{name} by the {reporter}");
            let labels: BTreeMap<&str, &str> = sample
                .labels
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str()))
                .collect();
            assert_eq!(labels, expected_labels(reporter), "{name}");
        }
        assert_eq!(metrics.sum("istio_tcp_connections_failed_total", &[]), 0.0);
    }
}

#[tokio::test]
async fn the_access_log_has_every_field_from_the_view_of_its_side() {
    let asked = Asked::new();
    let cluster = asked.start(&[]).await;
    let [source, destination] = asked.ask(&cluster).await;
    let (hbone, target) = (
        asked.api.at(15008).to_string(),
        asked.api.at(8080).to_string(),
    );
    let common = [
        ("src.workload", "web"),
        ("src.namespace", "shop"),
        ("src.identity", "spiffe://cluster.local/ns/shop/sa/web"),
        ("src.cluster", "Kubernetes"),
        ("dst.addr", &hbone),
        ("dst.hbone_addr", &target),
        ("dst.service", "api.shop.svc.cluster.local"),
        ("dst.workload", "api"),
        ("dst.namespace", "shop"),
        ("dst.identity", "spiffe://cluster.local/ns/shop/sa/api"),
        ("dst.cluster", "Kubernetes"),
    ];
    for (line, direction, sent, received) in [
        (&source, "outbound", "5", "18"),
        (&destination, "inbound", "18", "5"),
    ] {
        assert_eq!(line.level, "info", "{}", line.raw);
        for (field, value) in common {
            assert_eq!(line.field(field), value, "{field} of {}", line.raw);
        }
        assert_eq!(
            (
                line.field("direction"),
                line.field("bytes_sent"),
                line.field("bytes_recv")
            ),
            (direction, sent, received)
        );
        assert!(
            line.field("src.addr")
                .starts_with(&format!("{}:", asked.web.ip4())),
            "{}",
            line.raw
        );
        assert!(line.field("duration").ends_with("ms"), "{}", line.raw);
        assert!(!line.fields.contains_key("error"), "{}", line.raw);
        assert!(
            line.raw.contains("src.workload=\"web\"")
                && line.raw.contains(&format!("dst.addr={hbone} ")),
            "{}",
            line.raw
        );
    }
    let opened = cluster
        .proxy(0)
        .log()
        .wait("opened", |line| line.is_access("connection opened"))
        .await;
    assert_eq!(
        (opened.level.as_str(), opened.field("bytes_sent")),
        ("debug", "")
    );
}

#[tokio::test]
async fn json_lines_carry_the_same_fields() {
    let asked = Asked::new();
    let cluster = asked.start(&[("LOG_FORMAT", "json")]).await;
    let [source, _] = asked.ask(&cluster).await;
    let value: serde_json::Value = serde_json::from_str(&source.raw).expect("one JSON object");
    assert_eq!(
        (value["bytes_sent"].as_u64(), value["bytes_recv"].as_u64()),
        (Some(5), Some(18))
    );
    assert_eq!(
        (value["level"].as_str(), value["scope"].as_str()),
        (Some("info"), Some("access"))
    );
    assert_eq!(value["direction"].as_str(), Some("outbound"));
    for name in ["message", "msg"] {
        assert_eq!(value[name].as_str(), Some("connection complete"));
    }
    assert_eq!(
        value["dst.addr"].as_str(),
        Some(asked.api.at(15008).to_string().as_str())
    );
    let all = cluster
        .proxy(0)
        .log()
        .since(0, |line| line.level.is_empty());
    assert!(
        all.is_empty(),
        "not JSON: {:?}",
        all.iter().map(|line| &line.raw).collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn plaintext_has_no_source_identity() {
    let asked = Asked::new();
    let outside = asked.world.node(0).pod(&PodSpec::plain("outside")).unwrap();
    let cluster = asked.start(&[]).await;
    let app = asked.api.serve(8080, Behaviour::Sink).unwrap();
    outside.ask(app.address, b"hello").await.unwrap();
    let line = cluster
        .proxy(1)
        .log()
        .wait("inbound", |line| line.is_access("connection complete"))
        .await;
    assert_eq!(
        (
            line.field("src.identity"),
            line.field("dst.identity"),
            line.field("dst.hbone_addr")
        ),
        ("", "", "")
    );
    assert_eq!(line.field("dst.addr"), app.address.to_string());
    let metrics = cluster.proxy(1).metrics().await.unwrap();
    let sample = only(&metrics, TRAFFIC[0]);
    let expected = [
        ("source_principal", "unknown"),
        ("source_workload", "unknown"),
        (
            "destination_principal",
            "spiffe://cluster.local/ns/shop/sa/api",
        ),
        ("connection_security_policy", "unknown"),
        ("destination_service_name", "api"),
    ];
    assert!(sample.has(&expected), "{sample:?}");
}

#[tokio::test]
async fn failures_move_opened_and_closed_under_different_flags() {
    let asked = Asked::new();
    let cluster = asked.start(&[]).await;
    let _ = asked.web.ask(asked.vip, b"hello").await;
    for (node, reporter) in [(0, "source"), (1, "destination")] {
        let proxy = cluster.proxy(node);
        let failed = [("reporter", reporter), ("response_flags", "CONNECT")];
        proxy
            .metric("istio_tcp_connections_failed_total", &failed, |count| {
                count == 1.0
            })
            .await;
        let metrics = proxy.metrics().await.unwrap();
        assert_eq!(metrics.sum(TRAFFIC[0], &[("response_flags", "-")]), 1.0);
        assert_eq!(metrics.sum(TRAFFIC[1], &failed), 1.0);
        let line = proxy
            .log()
            .wait("the failure", |line| {
                line.is_access("connection complete") && line.level == "error"
            })
            .await;
        let reason = if node == 0 {
            "http status: 503 Service Unavailable"
        } else {
            "connection failed: "
        };
        assert!(line.field("error").starts_with(reason), "{}", line.raw);
    }
}

#[tokio::test]
async fn metrics_are_well_formed_from_the_start() {
    let asked = Asked::new();
    let cluster = asked.start(&[("ISTIO_META_ISTIO_VERSION", "1.99.0")]).await;
    asked.ask(&cluster).await;
    let proxy = cluster.proxy(0);
    let metrics = proxy.metrics().await.unwrap();
    let build = only(&metrics, "istio_build");
    assert!(
        build.value == 1.0 && build.has(&[("component", "ztunnel"), ("tag", "1.99.0")]),
        "{build:?}"
    );
    let stable = [
        "istio_build",
        "istio_tcp_connections_opened",
        "istio_tcp_connections_closed",
        "istio_tcp_sent_bytes",
        "istio_tcp_received_bytes",
    ];
    for (name, help) in &metrics.help {
        assert!(help.ends_with('.'), "{name}: {help}");
        if name.starts_with("istio_tcp") || name.starts_with("istio_build") {
            assert_eq!(
                help.contains("(unstable)"),
                !stable.contains(&name.as_str()),
                "{name}: {help}"
            );
        }
    }
    for name in [
        "workload_manager_active_proxy_count",
        "workload_manager_proxies_started_total",
    ] {
        assert_eq!(only(&metrics, name).value, 1.0);
    }
    assert_eq!(
        only(&metrics, "workload_manager_pending_proxy_count").value,
        0.0
    );
    assert!(only(&metrics, "process_open_fds").value > 3.0);
    let owned = [
        "app",
        "pod",
        "namespace",
        "instance",
        "job",
        "node",
        "container",
    ];
    for sample in &metrics.samples {
        assert!(
            !sample
                .labels
                .keys()
                .any(|label| owned.contains(&label.as_str())),
            "{sample:?}"
        );
    }
}

#[tokio::test]
async fn the_stats_server_negotiates_the_content_type() {
    let asked = Asked::new();
    let cluster = asked.start(&[]).await;
    let proxy = cluster.proxy(0);
    let server = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), STATS_PORT);
    let netns = asked.world.node(0).proxy_netns();
    let accept = ["Accept: text/plain;q=0.1, application/openmetrics-text;version=1.0.0"];
    let answer = http::request(netns, server, "GET /stats/prometheus", &accept)
        .await
        .unwrap();
    assert_eq!(
        answer.header("content-type"),
        Some("application/openmetrics-text;charset=utf-8;version=1.0.0")
    );
    assert!(answer.body.ends_with("# EOF\n"));
    let plain = proxy.get(STATS_PORT, "/metrics").await.unwrap();
    assert_eq!(
        plain.header("content-type"),
        Some("text/plain; charset=utf-8")
    );
    assert_eq!(proxy.get(STATS_PORT, "/nothing").await.unwrap().status, 404);
}

#[tokio::test]
async fn open_sockets_are_a_gauge() {
    let asked = Asked::new();
    let cluster = asked.start(&[]).await;
    let _app = asked.api.serve(8080, Behaviour::Echo).unwrap();
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut stream = asked.web.connect(asked.vip).await.unwrap();
        testkit::traffic::ping(&mut stream, b"open").await.unwrap();
        held.push(stream);
    }
    let open = "istio_tcp_sockets_open";
    cluster
        .proxy(0)
        .metric(open, &[("reporter", "source")], |count| count == 3.0)
        .await;
    cluster
        .proxy(1)
        .metric(open, &[("reporter", "destination")], |count| count == 1.0)
        .await;
    let source = cluster.proxy(0).metrics().await.unwrap();
    for (name, expected) in [
        ("culvert_pool_connections", 1.0),
        ("culvert_pool_streams", 3.0),
        ("culvert_pool_waiting", 0.0),
        ("culvert_pods_unprotected", 0.0),
    ] {
        assert_eq!(only(&source, name).value, expected, "{name}");
    }
    drop(held);
    cluster
        .proxy(0)
        .metric(open, &[("reporter", "source")], |count| count == 0.0)
        .await;
    cluster
        .proxy(0)
        .metric("culvert_pool_streams", &[], |count| count == 0.0)
        .await;
}

#[tokio::test]
async fn each_step_of_a_flow_is_timed_on_either_side() {
    let asked = Asked::new();
    let cluster = asked.start(&[]).await;
    asked.ask(&cluster).await;
    for (node, reporter) in [(0, "source"), (1, "destination")] {
        let metrics = cluster.proxy(node).metrics().await.unwrap();
        for step in ["connect", "tls_handshake", "first_byte"] {
            let family = format!("culvert_{step}_duration_seconds");
            let one = |suffix: &str| {
                metrics.sum(&format!("{family}_{suffix}"), &[("reporter", reporter)])
            };
            assert_eq!(one("count"), 1.0, "{family} of the {reporter}");
            let took = one("sum");
            assert!(took > 0.0 && took < 10.0, "{family}: {took}");
        }
        assert!(only(&metrics, "process_resident_memory_bytes").value > 1e6);
        assert!(only(&metrics, "process_cpu_seconds_total").value > 0.0);
    }
}

#[tokio::test]
async fn readiness_names_what_is_pending() {
    let asked = Asked::new();
    let node = asked.world.node(0);
    asked
        .mesh
        .write(&ProxyOptions::mesh_file(&asked.world))
        .unwrap();
    let proxy = ProxyOptions::new(&asked.world, node).start(node).unwrap();
    let answer = async || proxy.get(READINESS_PORT, "/healthz/ready").await.ok();
    let waiting = async || {
        answer()
            .await
            .filter(|answer| answer.body == "not ready, pending: workload proxy manager\n")
    };
    let pending = wait::until(wait::SOON, "only the agent is missing", waiting).await;
    assert_eq!(
        (pending.status, pending.header("content-type")),
        (500, Some("text/plain"))
    );

    let mut agent = Agent::bind(&ProxyOptions::agent_socket(&asked.world, node)).unwrap();
    let session = wait::within(
        std::time::Duration::from_secs(16),
        "the proxy connects",
        agent.accept(),
    )
    .await
    .unwrap();
    session.snapshot(&[&asked.web]).await.unwrap();
    proxy.ready().await;
    let ready = answer().await.unwrap();
    assert_eq!((ready.status, ready.body.as_str()), (200, "ready\n"));
    let server = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), READINESS_PORT);
    let netns = node.proxy_netns();
    assert_eq!(
        http::request(netns, server, "POST /healthz/ready", &[])
            .await
            .unwrap()
            .status,
        405
    );
    assert_eq!(
        http::request(netns, server, "GET /else", &[])
            .await
            .unwrap()
            .status,
        404
    );
    drop(session);
    proxy.unready().await;
}
