//! Which connections go by way of a waypoint. The waypoints are pods of the mesh themselves; what their application gets shows
//! that it went by them. A real Envoy in their place is in `envoy_waypoint.rs`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{net::SocketAddr, sync::Arc};

use testkit::{
    Cluster, Line, Mesh, Pod, PodSpec, World,
    stage::{vip, web_port},
    traffic::{Behaviour, End, Server},
    wait,
};

/// `web` and the waypoint `one` are on the first node, `api` and the waypoint `two` on the second.
struct Stage {
    world: World,
    web: Arc<Pod>,
    api: Arc<Pod>,
    one: Arc<Pod>,
    two: Arc<Pod>,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let pod = |node: usize, name| world.node(node).pod(&PodSpec::captured(name)).unwrap();
        Self {
            web: pod(0, "web"),
            one: pod(0, "one"),
            api: pod(1, "api"),
            two: pod(1, "two"),
            world,
        }
    }

    /// All pods, and a service for each waypoint.
    fn mesh(&self) -> Mesh {
        let mut mesh = Mesh::of(&self.pods());
        mesh.service("one", vip(8), &[(15008, 15008)], &[&self.one]);
        mesh.service("two", vip(9), &[(15008, 15008)], &[&self.two]);
        mesh
    }

    fn pods(&self) -> [&Pod; 4] {
        [&self.web, &self.api, &self.one, &self.two]
    }

    async fn start(&self, mesh: &Mesh) -> Cluster<'_> {
        let pods = [&self.web, &self.api, &self.one, &self.two];
        Cluster::start(&self.world, mesh, &pods).await.unwrap()
    }

    /// An application in `api` and in both waypoints.
    fn serve(&self, port: u16) -> Apps {
        let pods = [&self.api, &self.one, &self.two];
        Apps(pods.map(|pod| pod.serve(port, Behaviour::Echo).unwrap()))
    }
}

/// Applications of `api`, `one` and `two`.
struct Apps([Server; 3]);

impl Apps {
    /// Calls, and counts who was called so far.
    async fn called(&self, from: &Pod, to: SocketAddr) -> [usize; 3] {
        assert_eq!(from.ask(to, b"hello").await.unwrap(), b"hello", "{to}");
        self.0.each_ref().map(|app| app.peers().len())
    }
}

fn reference(name: &str) -> String {
    format!("{{destination: 'shop/{name}.shop.svc.cluster.local', hboneMtlsPort: 15008}}")
}

#[tokio::test]
async fn a_waypoint_of_a_pod_takes_what_is_dialled_at_the_pod_unless_it_dials_itself() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.service("api", vip(1), &[(80, 8080)], &[&stage.api]);
    let api = mesh.workload(&stage.api);
    api.set("waypoint", &reference("one"));
    let _cluster = stage.start(&mesh).await;
    let apps = stage.serve(8080);
    let pod = stage.api.at(8080);
    assert_eq!(apps.called(&stage.web, pod).await, [0, 1, 0]);
    assert_eq!(apps.called(&stage.web, web_port(1)).await, [1, 1, 0]);
    assert_eq!(apps.called(&stage.one, pod).await, [2, 1, 0]);
    let peers = apps.0[0].peers();
    assert_eq!(
        peers.last().unwrap().ip(),
        stage.one.ip4(),
        "from the waypoint"
    );
    // Another waypoint is anybody.
    assert_eq!(apps.called(&stage.two, pod).await, [2, 2, 0]);
}

#[tokio::test]
async fn a_service_whose_waypoint_is_not_ready_is_not_reached_at_all() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    let api = mesh.service("api", vip(1), &[(80, 8080)], &[&stage.api]);
    api.set("waypoint", &reference("one"));
    "Unhealthy".clone_into(&mut mesh.workload(&stage.one).status);
    let cluster = stage.start(&mesh).await;
    let direct = stage.serve(8080);
    let apps = stage.serve(80);
    let end = stage.web.turned_away(web_port(1)).await.unwrap();
    assert_eq!(end, End::Reset);
    let log = cluster.proxy(0).log();
    let refused = log.wait("a refusal", |line| line.is_access("connection failed"));
    let error = refused.await.field("error").to_owned();
    assert!(error.starts_with("unknown waypoint"), "{error}");

    "Healthy".clone_into(&mut mesh.workload(&stage.one).status);
    mesh.write(&cluster.mesh_file).unwrap();
    let ready = async || stage.web.ask(web_port(1), b"hello").await.ok();
    wait::until(wait::SOON, "the waypoint is ready", ready).await;
    assert_eq!(apps.0[1].peers().len(), 1);
    let around = direct.0.iter().map(|app| app.peers().len());
    assert_eq!(around.sum::<usize>(), 0, "around the waypoint");
}

#[tokio::test]
async fn weighted_waypoints_share_connections() {
    let stage = Stage::new();
    let weighted = |one: u32, two: u32, single| {
        let mut mesh = stage.mesh();
        let api = mesh.service("api", vip(1), &[(80, 8080)], &[&stage.api]);
        let entry =
            |name, weight: u32| format!("{{destination: {}, weight: {weight}}}", reference(name));
        let entries = format!("[{}, {}]", entry("one", one), entry("two", two));
        api.set("waypoint", &reference(single));
        api.set("weightedWaypoints", &entries);
        mesh
    };
    let cluster = stage.start(&weighted(90, 10, "one")).await;
    let apps = stage.serve(80);
    let calls = async |count| {
        let before = apps.0.each_ref().map(|app| app.peers().len());
        let mut after = before;
        for _ in 0..count {
            after = apps.called(&stage.web, web_port(1)).await;
        }
        [0, 1, 2].map(|app| after[app] - before[app])
    };
    let [around, one, two] = calls(200).await;
    // Expected are 20, and the deviation is 4.
    assert!((4..=40).contains(&two), "{two}");
    assert_eq!((around, one), (0, 200 - two));

    let only = async |mesh: Mesh, expected: [usize; 3]| {
        let log = cluster.proxy(0).log();
        let mark = log.mark();
        mesh.write(&cluster.mesh_file).unwrap();
        // Thirty connections in a row may go one way before it, too.
        let loaded = |line: &Line| line.message.starts_with("mesh file loaded");
        log.wait_from(mark, "the file is loaded", loaded).await;
        assert_eq!(calls(30).await, expected);
    };
    only(weighted(100, 0, "two"), [0, 30, 0]).await;
    only(weighted(0, 0, "two"), [0, 0, 30]).await;
}

#[tokio::test]
async fn a_waypoint_takes_addresses_that_are_used_as_they_are_dialled() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    let outside = mesh.service("outside", vip(1), &[], &[]);
    outside.set("cidrVips", "[{network: '', cidr: 10.77.0.0/16}]");
    outside.set(
        "loadBalancer",
        "{routingPreferences: [], mode: Passthrough, healthPolicy: AllowAll}",
    );
    outside.set("waypoint", &reference("two"));
    let cluster = stage.start(&mesh).await;
    let apps = stage.serve(4711);
    let dialled: SocketAddr = "10.77.1.2:4711".parse().unwrap();
    assert_eq!(apps.called(&stage.web, dialled).await, [0, 0, 1]);
    let log = cluster.proxy(0).log();
    let line = log.wait("the way", |line| line.field("direction") == "outbound");
    let line = line.await;
    assert_eq!(line.field("dst.hbone_addr"), dialled.to_string());
    assert_eq!(line.field("dst.addr"), stage.two.at(15008).to_string());
}
