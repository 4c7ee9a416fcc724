//! istiod goes and comes back: what is known stays in force, and only the difference is taken.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{sync::Arc, time::Duration};

use prost::Message as _;
use testkit::{
    Istiod, Mesh, NodeRun, Pod, PodSpec,
    istiod::{Kind, Stream},
    mesh::Policy,
    raw::Hello,
    stage::{Steered, vip, web_port},
    traffic::{self, Behaviour},
    wait,
};
use tokio::{net::TcpStream, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use xds_client::{
    local::Document,
    proto::workload::{TunnelProtocol, Workload},
};

const API: &str = "Kubernetes//Pod/shop/api";
const TERMINATIONS: &str = "istio_xds_connection_terminations_total";
/// Longer than the longest pause between attempts.
const A_PAUSE: Duration = Duration::from_secs(40);

/// Service `db` at address 2, in addition to `api`.
fn two_services(stage: &Steered) -> Mesh {
    let mut mesh = stage.mesh();
    mesh.service("db", vip(2), &[(80, 8080)], &[&stage.db]);
    mesh
}

/// A connection through the service that must survive.
async fn open(stage: &Steered) -> TcpStream {
    let mut stream = stage.web.connect(web_port(1)).await.unwrap();
    traffic::ping(&mut stream, b"open").await.unwrap();
    stream
}

/// Calls one after the other until told to stop; none may fail.
async fn call(web: Arc<Pod>, stop: CancellationToken) -> usize {
    let mut count = 0;
    while !stop.is_cancelled() {
        let answer = web.ask(web_port(1), b"hello").await;
        assert_eq!(answer.expect("no call fails"), b"hello");
        count += 1;
        // A client has some 28,000 ports, and each is in TIME_WAIT for a minute.
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    count
}

async fn connected(run: &NodeRun<'_>, value: f64) {
    let is = |now| now == value;
    run.proxy.metric("istio_xds_connected", &[], is).await;
}

/// The first response of a type on a stream.
fn first_sent(stream: &Stream, kind: Kind) -> &testkit::istiod::Sent {
    let mut sent = stream.sent.iter();
    sent.find(|sent| sent.type_url == kind.url()).unwrap()
}

/// A proxy that tells how many resources each response has changed.
async fn start_telling(stage: &Steered) -> NodeRun<'_> {
    let filter = "info,access=debug,culvert::node=debug";
    let options = stage.options().env("RUST_LOG", filter);
    stage.start_with(&options).await.unwrap()
}

/// How many workloads, services and policies the next response of a type changes, in the order of the log from `mark` on.
async fn changed(run: &NodeRun<'_>, mark: usize, kind: Kind) -> [String; 3] {
    let kind = format!("{kind:?}");
    let told = |line: &testkit::Line| {
        line.message.starts_with("the control plane told") && line.field("kind") == kind
    };
    let line = run.proxy.log().wait_from(mark, "what changed", told).await;
    ["workloads", "services", "policies"].map(|field| line.field(field).to_owned())
}

/// The certificate that `api` shows.
async fn certificate(stage: &Steered) -> Vec<u8> {
    let authority = stage.world.authority();
    let identity = authority.issue(&stage.web.spiffe_id()).unwrap();
    let from = stage.world.node(0).netns();
    let stream = Hello::new(&identity)
        .connect(from, stage.api.at(15008))
        .await
        .unwrap();
    let chain = stream.get_ref().1.peer_certificates().unwrap();
    chain[0].to_vec()
}

/// Case 14.
#[tokio::test]
async fn what_is_held_is_claimed_and_what_is_gone_goes() {
    let stage = Steered::new().unwrap();
    let mut mesh = two_services(&stage);
    mesh.policy(Policy::new("all", "Allow", vec![vec![]]));
    stage.istiod.set(&mesh);
    let _run = stage.start().await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let _other = stage.db.serve(8080, Behaviour::Echo).unwrap();
    assert!(stage.echoes(web_port(1)).await && stage.echoes(web_port(2)).await);
    let mut survivor = open(&stage).await;
    stage.istiod.stop().await;
    mesh.services.pop();
    mesh.workload(&stage.db).services.clear();
    let held = ["shop/db.shop.svc.cluster.local", API];
    let versions = held.map(|name| stage.istiod.version(Kind::Address, name));
    stage.istiod.set(&mesh);
    stage.istiod.start().unwrap();
    stage
        .istiod
        .until_within(A_PAUSE, "it returns", |streams| streams.get(1).map(drop))
        .await;
    stage.istiod.synced().await;
    let stream = stage.istiod.newest();
    let claimed = &stream
        .first(Kind::Address)
        .unwrap()
        .initial_resource_versions;
    assert_eq!(held.map(|name| claimed.get(name).cloned()), versions);
    assert_eq!(claimed.len(), 5, "{claimed:?}");
    let policies = stream.first(Kind::Authorization).unwrap();
    assert_eq!(policies.initial_resource_versions["shop/all"], "");
    for request in stream.requests.iter().skip(2) {
        assert!(request.initial_resource_versions.is_empty());
    }
    let difference = first_sent(&stream, Kind::Address);
    assert_eq!(difference.resources, ["Kubernetes//Pod/shop/db"]);
    assert_eq!(difference.removed, [held[0]]);
    assert!(!stage.echoes(web_port(2)).await, "it is gone");
    assert!(stage.echoes(web_port(1)).await);
    traffic::ping(&mut survivor, b"untouched").await.unwrap();
}

/// Case 15, and case 40 as far as one connection shows it.
#[tokio::test]
async fn an_empty_reconnect_response_is_accepted_and_changes_nothing() {
    let stage = Steered::new().unwrap();
    let run = start_telling(&stage).await;
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut survivor = open(&stage).await;
    stage.istiod.synced().await;
    assert_eq!(changed(&run, 0, Kind::Address).await, ["3", "1", "0"]);
    let mark = run.proxy.log().mark();
    stage.istiod.cut();
    stage.istiod.stream(1).await;
    stage.istiod.synced().await;
    for kind in Kind::ALL {
        assert_eq!(changed(&run, mark, kind).await, ["0"; 3], "{kind:?}");
    }
    let stream = stage.istiod.newest();
    let sent = first_sent(&stream, Kind::Address);
    assert!(
        sent.resources.is_empty() && sent.removed.is_empty(),
        "{sent:?}"
    );
    traffic::ping(&mut survivor, b"untouched").await.unwrap();
    assert!(stage.echoes(web_port(1)).await);
}

/// Case 40: another replica of istiod computes other versions of the same content.
#[tokio::test]
async fn the_same_content_under_other_versions_changes_nothing() {
    let stage = Steered::new().unwrap();
    let run = start_telling(&stage).await;
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut survivor = open(&stage).await;
    let before = certificate(&stage).await;
    let mark = run.proxy.log().mark();
    stage.istiod.reversion();
    stage.istiod.cut();
    stage.istiod.stream(1).await;
    stage.istiod.synced().await;
    assert_eq!(changed(&run, mark, Kind::Address).await, ["0"; 3]);
    let sent = stage.istiod.newest();
    assert_eq!(first_sent(&sent, Kind::Address).resources.len(), 4);
    traffic::ping(&mut survivor, b"untouched").await.unwrap();
    assert_eq!(certificate(&stage).await, before, "another certificate");
    // The new versions are what it holds now.
    let version = stage.istiod.version(Kind::Address, API);
    stage.istiod.cut();
    let stream = stage.istiod.stream(2).await;
    let claimed = &stream
        .first(Kind::Address)
        .unwrap()
        .initial_resource_versions;
    assert_eq!(claimed.get(API).cloned(), version);
}

/// Case 16.
#[tokio::test]
async fn a_connection_closed_for_its_age_is_back_within_a_second_under_traffic() {
    let stage = Steered::new().unwrap();
    let run = stage.start().await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    stage.istiod.synced().await;
    let mut survivor = open(&stage).await;
    let (mut calls, stop) = (JoinSet::new(), CancellationToken::new());
    calls.spawn(call(Arc::clone(&stage.web), stop.clone()));
    stage.istiod.goaway(Duration::from_secs(1));
    let [ended, returned] = stage
        .istiod
        .until("the next stream", |streams| {
            Some([streams[0].ended?, streams.get(1)?.opened])
        })
        .await;
    let gap = returned.saturating_duration_since(ended);
    assert!(gap < Duration::from_secs(1), "away for {gap:?}");
    stage.istiod.synced().await;
    connected(&run, 1.0).await;
    stop.cancel();
    assert!(calls.join_all().await[0] > 0);
    traffic::ping(&mut survivor, b"untouched").await.unwrap();
    assert!(run.proxy.is_ready().await);
}

/// Case 17.
#[tokio::test]
async fn without_istiod_all_that_is_known_keeps_working() {
    let stage = Steered::new().unwrap();
    let run = stage.start().await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    stage.istiod.synced().await;
    let mut survivor = open(&stage).await;
    let (mut calls, stop) = (JoinSet::new(), CancellationToken::new());
    calls.spawn(call(Arc::clone(&stage.web), stop.clone()));
    stage.istiod.stop().await;
    connected(&run, 0.0).await;
    let failures = [("reason", "ConnectionError")];
    let repeated = |count| count >= 3.0;
    run.proxy.metric(TERMINATIONS, &failures, repeated).await;
    assert!(run.proxy.is_ready().await, "readiness does not go back");
    assert!(stage.echoes(web_port(1)).await);
    let age = run.proxy.metrics().await.unwrap();
    let heard = age.sum("istio_xds_last_response_timestamp_seconds", &[]);
    assert!(heard > 0.0, "the age of what is known");
    // Nor does the CNI agent wait for istiod.
    let node = stage.world.node(0);
    let (late, session) = (node.pod(&PodSpec::captured("late")).unwrap(), &run.session);
    let answers = async {
        session.add(&late).await.unwrap().unwrap();
        session.del(late.uid()).await.unwrap().unwrap();
    };
    wait::within(Duration::from_secs(1), "the answer", answers).await;
    tokio::time::sleep(wait::outage()).await;
    assert!(run.proxy.is_ready().await, "nor does it later");

    stage.istiod.start().unwrap();
    stage.istiod.synced_within(A_PAUSE).await;
    connected(&run, 1.0).await;
    stop.cancel();
    assert!(calls.join_all().await[0] > 0);
    traffic::ping(&mut survivor, b"untouched").await.unwrap();
}

/// §2.6: each end of a stream has its class, and none stops the client.
#[tokio::test]
async fn ends_of_streams_are_counted_by_their_kind() {
    let stage = Steered::new().unwrap();
    let run = stage.start().await.unwrap();
    let ends = [
        ("Reconnect", Err(Status::cancelled("x"))),
        (
            "Reconnect",
            Err(Status::unavailable("transport is closing")),
        ),
        ("Error", Err(Status::internal("x"))),
        ("Complete", Ok(())),
    ];
    for (index, (reason, end)) in ends.into_iter().enumerate() {
        stage.istiod.synced_within(A_PAUSE).await;
        let labels = [("reason", reason)];
        let before = run
            .proxy
            .metrics()
            .await
            .unwrap()
            .sum(TERMINATIONS, &labels);
        stage.istiod.end_streams(end);
        let one_more = |count| count == before + 1.0;
        run.proxy.metric(TERMINATIONS, &labels, one_more).await;
        let returns = |streams: &[Stream]| streams.get(index + 1).map(drop);
        let what = "the next stream";
        stage.istiod.until_within(A_PAUSE, what, returns).await;
    }
    stage.istiod.synced_within(A_PAUSE).await;
    assert!(run.proxy.is_ready().await);
}

/// §1.4: pings tell that a connection is dead.
#[tokio::test]
async fn a_connection_on_which_nothing_comes_is_given_up() {
    let stage = Steered::new().unwrap();
    let run = stage.start().await.unwrap();
    stage.istiod.synced().await;
    connected(&run, 1.0).await;
    stage.istiod.stall(true, true);
    let gone = async || {
        let metrics = run.proxy.metrics().await.ok()?;
        (metrics.sum("istio_xds_connected", &[]) == 0.0).then_some(())
    };
    let limit = Duration::from_secs(60);
    wait::until(limit, "the stream is given up", gone).await;
    stage.istiod.stall(false, false);
    let returns = |streams: &[Stream]| streams.get(1).map(drop);
    stage
        .istiod
        .until_within(A_PAUSE, "it returns", returns)
        .await;
    stage.istiod.synced_within(A_PAUSE).await;
}

/// A mesh in a large cluster, whose pods have names as long as real ones.
fn crowded(mesh: &Mesh, count: u32) -> Document {
    let mut document = Document::from(mesh);
    let workloads = (0..count).map(|index| {
        let [_, address @ ..] = index.to_be_bytes();
        let name = format!("recommendation-service-7d9c8b6f5d-{index:06}");
        Workload {
            uid: format!("Kubernetes//Pod/production/{name}"),
            name,
            namespace: "production".to_owned(),
            addresses: vec![[&[11], &address[..]].concat()],
            tunnel_protocol: TunnelProtocol::Hbone.into(),
            ..Workload::default()
        }
    });
    // Before the services, as istiod does.
    let addresses = workloads.map(Into::into).chain(document.addresses);
    document.addresses = addresses.collect();
    document
}

/// Case 19.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_thousand_workloads_come_back_below_four_mebibytes() {
    let stage = Steered::new().unwrap();
    let run = stage.start().await.unwrap();
    stage.istiod.set(crowded(&two_services(&stage), 60_000));
    let limit = Duration::from_secs(120);
    stage.istiod.synced_within(limit).await;
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let _other = stage.db.serve(8080, Behaviour::Echo).unwrap();
    assert!(stage.echoes(web_port(2)).await);
    let mut survivor = open(&stage).await;

    stage.istiod.stop().await;
    let gone = "shop/db.shop.svc.cluster.local";
    stage.istiod.remove(Kind::Address, &[gone]);
    stage.istiod.start().unwrap();
    let returns = |streams: &[Stream]| streams.get(1).map(drop);
    stage
        .istiod
        .until_within(limit, "it returns", returns)
        .await;
    stage.istiod.synced_within(limit).await;
    let streams = stage.istiod.streams();
    assert_eq!(streams.len(), 2, "no attempt was refused");
    let size = streams[1].first(Kind::Address).unwrap().encoded_len();
    assert!(size <= 4 << 20, "{size} bytes");
    assert!(!stage.echoes(web_port(2)).await, "what is gone is gone");
    assert!(stage.echoes(web_port(1)).await);
    traffic::ping(&mut survivor, b"untouched").await.unwrap();
    assert!(run.proxy.is_ready().await);
}

/// A control plane that reads less than istiod does.
#[tokio::test]
async fn a_smaller_limit_than_expected_is_lived_with() {
    let stage = Steered::with(Istiod::options().request_limit(20_000)).unwrap();
    stage.istiod.set(crowded(&stage.mesh(), 500));
    let _run = stage.start().await.unwrap();
    stage.istiod.synced().await;
    stage.istiod.cut();
    let third = |streams: &[Stream]| streams.get(2).map(drop);
    stage
        .istiod
        .until_within(A_PAUSE, "the third stream", third)
        .await;
    stage.istiod.synced().await;
    let newest = stage.istiod.newest();
    let first = newest.first(Kind::Address).unwrap();
    assert!(first.initial_resource_versions.is_empty());
    assert_eq!(first_sent(&newest, Kind::Address).resources.len(), 504);
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert!(stage.echoes(web_port(1)).await);
}
