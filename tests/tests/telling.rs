//! What consumers of metrics, access log and readiness rely on, case by case.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::net::SocketAddr;

use testkit::{
    Authority, Line, Metrics, PodSpec, ProxyOptions, World,
    proxy::{READINESS_PORT, STATS_PORT},
    raw::Hello,
    stage::{ForeignClient, Pair},
    traffic::{self, Behaviour},
    wait,
};

const OPENED: &str = "istio_tcp_connections_opened_total";
const CLOSED: &str = "istio_tcp_connections_closed_total";
const RECEIVED: &str = "istio_tcp_received_bytes_total";
const SENT: &str = "istio_tcp_sent_bytes_total";

fn complete(line: &Line) -> bool {
    line.is_access("connection complete")
}

#[tokio::test]
async fn a_fresh_proxy_names_all_that_it_waits_for_in_order() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let options = ProxyOptions::new(&world, node)
        .without("LOCAL_XDS_PATH")
        .env("XDS_ADDRESS", "http://127.0.0.1:1");
    let proxy = options.start(node).unwrap();
    let waits = wait::until(wait::SOON, "an answer", async || {
        let answer = proxy.get(READINESS_PORT, "/healthz/ready").await.ok()?;
        let body = "not ready, pending: state manager, workload proxy manager\n";
        (answer.body == body).then_some(answer.status)
    });
    assert_eq!(waits.await, 500);
}

#[tokio::test]
async fn nothing_is_told_of_traffic_before_there_is_any() {
    let stage = Pair::new().unwrap();
    let cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    let answer = cluster.proxy(0).get(STATS_PORT, "/metrics").await.unwrap();
    assert!(!answer.body.contains("istio_tcp_"), "{}", answer.body);
    for family in [
        "istio_build",
        "process_open_fds",
        "workload_manager_active_proxy_count",
    ] {
        assert!(answer.body.contains(&format!("\n# TYPE {family} gauge\n")));
    }
}

#[tokio::test]
async fn bytes_are_told_while_they_move() {
    let stage = Pair::new().unwrap();
    let cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut stream = stage.web.connect(Pair::SERVICE).await.unwrap();
    for sent in [1000.0, 2000.0] {
        traffic::ping(&mut stream, &[7; 1000]).await.unwrap();
        for node in 0..2 {
            let proxy = cluster.proxy(node);
            proxy.metric(RECEIVED, &[], |bytes| bytes == sent).await;
            proxy.metric(SENT, &[], |bytes| bytes == sent).await;
            let metrics = proxy.metrics().await.unwrap();
            assert_eq!(metrics.series(CLOSED, &[]).count(), 0);
        }
    }
}

#[tokio::test]
async fn plaintext_is_told_without_identities_and_strangers_without_names() {
    let stage = Pair::new().unwrap();
    let pod = |name| stage.world.node(1).pod(&PodSpec::plain(name)).unwrap();
    let (plain, stranger) = (pod("plain"), pod("stranger"));
    let mut mesh = stage.mesh();
    mesh.pod(&plain);
    let cluster = stage.start(&mesh, &[]).await.unwrap();
    let proxy = cluster.proxy(0);
    for (pod, workload, principal) in [
        (&plain, "plain-deploy", plain.spiffe_id()),
        (&stranger, "unknown", "unknown".to_owned()),
    ] {
        let app = pod.serve(7000, Behaviour::Echo).unwrap();
        let mark = proxy.log().mark();
        assert_eq!(stage.web.ask(app.address, b"x").await.unwrap(), b"x");
        let expected = [
            ("reporter", "source"),
            ("connection_security_policy", "unknown"),
            ("source_workload", "web-deploy"),
            ("source_principal", "unknown"),
            ("destination_workload", workload),
            ("destination_principal", &*principal),
            ("destination_service", "unknown"),
        ];
        proxy.metric(CLOSED, &expected, |count| count == 1.0).await;
        let line = proxy.log().wait_from(mark, "its line", complete).await;
        assert_eq!(line.field("src.identity"), "", "{}", line.raw);
        assert_eq!(line.field("dst.identity"), "", "{}", line.raw);
        assert_eq!(line.field("dst.addr"), app.address.to_string());
    }
    let metrics = proxy.metrics().await.unwrap();
    let unknown = [("destination_workload", "unknown")];
    let stranger = metrics.series(OPENED, &unknown).next().unwrap();
    let mut destination = stranger.labels.iter();
    assert!(
        destination.all(|(name, value)| !name.starts_with("destination_") || value == "unknown")
    );
}

#[tokio::test]
async fn an_access_line_has_five_columns() {
    let stage = Pair::new().unwrap();
    let cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    stage.web.ask(Pair::SERVICE, b"hello").await.unwrap();
    let line = cluster.proxy(0).log().wait("its line", complete).await;
    let columns: Vec<&str> = line.raw.split('\t').collect();
    let [time, "info", "access", "connection complete", fields] = *columns else {
        panic!("{columns:?}")
    };
    // Twenty-six digits and signs, and a Z: to the microsecond.
    assert!(time.len() == 27 && time.ends_with('Z'), "{time}");
    assert!(fields.starts_with("src.addr=10."), "{fields}");
}

#[tokio::test]
async fn a_foreign_certificate_is_one_line_and_no_flow() {
    let foreign = ForeignClient::new().unwrap();
    let cluster = foreign.cluster().await.unwrap();
    let other = Authority::new("other").unwrap();
    let hello = Hello::new(&other.issue(&foreign.peer.spiffe_id()).unwrap());
    assert!(foreign.try_client(&hello).await.is_err());
    let failed = |line: &Line| line.is_access("connection failed");
    let proxy = cluster.proxy(0);
    let line = proxy.log().wait("its line", failed).await;
    let fields: Vec<&str> = line.fields.keys().map(String::as_str).collect();
    assert_eq!(fields, ["direction", "dst.addr", "error", "src.addr"]);
    assert_eq!((&*line.level, line.field("direction")), ("warn", "inbound"));
    let refused = [("reporter", "destination")];
    let told = "culvert_flows_refused_total";
    proxy.metric(told, &refused, |count| count == 1.0).await;
    assert_eq!(proxy.log().since(0, failed).len(), 1);
    let metrics = proxy.metrics().await.unwrap();
    for family in [OPENED, CLOSED, "istio_tcp_connections_failed_total"] {
        assert_eq!(metrics.series(family, &[]).count(), 0, "{family}");
    }
}

#[tokio::test]
async fn a_peer_behind_a_black_hole_is_told_as_a_network_policy() {
    let stage = Pair::new().unwrap();
    let cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    let rules = "table inet hole { chain in { type filter hook prerouting priority -400; tcp dport 15008 drop; }; }";
    let netns = stage.api.netns();
    netns.command("nft", &["-f", "-"], rules).unwrap();
    let began = tokio::time::Instant::now();
    assert!(stage.web.ask(Pair::SERVICE, b"hello").await.is_err());
    let waited = began.elapsed().as_secs();
    assert!((9..15).contains(&waited), "{waited} s");
    let line = cluster.proxy(0).log().wait("its line", complete).await;
    let phrase = "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: ";
    assert!(line.field("error").starts_with(phrase), "{}", line.raw);
    assert_eq!(line.level, "error");
    let flag = [("response_flags", "NETWORK_POLICY")];
    let failed = "istio_tcp_connections_failed_total";
    let proxy = cluster.proxy(0);
    proxy.metric(failed, &flag, |count| count == 1.0).await;
}

#[tokio::test]
async fn what_has_ended_is_forgotten_and_what_goes_on_stays_as_it_is() {
    let stage = Pair::new().unwrap();
    let env = [("METRICS_IDLE", "2s")];
    let cluster = stage.start(&stage.mesh(), &env).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let _other = stage.api.serve(8081, Behaviour::Echo).unwrap();
    let direct = SocketAddr::new(stage.api.ip4(), 8081);
    let mut lasting = stage.web.connect(Pair::SERVICE).await.unwrap();
    traffic::ping(&mut lasting, b"hello").await.unwrap();
    stage.web.ask(direct, b"once").await.unwrap();
    let proxy = cluster.proxy(0);
    let of = |metrics: &Metrics, service| {
        let labels = [("destination_service", service)];
        let series = metrics.series(RECEIVED, &labels);
        series.map(|one| one.value).collect::<Vec<f64>>()
    };
    let both = proxy.metrics().await.unwrap();
    let (service, none) = ("api.shop.svc.cluster.local", "unknown");
    assert_eq!(
        (of(&both, service), of(&both, none)),
        (vec![5.0], vec![4.0])
    );
    wait::until(wait::SOON, "one is forgotten", async || {
        let metrics = proxy.metrics().await.ok()?;
        assert_eq!(of(&metrics, service), [5.0]);
        of(&metrics, none).is_empty().then_some(())
    })
    .await;
    traffic::ping(&mut lasting, b"again").await.unwrap();
    proxy.metric(RECEIVED, &[], |bytes| bytes == 10.0).await;
}

#[tokio::test]
async fn what_peers_say_of_themselves_is_escaped() {
    let foreign = ForeignClient::new().unwrap();
    let talk = foreign.talk(Behaviour::Echo).await;
    let headers = [
        ("x-forwarded-network", "elsewhere"),
        ("baggage", "service.name=a\"b\\c,k8s.namespace.name=shop"),
    ];
    let tunnel = talk.client.tunnel_with(&talk.target, &headers);
    tunnel.await.unwrap().ping(b"hello").await.unwrap();
    let proxy = talk.cluster.proxy(0);
    let labels = [("source_canonical_service", "a\"b\\c")];
    proxy.metric(RECEIVED, &labels, |bytes| bytes == 5.0).await;
}
