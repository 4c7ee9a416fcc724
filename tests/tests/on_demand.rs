//! Traffic of a node that is told of its own pods only, and asks for the rest.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{net::SocketAddr, ops::Range, sync::Arc, time::Duration};

use futures_util::future::join_all;
use testkit::{
    Line, Mesh, NodeRun, Pod, PodSpec,
    istiod::{Kind, Stream},
    mesh::workload_uid,
    raw::{Hello, RawClient, RawServer},
    stage::{Steered, vip, web_port},
    traffic::{Behaviour, Server},
};
use tokio::time::Instant;

/// `web`, `api` and `db` are of the node. `far` takes no part in the mesh and is elsewhere, as far as istiod knows.
struct Scene {
    stage: Steered,
    far: Arc<Pod>,
    app: Server,
}

impl Scene {
    fn new() -> Self {
        let stage = Steered::new().unwrap();
        let far = stage.world.node(0).pod(&PodSpec::plain("far")).unwrap();
        let app = far.serve(8080, Behaviour::Echo).unwrap();
        let scene = Self { stage, far, app };
        scene.stage.istiod.set(&scene.mesh());
        scene
    }

    fn mesh(&self) -> Mesh {
        let mut mesh = self.stage.mesh();
        "elsewhere".clone_into(&mut mesh.pod(&self.far).node);
        mesh
    }

    /// A proxy that knows the pods of its node.
    async fn start(&self) -> NodeRun<'_> {
        let options = self.stage.options().env("XDS_ON_DEMAND", "true");
        let run = self.stage.start_with(&options).await.unwrap();
        self.stage.istiod.synced().await;
        run
    }

    /// A foreign pod that is elsewhere.
    fn foreign(&self, mesh: &mut Mesh, name: &str, protocol: &str) -> Arc<Pod> {
        let node = self.stage.world.node(0);
        let pod = node.pod(&PodSpec::plain(name)).unwrap();
        let record = mesh.pod(&pod);
        "elsewhere".clone_into(&mut record.node);
        protocol.clone_into(&mut record.protocol);
        pod
    }

    /// Names asked for on the newest stream, in order.
    fn asked(&self) -> Vec<String> {
        let newest = self.stage.istiod.newest();
        assert_eq!(newest.complaints, Vec::<String>::new());
        let requests = newest.of(Kind::Address).skip(1);
        requests
            .flat_map(|request| request.resource_names_subscribe.clone())
            .collect()
    }

    /// How long `web` takes to get its words back from there.
    async fn echoes(&self, to: SocketAddr) -> Duration {
        let began = Instant::now();
        assert!(self.stage.echoes(to).await, "{to}");
        began.elapsed()
    }

    /// Calls from `web`, and whom the proxy took it for.
    async fn known_as(&self, run: &NodeRun<'_>, to: SocketAddr) -> String {
        let mark = run.proxy.log().mark();
        self.echoes(to).await;
        let line = ended(run, mark, "outbound").await;
        line.field("dst.workload").to_owned()
    }
}

async fn ended(run: &NodeRun<'_>, mark: usize, direction: &str) -> Line {
    let complete =
        |line: &Line| line.is_access("connection complete") && line.field("direction") == direction;
    let log = run.proxy.log();
    log.wait_from(mark, "the end of a connection", complete)
        .await
}

fn key(pod: &Pod) -> String {
    format!("/{}", pod.ip4())
}

const WAYPOINT: &str =
    "{destination: 'shop/waypoint.shop.svc.cluster.local', hboneMtlsPort: 15008}";
const WAYPOINT_KEY: &str = "shop/waypoint.shop.svc.cluster.local";
/// An answer that comes over loopback.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Half of the connect limit of 10 s, and what a busy machine adds.
const AFTER_THE_LIMIT: Range<Duration> = Duration::from_millis(4500)..Duration::from_secs(9);

#[tokio::test]
async fn an_answer_is_the_service_of_an_address_with_all_its_workloads() {
    let scene = Scene::new();
    let mut mesh = scene.mesh();
    let other = scene.foreign(&mut mesh, "other", "TCP");
    let second = other.serve(8080, Behaviour::Echo).unwrap();
    mesh.service("both", vip(2), &[(80, 8080)], &[&scene.far, &other]);
    scene.stage.istiod.set(&mesh);
    let _run = scene.start().await;
    for _ in 0..40 {
        assert!(scene.echoes(web_port(2)).await < AT_ONCE);
    }
    let (one, two) = (scene.app.peers().len(), second.peers().len());
    assert!(one > 0 && two > 0, "{one} and {two}");
    assert_eq!(scene.asked(), ["/10.96.0.2"]);
}

/// Case 37.
#[tokio::test]
async fn connections_that_miss_the_same_are_served_by_one_answer_at_once() {
    let scene = Scene::new();
    let mut mesh = scene.mesh();
    mesh.service("far", vip(2), &[(80, 8080)], &[&scene.far]);
    scene.stage.istiod.set(&mesh);
    let run = scene.start().await;
    scene.stage.istiod.hold(&[Kind::Address]);
    let release = async {
        let source = [("reporter", "source")];
        let both = |open| open >= 2.0;
        run.proxy
            .metric("istio_tcp_sockets_open", &source, both)
            .await;
        let asks = |request: &xds_client::proto::discovery::DeltaDiscoveryRequest| {
            request.resource_names_subscribe == ["/10.96.0.2"]
        };
        scene.stage.istiod.request("the question", asks).await;
        assert!(scene.app.peers().is_empty(), "nobody goes on without it");
        scene.stage.istiod.hold(&[]);
        Instant::now()
    };
    let one = scene.stage.echoes(web_port(2));
    let two = scene.stage.echoes(web_port(2));
    let (released, one, two) = tokio::join!(release, one, two);
    assert!(one && two);
    assert!(released.elapsed() < AT_ONCE);
    assert_eq!(scene.asked(), ["/10.96.0.2"]);
}

/// Case 38.
#[tokio::test]
async fn what_does_not_exist_is_unknown_until_it_is_pushed() {
    let scene = Scene::new();
    scene.stage.istiod.set(&scene.stage.mesh());
    let run = scene.start().await;
    assert_eq!(scene.known_as(&run, scene.app.address).await, "");
    assert_eq!(scene.known_as(&run, scene.app.address).await, "");
    assert_eq!(scene.asked(), [key(&scene.far)]);
    scene.stage.istiod.set(&scene.mesh());
    scene.stage.istiod.synced().await;
    assert_eq!(scene.known_as(&run, scene.app.address).await, "far");
    assert_eq!(scene.asked(), [key(&scene.far)]);
}

/// First the service, then its waypoint: never around it.
#[tokio::test]
async fn a_waypoint_is_asked_for_by_its_host_name() {
    let scene = Scene::new();
    let mut mesh = scene.mesh();
    let way = scene.foreign(&mut mesh, "way", "HBONE");
    mesh.service("waypoint", vip(9), &[(15008, 15008)], &[&way]);
    let guarded = mesh.service("guarded", vip(2), &[(80, 8080)], &[&scene.far]);
    guarded.set("waypoint", WAYPOINT);
    scene.stage.istiod.set(&mesh);
    let _run = scene.start().await;
    let authority = scene.stage.world.authority();
    let identity = authority.issue(&way.spiffe_id()).unwrap();
    let server = RawServer::listen(&way, &identity, authority.root()).unwrap();
    let serving = async {
        let mut connection = server.accept().await.unwrap();
        let incoming = connection.next().await.unwrap();
        assert_eq!(incoming.authority(), "10.96.0.2:80");
        let echo = incoming.echo();
        tokio::join!(echo, connection.next()).0.unwrap();
    };
    let calling = scene.echoes(web_port(2));
    tokio::select! {
        took = calling => assert!(took < AT_ONCE, "{took:?}"),
        () = serving => panic!("the connection ended before the answer was read"),
    }
    assert_eq!(scene.asked(), ["/10.96.0.2", WAYPOINT_KEY]);
    assert!(scene.app.peers().is_empty(), "the waypoint was bypassed");
}

/// `api` is a waypoint, and learns whom it serves from the tunnels that it is asked for.
#[tokio::test]
async fn a_waypoint_asks_for_whom_it_is_to_serve() {
    let scene = Scene::new();
    let api = &scene.stage.api;
    let mut mesh = scene.mesh();
    let caller = scene.foreign(&mut mesh, "caller", "HBONE");
    mesh.service("waypoint", vip(9), &[(15008, 15008)], &[api]);
    mesh.service("mine", vip(2), &[(80, 8080)], &[])
        .set("waypoint", WAYPOINT);
    mesh.service("other", vip(3), &[(80, 8080)], &[]);
    scene.stage.istiod.set(&mesh);
    let run = scene.start().await;
    let _app = api.serve(80, Behaviour::Echo).unwrap();
    let identity = scene.stage.world.authority().issue(&caller.spiffe_id());
    let hello = Hello::new(&identity.unwrap());
    let client = RawClient::connect(caller.netns(), api.at(15008), &hello)
        .await
        .unwrap();
    for (last, status) in [(2, 200), (3, 400), (4, 400)] {
        let authority = web_port(last).to_string();
        assert_eq!(client.status(&authority).await.unwrap(), status, "{last}");
    }
    let asked = [
        "/10.96.0.2",
        WAYPOINT_KEY,
        &key(&caller),
        "/10.96.0.3",
        "/10.96.0.4",
    ];
    assert_eq!(scene.asked(), asked);
    drop(client);
    let line = ended(&run, 0, "inbound").await;
    assert_eq!(line.field("src.workload"), "caller", "{}", line.raw);
}

#[tokio::test]
async fn a_plaintext_peer_is_asked_for_and_briefly_waited_for() {
    let scene = Scene::new();
    let run = scene.start().await;
    let app = scene.stage.web.serve(7000, Behaviour::Echo).unwrap();
    let mark = run.proxy.log().mark();
    assert_eq!(scene.far.ask(app.address, b"hi").await.unwrap(), b"hi");
    let line = ended(&run, mark, "inbound").await;
    assert_eq!(line.field("src.workload"), "far", "{}", line.raw);
    assert_eq!(scene.asked(), [key(&scene.far)]);

    scene.stage.istiod.hold(&[Kind::Address]);
    let node = scene.stage.world.node(0);
    let stranger = node.pod(&PodSpec::plain("stranger")).unwrap();
    let began = Instant::now();
    assert_eq!(stranger.ask(app.address, b"hi").await.unwrap(), b"hi");
    let took = began.elapsed();
    let limit = Duration::from_millis(900)..Duration::from_secs(4);
    assert!(limit.contains(&took), "{took:?}");
}

#[tokio::test]
async fn a_silent_control_plane_costs_a_limited_time() {
    let scene = Scene::new();
    let run = scene.start().await;
    scene.stage.istiod.hold(&[Kind::Address]);
    let mark = run.proxy.log().mark();
    let to = scene.app.address;
    let (one, two) = tokio::join!(scene.echoes(to), scene.echoes(to));
    for took in [one, two] {
        assert!(AFTER_THE_LIMIT.contains(&took), "{took:?}");
    }
    let line = ended(&run, mark, "outbound").await;
    assert_eq!(line.field("dst.workload"), "", "it goes on as passthrough");
    scene.stage.istiod.hold(&[]);
    let uid = workload_uid(&scene.far);
    let taken_in = |streams: &[Stream]| {
        let stream = streams.last()?;
        let mut told = stream.sent.iter();
        let told = told.find(|sent| sent.resources.contains(&uid))?;
        (!stream.answers(&told.nonce).is_empty()).then_some(())
    };
    let istiod = &scene.stage.istiod;
    istiod.until("the late answer is taken in", taken_in).await;
    assert_eq!(
        scene.known_as(&run, to).await,
        "far",
        "the late answer counts"
    );
    assert_eq!(scene.asked(), [key(&scene.far)]);
}

#[tokio::test]
async fn without_a_control_plane_what_is_known_stays_known() {
    let scene = Scene::new();
    let node = scene.stage.world.node(0);
    let outside = node.pod(&PodSpec::plain("outside")).unwrap();
    let outside = outside.serve(7000, Behaviour::Echo).unwrap();
    let mut mesh = scene.mesh();
    let near = scene.foreign(&mut mesh, "near", "TCP");
    let near = near.serve(7000, Behaviour::Echo).unwrap();
    scene.stage.istiod.set(&mesh);
    let run = scene.start().await;
    assert_eq!(scene.known_as(&run, near.address).await, "near");
    assert_eq!(scene.known_as(&run, outside.address).await, "");

    scene.stage.istiod.stop().await;
    let failed = |count| count >= 2.0;
    let reason = [("reason", "ConnectionError")];
    run.proxy
        .metric("istio_xds_connection_terminations_total", &reason, failed)
        .await;
    assert!(scene.echoes(near.address).await < AT_ONCE);
    assert!(
        scene.echoes(outside.address).await < AT_ONCE,
        "it is known to be no part"
    );
    let took = scene.echoes(scene.app.address).await;
    assert!(AFTER_THE_LIMIT.contains(&took), "{took:?}");

    scene.stage.istiod.start().unwrap();
    let opened = |streams: &[Stream]| streams.get(1).map(|_| ());
    let limit = Duration::from_secs(30);
    let istiod = &scene.stage.istiod;
    istiod.until_within(limit, "a new stream", opened).await;
    assert_eq!(scene.known_as(&run, scene.app.address).await, "far");
}

/// An application that scans a network asks much, and holds nobody else up.
#[tokio::test]
async fn many_unknown_addresses_are_asked_for_once_each() {
    let scene = Scene::new();
    let ip = |pod: &testkit::Netns, route: &str| {
        pod.command("ip", &["-batch", "-"], route).unwrap();
    };
    let via = format!("route add 10.99.0.0/16 via {}\n", scene.far.ip4());
    ip(scene.stage.world.node(0).netns(), &via);
    ip(scene.far.netns(), "route add local 10.99.0.0/16 dev lo\n");
    let run = scene.start().await;
    let network =
        |third: u8| (1..=100).map(move |last| SocketAddr::from(([10, 99, third, last], 8080)));
    for _ in 0..2 {
        join_all(network(0).map(|to| scene.echoes(to))).await;
        let mut asked = scene.asked();
        asked.sort_unstable();
        let mut expected: Vec<_> = network(0).map(|to| format!("/{}", to.ip())).collect();
        expected.sort_unstable();
        assert_eq!(asked, expected);
    }
    scene.stage.istiod.hold(&[Kind::Address]);
    let scanning = join_all(network(1).map(|to| scene.echoes(to)));
    let others = async {
        assert_eq!(scene.known_as(&run, network(0).next().unwrap()).await, "");
        assert!(run.proxy.is_ready().await);
        Instant::now()
    };
    let began = Instant::now();
    let (took, others) = tokio::join!(scanning, others);
    assert!(others - began < AT_ONCE, "others wait for nothing");
    assert!(
        took.iter().all(|took| AFTER_THE_LIMIT.contains(took)),
        "{took:?}"
    );
}
