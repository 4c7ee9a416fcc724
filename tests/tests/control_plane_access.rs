//! The way to istiod: names, roots, tokens and headers, and what happens while it cannot be gone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{fs, path::Path, time::Duration};

use testkit::{
    Istiod, IstiodOptions, Proxy, ProxyOptions, World, istiod::PORT, stage::Steered, wait,
};
use tonic::Status;

const TERMINATIONS: &str = "istio_xds_connection_terminations_total";
/// Longer than the longest pause between attempts.
const A_PAUSE: Duration = Duration::from_secs(40);

/// A stand-in on the loopback interface of the proxy itself, where `localhost` leads.
fn on_loopback(world: &World, names: &[&str]) -> (Istiod, ProxyOptions) {
    let node = world.node(0);
    let at = ([127, 0, 0, 1], PORT).into();
    let options: IstiodOptions = Istiod::options().valid_for(names);
    let istiod = options
        .start_at(node.proxy_netns(), at, world.directory())
        .unwrap();
    let options = ProxyOptions::new(world, node)
        .follow(&istiod)
        .env("XDS_ADDRESS", &format!("https://localhost:{PORT}"));
    (istiod, options)
}

/// Waits until so many attempts have failed for this reason.
async fn failed(proxy: &Proxy<'_>, reason: &str, times: f64) {
    let enough = |count| count >= times;
    proxy
        .metric(TERMINATIONS, &[("reason", reason)], enough)
        .await;
}

/// Waits until all is sent and accepted, also when the next attempt is far.
async fn synced(istiod: &Istiod) {
    istiod.synced_within(A_PAUSE).await;
}

fn write(path: &Path, text: &str) {
    let aside = path.with_extension("new");
    fs::write(&aside, text).unwrap();
    fs::rename(&aside, path).unwrap();
}

/// Case 3.
#[tokio::test]
async fn the_cluster_id_is_told_in_a_header_and_in_metadata() {
    let options = Istiod::options().token("secret").cluster("c1");
    let stage = Steered::with(options.namespace("istio-system")).unwrap();
    let options = stage
        .options()
        .env("ISTIO_META_CLUSTER_ID", "c1")
        .env("ISTIO_METAJSON_LABELS", r#"{"app": "culvert"}"#);
    let _proxy = options.start(stage.world.node(0)).unwrap();
    synced(&stage.istiod).await;
    let stream = stage.istiod.newest();
    assert_eq!(stream.headers["clusterid"], "c1");
    assert_eq!(stream.headers["authorization"], "Bearer secret");
    assert_eq!(stream.headers["content-type"], "application/grpc");
    assert_eq!(stream.headers["te"], "trailers");
    assert_eq!(stream.metadata_text("CLUSTER_ID"), Some("c1"));
    let labels = &stream.metadata().unwrap().fields["LABELS"];
    assert!(format!("{labels:?}").contains("culvert"), "{labels:?}");
    assert_eq!(stage.istiod.streams().len(), 1);
}

/// Case 4.
#[tokio::test]
async fn custom_headers_are_sent_and_bad_ones_stop_the_start() {
    let stage = Steered::new().unwrap();
    let options = stage.options().env("XDS_HEADER_x-foo", "bar");
    let _proxy = options.start(stage.world.node(0)).unwrap();
    synced(&stage.istiod).await;
    assert_eq!(stage.istiod.newest().headers["x-foo"], "bar");

    let bad = stage.options().env("XDS_HEADER_bad name", "x");
    let mut proxy = bad.start(stage.world.node(0)).unwrap();
    let end = proxy.exit(wait::SOON).await.unwrap();
    assert_eq!(end.code(), Some(1));
    let text = proxy.log().tail(20);
    assert!(text.contains("XDS_HEADER_bad name"), "{text}");
    assert_eq!(stage.istiod.streams().len(), 1);
}

/// Case 5.
#[tokio::test]
async fn a_replaced_token_is_used_for_the_next_stream() {
    let stage = Steered::new().unwrap();
    let token = stage.world.file("token");
    write(&token, "first\n");
    let options = stage.options().env("AUTH_TOKEN", token.to_str().unwrap());
    let proxy = options.start(stage.world.node(0)).unwrap();
    synced(&stage.istiod).await;
    let used = |stream: testkit::istiod::Stream| stream.headers["authorization"].clone();
    assert_eq!(used(stage.istiod.newest()), "Bearer first");
    write(&token, "second");
    stage.istiod.cut();
    assert_eq!(used(stage.istiod.stream(1).await), "Bearer second");
    synced(&stage.istiod).await;

    write(&token, "");
    stage.istiod.cut();
    failed(&proxy, "Error", 1.0).await;
    assert_eq!(stage.istiod.streams().len(), 2, "no stream without a token");
    write(&token, "third");
    synced(&stage.istiod).await;
    assert_eq!(used(stage.istiod.newest()), "Bearer third");
}

/// Case 6.
#[tokio::test]
async fn a_replaced_root_is_used_for_the_next_connection() {
    let stage = Steered::new().unwrap();
    let proxy = stage.options().start(stage.world.node(0)).unwrap();
    synced(&stage.istiod).await;
    stage.istiod.replace_root().unwrap();
    stage.istiod.cut();
    stage.istiod.stream(1).await;
    synced(&stage.istiod).await;
    let errors = [("reason", "ConnectionError")];
    let metrics = proxy.metrics().await.unwrap();
    assert!(metrics.sum(TERMINATIONS, &errors) < 1.0, "{metrics:?}");
}

#[tokio::test]
async fn a_root_that_comes_late_is_waited_for_and_used_soon() {
    let stage = Steered::new().unwrap();
    let late = stage.world.file("late-root.pem");
    let options = stage.options().env("XDS_ROOT_CA", late.to_str().unwrap());
    let proxy = options.start(stage.world.node(0)).unwrap();
    failed(&proxy, "Error", 1.0).await;
    let told = |line: &testkit::Line| line.level == "warn" && line.raw.contains("late-root.pem");
    proxy.log().wait("which file is missing", told).await;
    assert!(!proxy.is_ready().await);
    let root = fs::read_to_string(stage.istiod.root_file()).unwrap();
    write(
        &late,
        &format!("-----BEGIN CERTIFICATE-----\nbm90IG9uZQ==\n-----END CERTIFICATE-----\n{root}"),
    );
    synced(&stage.istiod).await;
}

/// Case 7.
#[tokio::test]
async fn an_alternative_name_is_accepted_and_never_asked_for() {
    let world = World::new(1).unwrap();
    let (istiod, options) = on_loopback(&world, &["istiod.example"]);
    let strict = options.start(world.node(0)).unwrap();
    failed(&strict, "ConnectionError", 2.0).await;
    assert!(istiod.streams().is_empty(), "the name was not checked");
    drop(strict);

    let lenient = options.env("ALT_XDS_HOSTNAME", "istiod.example");
    let _proxy = lenient.start(world.node(0)).unwrap();
    synced(&istiod).await;
    let asked_for = istiod.newest().server_name;
    assert_eq!(asked_for.as_deref(), Some("localhost"));
}

#[tokio::test]
async fn an_alternative_name_does_not_replace_the_host() {
    let world = World::new(1).unwrap();
    let (istiod, options) = on_loopback(&world, &["localhost"]);
    let options = options.env("ALT_XDS_HOSTNAME", "istiod.example");
    let _proxy = options.start(world.node(0)).unwrap();
    synced(&istiod).await;
}

#[tokio::test]
async fn a_foreign_root_is_not_trusted() {
    let stage = Steered::new().unwrap();
    let stranger = testkit::Authority::new("a stranger").unwrap();
    let root = stage.world.file("stranger.pem");
    fs::write(&root, stranger.root_pem()).unwrap();
    let options = stage.options().env("XDS_ROOT_CA", root.to_str().unwrap());
    let proxy = options.start(stage.world.node(0)).unwrap();
    failed(&proxy, "ConnectionError", 2.0).await;
    assert!(stage.istiod.streams().is_empty());
}

/// Case 18.
#[tokio::test]
async fn refused_attempts_are_counted_spaced_out_and_end_with_the_refusal() {
    let stage = Steered::new().unwrap();
    stage
        .istiod
        .refuse(Status::unauthenticated("authentication failure"));
    let proxy = stage.options().start(stage.world.node(0)).unwrap();
    failed(&proxy, "ConnectionError", 4.0).await;
    let warned = |line: &testkit::Line| line.raw.contains("authentication failure");
    proxy.log().wait("the reason", warned).await;
    assert!(!proxy.is_ready().await);
    // Pauses are drawn from ever wider ranges: without them there would be thousands by now.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let attempts = stage.istiod.streams().len();
    assert!((4..=12).contains(&attempts), "{attempts} attempts");
    stage.istiod.refuse(None);
    synced(&stage.istiod).await;
    let newest = stage.istiod.newest();
    assert!(newest.is_open() && newest.sent.len() >= 2, "{newest:?}");
}
