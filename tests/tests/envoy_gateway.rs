//! A real Envoy as east-west gateway: it ends the outer tunnel and passes the inner one to the proxy of a pod.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use testkit::{
    Cluster, Envoy, Mesh, Pod, PodSpec, World,
    envoy::Gateway,
    mesh::{Match, Policy},
    raw::{Hello, RawClient},
    stage::vip,
    traffic::{self, Behaviour, Server},
};

/// `caller` is a foreign client on the first node; `one` and `two` on the second are behind `gate`.
struct Stage {
    world: World,
    caller: Arc<Pod>,
    gate: Arc<Pod>,
    one: Arc<Pod>,
    two: Arc<Pod>,
}

/// How the service is asked for.
const AUTHORITY: &str = "app.shop.svc.cluster.local:80";

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let pod = |node: usize, spec: PodSpec| world.node(node).pod(&spec).unwrap();
        Self {
            caller: pod(0, PodSpec::plain("caller")),
            gate: pod(1, PodSpec::plain("gate")),
            one: pod(1, PodSpec::captured("one")),
            two: pod(1, PodSpec::captured("two")),
            world,
        }
    }

    fn mesh(&self) -> Mesh {
        let mut mesh = Mesh::of(&[&self.gate, &self.one, &self.two]);
        mesh.service("app", vip(1), &[(80, 8080)], &[&self.one, &self.two]);
        mesh
    }

    async fn start(&self, mesh: &Mesh) -> (Cluster<'_>, Envoy, [Server; 2]) {
        let pods = [&self.one, &self.two];
        let cluster = Cluster::start(&self.world, mesh, &pods).await.unwrap();
        let gateway = Gateway::default().service(AUTHORITY, &[&self.one, &self.two]);
        let gateway = gateway.start(&self.world, &self.gate).await.unwrap();
        let apps = [&self.one, &self.two].map(|pod| pod.serve(8080, Behaviour::Echo).unwrap());
        (cluster, gateway, apps)
    }

    fn hello(&self, pod: &Pod) -> Hello {
        Hello::new(&self.world.authority().issue(&pod.spiffe_id()).unwrap())
    }

    /// An outer tunnel's connection.
    async fn outer(&self) -> RawClient {
        let hello = self.hello(&self.caller);
        let gate = self.gate.at(15008);
        RawClient::connect(self.caller.netns(), gate, &hello)
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn the_inner_tunnel_reaches_a_pod_as_the_client_it_comes_from() {
    let stage = Stage::new();
    let (cluster, gateway, _apps) = stage.start(&stage.mesh()).await;
    let outer = stage.outer().await;
    assert_eq!(outer.server_id, Some(stage.gate.spiffe_id()));

    let mut served = BTreeSet::new();
    let headers = [
        ("x-forwarded-network", "abroad"),
        (
            "baggage",
            "k8s.cluster.name=c2,k8s.namespace.name=away,k8s.deployment.name=caller",
        ),
    ];
    for _ in 0..20 {
        let hello = stage.hello(&stage.caller);
        let inner = outer.nested(AUTHORITY, &hello).await.unwrap();
        let mut tunnel = inner.tunnel_with(AUTHORITY, &headers).await.unwrap();
        assert_eq!(tunnel.status.as_u16(), 200);
        tunnel.ping(b"through two tunnels").await.unwrap();
        served.insert(inner.server_id.clone().unwrap());
    }
    let pods = BTreeSet::from([stage.one.spiffe_id(), stage.two.spiffe_id()]);
    assert_eq!(served, pods, "the gateway chooses");

    for tunnel in gateway.tunnels(20).await {
        assert_eq!(tunnel.field("authority"), AUTHORITY);
        assert_eq!(tunnel.field("client"), stage.caller.spiffe_id());
    }
    let log = cluster.proxy(1).log();
    let line = log
        .wait("a flow", |line| line.is_access("connection complete"))
        .await;
    assert_eq!(line.field("direction"), "inbound");
    assert_eq!(line.field("src.identity"), stage.caller.spiffe_id());
    assert_eq!(line.field("dst.service"), "app.shop.svc.cluster.local");
    assert_eq!(line.field("dst.hbone_addr"), AUTHORITY);
    let from: SocketAddr = line.field("src.addr").parse().unwrap();
    assert_eq!(from.ip(), stage.gate.ip4());
    // The address is the gateway's: who the client is, its baggage says.
    assert_eq!(line.field("src.workload"), "caller");
    let labels = [
        ("reporter", "destination"),
        ("source_workload", "caller"),
        ("source_workload_namespace", "away"),
        ("source_cluster", "c2"),
    ];
    let opened = "istio_tcp_connections_opened_total";
    cluster
        .proxy(1)
        .metric(opened, &labels, |count| count == 20.0)
        .await;
}

#[tokio::test]
async fn policy_judges_the_client_and_not_the_gateway() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.policy(Policy::allow("caller", vec![Match::pod(&stage.caller)]));
    let (_cluster, _gateway, _apps) = stage.start(&mesh).await;
    let outer = stage.outer().await;
    for (client, status) in [(&stage.caller, 200), (&stage.gate, 401)] {
        let inner = outer.nested(AUTHORITY, &stage.hello(client)).await.unwrap();
        assert_eq!(inner.status(AUTHORITY).await.unwrap(), status);
    }
}

#[tokio::test]
async fn what_the_gateway_has_no_service_for_ends_there() {
    let stage = Stage::new();
    let (_cluster, _gateway, apps) = stage.start(&stage.mesh()).await;
    let outer = stage.outer().await;
    let hello = stage.hello(&stage.caller);
    let unknown = "other.shop.svc.cluster.local:80";
    assert!(outer.nested(unknown, &hello).await.is_err());
    // A service that the gateway knows, but not the pod that it leads to.
    let inner = outer.nested(AUTHORITY, &hello).await.unwrap();
    assert_eq!(inner.status(unknown).await.unwrap(), 503);
    assert!(apps.iter().all(|app| app.peers().is_empty()));
}

#[tokio::test]
async fn large_transfers_and_ends_pass_both_tunnels() {
    let stage = Stage::new();
    let (_cluster, _gateway, _apps) = stage.start(&stage.mesh()).await;
    let outer = stage.outer().await;
    let inner = outer
        .nested(AUTHORITY, &stage.hello(&stage.caller))
        .await
        .unwrap();
    let mut tunnel = inner.tunnel(AUTHORITY).await.unwrap();
    let bytes = traffic::pattern(20 << 20);
    tunnel.ping(&bytes).await.unwrap();
    tunnel.finish().unwrap();
    assert!(tunnel.read_to_end().await.unwrap().is_empty());
}
