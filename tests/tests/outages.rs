//! What others do without: traffic while the peer node, the name server or scrapers fail, and while everything is away at once.
//!
//! Istiod, the certificate authority, OpenBao and the CNI agent alone: `control_plane_reconnect`, `certificates_istiod`,
//! `certificates_openbao`, `inpod`. `CULVERT_TEST_OUTAGE_SECONDS` makes outages longer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use testkit::{
    Agent, Cluster, Istiod, Mesh, Pod, PodSpec, ProxyOptions, Redirect, World,
    dns::Dnsmasq,
    proxy::{ADMIN_PORT, Proxy, STATS_PORT},
    stage::{RESOLVER, Steady, UPSTREAM, UPSTREAM6, vip},
    traffic::{self, Behaviour, Server},
    wait,
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

const SECOND: Duration = Duration::from_secs(1);
/// Longer than the longest pause between attempts of anything.
const A_PAUSE: Duration = Duration::from_secs(40);
const ZONE: &str = "corp.example";
const NAME: &str = "www.corp.example";

/// `web` and `other` are on the first node with `near`, `far` is on the second. Istiod, the authority and the name server are
/// on the first.
struct Stage {
    world: World,
    web: Arc<Pod>,
    other: Arc<Pod>,
    near: Arc<Pod>,
    far: Arc<Pod>,
    istiod: Istiod,
    authority: Istiod,
    _servers: [Server; 2],
}

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let pod = |node: usize, spec: PodSpec| world.node(node).pod(&spec).unwrap();
        let captured = |node, name| pod(node, PodSpec::captured(name));
        let asking = PodSpec::captured("web").redirect(Redirect::default().with_dns());
        let (web, other) = (pod(0, asking), captured(0, "other"));
        let (near, far) = (captured(0, "near"), captured(1, "far"));
        let [istiod, authority] = ["istiod", "authority"].map(|name| {
            let home = pod(0, PodSpec::plain(name));
            Istiod::options().start(&world, &home).unwrap()
        });
        let mut mesh = Mesh::of(&[&web, &other, &near, &far]);
        mesh.service("near", vip(1), &[(80, 8080)], &[&near]);
        istiod.set(&mesh);
        let resolv_conf = world.file("resolv.conf");
        std::fs::write(resolv_conf, format!("nameserver {UPSTREAM}\n")).unwrap();
        let _servers = [&near, &far].map(|pod| pod.serve(8080, Behaviour::Echo).unwrap());
        Self {
            world,
            web,
            other,
            near,
            far,
            istiod,
            authority,
            _servers,
        }
    }

    async fn start(&self) -> Cluster<'_> {
        let options = |node: &testkit::Node| {
            ProxyOptions::new(&self.world, node)
                .follow(&self.istiod)
                .certified_by(&self.authority)
                .env("ISTIO_META_DNS_CAPTURE", "true")
                .resolv_conf(self.world.file("resolv.conf"))
        };
        let pods = [&self.web, &self.other, &self.near, &self.far];
        Cluster::run(&self.world, options, &pods).await.unwrap()
    }

    async fn name_server(&self) -> Dnsmasq {
        let netns = self.world.node(0).netns();
        let records = [format!("host-record={NAME},192.0.2.7")];
        Dnsmasq::start(netns, &[UPSTREAM, UPSTREAM6], ZONE, &records)
            .await
            .unwrap()
    }

    /// The addresses that `web` gets for a name.
    async fn resolves(&self, name: &str) -> Vec<String> {
        let server = format!("@{}", RESOLVER.ip());
        let dug = self.web.dig(&[&server, name, "A"]).await;
        let addresses = dug.map(|dug| dug.data("A").into_iter().map(str::to_owned).collect());
        addresses.unwrap_or_default()
    }

    /// Takes the second node off the link, or puts it back.
    fn link(&self, state: &str) {
        let link = self.world.link();
        link.command("ip", &["link", "set", "node1", state], "")
            .unwrap();
    }

    /// A flow to the other node, which must last.
    async fn lasting(&self) -> TcpStream {
        let mut flow = self.web.connect(self.far.at(8080)).await.unwrap();
        traffic::ping(&mut flow, b"open").await.unwrap();
        flow
    }

    /// A connection of `web` that nothing stands against.
    async fn echoes(&self, to: SocketAddr) -> bool {
        let answer = self.web.ask(to, b"hello").await;
        answer.is_ok_and(|answer| answer == b"hello")
    }
}

/// Says something and waits for it to come back, longer than the kernel may wait before it repeats what was lost.
async fn carries(flow: &mut TcpStream) {
    use tokio::io::AsyncReadExt as _;
    flow.write_all(b"!").await.unwrap();
    let answer = tokio::time::timeout(A_PAUSE, flow.read_u8()).await;
    assert_eq!(answer.expect("in time").unwrap(), b'!');
}

/// Scrapers that ask and never read.
async fn hanging_scrapers(world: &World) -> Vec<TcpStream> {
    let node = world.node(0).proxy_netns();
    let mut hanging = Vec::new();
    for _ in 0..20 {
        let at = ([127, 0, 0, 1], STATS_PORT).into();
        let mut scraper = traffic::connect(node, at).await.unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n";
        scraper.write_all(request).await.unwrap();
        hanging.push(scraper);
    }
    hanging
}

async fn becomes(proxy: &Proxy<'_>, metric: &str, value: f64) {
    let is = |now| now == value;
    proxy.metric(metric, &[], is).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_peer_node_is_cut_off_the_own_goes_on_and_flows_outlast_it() {
    let stage = Stage::new();
    let cluster = stage.start().await;
    let mut lasting = stage.lasting().await;
    let traffic = Steady::start(&stage.web, stage.near.at(8080));
    stage.link("down");
    // `other` has no tunnel to the node yet.
    let refused = stage.other.ask(stage.far.at(8080), b"hello");
    let (refused, ()) = tokio::join!(refused, async {
        let families = ["culvert_flows_failed_total", "culvert_flows_refused_total"];
        let told = async || {
            let metrics = cluster.proxy(0).metrics().await.ok()?;
            let count: f64 = families.iter().map(|one| metrics.sum(one, &[])).sum();
            (count > 0.0).then_some(())
        };
        wait::until(15 * SECOND, "the failure is counted", told).await;
    });
    assert!(refused.is_err());
    assert!(cluster.proxy(0).is_ready().await);
    stage.link("up");
    carries(&mut lasting).await;
    // A peer that is silent for long is given up, and its flows with it; nothing else is.
    stage.link("down");
    tokio::time::sleep(wait::outage()).await;
    stage.link("up");
    traffic.end().await;
    let again = async || stage.echoes(stage.far.at(8080)).await.then_some(());
    wait::until(A_PAUSE, "new flows reach it", again).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_name_server_the_mesh_has_its_names() {
    let stage = Stage::new();
    let cluster = stage.start().await;
    let names = stage.name_server().await;
    let mesh_name = "near.shop.svc.cluster.local";
    assert_eq!(stage.resolves(NAME).await, ["192.0.2.7"]);
    let traffic = Steady::start(&stage.web, stage.near.at(8080));
    drop(names);
    assert!(stage.resolves(NAME).await.is_empty());
    let failed = |count| count >= 1.0;
    let (family, proxy) = ("istio_dns_unanswered_total", cluster.proxy(0));
    proxy.metric(family, &[], failed).await;
    let shown = async || {
        stage.resolves(NAME).await;
        let page = proxy.get(ADMIN_PORT, "/live").await.ok()?.body;
        page.contains("silent</b>").then_some(())
    };
    wait::until(A_PAUSE, "the page tells of it", shown).await;
    let said = |text: &'static str| move |line: &testkit::Line| line.message.starts_with(text);
    proxy
        .log()
        .wait("a warning", said("name servers do not answer"))
        .await;
    assert_eq!(stage.resolves(mesh_name).await, [vip(1).to_string()]);
    assert!(cluster.proxy(0).is_ready().await);
    tokio::time::sleep(wait::outage()).await;
    let _names = stage.name_server().await;
    assert_eq!(stage.resolves(NAME).await, ["192.0.2.7"], "at once");
    proxy
        .log()
        .wait("the end of it", said("name servers answer again"))
        .await;
    tokio::time::sleep(SECOND).await;
    traffic.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scrapers_that_hang_cost_nothing() {
    let stage = Stage::new();
    let cluster = stage.start().await;
    let traffic = Steady::start(&stage.web, stage.far.at(8080));
    let _hanging = hanging_scrapers(&stage.world).await;
    for _ in 0..20 {
        assert!(cluster.proxy(0).metrics().await.is_ok());
        tokio::time::sleep(SECOND / 10).await;
    }
    tokio::time::sleep(wait::outage()).await;
    assert!(cluster.proxy(0).is_ready().await);
    traffic.end().await;
}

/// Whatever is not needed to carry bytes is away, on both nodes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_everything_away_at_once_traffic_goes_on_and_all_of_it_returns() {
    let stage = Stage::new();
    let mut cluster = stage.start().await;
    let names = stage.name_server().await;
    assert_eq!(stage.resolves(NAME).await, ["192.0.2.7"]);
    let traffic = [&stage.near, &stage.far].map(|to| Steady::start(&stage.web, to.at(8080)));
    let mut lasting = stage.lasting().await;

    stage.istiod.stop().await;
    stage.authority.stop().await;
    drop(names);
    let scrapers = hanging_scrapers(&stage.world).await;
    let proxies: Vec<_> = cluster.nodes.drain(..).map(|run| run.proxy).collect();
    for proxy in &proxies {
        becomes(proxy, "istio_xds_connected", 0.0).await;
        proxy.unready().await;
        let answer = proxy
            .get(testkit::proxy::READINESS_PORT, "/healthz/ready")
            .await;
        let pending = answer.unwrap().body;
        assert!(pending.contains("workload proxy manager"), "{pending}");
        assert!(
            !pending.contains("state manager"),
            "only the agent counts: {pending}"
        );
        let told = |line: &testkit::Line| line.message == "no stream to the control plane";
        proxy.log().wait("a warning", told).await;
        let page = proxy.get(ADMIN_PORT, "/live").await.unwrap().body;
        for told in ["disconnected</b>", "waits for workload proxy manager</b>"] {
            assert!(page.contains(told), "{told}: {page:.2000}");
        }
    }
    assert!(stage.resolves(NAME).await.is_empty());
    // What has a tunnel already, and what needs a new one under a certificate that is held.
    assert!(stage.echoes(stage.near.at(8080)).await);
    let first = stage.other.ask(stage.far.at(8080), b"hello").await;
    assert_eq!(first.unwrap(), b"hello");
    tokio::time::sleep(2 * SECOND + wait::outage()).await;
    traffic::ping(&mut lasting, b"established").await.unwrap();

    drop(scrapers);
    let _names = stage.name_server().await;
    stage.authority.start().unwrap();
    stage.istiod.start().unwrap();
    let pods: [&[&Pod]; 2] = [&[&stage.web, &stage.other, &stage.near], &[&stage.far]];
    let mut sessions = Vec::new();
    for ((proxy, node), pods) in proxies.iter().zip(stage.world.nodes()).zip(pods) {
        let mut agent = Agent::bind(&ProxyOptions::agent_socket(&stage.world, node)).unwrap();
        let session = wait::within(A_PAUSE, "the proxy finds the agent", agent.accept());
        let session = session.await.unwrap();
        session.snapshot(pods).await.unwrap();
        sessions.push((agent, session));
        proxy.ready().await;
        let connected = async || {
            let metrics = proxy.metrics().await.ok()?;
            (metrics.sum("istio_xds_connected", &[]) == 1.0).then_some(())
        };
        wait::until(A_PAUSE, "istiod is found again", connected).await;
    }
    assert_eq!(stage.resolves(NAME).await, ["192.0.2.7"]);
    traffic::ping(&mut lasting, b"still").await.unwrap();
    for traffic in traffic {
        traffic.end().await;
    }
}
