//! A real Envoy as the waypoint of a service: client → proxy → Envoy → proxy → application.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use testkit::{
    Cluster, Envoy, Istiod, Line, PodSpec, ProxyOptions,
    istiod::{Layout, Signing},
    mesh::{Match, Policy},
    stage::Guarded,
    traffic::{self, Behaviour},
    wait,
    web::{Caller, Web},
    world::Node,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The stage without its waypoints.
async fn start(stage: &Guarded) -> Cluster<'_> {
    stage.start(&stage.mesh()).await.unwrap()
}

fn serve(stage: &Guarded) -> [Web; 2] {
    [&stage.one, &stage.two].map(|pod| Web::serve(pod, 8080).unwrap())
}

/// A connection and a request.
async fn call(stage: &Guarded) -> anyhow::Result<String> {
    let mut caller = Caller::connect(&stage.web, stage.http()).await?;
    caller.call(&Bytes::from_static(b"hello")).await
}

/// Echoes at the port that takes any bytes, through the waypoint.
async fn echoes(stage: &Guarded) -> bool {
    let answer = stage.web.ask(stage.bytes(), b"hello").await;
    answer.is_ok_and(|answer| answer == b"hello")
}

/// The access log's line of a flow that ended well, by proxy and direction.
async fn complete(cluster: &Cluster<'_>, node: usize, direction: &str) -> Line {
    let log = cluster.proxy(node).log();
    log.wait("a flow", |line| {
        line.is_access("connection complete")
            && line.field("direction") == direction
            && line.field("error").is_empty()
    })
    .await
}

#[tokio::test]
async fn requests_are_split_as_the_waypoint_says() {
    let stage = Guarded::new().unwrap();
    let _cluster = start(&stage).await;
    let _envoy = stage.waypoint_of(0).await.unwrap();
    let _apps = serve(&stage);

    let mut answered = BTreeMap::<String, usize>::new();
    for _ in 0..10 {
        let mut caller = Caller::connect(&stage.web, stage.http()).await.unwrap();
        for _ in 0..50 {
            let pod = caller.call(&Bytes::from_static(b"hello")).await.unwrap();
            *answered.entry(pod).or_default() += 1;
        }
    }
    // Of 500 requests, 50 are expected at the second pod; the deviation is 7.
    assert!((20..=80).contains(&answered["two"]), "{answered:?}");
}

#[tokio::test]
async fn each_side_knows_the_waypoint() {
    let stage = Guarded::new().unwrap();
    let cluster = start(&stage).await;
    let envoy = stage.waypoint_of(0).await.unwrap();
    let _apps = serve(&stage);
    for _ in 0..10 {
        call(&stage).await.unwrap();
    }

    let tunnels = envoy.tunnels(10).await;
    assert_eq!(tunnels.len(), 10);
    for tunnel in tunnels {
        assert_eq!(tunnel.field("authority"), stage.http().to_string());
        assert_eq!(tunnel.field("client"), stage.web.spiffe_id());
        let from: SocketAddr = tunnel.field("from").parse().unwrap();
        assert_eq!(from.ip(), stage.web.ip4(), "the client's own address");
        let baggage = tunnel.field("baggage");
        assert!(
            baggage.contains("k8s.deployment.name=web-deploy"),
            "{baggage}"
        );
    }

    let waypoint = &stage.waypoints[0];
    let out = complete(&cluster, 0, "outbound").await;
    assert_eq!(out.field("dst.workload"), waypoint.name());
    assert_eq!(out.field("dst.identity"), waypoint.spiffe_id());
    assert_eq!(out.field("dst.addr"), waypoint.at(15008).to_string());
    assert_eq!(out.field("dst.hbone_addr"), stage.http().to_string());
    let labels = [
        ("reporter", "source"),
        ("source_workload", "web-deploy"),
        ("destination_workload", "way-0-deploy"),
        ("destination_service", "app.shop.svc.cluster.local"),
    ];
    let opened = "istio_tcp_connections_opened_total";
    cluster
        .proxy(0)
        .metric(opened, &labels, |count| count >= 10.0)
        .await;

    // Envoy keeps its tunnels to the applications, so these flows have not ended.
    let log = cluster.proxy(1).log();
    let inbound = log
        .wait("the far side", |line| line.is_access("connection opened"))
        .await;
    assert_eq!(inbound.field("src.identity"), waypoint.spiffe_id());
    assert_eq!(inbound.field("src.workload"), waypoint.name());
    let from: SocketAddr = inbound.field("src.addr").parse().unwrap();
    assert_eq!(from.ip(), waypoint.ip4());
    let labels = [
        ("reporter", "destination"),
        ("source_workload", "way-0-deploy"),
        ("destination_workload", "one-deploy"),
        ("connection_security_policy", "mutual_tls"),
    ];
    cluster
        .proxy(1)
        .metric(opened, &labels, |count| count > 0.0)
        .await;
}

#[tokio::test]
async fn each_hop_judges_by_the_identity_that_it_sees() {
    let stage = Guarded::new().unwrap();
    let mut mesh = stage.mesh();
    let waypoint = &stage.waypoints[0];
    mesh.policy(Policy::allow("waypoint", vec![Match::pod(waypoint)]));
    let cluster = stage.start(&mesh).await.unwrap();
    let envoy = stage.waypoint().shut_out(&stage.stranger);
    let _envoy = envoy.start(&stage.world, waypoint).await.unwrap();
    let _apps = serve(&stage);

    call(&stage).await.unwrap();
    let mut stranger = Caller::connect(&stage.stranger, stage.http())
        .await
        .unwrap();
    let refused = stranger.call(&Bytes::from_static(b"hello")).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.starts_with("403"), "{refused}");

    // Around the waypoint.
    let direct = stage
        .web
        .ask(stage.one.at(8080), b"GET / HTTP/1.0\r\n\r\n")
        .await;
    assert!(direct.is_err() || direct.is_ok_and(|answer| answer.is_empty()));
    let denied = cluster.proxy(1).log();
    let denied = denied
        .wait("a denial", |line| {
            line.field("error").contains("policy rejection")
        })
        .await;
    assert_eq!(denied.field("src.identity"), stage.web.spiffe_id());
}

/// An authority that is itself certified, and whose answers hold the root twice, as istiod's with the files of a
/// `kubernetes.io/tls` secret: Envoy takes what the proxies present, as server on one side and as client on the other.
#[tokio::test]
async fn certificates_of_every_layout_are_taken() {
    for layout in [Layout::RootRepeated, Layout::Concatenated] {
        let stage = Guarded::new().unwrap();
        let home = stage.world.node(0).pod(&PodSpec::plain("ca")).unwrap();
        let ca = Istiod::options().start(&stage.world, &home).unwrap();
        let root = stage.world.authority().duplicate().unwrap();
        let signing = Signing::by(root).below("outer").unwrap();
        ca.sign_by(signing.below("inner").unwrap().layout(layout));
        stage
            .mesh()
            .write(&ProxyOptions::mesh_file(&stage.world))
            .unwrap();
        let options = |node: &Node| ProxyOptions::new(&stage.world, node).certified_by(&ca);
        let cluster = Cluster::run(&stage.world, options, &[&stage.web, &stage.one]).await;
        let _cluster = cluster.unwrap();
        let envoy = stage.waypoint_of(0).await.unwrap();
        let _echo = stage.one.serve(8081, Behaviour::Echo).unwrap();
        assert!(echoes(&stage).await, "{layout:?}");
        let tunnels = envoy.tunnels(1).await;
        assert_eq!(tunnels[0].field("client"), stage.web.spiffe_id());
    }
}

#[tokio::test]
async fn large_bodies_pass_both_ways_at_once() {
    let stage = Guarded::new().unwrap();
    let _cluster = start(&stage).await;
    let _envoy = stage.waypoint_of(0).await.unwrap();
    let _apps = serve(&stage);
    let _echo = stage.one.serve(8081, Behaviour::Echo).unwrap();
    let body = Bytes::from(traffic::pattern(100 << 20));

    let mut caller = Caller::connect(&stage.web, stage.http()).await.unwrap();
    caller.call(&body).await.unwrap();
    let mut stream = stage.web.connect(stage.bytes()).await.unwrap();
    let exchange = traffic::exchange(&mut stream, &body);
    let answer = wait::within(MINUTE, "100 MB there and back", exchange).await;
    assert!(answer.unwrap() == body, "other bytes than were sent");
}

#[tokio::test]
async fn each_direction_ends_on_its_own() {
    let stage = Guarded::new().unwrap();
    let _cluster = start(&stage).await;
    let _envoy = stage.waypoint_of(0).await.unwrap();
    // It answers only when it has read to the end.
    let sink = stage.one.serve(8081, Behaviour::Sink).unwrap();
    let answer = stage.web.ask(stage.bytes(), b"a request").await.unwrap();
    assert_eq!(answer, traffic::receipt(b"a request"));
    sink.stop().await;

    // An application that ends first.
    let source = stage.one.serve(8081, Behaviour::Source(5000)).unwrap();
    let answer = stage.web.ask(stage.bytes(), b"").await.unwrap();
    assert!(answer == traffic::pattern(5000));
    source.stop().await;

    // One that breaks off ends its own stream, and the tunnels stay.
    let broken = stage.one.serve(8081, Behaviour::Reset).unwrap();
    let mut stream = stage.web.connect(stage.bytes()).await.unwrap();
    assert!(traffic::ping(&mut stream, b"x").await.is_err());
    broken.stop().await;
    let _echo = stage.one.serve(8081, Behaviour::Echo).unwrap();
    assert!(echoes(&stage).await);
}

#[tokio::test]
async fn more_flows_than_a_tunnel_may_have_streams() {
    let stage = Guarded::new().unwrap();
    let _cluster = start(&stage).await;
    let envoy = stage.waypoint_of(0).await.unwrap();
    let _echo = stage.one.serve(8081, Behaviour::Echo).unwrap();
    let mut opening = JoinSet::new();
    for _ in 0..FLOWS {
        let (web, to) = (Arc::clone(&stage.web), stage.bytes());
        opening.spawn(async move {
            let mut stream = web.connect(to).await.unwrap();
            traffic::ping(&mut stream, b"hello").await.unwrap();
            stream
        });
    }
    let mut streams = wait::within(MINUTE, "all flows are open", opening.join_all()).await;
    for stream in &mut streams {
        traffic::ping(stream, b"still there").await.unwrap();
    }
    let mut per_connection = BTreeMap::<String, usize>::new();
    for tunnel in envoy.tunnels(FLOWS).await {
        *per_connection
            .entry(tunnel.field("connection").to_owned())
            .or_default() += 1;
    }
    let streams: usize = per_connection.values().sum();
    assert_eq!(streams, FLOWS, "{per_connection:?}");
    assert!(
        per_connection.values().all(|streams| *streams <= 100),
        "{per_connection:?}"
    );
}

#[tokio::test]
#[expect(clippy::print_stderr, reason = "figures for whoever asks")]
async fn waypoints_that_restart_one_after_the_other_lose_no_request() {
    let stage = Arc::new(Guarded::new().unwrap());
    let cluster = start(&stage).await;
    let mut envoys = [
        stage.waypoint_of(0).await.unwrap(),
        stage.waypoint_of(1).await.unwrap(),
    ];
    let _apps = serve(&stage);
    let (stop, mut load) = (CancellationToken::new(), JoinSet::new());
    for _ in 0..4 {
        let (stage, stop) = (Arc::clone(&stage), stop.clone());
        load.spawn(async move {
            let mut calls = 0;
            while !stop.is_cancelled() {
                let answer = call(&stage).await;
                answer.unwrap_or_else(|error| panic!("request {calls}: {error:#}"));
                calls += 1;
            }
            calls
        });
    }
    for (node, envoy) in envoys.iter_mut().enumerate() {
        envoy.drain().await.unwrap();
        *envoy = restart(&stage, node, envoy).await;
    }
    stop.cancel();
    let calls: Vec<usize> = load.join_all().await;
    let retries = cluster.proxy(0).metrics().await.unwrap();
    let retries = retries.sum("istio_tcp_connection_retries_total", &[]);
    eprintln!("{calls:?} requests, {retries} connections tried elsewhere");
    assert!(calls.iter().all(|calls| *calls > 20), "{calls:?}");
}

/// Kills it, and starts it again once another waypoint has served for a while.
async fn restart(stage: &Guarded, node: usize, envoy: &mut Envoy) -> Envoy {
    envoy.kill().await.unwrap();
    for _ in 0..20 {
        call(stage).await.unwrap();
    }
    stage.waypoint_of(node).await.unwrap()
}

#[tokio::test]
async fn a_waypoint_that_dies_costs_no_later_flow() {
    let stage = Guarded::new().unwrap();
    let _cluster = start(&stage).await;
    let mut envoys = [
        stage.waypoint_of(0).await.unwrap(),
        stage.waypoint_of(1).await.unwrap(),
    ];
    let _apps = serve(&stage);
    // Until both have tunnels of the client.
    for envoy in &envoys {
        wait::until(wait::SOON, "the waypoint is used", async || {
            call(&stage).await.unwrap();
            let tunnels = envoy.stat("http.outer.downstream_cx_active").await.unwrap();
            (tunnels > 0).then_some(())
        })
        .await;
    }
    envoys[0].kill().await.unwrap();
    for _ in 0..50 {
        call(&stage).await.unwrap();
    }
}

const FLOWS: usize = 300;
const MINUTE: Duration = Duration::from_secs(60);
