//! Certificates from the PKI engine of a real OpenBao.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::json;
use testkit::{
    Cluster, Mesh, OpenBao, Pod, PodSpec, ProxyOptions, World, openbao,
    stage::Steady,
    traffic::{self, Behaviour, Server},
    wait,
};
use tokio::time::Instant;

/// `web` on one node, `api` on another; OpenBao beside `web`.
struct Stage {
    world: World,
    web: Arc<Pod>,
    api: Arc<Pod>,
    home: Arc<Pod>,
    app: Server,
}

type Variables = Vec<(String, String)>;

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        let api = world.node(1).pod(&PodSpec::captured("api")).unwrap();
        let home = world.node(0).pod(&PodSpec::plain("openbao")).unwrap();
        let mesh = Mesh::of(&[&web, &api]);
        mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
        let app = api.serve(8080, Behaviour::Echo).unwrap();
        Self {
            world,
            web,
            api,
            home,
            app,
        }
    }

    /// Proxies that log in with these variables, by node, and have certificates of this life. Each flow has a TLS
    /// connection of its own.
    async fn start(&self, bao: &OpenBao, logins: [&Variables; 2], ttl: &str) -> Cluster<'_> {
        let options = |node: &testkit::Node| {
            let index = usize::from(node.name() != self.world.node(0).name());
            bao.certify(ProxyOptions::new(&self.world, node), logins[index])
                .env("SECRET_TTL", ttl)
                .env("POOL_MAX_STREAMS_PER_CONNECTION", "1")
                .env("POOL_UNUSED_RELEASE_TIMEOUT", "10ms")
                .env("TRUST_BUNDLE_GRACE", "2s")
        };
        let cluster = Cluster::run(&self.world, options, &[&self.web, &self.api]).await;
        cluster.unwrap_or_else(|error| panic!("{error:#}\n{}", bao.log()))
    }

    async fn echoes(&self) -> bool {
        let answer = self.web.ask(self.app.address, b"hello").await;
        answer.is_ok_and(|answer| answer == b"hello")
    }

    /// Both identities.
    fn ids(&self) -> [String; 2] {
        [self.web.spiffe_id(), self.api.spiffe_id()]
    }

    /// Waits until both have been issued `count` certificates in all by an issuer of this name.
    async fn issued(&self, bao: &OpenBao, issuer: &str, count: usize) {
        bao.until_issued(&self.ids(), issuer, count).await;
    }

    fn traffic(&self) -> Steady {
        Steady::start(&self.web, self.app.address)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_pods_talk_once_the_role_lets_them() {
    let stage = Stage::new();
    let bao = OpenBao::dev(&stage.world, &stage.home).await.unwrap();
    bao.set_up("one").await.unwrap();
    bao.set_role(json!({ "use_csr_sans": false }))
        .await
        .unwrap();
    let jwt = bao.jwt().await.unwrap();
    let kubernetes = bao.kubernetes(&stage.world, &stage.home).await;
    let (account, _reviews) = kubernetes.unwrap();
    let cluster = stage.start(&bao, [&jwt, &account], "1h").await;
    let log = cluster.proxy(0).log();
    log.wait("a certificate without the name is refused", |line| {
        line.raw.contains("did not find expected SAN")
    })
    .await;

    let elsewhere = json!({ "allowed_uri_sans": "spiffe://cluster.local/ns/other/*" });
    bao.set_role(elsewhere).await.unwrap();
    let refused = log.wait("the role refuses", |line| {
        line.raw.contains("status 400 (the role refuses)")
    });
    let (echoes, _) = tokio::join!(stage.echoes(), refused);
    assert!(!echoes);

    bao.set_role(json!({})).await.unwrap();
    wait::until(Duration::from_secs(20), "the pods talk", async || {
        stage.echoes().await.then_some(())
    })
    .await;
    let line = log
        .wait("the flow is told", |line| {
            line.is_access("connection complete") && line.field("error").is_empty()
        })
        .await;
    let [web, api] = stage.ids();
    assert_eq!(
        (line.field("src.identity"), line.field("dst.identity")),
        (&*web, &*api)
    );
    // And with a foreign peer below the same root.
    bao.visit(&stage.home, &stage.api, &stage.app).await;
    let issued: BTreeSet<_> = bao
        .issued()
        .await
        .unwrap()
        .into_iter()
        .map(|it| it.issuer)
        .collect();
    assert_eq!(issued, ["mesh one".to_owned()].into());
    for (_, value) in jwt.iter().chain(&account) {
        let Ok(secret) = std::fs::read_to_string(value) else {
            continue;
        };
        for node in 0..2 {
            let told = cluster
                .proxy(node)
                .log()
                .since(0, |line| line.raw.contains(&secret));
            assert!(told.is_empty(), "{told:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workloads_that_log_in_for_themselves_have_their_own_names_only() {
    let stage = Stage::new();
    let other = PodSpec::captured("other").namespace("elsewhere");
    let other = stage.world.node(0).pod(&other).unwrap();
    let mesh = Mesh::of(&[&stage.web, &stage.api, &other]);
    mesh.write(&ProxyOptions::mesh_file(&stage.world)).unwrap();
    let bao = OpenBao::dev(&stage.world, &stage.home).await.unwrap();
    bao.set_up("one").await.unwrap();
    let accounts = bao.workload_accounts(&stage.world, &stage.home, "shop");
    let accounts = accounts.await.unwrap();
    let [web, api] = stage.ids();
    assert!(accounts.may_sign(&bao, &stage.web, &web).await.unwrap());
    assert!(!accounts.may_sign(&bao, &stage.web, &api).await.unwrap());

    let logins = [&accounts.from_kubernetes, &accounts.from_directory];
    let cluster = stage.start(&bao, logins, "5s").await;
    let log = cluster.proxy(1).log();
    log.wait("the token of api is not there yet", |line| {
        line.raw.contains("cannot read") && line.raw.contains("shop/api")
    })
    .await;
    accounts.admit(&stage.api).unwrap();
    wait::until(Duration::from_secs(20), "the pods talk", async || {
        stage.echoes().await.then_some(())
    })
    .await;
    let traffic = stage.traffic();
    stage.issued(&bao, "mesh one", 3).await;
    traffic.end().await;

    // The node's own account gets no token of this one.
    let refused = "status 403 (may the proxy's account create serviceaccounts/token?)";
    let log = cluster.proxy(0).log();
    log.wait("no token of another namespace", |line| {
        line.raw.contains(refused) && line.raw.contains("elsewhere/other")
    })
    .await;
    let issued = bao.issued().await.unwrap().into_iter().map(|it| it.id);
    assert_eq!(issued.collect::<BTreeSet<_>>(), [web, api].into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewals_lose_nothing_even_if_tokens_are_revoked() {
    let stage = Stage::new();
    let bao = OpenBao::dev(&stage.world, &stage.home).await.unwrap();
    bao.set_up("one").await.unwrap();
    let approle = bao.approle().await.unwrap();
    let _cluster = stage.start(&bao, [&approle; 2], "5s").await;
    let traffic = stage.traffic();
    stage.issued(&bao, "mesh one", 3).await;
    bao.revoke_tokens().await.unwrap();
    stage.issued(&bao, "mesh one", 5).await;
    traffic.end().await;
}

/// The shortest life that is of use in a cluster: renewed a good half minute after each issue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_a_minute_are_renewed_in_time_under_traffic() {
    let stage = Stage::new();
    let bao = OpenBao::dev(&stage.world, &stage.home).await.unwrap();
    bao.set_up("one").await.unwrap();
    let token = bao.token().await.unwrap();
    let cluster = stage.start(&bao, [&token; 2], "60s").await;
    stage.issued(&bao, "mesh one", 1).await;
    let traffic = stage.traffic();
    let first = Instant::now();
    let renewed = async || {
        let issued = bao.issued().await.unwrap();
        let twice = |id: &String| issued.iter().filter(|one| one.id == *id).count() >= 2;
        stage.ids().iter().all(twice).then_some(())
    };
    wait::until(Duration::from_secs(50), "both are renewed", renewed).await;
    // After half of what was left of them at the earliest, and of the backdated life there is more.
    assert!(
        first.elapsed() > Duration::from_secs(25),
        "{:?}",
        first.elapsed()
    );
    traffic.end().await;
    for node in 0..2 {
        let failed = |line: &testkit::Line| line.message.starts_with("renewal failed");
        assert_eq!(cluster.proxy(node).log().since(0, failed), []);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_outlasts_a_sealed_server() {
    let stage = Stage::new();
    let bao = OpenBao::sealable(&stage.world, &stage.home).await.unwrap();
    bao.set_up("one").await.unwrap();
    let token = bao.token().await.unwrap();
    let cluster = stage.start(&bao, [&token; 2], "8s").await;
    let sealed = |what: &'static str| {
        let log = cluster.proxy(0).log();
        let mark = log.mark();
        log.wait_from(mark, what, move |line| {
            line.raw.contains(what) && line.raw.contains("sealed")
        })
    };
    let traffic = stage.traffic();
    stage.issued(&bao, "mesh one", 1).await;
    bao.seal().await.unwrap();
    sealed("renewal failed").await;
    bao.unseal().await.unwrap();
    stage.issued(&bao, "mesh one", 2).await;
    traffic.end().await;

    // For longer than a certificate lives: what is open stays, what is new fails, and recovers by itself.
    let mut open = stage.web.connect(stage.app.address).await.unwrap();
    traffic::ping(&mut open, b"before").await.unwrap();
    bao.seal().await.unwrap();
    sealed("no certificate").await;
    tokio::time::sleep(wait::outage()).await;
    assert!(!stage.echoes().await);
    tokio::time::sleep(wait::outage()).await;
    traffic::ping(&mut open, b"meanwhile").await.unwrap();
    bao.unseal().await.unwrap();
    wait::until(Duration::from_secs(5), "the pods talk again", async || {
        stage.echoes().await.then_some(())
    })
    .await;
    traffic::ping(&mut open, b"after").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn issuers_are_replaced_under_traffic() {
    let stage = Stage::new();
    let bao = OpenBao::dev(&stage.world, &stage.home).await.unwrap();
    bao.set_up("one").await.unwrap();
    let token = bao.token().await.unwrap();
    let cluster = stage.start(&bao, [&token; 2], "5s").await;
    let roots = async |count: f64| {
        for node in 0..2 {
            let labels = [("source", "openbao")];
            let name = "istio_trust_bundle_roots";
            let fits = |roots: f64| roots.total_cmp(&count).is_eq();
            cluster.proxy(node).metric(name, &labels, fits).await;
        }
    };
    let traffic = stage.traffic();
    stage.issued(&bao, "mesh one", 1).await;
    bao.add_intermediate("two").await.unwrap();
    stage.issued(&bao, "mesh two", 1).await;

    bao.add_root("three").await.unwrap();
    roots(2.0).await;
    bao.add_intermediate("three").await.unwrap();
    stage.issued(&bao, "mesh three", 1).await;

    for engine in [openbao::MESH, openbao::ROOT] {
        bao.remove_old_issuers(engine).await.unwrap();
    }
    roots(1.0).await;
    stage.issued(&bao, "mesh three", 3).await;
    traffic.end().await;
}
