//! Certificates from istiod and istio-csr: what is asked for, what is accepted, and what happens while nobody signs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{fs, path::Path, sync::Arc, time::Duration};

use testkit::{
    Authority, Istiod, Line, NodeRun, Pod, PodSpec, ProxyOptions, World,
    istiod::{Flaw, Layout, Outcome, Signing},
    proxy::ADMIN_PORT,
    raw::{Hello, RawClient, RawServer},
    stage::{Steady, Steered},
    traffic::{self, Behaviour, Server},
    wait,
};
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};

const SECOND: Duration = Duration::from_secs(1);
/// For certificates that a test sees renewed, or expire.
const SHORT: Duration = Duration::from_secs(12);
/// Longer than SHORT, and than the pauses between a few attempts.
const A_WHILE: Duration = Duration::from_secs(30);

/// A mesh from one stand-in, certificates from another, as with istio-csr; `peer` is outside.
struct Stage {
    mesh: Steered,
    ca: Istiod,
    /// Where the authority lives.
    home: Arc<Pod>,
    peer: Arc<Pod>,
    app: Server,
}

impl Stage {
    fn new() -> Self {
        let mesh = Steered::new().unwrap();
        let node = mesh.world.node(0);
        let home = node.pod(&PodSpec::plain("istio-csr")).unwrap();
        let ca = Istiod::options().start(&mesh.world, &home).unwrap();
        let peer = node.pod(&PodSpec::plain("peer")).unwrap();
        let app = mesh.api.serve(8080, Behaviour::Echo).unwrap();
        Self {
            mesh,
            ca,
            home,
            peer,
            app,
        }
    }

    fn options(&self) -> ProxyOptions {
        self.mesh.options().certified_by(&self.ca)
    }

    async fn start(&self) -> NodeRun<'_> {
        self.mesh.start_with(&self.options()).await.unwrap()
    }

    /// Whether `api` gets through to `web`.
    async fn echoes(&self) -> bool {
        self.mesh.echoes(self.app.address).await
    }

    /// Asks until `web` gets its answer; how long that took.
    async fn until_echoed(&self, limit: Duration) -> Duration {
        let start = Instant::now();
        let echoed = async || self.echoes().await.then_some(());
        wait::until(limit, "web gets an answer", echoed).await;
        start.elapsed()
    }

    /// A foreign client with a certificate of `root`.
    async fn client(&self, root: &Authority) -> anyhow::Result<RawClient> {
        let identity = root.issue(&self.peer.spiffe_id())?;
        self.connect(&Hello::new(&identity)).await
    }

    async fn connect(&self, hello: &Hello) -> anyhow::Result<RawClient> {
        let to = self.mesh.api.at(15008);
        RawClient::connect(self.peer.netns(), to, hello).await
    }

    /// `web` calls the foreign peer, which wants to see a chain that leads to `root`.
    async fn calls_peer(&self, root: &Authority) {
        let mut mesh = testkit::Mesh::default();
        mesh.pod(&self.peer).protocol = "HBONE".to_owned();
        self.mesh.istiod.put(&mesh);
        self.mesh.istiod.synced().await;
        let identity = root.issue(&self.peer.spiffe_id()).unwrap();
        let server = RawServer::listen(&self.peer, &identity, root.root()).unwrap();
        let (call, taken) =
            tokio::join!(self.mesh.web.connect(self.peer.at(8080)), server.accept());
        call.unwrap();
        assert_eq!(taken.unwrap().client_id, Some(self.mesh.web.spiffe_id()));
    }
}

fn write(path: &Path, text: &str) {
    let aside = path.with_extension("new");
    fs::write(&aside, text).unwrap();
    fs::rename(&aside, path).unwrap();
}

/// Whether a line tells that there is no certificate, for this reason.
fn lacks(id: &str, reason: &str) -> impl Fn(&Line) -> bool {
    move |line| {
        line.message == "no certificate" && {
            line.field("id") == id && line.field("reason").contains(reason)
        }
    }
}

/// Cases 2, 6 and 39.
#[tokio::test]
async fn pods_talk_under_certificates_of_istiod() {
    let options = Istiod::options().token("s3cret-token");
    let stage = Steered::with(options).unwrap();
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let proxy = stage
        .options()
        .certified_by(&stage.istiod)
        .env("CA_HEADER_x-tenant", "s3cret-tenant")
        .env("XDS_HEADER_x-mesh", "other")
        .env("SECRET_TTL", "90m")
        .env("RUST_LOG", "debug");
    let run = stage.start_with(&proxy).await.unwrap();
    assert!(stage.echoes(app.address).await);

    for pod in [&stage.web, &stage.api, &stage.db] {
        let calls = stage.istiod.certified(&pod.spiffe_id(), 1).await;
        assert_eq!(calls.len(), 1, "one for each identity: {calls:?}");
        let call = &calls[0];
        assert_eq!(call.outcome(), Some(Outcome::Answered));
        let csr = call.csr.as_ref().unwrap();
        assert!(csr.is_p256 && csr.is_signed && csr.names_are_critical);
        assert_eq!(csr.uris, [pod.spiffe_id()]);
        let rest = (csr.subject_entries, csr.extensions, csr.other_names);
        assert_eq!(rest, (0, 1, 0));
        assert_eq!(call.validity_seconds, 5_400);
        assert_eq!(call.metadata.as_ref().unwrap().fields.len(), 1);
        assert_eq!(call.headers["authorization"], "Bearer s3cret-token");
        assert_eq!(call.headers["clusterid"], "Kubernetes");
        assert_eq!(call.headers["x-tenant"], "s3cret-tenant");
        assert!(!call.headers.contains_key("x-mesh"));
    }
    let log = run.proxy.log().tail(usize::MAX);
    assert!(log.contains("obtained a certificate"), "{log}");
    let metrics = run.proxy.get(15020, "/metrics").await.unwrap().body;
    let mut texts = vec![log, metrics];
    for path in ["/config_dump", "/live", "/debug/flows", "/debug/refusals"] {
        texts.push(run.proxy.get(ADMIN_PORT, path).await.unwrap().body);
    }
    for text in texts {
        assert!(!text.is_empty());
        for secret in ["s3cret", "PRIVATE KEY"] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

/// Case 3.
#[tokio::test]
async fn a_proxy_of_one_workload_takes_the_identity_that_it_is_given() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let [web, peer, home] =
        ["web", "peer", "istiod"].map(|name| node.pod(&PodSpec::plain(name)).unwrap());
    let istiod = Istiod::options().start(&world, &home).unwrap();
    let mut mesh = testkit::Mesh::of(&[&web]);
    mesh.workload(&web).protocol = "HBONE".to_owned();
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    let given = "spiffe://cluster.local/ns/shop/sa/another";
    istiod.take_callers_for(given);
    let root = Authority::new("mesh").unwrap();
    istiod.sign_by(Signing::by(root.duplicate().unwrap()));
    let proxy = ProxyOptions::new(&world, node)
        .certified_by(&istiod)
        .env("PROXY_MODE", "dedicated")
        .env("PROXY_WORKLOAD_INFO", "shop/web/web")
        .start_in(web.netns(), "dedicated")
        .unwrap();
    proxy.ready().await;
    let hello = Hello::new(&root.issue(&peer.spiffe_id()).unwrap());
    let client = RawClient::connect(peer.netns(), web.at(15008), &hello);
    let client = client.await.unwrap();
    assert_eq!(client.server_id.as_deref(), Some(given));
    let calls = istiod.certificate_calls();
    assert!(
        calls.iter().all(|call| call.metadata.is_none()),
        "{calls:?}"
    );
}

/// Cases 9 and 10. The foreign peers judge chains as ztunnel does, by the same library: as they are presented, against one root.
/// Envoy is asked where it is the waypoint.
#[tokio::test]
async fn every_layout_of_a_chain_is_understood() {
    for layout in [Layout::Separate, Layout::Concatenated, Layout::RootRepeated] {
        let stage = Stage::new();
        let [root, other, stranger] =
            ["root", "other", "stranger"].map(|name| Authority::new(name).unwrap());
        let signing = Signing::by(root.duplicate().unwrap()).trusting(&other);
        let signing = signing.below("outer").unwrap().below("inner").unwrap();
        stage.ca.sign_by(signing.layout(layout));
        let _run = stage.start().await;
        assert!(stage.echoes().await, "{layout:?}");
        stage.calls_peer(&root).await;
        for trusted in [&root, &other] {
            let identity = trusted.issue(&stage.peer.spiffe_id()).unwrap();
            let strict = Hello::new(&identity).trusting(root.root());
            let client = stage.connect(&strict).await.unwrap();
            assert_eq!(client.server_id, Some(stage.mesh.api.spiffe_id()));
            // Leaf and two intermediates; a root tells a peer nothing.
            assert_eq!(client.server_chain.len(), 3, "{layout:?}");
            assert!(!client.server_chain.contains(root.root()), "{layout:?}");
            let mut tunnel = client.tunnel(&stage.app.address.to_string()).await.unwrap();
            tunnel.ping(b"hello").await.unwrap();
        }
        assert!(stage.client(&stranger).await.is_err(), "{layout:?}");
    }
}

/// Cases 7 and 8: each pod appears while answers are wrong, and gets through once they are right.
#[tokio::test]
async fn wrong_answers_are_refused_and_asked_for_again() {
    let flaws = [
        (Flaw::Empty, "chain returned from CA is empty for: "),
        (Flaw::LeafAlone, "no root certificate present"),
        (
            Flaw::Names(vec!["spiffe://cluster.local/ns/shop/sa/x".to_owned()]),
            "did not find expected SAN: ",
        ),
        (Flaw::OtherKey, "does not fit the private key"),
        (Flaw::Expired, "expired certificate"),
        (Flaw::OtherRoot, "does not chain to a returned root"),
    ];
    let stage = Stage::new();
    let node = stage.mesh.world.node(0);
    let pods: Vec<_> = (0..flaws.len())
        .map(|index| node.pod(&PodSpec::captured(&format!("p{index}"))).unwrap())
        .collect();
    let everybody: Vec<&Pod> = pods
        .iter()
        .map(Arc::as_ref)
        .chain([&*stage.mesh.api])
        .collect();
    let options = stage.options();
    let run = NodeRun::start(&stage.mesh.world, node, &options, &everybody);
    let run = run.await.unwrap();
    for (pod, (flaw, reason)) in pods.iter().zip(flaws) {
        stage.ca.certified(&stage.mesh.api.spiffe_id(), 1).await;
        stage.ca.sign_wrongly(flaw.clone());
        stage.mesh.istiod.put(&testkit::Mesh::of(&[pod]));
        let id = pod.spiffe_id();
        run.proxy.log().wait(reason, lacks(&id, reason)).await;
        stage.ca.sign_wrongly(None);
        let answered = async || {
            let answer = pod.ask(stage.app.address, b"hello").await;
            answer.is_ok_and(|answer| answer == b"hello").then_some(())
        };
        wait::until(wait::SOON, &format!("an answer after {flaw:?}"), answered).await;
    }
}

/// Cases 4 and 5.
#[tokio::test]
async fn each_renewal_has_its_own_key_and_the_token_of_the_moment() {
    let stage = Stage::new();
    stage.ca.sign_for_at_most(SHORT);
    let token = stage.mesh.world.file("istio-token");
    write(&token, "first\n");
    let options = stage.options().env("AUTH_TOKEN", token.to_str().unwrap());
    let run = stage.mesh.start_with(&options).await.unwrap();
    let web = stage.mesh.web.spiffe_id();
    stage.ca.certified(&web, 1).await;
    write(&token, "second\n");
    let calls = stage.ca.certified(&web, 2).await;
    let shown = |index: usize| calls[index].headers["authorization"].as_str();
    assert_eq!((shown(0), shown(1)), ("Bearer first", "Bearer second"));
    assert_ne!(calls[0].public_key(), calls[1].public_key());

    write(&token, "");
    let told =
        |line: &Line| line.message.starts_with("renewal failed") && line.raw.contains("is empty");
    run.proxy.log().wait("the token is empty", told).await;
    assert!(stage.echoes().await, "what is held is good");
    write(&token, "third\n");
    let third = stage
        .ca
        .until_certified(A_WHILE, "the third token", |calls| {
            let mut calls = calls.iter();
            calls
                .find(|call| call.headers["authorization"] == "Bearer third")
                .cloned()
        });
    third.await;
    assert!(stage.echoes().await);
}

/// Cases 17 and 18.
#[tokio::test]
async fn without_an_authority_certificates_last_until_they_expire() {
    let stage = Stage::new();
    let root = Authority::new("root").unwrap();
    stage.ca.sign_by(Signing::by(root.duplicate().unwrap()));
    stage.ca.sign_for_at_most(SHORT);
    let db = stage.mesh.db.serve(8080, Behaviour::Echo).unwrap();
    let run = stage.start().await;
    let mut lasting = stage.mesh.web.connect(stage.app.address).await.unwrap();
    traffic::ping(&mut lasting, b"before").await.unwrap();
    let before = stage.client(&root).await.unwrap();

    let web = stage.mesh.web.spiffe_id();
    stage.ca.certified(&web, 1).await;
    stage.ca.stop().await;
    let held = Instant::now();
    let failed = |line: &Line| line.message.starts_with("renewal failed");
    run.proxy.log().wait("a failed renewal", failed).await;
    let during = stage.client(&root).await.unwrap();
    assert_eq!(during.server_chain, before.server_chain);
    assert!(stage.echoes().await);

    let mut last = held;
    while stage.client(&root).await.is_ok() {
        last = Instant::now();
        assert!(held.elapsed() < A_WHILE, "it is presented for ever");
        sleep(SECOND / 10).await;
    }
    let presented = last - held;
    assert!(presented < SHORT + SECOND, "{presented:?}");
    // As long as it was good.
    assert!(presented > SHORT - 3 * SECOND, "{presented:?}");
    // A pair that has no tunnel yet.
    assert!(!stage.mesh.echoes(db.address).await);
    let refused = |line: &Line| {
        line.scope.starts_with("access") && {
            line.field("error")
                .contains("cannot reach the certificate authority")
        }
    };
    run.proxy
        .log()
        .wait("the access log tells why", refused)
        .await;
    traffic::ping(&mut lasting, b"after").await.unwrap();

    stage.ca.start().unwrap();
    let answered = async || stage.mesh.echoes(db.address).await.then_some(());
    wait::until(5 * SECOND, "certificates are back", answered).await;
    let fresh = stage.client(&root).await.unwrap();
    assert_ne!(fresh.server_chain, before.server_chain);
    traffic::ping(&mut lasting, b"still").await.unwrap();
}

/// Case 17, under traffic whose every flow takes a handshake.
#[tokio::test]
async fn renewals_that_fail_for_three_quarters_of_a_life_lose_nothing() {
    let stage = Stage::new();
    let away = 9 * SECOND + wait::outage();
    let left = away / 3;
    stage.ca.sign_for_at_most(away + left);
    let options = stage
        .options()
        .env("POOL_MAX_STREAMS_PER_CONNECTION", "1")
        .env("POOL_UNUSED_RELEASE_TIMEOUT", "10ms");
    let run = stage.mesh.start_with(&options).await.unwrap();
    let ids = [stage.mesh.web.spiffe_id(), stage.mesh.api.spiffe_id()];
    for id in &ids {
        stage.ca.certified(id, 1).await;
    }
    let traffic = Steady::start(&stage.mesh.web, stage.app.address);
    stage.ca.stop().await;
    let back = Instant::now() + away;
    for id in &ids {
        let failed = |line: &Line| {
            line.message.starts_with("renewal failed") && line.field("id") == id.as_str()
        };
        // At 70 % of what was left at the latest, which was more than the authority stays away.
        let found = run.proxy.log().find(0, away, failed).await;
        assert!(found.is_some(), "no renewal of {id} was tried");
    }
    tokio::time::sleep_until(back).await;
    stage.ca.start().unwrap();
    for id in &ids {
        let limit = left + 5 * SECOND;
        stage.ca.certified_within(limit, id, 2).await;
    }
    traffic.end().await;
}

/// Case 19.
#[tokio::test]
async fn an_authority_may_be_away_at_the_start() {
    let stage = Stage::new();
    stage.ca.stop().await;
    let run = stage.start().await;
    let start = Instant::now();
    assert!(!stage.echoes().await);
    assert!(start.elapsed() < 15 * SECOND, "{:?}", start.elapsed());
    sleep(wait::outage()).await;
    assert!(run.proxy.is_ready().await);
    assert!(!stage.echoes().await);
    let page = run.proxy.get(ADMIN_PORT, "/live").await.unwrap().body;
    assert!(page.contains("fails</b>"), "{page:.2000}");
    stage.ca.start().unwrap();
    let took = stage.until_echoed(A_WHILE).await;
    assert!(took < 5 * SECOND, "{took:?}");
    // And what nobody asks for.
    let db = stage.mesh.db.spiffe_id();
    stage.ca.certified_within(10 * SECOND, &db, 1).await;
}

/// Case 20.
#[tokio::test]
async fn a_pod_that_istiod_does_not_know_yet_waits_a_moment() {
    let stage = Stage::new();
    let unknown = Status::unauthenticated("request impersonation authentication failure");
    // All three identities are asked for at once, and again.
    stage.ca.refuse_to_sign_next(&vec![unknown; 5]);
    let run = stage.start().await;
    let start = Instant::now();
    assert!(stage.echoes().await, "the first connection waits");
    assert!(start.elapsed() < 8 * SECOND, "{:?}", start.elapsed());
    let said = "signing gRPC error (Unauthenticated): request impersonation authentication failure";
    let told = |line: &Line| line.field("reason").contains(said);
    run.proxy.log().wait("what the server said", told).await;
}

/// Case 34: as istio-csr.
#[tokio::test]
async fn a_slow_authority_is_waited_for() {
    let stage = Stage::new();
    stage.ca.sign_after(8 * SECOND);
    stage.ca.sign_for_at_most(3600 * SECOND);
    let _run = stage.start().await;
    let start = Instant::now();
    assert!(stage.echoes().await);
    assert!(start.elapsed() < 10 * SECOND, "{:?}", start.elapsed());
    assert_eq!(
        stage.ca.certificate_calls().len(),
        3,
        "one for each identity"
    );
}

/// Cases 14 and 35: a call that is never answered. Its deadline and the pings are tested where the clock can be moved.
#[tokio::test]
async fn a_request_without_an_answer_bounds_the_wait_and_ends_with_the_proxy() {
    let stage = Stage::new();
    stage.ca.sign_after(3600 * SECOND);
    let run = stage.start().await;
    let web = stage.mesh.web.spiffe_id();
    let mine = |call: &testkit::istiod::CertificateCall| call.impersonated.as_ref() == Some(&web);
    stage
        .ca
        .until_certified(wait::SOON, "a request", |calls| {
            calls.iter().find(|call| mine(call)).map(drop)
        })
        .await;
    stage.ca.sign_after(Duration::ZERO);
    let start = Instant::now();
    assert!(!stage.echoes().await);
    let waited = start.elapsed();
    assert!(waited < 15 * SECOND, "{waited:?}");
    let refused = |line: &Line| line.field("error").contains("no certificate for");
    run.proxy
        .log()
        .wait("the access log tells why", refused)
        .await;
    let open = stage.ca.certificate_calls();
    let open: Vec<_> = open.iter().filter(|call| mine(call)).collect();
    assert_eq!(open.len(), 1, "never two at once: {open:#?}");
    assert!(open[0].is_open());
    drop(run);
    let ended = stage
        .ca
        .until_certified(wait::SOON, "the request ends", |calls| {
            calls.iter().find(|call| mine(call))?.outcome()
        });
    assert_eq!(ended.await, Outcome::Cancelled);
}

/// Case 35: istio-csr ends connections that are pinged more often than every five minutes, and any on which nothing is asked.
/// istiod, whose stream stays open meanwhile, is pinged every 30 s, so that the count is known to count.
#[tokio::test]
async fn the_authority_is_not_pinged_whether_it_answers_or_not() {
    let stage = Stage::new();
    let node = stage.mesh.world.node(0);
    let late = node.pod(&PodSpec::captured("late")).unwrap();
    let run = stage.start().await;
    assert!(stage.echoes().await);
    // An idle connection, and a call on it that is not answered.
    stage.ca.sign_after(3600 * SECOND);
    run.session.add(&late).await.unwrap().unwrap();
    stage.mesh.istiod.put(&testkit::Mesh::of(&[&late]));
    let id = late.spiffe_id();
    let asked = stage.ca.until_certified(wait::SOON, "a call", |calls| {
        let mut calls = calls.iter();
        let call = calls.find(|call| call.impersonated.as_ref() == Some(&id))?;
        call.is_open().then_some(())
    });
    asked.await;

    let pinged = async || (stage.mesh.istiod.pings() > 0).then_some(());
    wait::until(2 * A_WHILE, "istiod is pinged", pinged).await;
    sleep(5 * SECOND).await;
    assert_eq!(stage.ca.pings(), 0);
}

/// Case 23: the trust roots of the server, not of the mesh.
#[tokio::test]
async fn new_trust_roots_of_the_server_count_at_the_next_request() {
    let stage = Stage::new();
    stage.ca.sign_for_at_most(SHORT);
    let run = stage.start().await;
    let web = stage.mesh.web.spiffe_id();
    let first = stage.ca.certified(&web, 1).await[0].connection;
    stage.ca.replace_root().unwrap();
    let second = stage.ca.certified(&web, 2).await[1].connection;
    assert_ne!(first, second, "the old connection is not used on");

    // A connection that the server ends in order is replaced without a failure.
    stage.ca.goaway(Duration::ZERO);
    stage.ca.certified(&web, 3).await;
    let failures = |line: &Line| line.message.starts_with("renewal failed");
    assert_eq!(run.proxy.log().since(0, failures), []);

    fs::write(stage.ca.root_file(), "garbage").unwrap();
    stage.ca.cut();
    stage.ca.certified(&web, 4).await;
    assert_eq!(run.proxy.log().since(0, failures), []);
}

/// The network loses its way: nothing is refused, nothing answers, and a connection is open at the time.
#[tokio::test]
async fn a_request_into_the_void_does_not_outlast_the_void() {
    let stage = Stage::new();
    let node = stage.mesh.world.node(0);
    let late = node.pod(&PodSpec::captured("late")).unwrap();
    let run = stage.start().await;
    run.session.add(&late).await.unwrap().unwrap();
    stage.until_echoed(wait::SOON).await;
    let link = |state: &str| {
        let command = format!("link set eth0 {state}\n");
        let home = stage.home.netns();
        home.command("ip", &["-batch", "-"], &command).unwrap();
    };
    link("down");
    stage.mesh.istiod.put(&testkit::Mesh::of(&[&late]));
    // Over the connection that is open, and then over none.
    let id = late.spiffe_id();
    let unacknowledged = lacks(&id, "");
    let told = run.proxy.log().find(0, A_WHILE, unacknowledged).await;
    told.expect("the connection is given up");
    // The kernel would send again after 51 s.
    sleep(8 * SECOND).await;
    link("up");
    let up = Instant::now();
    let answered = async || {
        let answer = late.ask(stage.app.address, b"hello").await;
        answer.is_ok_and(|answer| answer == b"hello").then_some(())
    };
    wait::until(15 * SECOND, "a certificate for `late`", answered).await;
    assert!(up.elapsed() < 12 * SECOND, "{:?}", up.elapsed());
}

/// What is wrong with a request does not get better by itself: connections are not kept waiting for it.
#[tokio::test]
async fn a_refused_request_fails_connections_at_once() {
    let stage = Stage::new();
    stage
        .ca
        .refuse_to_sign(Status::invalid_argument("CSR signing error (TTL too long)"));
    let run = stage.start().await;
    let web = stage.mesh.web.spiffe_id();
    let calls = stage.ca.certified(&web, 1).await;
    let refused = Outcome::Refused(Code::InvalidArgument);
    assert_eq!(calls[0].outcome(), Some(refused));
    let told = lacks(
        &web,
        "signing gRPC error (InvalidArgument): CSR signing error (TTL too long)",
    );
    run.proxy.log().wait("what the server said", told).await;
    let start = Instant::now();
    assert!(!stage.echoes().await);
    assert!(start.elapsed() < 8 * SECOND, "{:?}", start.elapsed());
    sleep(SECOND).await;
    stage.ca.refuse_to_sign(None);
    stage.until_echoed(A_WHILE).await;
}
