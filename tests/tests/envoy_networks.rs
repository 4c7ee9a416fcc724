//! Two networks joined by a real Envoy: client → proxy → Envoy as gateway → proxy → application.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use testkit::{
    Cluster, Envoy, Mesh, Node, Pod, PodSpec, ProxyOptions, World,
    envoy::Gateway,
    mesh::{Match, Policy, Ports, Service, Workload},
    traffic::{self, Behaviour, Server},
    wait,
};
use tokio::task::JoinSet;

/// `web` is on network `east`, which is node 0; `one` and `two` are on `west`, behind `gate`.
struct Stage {
    world: World,
    web: Arc<Pod>,
    gate: Arc<Pod>,
    one: Arc<Pod>,
    two: Arc<Pod>,
}

const HOST: &str = "app.shop.svc.cluster.local";
const AUTHORITY: &str = "app.shop.svc.cluster.local:80";
const VIP: [u8; 4] = [10, 96, 0, 1];

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let pod = |node: usize, spec: PodSpec| world.node(node).pod(&spec).unwrap();
        Self {
            web: pod(0, PodSpec::captured("web")),
            gate: pod(1, PodSpec::plain("gate")),
            one: pod(1, PodSpec::captured("one")),
            two: pod(1, PodSpec::captured("two")),
            world,
        }
    }

    /// Of `west`, `east` is told of the gateway, and of one workload that stands for all behind it.
    fn east(&self) -> Mesh {
        let mut mesh = Mesh::of(&[&self.web]);
        mesh.workload(&self.web).set("network", "east");
        let gate = mesh.pod(&self.gate);
        "HBONE".clone_into(&mut gate.protocol);
        gate.set("network", "west");
        let names = format!("[{}, {}]", self.one.spiffe_id(), self.two.spiffe_id());
        service(&mut mesh, "east", &[]).set("subjectAltNames", &names);
        let mut behind = Workload {
            uid: "west/SplitHorizonWorkload/east-west/app".to_owned(),
            name: "west-app".to_owned(),
            namespace: "shop".to_owned(),
            protocol: "HBONE".to_owned(),
            status: "Healthy".to_owned(),
            capacity: 1,
            services: [(format!("shop/{HOST}"), Ports::from([(80, 8080)]))].into(),
            ..Workload::default()
        };
        behind.set("network", "west");
        let gateway = format!(
            "{{destination: 'west/{}', hboneMtlsPort: 15008}}",
            self.gate.ip4()
        );
        behind.set("networkGateway", &gateway);
        mesh.workloads.push(behind);
        mesh
    }

    fn west(&self) -> Mesh {
        let pods = [&*self.one, &self.two];
        let mut mesh = Mesh::of(&pods);
        for pod in pods {
            mesh.workload(pod).set("network", "west");
        }
        service(&mut mesh, "west", &pods);
        mesh
    }

    async fn start(&self, west: &Mesh) -> Cluster<'_> {
        self.east().write(&self.file("east")).unwrap();
        west.write(&self.file("west")).unwrap();
        let options = |node: &Node| {
            let east = node.name() == self.world.node(0).name();
            let network = if east { "east" } else { "west" };
            let file = self.file(network).display().to_string();
            let options = ProxyOptions::new(&self.world, node);
            options.env("NETWORK", network).env("LOCAL_XDS_PATH", &file)
        };
        let pods = [&self.web, &self.one, &self.two];
        Cluster::run(&self.world, options, &pods).await.unwrap()
    }

    async fn gateway(&self) -> Envoy {
        let gateway = Gateway::default().service(AUTHORITY, &[&self.one, &self.two]);
        gateway.start(&self.world, &self.gate).await.unwrap()
    }

    fn serve(&self) -> [Server; 2] {
        [&self.one, &self.two].map(|pod| pod.serve(8080, Behaviour::Echo).unwrap())
    }

    fn file(&self, network: &str) -> PathBuf {
        self.world.file(&format!("{network}.yaml"))
    }

    async fn echoes(&self) -> bool {
        let answer = self.web.ask(app(), b"hello").await;
        answer.is_ok_and(|answer| answer == b"hello")
    }
}

fn service<'m>(mesh: &'m mut Mesh, network: &str, pods: &[&Pod]) -> &'m mut Service {
    let service = mesh.service("app", VIP.into(), &[(80, 8080)], pods);
    service.vips = vec![format!("{network}/{}", IpAddr::from(VIP))];
    service
}

fn app() -> SocketAddr {
    SocketAddr::from((VIP, 80))
}

#[tokio::test]
async fn flows_cross_as_the_client_that_they_come_from() {
    let stage = Stage::new();
    let cluster = stage.start(&stage.west()).await;
    let gateway = stage.gateway().await;
    let apps = stage.serve();
    for _ in 0..20 {
        assert!(stage.echoes().await);
    }
    for app in &apps {
        assert!(!app.peers().is_empty(), "the gateway chooses for each flow");
    }

    let tunnels = gateway.tunnels(20).await;
    let connections = tunnels.iter().map(|tunnel| tunnel.field("connection"));
    assert_eq!(connections.collect::<BTreeSet<_>>().len(), 1);
    for tunnel in &tunnels {
        assert_eq!(tunnel.field("authority"), AUTHORITY);
        assert_eq!(tunnel.field("client"), stage.web.spiffe_id());
    }

    let log = cluster.proxy(1).log();
    let line = log
        .wait("a flow", |line| line.is_access("connection complete"))
        .await;
    assert_eq!(line.field("src.identity"), stage.web.spiffe_id());
    assert_eq!(line.field("dst.service"), HOST);
    let from: SocketAddr = line.field("src.addr").parse().unwrap();
    assert_eq!(from.ip(), stage.gate.ip4());
    let labels = [
        ("reporter", "destination"),
        ("source_workload", "web-deploy"),
        ("connection_security_policy", "mutual_tls"),
    ];
    let opened = "istio_tcp_connections_opened_total";
    cluster
        .proxy(1)
        .metric(opened, &labels, |count| count == 20.0)
        .await;
    // Which pod it was, the client's side learns from the answer.
    let labels = [
        ("reporter", "source"),
        ("destination_workload", "one-deploy"),
    ];
    cluster
        .proxy(0)
        .metric(opened, &labels, |count| count > 0.0)
        .await;
}

#[tokio::test]
async fn large_transfers_and_ends_cross() {
    let stage = Stage::new();
    let _cluster = stage.start(&stage.west()).await;
    let _gateway = stage.gateway().await;
    let _apps = stage.serve();
    let bytes = traffic::pattern(100 << 20);
    let mut stream = stage.web.connect(app()).await.unwrap();
    let exchange = traffic::exchange(&mut stream, &bytes);
    let answer = wait::within(Duration::from_secs(60), "100 MB there and back", exchange).await;
    assert!(answer.unwrap() == bytes, "other bytes than were sent");
}

#[tokio::test]
async fn many_flows_share_tunnels_to_the_gateway() {
    let stage = Stage::new();
    let _cluster = stage.start(&stage.west()).await;
    let gateway = stage.gateway().await;
    let _apps = stage.serve();
    let mut opening = JoinSet::new();
    for _ in 0..FLOWS {
        let web = Arc::clone(&stage.web);
        opening.spawn(async move {
            let mut stream = web.connect(app()).await.unwrap();
            traffic::ping(&mut stream, b"hello").await.unwrap();
            stream
        });
    }
    for mut stream in opening.join_all().await {
        traffic::ping(&mut stream, b"still there").await.unwrap();
    }
    let tunnels = gateway.tunnels(FLOWS).await;
    let connections = tunnels.iter().map(|tunnel| tunnel.field("connection"));
    let connections = connections.collect::<BTreeSet<_>>().len();
    assert_eq!(connections, 2, "a hundred streams each");
}

#[tokio::test]
async fn policy_at_the_far_end_judges_the_client() {
    let stage = Stage::new();
    let mut west = stage.west();
    west.policy(Policy::deny("web", vec![Match::pod(&stage.web)]));
    let cluster = stage.start(&west).await;
    let _gateway = stage.gateway().await;
    let apps = stage.serve();
    stage.web.turned_away(app()).await.unwrap();
    let near = cluster.proxy(0).log();
    near.wait("a refusal", |line| line.field("error").contains("401"))
        .await;
    assert!(apps.iter().all(|app| app.peers().is_empty()));

    // Once the policy is gone, the same tunnels serve.
    stage.west().write(&stage.file("west")).unwrap();
    wait::until(wait::SOON, "the policy is gone", async || {
        stage.echoes().await.then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_comes_back_is_used_again() {
    let stage = Stage::new();
    let _cluster = stage.start(&stage.west()).await;
    let mut gateway = stage.gateway().await;
    let _apps = stage.serve();
    assert!(stage.echoes().await);
    gateway.kill().await.unwrap();
    assert!(!stage.echoes().await, "there is no other way");
    let _gateway = stage.gateway().await;
    assert!(stage.echoes().await);
}

const FLOWS: usize = 150;
