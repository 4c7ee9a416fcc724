//! Flows between two pods of one proxy without a tunnel: everything but the tunnel stays as it was.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rustls::pki_types::CertificateDer;
use testkit::{
    Cluster, Line, Mesh, Pod, PodSpec, World,
    mesh::{Match, Policy},
    raw::Hello,
    traffic::{self, Behaviour, End},
    wait,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const DIRECT: (&str, &str) = ("SAME_NODE", "direct");
const TAKEN: &str = "culvert_same_node_flows_total";

/// `web` calls `api`, of the same node, and `far`, of another.
struct Stage {
    world: World,
    web: Arc<Pod>,
    api: Arc<Pod>,
    far: Arc<Pod>,
    vip: SocketAddr,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let pod = |node: usize, name| world.node(node).pod(&PodSpec::captured(name)).unwrap();
        let (web, api, far) = (pod(0, "web"), pod(0, "api"), pod(1, "far"));
        let vip = SocketAddr::new(IpAddr::from([10, 96, 0, 1]), 80);
        Self {
            world,
            web,
            api,
            far,
            vip,
        }
    }

    fn mesh(&self) -> Mesh {
        let mut mesh = Mesh::of(&[&self.web, &self.api, &self.far]);
        mesh.service("api", self.vip.ip(), &[(80, 8080)], &[&self.api]);
        mesh
    }

    async fn start(&self, mesh: &Mesh, env: &[(&str, &str)]) -> Cluster<'_> {
        let env: BTreeMap<_, _> = env.iter().copied().collect();
        let pods = [&self.web, &self.api, &self.far];
        let cluster = Cluster::start_with(&self.world, mesh, &pods, &env)
            .await
            .unwrap();
        // Both certificates are there once a tunnel, or its better, has led somewhere.
        let warm = self.api.serve(9999, Behaviour::Echo).unwrap();
        self.web.ask(warm.address, b"warm").await.unwrap();
        for direction in ["outbound", "inbound"] {
            cluster
                .proxy(0)
                .log()
                .wait(direction, ended(direction))
                .await;
        }
        cluster
    }
}

/// Flows that took the short way so far.
async fn taken(cluster: &Cluster<'_>) -> f64 {
    cluster.proxy(0).metrics().await.unwrap().sum(TAKEN, &[])
}

fn ended(direction: &'static str) -> impl Fn(&Line) -> bool {
    move |line| line.is_access("connection complete") && line.field("direction") == direction
}

#[tokio::test]
async fn both_sides_report_a_flow_as_they_report_one_of_a_tunnel() {
    let stage = Stage::new();
    let app = stage.api.serve(8080, Behaviour::Sink).unwrap();
    let mut reports = Vec::new();
    for env in [&[][..], &[DIRECT]] {
        let cluster = stage.start(&stage.mesh(), env).await;
        let (proxy, before) = (cluster.proxy(0), taken(&cluster).await);
        let mark = proxy.log().mark();
        stage.web.ask(stage.vip, b"hello").await.unwrap();
        assert_eq!(app.peers().last().unwrap().ip(), stage.web.ip4());
        let mut lines = Vec::new();
        for direction in ["outbound", "inbound"] {
            let mut line = proxy
                .log()
                .wait_from(mark, direction, ended(direction))
                .await;
            assert!(line.fields.remove("duration").is_some());
            let path = line.fields.remove("path");
            assert_eq!(
                path.as_deref() == Some("same-node"),
                !env.is_empty(),
                "{path:?}"
            );
            let port = |text: &str| text.rsplit_once(':').map(|(ip, _)| ip.to_owned());
            let source = line.fields.remove("src.addr").unwrap();
            assert_eq!(port(&source).unwrap(), stage.web.ip4().to_string());
            lines.push((line.level, line.fields));
        }
        let flows = if env.is_empty() { 0.0 } else { 1.0 };
        assert_eq!(taken(&cluster).await - before, flows);
        let service = [("destination_service", "api.shop.svc.cluster.local")];
        let metrics = proxy.metrics().await.unwrap();
        let mut series = BTreeMap::new();
        for family in [
            "connections_opened",
            "connections_closed",
            "received_bytes",
            "sent_bytes",
        ] {
            for sample in metrics.series(&format!("istio_tcp_{family}_total"), &service) {
                let key = (family, sample.labels.clone());
                series.insert(format!("{key:?}"), sample.value.to_string());
            }
        }
        assert_eq!(series.len(), 8, "{series:?}");
        reports.push((lines, series));
    }
    assert_eq!(reports[0], reports[1]);
}

#[tokio::test]
async fn who_is_elsewhere_or_wants_a_tunnel_gets_one() {
    let stage = Stage::new();
    let overridden = [DIRECT, ("SAME_NODE_NAMESPACES", "shop=hbone,other=direct")];
    for (env, from_near) in [(&[DIRECT][..], 1.0), (&overridden, 0.0)] {
        let cluster = stage.start(&stage.mesh(), env).await;
        let near = stage.api.serve(8080, Behaviour::Echo).unwrap();
        let far = stage.far.serve(8080, Behaviour::Echo).unwrap();
        let before = taken(&cluster).await;
        stage.web.ask(far.address, b"far").await.unwrap();
        assert_eq!(taken(&cluster).await, before);
        stage.web.ask(near.address, b"near").await.unwrap();
        assert_eq!(taken(&cluster).await - before, from_near);
    }
}

#[tokio::test]
async fn the_destination_decides_at_the_start_and_later() {
    let stage = Stage::new();
    let cluster = stage.start(&stage.mesh(), &[DIRECT]).await;
    let (log, app) = (
        cluster.proxy(0).log(),
        stage.api.serve(8080, Behaviour::Echo).unwrap(),
    );
    let mut open = stage.web.connect(app.address).await.unwrap();
    traffic::ping(&mut open, b"before").await.unwrap();
    let mark = log.mark();
    let mut mesh = stage.mesh();
    mesh.policy(Policy::deny("web", vec![Match::pod(&stage.web)]));
    mesh.write(&cluster.mesh_file).unwrap();
    traffic::closed(&mut open, wait::SOON).await.unwrap();
    let cut = log.wait_from(mark, "the cut", ended("inbound")).await;
    let why = "connection closed due to policy change: explicitly denied by: shop/web";
    assert_eq!(cut.field("error"), why);

    let (mark, before) = (log.mark(), app.peers().len());
    assert!(stage.web.ask(app.address, b"after").await.is_err());
    let denied = log.wait_from(mark, "the denial", ended("inbound")).await;
    let reason = "connection closed due to policy rejection: explicitly denied by: shop/web";
    assert_eq!(denied.field("error"), reason);
    let told = log.wait_from(mark, "the status", ended("outbound")).await;
    assert!(told.field("error").contains("http status: 401"), "{told:?}");
    assert_eq!(app.peers().len(), before);
}

#[tokio::test]
async fn an_application_that_does_not_answer_is_told_as_through_a_tunnel() {
    let stage = Stage::new();
    let cluster = stage.start(&stage.mesh(), &[DIRECT]).await;
    let (log, mark) = (cluster.proxy(0).log(), cluster.proxy(0).log().mark());
    assert!(stage.web.ask(stage.api.at(8081), b"nobody").await.is_err());
    let there = log.wait_from(mark, "there", ended("inbound")).await;
    assert!(
        there.field("error").starts_with("connection failed"),
        "{there:?}"
    );
    let here = log.wait_from(mark, "here", ended("outbound")).await;
    assert!(here.field("error").contains("http status: 503"), "{here:?}");
}

#[tokio::test]
async fn bytes_half_closes_and_resets_arrive() {
    let stage = Stage::new();
    let cluster = stage.start(&stage.mesh(), &[DIRECT]).await;
    let (before, app) = (
        taken(&cluster).await,
        stage.api.serve(8080, Behaviour::Sink).unwrap(),
    );
    let sent = traffic::pattern(32 << 20);
    let receipt = stage.web.ask(app.address, &sent).await.unwrap();
    assert_eq!(receipt, traffic::receipt(&sent));

    let listener = traffic::listen(stage.api.netns(), stage.api.at(8081)).unwrap();
    let mut client = stage.web.connect(stage.api.at(8081)).await.unwrap();
    let mut server = listener.accept().await.unwrap().0;
    client.write_all(b"then nothing").await.unwrap();
    let mut received = [0; 12];
    server.read_exact(&mut received).await.unwrap();
    traffic::reset(server).unwrap();
    assert_eq!(
        traffic::closed(&mut client, wait::SOON).await.unwrap(),
        End::Reset
    );
    assert_eq!(taken(&cluster).await - before, 2.0);
}

#[tokio::test]
async fn a_flow_ends_with_its_destination_and_a_new_one_takes_its_place() {
    let stage = Stage::new();
    let cluster = stage.start(&stage.mesh(), &[DIRECT]).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut open = stage.web.connect(app.address).await.unwrap();
    traffic::ping(&mut open, b"before").await.unwrap();
    let session = &cluster.nodes[0].session;
    session.del(stage.api.uid()).await.unwrap().unwrap();
    traffic::closed(&mut open, wait::SOON).await.unwrap();
    session.add(&stage.api).await.unwrap().unwrap();
    let back = async || {
        let before = taken(&cluster).await;
        stage.web.ask(app.address, b"again").await.ok()?;
        (taken(&cluster).await > before).then_some(())
    };
    wait::until(wait::SOON, "the short way is open again", back).await;
}

/// What `api` presents to a tunnel's client.
async fn served_certificate(stage: &Stage) -> CertificateDer<'static> {
    let stranger = stage
        .world
        .node(0)
        .pod(&PodSpec::plain("stranger"))
        .unwrap();
    let identity = stage
        .world
        .authority()
        .issue(&stranger.spiffe_id())
        .unwrap();
    let hello = Hello::new(&identity);
    let tls = hello
        .connect(stranger.netns(), stage.api.at(15008))
        .await
        .unwrap();
    tls.get_ref().1.peer_certificates().unwrap()[0]
        .clone()
        .into_owned()
}

#[tokio::test]
async fn a_revoked_certificate_ends_flows_of_either_side() {
    let stage = Stage::new();
    let (path, next) = (stage.world.file("crl.pem"), stage.world.file("crl.next"));
    let authority = stage.world.authority();
    fs::write(&path, authority.crl(&[]).unwrap()).unwrap();
    let crl = path.display().to_string();
    let cluster = stage
        .start(&stage.mesh(), &[DIRECT, ("CRL_PATH", &crl)])
        .await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut open = stage.web.connect(app.address).await.unwrap();
    traffic::ping(&mut open, b"before").await.unwrap();
    assert!(taken(&cluster).await > 0.0);

    let leaf = served_certificate(&stage).await;
    let mark = cluster.proxy(0).log().mark();
    fs::write(&next, authority.crl(&[&leaf]).unwrap()).unwrap();
    fs::rename(&next, &path).unwrap();
    traffic::closed(&mut open, wait::SOON).await.unwrap();
    for direction in ["outbound", "inbound"] {
        let line = cluster.proxy(0).log();
        let line = line.wait_from(mark, direction, ended(direction)).await;
        let error = "connection closed: peer certificate revoked by CRL";
        assert_eq!(line.field("error"), error);
    }
    let before = taken(&cluster).await;
    assert!(stage.web.ask(app.address, b"after").await.is_err());
    assert_eq!(taken(&cluster).await, before);
}
