//! Certificates of a real OpenBao that come by way of an authority in front, as with istio-csr and cert-manager.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{sync::Arc, time::Duration};

use testkit::{
    Cluster, Istiod, Mesh, OpenBao, Pod, PodSpec, ProxyOptions, World,
    istiod::{CertificateCall, Outcome},
    openbao,
    stage::Steady,
    traffic::{Behaviour, Server},
};
use tokio::time::Instant;

/// `web`, the authority in front and OpenBao on one node, `api` on another. Each flow has a TLS connection of its own.
struct Stage {
    world: World,
    web: Arc<Pod>,
    api: Arc<Pod>,
    /// Outside.
    peer: Arc<Pod>,
    front: Istiod,
    bao: OpenBao,
    app: Server,
}

impl Stage {
    /// The server is set up with a root and an intermediate `one`.
    async fn new(sealable: bool) -> Self {
        let world = World::new(2).unwrap();
        let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        let api = world.node(1).pod(&PodSpec::captured("api")).unwrap();
        let [home, outside, peer] = ["openbao", "istio-csr", "peer"]
            .map(|name| world.node(0).pod(&PodSpec::plain(name)).unwrap());
        let mesh = Mesh::of(&[&web, &api]);
        mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
        let app = api.serve(8080, Behaviour::Echo).unwrap();
        let bao = if sealable {
            OpenBao::sealable(&world, &home).await.unwrap()
        } else {
            OpenBao::dev(&world, &home).await.unwrap()
        };
        bao.set_up("one").await.unwrap();
        let front = Istiod::options().start(&world, &outside).unwrap();
        front.sign_through(bao.issuer(&world, &outside).await.unwrap());
        Self {
            world,
            web,
            api,
            peer,
            front,
            bao,
            app,
        }
    }

    /// Proxies with certificates of this life.
    async fn start(&self, ttl: u64) -> Cluster<'_> {
        self.front.sign_for_at_most(Duration::from_secs(ttl));
        let options = |node: &testkit::Node| {
            ProxyOptions::new(&self.world, node)
                .certified_by(&self.front)
                .env("POOL_MAX_STREAMS_PER_CONNECTION", "1")
                .env("POOL_UNUSED_RELEASE_TIMEOUT", "10ms")
                .env("TRUST_BUNDLE_GRACE", &format!("{}s", GRACE.as_secs()))
        };
        Cluster::run(&self.world, options, &[&self.web, &self.api])
            .await
            .unwrap()
    }

    fn ids(&self) -> [String; 2] {
        [self.web.spiffe_id(), self.api.spiffe_id()]
    }

    async fn echoes(&self) -> bool {
        let answer = self.web.ask(self.app.address, b"hello").await;
        answer.is_ok_and(|answer| answer == b"hello")
    }

    /// Waits until both got a certificate that they ask for from now on.
    async fn renewed(&self) {
        let start = Instant::now();
        let since = |calls: &[CertificateCall]| {
            let answered = |id: &String| {
                calls.iter().any(|call| {
                    let mine = call.impersonated.as_ref() == Some(id);
                    mine && call.came > start && call.outcome() == Some(Outcome::Answered)
                })
            };
            self.ids().iter().all(answered).then_some(())
        };
        let limit = Duration::from_secs(25);
        self.front.until_certified(limit, "renewals", since).await;
    }

    /// Both were issued something by this one.
    async fn issued(&self, issuer: &str) {
        self.bao.until_issued(&self.ids(), issuer, 1).await;
    }

    /// A foreign peer with a certificate of the same server gets through, and sees one of the same intermediate.
    async fn welcomes_a_peer(&self) {
        self.bao.visit(&self.peer, &self.api, &self.app).await;
    }

    fn traffic(&self) -> Steady {
        Steady::start(&self.web, self.app.address)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_outlasts_a_sealed_server_behind_the_authority() {
    let stage = Stage::new(true).await;
    let cluster = stage.start(8).await;
    assert!(stage.echoes().await);
    let log = cluster.proxy(0).log();
    let line = log
        .wait("the flow is told", |line| {
            line.is_access("connection complete") && line.field("error").is_empty()
        })
        .await;
    let [web, api] = stage.ids();
    let told = (line.field("src.identity"), line.field("dst.identity"));
    assert_eq!(told, (&*web, &*api));
    for issued in stage.bao.issued().await.unwrap() {
        assert!(stage.ids().contains(&issued.id), "{issued:?}");
        assert_eq!(issued.issuer, "mesh one");
    }

    stage.welcomes_a_peer().await;

    let traffic = stage.traffic();
    stage.renewed().await;
    stage.bao.seal().await.unwrap();
    let failed = log.wait("a failed renewal", |line| {
        let said = "signing gRPC error (Internal): failed to sign certificate request";
        line.message.starts_with("renewal failed") && line.raw.contains(said)
    });
    failed.await;
    assert!(stage.echoes().await, "what is held is good");
    stage.bao.unseal().await.unwrap();
    stage.renewed().await;
    traffic.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roots_are_replaced_behind_the_authority_under_traffic() {
    let stage = Stage::new(false).await;
    let _cluster = stage.start(5).await;
    let traffic = stage.traffic();
    stage.issued("mesh one").await;

    // It is trusted before it signs: pods hear of a root with their next certificate.
    stage.bao.add_root("two").await.unwrap();
    stage.renewed().await;
    stage.bao.add_intermediate("two").await.unwrap();
    stage.renewed().await;
    stage.issued("mesh two").await;
    stage.welcomes_a_peer().await;
    for engine in [openbao::MESH, openbao::ROOT] {
        stage.bao.remove_old_issuers(engine).await.unwrap();
    }
    // The old root is trusted no longer by the end.
    stage.renewed().await;
    tokio::time::sleep(GRACE + Duration::from_secs(1)).await;
    assert!(stage.echoes().await);
    traffic.end().await;
}

/// For how long a root is trusted that is gone.
const GRACE: Duration = Duration::from_secs(2);
