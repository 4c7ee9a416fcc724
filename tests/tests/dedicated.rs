//! A proxy for one workload in its own namespace, as on a virtual machine, and HBONE to the proxy's own pod.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::sync::Arc;

use nix::sys::signal::Signal;
use testkit::{
    Mesh, Metrics, NodeRun, Pod, PodSpec, ProxyOptions, World, http,
    mesh::{Match, Policy, Workload},
    proxy::{Proxy, STATS_PORT},
    traffic::{self, Behaviour, End},
    wait,
};

/// `vm` has a proxy to itself, and `api`, on the other node, one that serves its node.
struct Stage {
    world: World,
    vm: Arc<Pod>,
    api: Arc<Pod>,
    outside: Arc<Pod>,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let pod = |node: usize, spec| world.node(node).pod(&spec).unwrap();
        Self {
            vm: pod(0, PodSpec::captured("vm")),
            api: pod(1, PodSpec::captured("api")),
            outside: pod(1, PodSpec::plain("outside")),
            world,
        }
    }

    fn mesh(&self) -> Mesh {
        Mesh::of(&[&self.vm, &self.api, &self.outside])
    }

    fn write(&self, mesh: &Mesh) {
        mesh.write(&ProxyOptions::mesh_file(&self.world)).unwrap();
    }

    /// The machine's proxy. Its packets are marked, as the rules of the machine expect.
    async fn dedicated(&self) -> Proxy<'_> {
        let proxy = ProxyOptions::new(&self.world, self.world.node(0))
            .env("PROXY_MODE", "dedicated")
            .env("PROXY_WORKLOAD_INFO", "shop/vm/vm")
            .env("PACKET_MARK", "1337")
            .env("CONNECTION_TERMINATION_DEADLINE", "2s")
            .start_in(self.vm.netns(), "dedicated")
            .unwrap();
        proxy.ready().await;
        proxy
    }

    async fn shared(&self) -> NodeRun<'_> {
        let node = self.world.node(1);
        let options = ProxyOptions::new(&self.world, node);
        let pods: [&Pod; 1] = [&self.api];
        NodeRun::start(&self.world, node, &options, &pods)
            .await
            .unwrap()
    }
}

async fn echoes(from: &Pod, to: &Pod) -> bool {
    let answer = from.ask(to.at(8080), b"hello").await;
    answer.is_ok_and(|answer| answer == b"hello")
}

#[tokio::test]
async fn one_workload_is_carried_both_ways() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    for (name, pod, peer) in [
        ("api", &stage.api, &stage.vm),
        ("vm", &stage.vm, &stage.api),
    ] {
        mesh.policy(Policy::allow(name, vec![Match::pod(peer)]).selected());
        let policies = format!("[shop/{name}]");
        mesh.workload(pod).set("authorizationPolicies", &policies);
    }
    stage.write(&mesh);
    let (vm, node) = (stage.dedicated().await, stage.shared().await);
    let _servers = [&stage.vm, &stage.api].map(|pod| pod.serve(8080, Behaviour::Echo).unwrap());
    // Only identities get through, so each way is a tunnel.
    assert!(echoes(&stage.vm, &stage.api).await);
    assert!(echoes(&stage.api, &stage.vm).await);
    assert!(
        !echoes(&stage.outside, &stage.vm).await,
        "plaintext is refused"
    );
    for proxy in [&vm, &node.proxy] {
        for reporter in ["source", "destination"] {
            let labels = [
                ("reporter", reporter),
                ("connection_security_policy", "mutual_tls"),
            ];
            let some = |count| count >= 1.0;
            let family = "istio_tcp_connections_opened_total";
            proxy.metric(family, &labels, some).await;
        }
    }
}

#[tokio::test]
async fn plaintext_and_policies_reach_a_single_workload_too() {
    let stage = Stage::new();
    stage.write(&stage.mesh());
    let mut vm = stage.dedicated().await;
    let app = stage.vm.serve(8080, Behaviour::Whoami).unwrap();
    let seen = stage.outside.seen_as(app.address).await.unwrap();
    assert_eq!(
        seen.ip(),
        stage.outside.ip4(),
        "the client's address is kept"
    );
    let other = stage.outside.serve(9090, Behaviour::Echo).unwrap();
    let mut out = stage.vm.connect(other.address).await.unwrap();
    traffic::ping(&mut out, b"to who is in no mesh")
        .await
        .unwrap();

    let mut mesh = stage.mesh();
    mesh.policy(Policy::deny("none", vec![Match::port(8080)]));
    stage.write(&mesh);
    let refused = async || {
        let end = stage.outside.turned_away(app.address).await;
        end.is_ok_and(|end| end == End::Reset).then_some(())
    };
    wait::until(wait::SOON, "the policy is in force", refused).await;

    // What is open lasts until the deadline of the one drain there is.
    vm.signal(Signal::SIGTERM).unwrap();
    traffic::ping(&mut out, b"still there").await.unwrap();
    traffic::closed(&mut out, wait::SOON).await.unwrap();
    assert!(vm.exit(wait::SOON).await.unwrap().success());
}

/// The proxy's own pod speaks HBONE, so that a captured Prometheus scrapes it under mutual TLS.
#[tokio::test]
async fn metrics_are_scraped_through_a_tunnel_by_those_who_may() {
    let world = World::new(2).unwrap();
    let prometheus = world.node(0).pod(&PodSpec::captured("prometheus")).unwrap();
    let stranger = world.node(0).pod(&PodSpec::captured("stranger")).unwrap();
    let mut mesh = Mesh::of(&[&prometheus, &stranger]);
    let address = [10, 20, 1, 2].into();
    let mut own = Workload::of(&stranger);
    own.uid = "Kubernetes//Pod/istio-system/culvert-1".to_owned();
    own.name = "culvert-1".to_owned();
    own.workload_name = "ztunnel".to_owned();
    own.namespace = "istio-system".to_owned();
    own.service_account = "culvert".to_owned();
    own.workload_ips = vec![address];
    own.node = world.node(1).name().to_owned();
    own.set("authorizationPolicies", "[shop/scrape]");
    mesh.workloads.push(own);
    mesh.policy(Policy::allow("scrape", vec![Match::pod(&prometheus)]).selected());
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    let node = world.node(0);
    let pods: [&Pod; 2] = [&prometheus, &stranger];
    let _clients = NodeRun::start(&world, node, &ProxyOptions::new(&world, node), &pods)
        .await
        .unwrap();
    let node = world.node(1);
    let options = ProxyOptions::new(&world, node)
        .env("POD_NAME", "culvert-1")
        .env("POD_NAMESPACE", "istio-system")
        .env("SERVICE_ACCOUNT", "culvert");
    let run = NodeRun::start(&world, node, &options, &[]).await.unwrap();

    let stats = (address, STATS_PORT).into();
    let scrape = async |from: &Pod| http::request(from.netns(), stats, "GET /metrics", &[]).await;
    let answer = scrape(&prometheus).await.unwrap();
    assert_eq!(answer.status, 200);
    let metrics = Metrics::parse(&answer.body).unwrap();
    assert_eq!(metrics.sum("istio_build", &[]), 1.0);
    let tunnelled = [
        ("reporter", "destination"),
        ("source_workload", "prometheus-deploy"),
        ("destination_workload", "ztunnel"),
        ("connection_security_policy", "mutual_tls"),
    ];
    let one = |count| count == 1.0;
    let family = "istio_tcp_connections_opened_total";
    run.proxy.metric(family, &tunnelled, one).await;
    assert!(scrape(&stranger).await.is_err(), "others are refused");
}
