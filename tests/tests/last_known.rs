//! What istiod told last is on disk, and served after a restart while istiod is away (`STATE_DIR`).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

use nix::sys::signal::Signal;
use testkit::{
    Authority, Mesh, NodeRun, ProxyOptions,
    istiod::{Kind, Signing, Stream},
    mesh::{Match, Policy},
    proxy::Proxy,
    stage::{Steered, web_port},
    traffic::{Behaviour, Server},
    wait,
};
use tokio::time::Instant;
use xds_client::local::Document;

/// Longer than the longest pause between attempts.
const A_PAUSE: Duration = Duration::from_secs(40);

/// `api` may be called by `web`, and by nobody else.
fn guarded(stage: &Steered) -> Mesh {
    let mut mesh = stage.mesh();
    mesh.policy(Policy::allow("web-only", vec![Match::pod(&stage.web)]).selected());
    let api = mesh.workload(&stage.api);
    api.set("authorizationPolicies", "[shop/web-only]");
    mesh
}

fn directory(stage: &Steered) -> PathBuf {
    stage.world.file("state")
}

fn options(stage: &Steered) -> ProxyOptions {
    let directory = directory(stage).display().to_string();
    stage.options().env("STATE_DIR", &directory)
}

async fn start(stage: &Steered) -> NodeRun<'_> {
    stage.start_with(&options(stage)).await.unwrap()
}

/// Waits until what istiod told is on disk.
async fn kept(proxy: &Proxy<'_>) {
    let is_kept = |kept| kept == 1.0;
    proxy.metric("culvert_state_kept", &[], is_kept).await;
}

async fn killed(run: NodeRun<'_>) {
    let mut proxy = run.proxy;
    proxy.signal(Signal::SIGKILL).unwrap();
    proxy.exit(wait::SOON).await.unwrap();
}

/// A proxy has learnt the mesh and was killed, and istiod is away.
async fn abandoned() -> (Steered, Server) {
    let stage = Steered::new().unwrap();
    stage.istiod.set(&guarded(&stage));
    let run = start(&stage).await;
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    kept(&run.proxy).await;
    behaves_as_before(&stage).await;
    killed(run).await;
    stage.istiod.stop().await;
    (stage, app)
}

/// `web` gets through to `api`, by its service and by its address, and `db` does not.
async fn behaves_as_before(stage: &Steered) {
    assert!(stage.echoes(web_port(1)).await);
    assert!(stage.echoes(stage.api.at(8080)).await);
    assert!(stage.db.ask(web_port(1), b"hello").await.is_err());
}

async fn age(proxy: &Proxy<'_>) -> f64 {
    let metrics = proxy.metrics().await.unwrap();
    metrics.sum("culvert_state_age_seconds", &[])
}

/// Starts istiod again, and waits until it has told this proxy all.
async fn returns(stage: &Steered, streams_before: usize) {
    stage.istiod.start().unwrap();
    let next = |streams: &[Stream]| streams.get(streams_before).map(drop);
    let what = "the proxy returns to istiod";
    stage.istiod.until_within(A_PAUSE, what, next).await;
    stage.istiod.synced_within(A_PAUSE).await;
}

#[tokio::test]
async fn a_restart_without_istiod_goes_on_as_before_until_it_answers() {
    let (stage, _app) = abandoned().await;
    let run = start(&stage).await;
    behaves_as_before(&stage).await;
    assert!(age(&run.proxy).await > 0.0, "marked as old");
    let dump = run.proxy.document("/config_dump").await.unwrap();
    let from = dump["controlPlane"]["recalledFrom"].as_str();
    assert!(from.is_some_and(|from| from.starts_with("20")), "{dump}");
    let served = |line: &testkit::Line| {
        line.message
            .contains("last known state of the mesh is served")
    };
    run.proxy.log().wait("a warning", served).await;
    let mode = fs::metadata(directory(&stage).join("mesh.state")).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);

    // Meanwhile the service went away, and `db` may call now.
    let mut mesh = guarded(&stage);
    mesh.services.clear();
    mesh.workload(&stage.api).services.clear();
    mesh.policies = vec![Policy::allow("web-only", vec![Match::port(8080)]).selected()];
    stage.istiod.set(&mesh);
    returns(&stage, 1).await;
    let claimed = stage.istiod.newest().first(Kind::Address).cloned().unwrap();
    assert_eq!(
        claimed.initial_resource_versions.len(),
        4,
        "only what changed is told"
    );
    let zero = |age| age == 0.0;
    run.proxy
        .metric("culvert_state_age_seconds", &[], zero)
        .await;
    assert!(!stage.echoes(web_port(1)).await, "gone");
    let answer = stage.db.ask(stage.api.at(8080), b"hello").await;
    assert_eq!(answer.unwrap(), b"hello", "allowed since");
    let dump = run.proxy.document("/config_dump").await.unwrap();
    assert!(dump["controlPlane"].get("recalledFrom").is_none());

    // And that is what the next start without istiod knows.
    kept(&run.proxy).await;
    killed(run).await;
    stage.istiod.stop().await;
    let _run = start(&stage).await;
    assert!(!stage.echoes(web_port(1)).await);
    assert!(stage.db.ask(stage.api.at(8080), b"hello").await.is_ok());
}

#[tokio::test]
async fn a_policy_that_was_still_to_come_is_not_done_without() {
    let stage = Steered::new().unwrap();
    stage.istiod.set(&guarded(&stage));
    let run = start(&stage).await;
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    kept(&run.proxy).await;
    assert!(stage.echoes(web_port(1)).await);
    // Another policy takes the place of the first, and istiod dies when it has told of the workload only.
    stage.istiod.hold(&[Kind::Authorization]);
    let mut mesh = stage.mesh();
    mesh.policy(Policy::allow("nobody", vec![Match::port(1)]).selected());
    let api = mesh.workload(&stage.api);
    api.set("authorizationPolicies", "[shop/nobody]");
    stage.istiod.set(&mesh);
    let names_it = async || {
        let dump = run.proxy.document("/config_dump").await.ok()?;
        dump["workloads"]
            .to_string()
            .contains("shop/nobody")
            .then_some(())
    };
    wait::until(wait::SOON, "the workload names the new policy", names_it).await;
    stage.istiod.stop().await;
    killed(run).await;

    let run = start(&stage).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(
        !stage.echoes(web_port(1)).await,
        "refused without the policy, however long it lacks"
    );
    let told = |line: &testkit::Line| {
        line.message
            .contains("refused until the control plane answers")
    };
    run.proxy.log().wait("why", told).await;
    stage.istiod.hold(&[]);
    stage.istiod.set(&guarded(&stage));
    returns(&stage, 1).await;
    assert!(stage.echoes(web_port(1)).await);
}

#[tokio::test]
async fn what_is_damaged_or_of_another_node_is_set_aside() {
    let (stage, _app) = abandoned().await;
    let file = directory(&stage).join("mesh.state");
    let whole = fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    let elsewhere = options(&stage).env("NODE_NAME", "node-9");
    for (bytes, options, expected) in [
        (&flipped, options(&stage), "damaged"),
        (&whole, elsewhere, "belongs to"),
    ] {
        fs::write(&file, bytes).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let proxy = options.start(stage.world.node(0)).unwrap();
        let aside = |line: &testkit::Line| line.message.contains("it is set aside");
        let line = proxy.log().wait("a warning", aside).await;
        assert!(line.field("error").contains(expected), "{line:?}");
        assert!(directory(&stage).join("mesh.state.unusable").exists() && !file.exists());
        let unusable = |count| count == 1.0;
        proxy
            .metric("culvert_state_unusable_total", &[], unusable)
            .await;
        assert!(!proxy.is_ready().await, "it knows nothing");
    }
    // What istiod tells is kept in its place.
    stage.istiod.start().unwrap();
    let run = start(&stage).await;
    kept(&run.proxy).await;
    behaves_as_before(&stage).await;
}

/// Istiod signs as well, and both are away at the restart.
#[tokio::test]
async fn with_keys_in_memory_nobody_else_is_needed_for_a_restart() {
    let stage = Steered::new().unwrap();
    stage.istiod.set(&guarded(&stage));
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let keys = memory.path().join("keys");
    let options = options(&stage)
        .certified_by(&stage.istiod)
        .env("STATE_KEYS", &keys.display().to_string());
    let run = stage.start_with(&options).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    kept(&run.proxy).await;
    behaves_as_before(&stage).await;
    killed(run).await;
    stage.istiod.stop().await;
    let asked = stage.istiod.certificate_calls().len();
    let run = stage.start_with(&options).await.unwrap();
    let start = Instant::now();
    behaves_as_before(&stage).await;
    assert!(start.elapsed() < Duration::from_secs(5), "served at once");
    for file in fs::read_dir(keys.join("istio")).unwrap() {
        let mode = file.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    killed(run).await;

    // An upgrade that goes by the book leaves them, too, and costs the authority nothing.
    stage.istiod.start().unwrap();
    let run = stage.start_with(&options).await.unwrap();
    stage.istiod.synced_within(A_PAUSE).await;
    behaves_as_before(&stage).await;
    let mut proxy = run.proxy;
    proxy.signal(Signal::SIGTERM).unwrap();
    proxy.exit(wait::SOON).await.unwrap();
    let _run = stage.start_with(&options).await.unwrap();
    behaves_as_before(&stage).await;
    assert_eq!(stage.istiod.certificate_calls().len(), asked);
}

/// What was kept counts no longer when the mesh has another root by then.
#[tokio::test]
async fn a_kept_certificate_of_a_root_that_has_gone_is_not_used() {
    let stage = Steered::new().unwrap();
    stage.istiod.set(&guarded(&stage));
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let trusted = stage.world.file("roots.pem");
    let [old, new] = ["old", "new"].map(|name| Authority::new(name).unwrap());
    let options = options(&stage)
        .certified_by(&stage.istiod)
        .env("TRUST_BUNDLE_PATH", &trusted.display().to_string())
        .env("STATE_KEYS", &memory.path().display().to_string());
    let sign_by = |root: &Authority| {
        stage.istiod.sign_by(Signing::by(root.duplicate().unwrap()));
        fs::write(&trusted, root.root_pem()).unwrap();
    };
    sign_by(&old);
    let run = stage.start_with(&options).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    behaves_as_before(&stage).await;
    killed(run).await;
    sign_by(&new);
    let asked = stage.istiod.certificate_calls().len();
    let run = stage.start_with(&options).await.unwrap();
    behaves_as_before(&stage).await;
    assert!(stage.istiod.certificate_calls().len() > asked);
    let told =
        |line: &testkit::Line| line.message == "the certificate of an earlier process is not used";
    run.proxy.log().wait("why", told).await;
}

#[tokio::test]
async fn keys_are_never_kept_on_a_disk() {
    let stage = Steered::new().unwrap();
    // That of processes, which is no disk, either, but holds no file of ours whatever the machine.
    for directory in ["/proc/culvert-test-keys", "/var/tmp/culvert-test-keys"] {
        let options = stage.options().env("STATE_KEYS", directory);
        let mut proxy = options.start(stage.world.node(0)).unwrap();
        let status = proxy.exit(wait::SOON).await.unwrap();
        assert_eq!(status.code(), Some(1));
        let log = proxy.log().tail(5);
        assert!(log.contains("not in memory"), "{log}");
        assert!(!fs::exists(directory).unwrap(), "nothing is made there");
    }
}

/// A directory that is a file system of its own, seen by the proxy alone.
fn mounted(stage: &Steered, mount_options: &str) -> ProxyOptions {
    const MOUNT: &str = r#"mount -t tmpfs -o "$0" tmpfs "$1" && shift && exec "$@""#;
    fs::create_dir_all(directory(stage)).unwrap();
    let at = directory(stage).display().to_string();
    let words = [
        "unshare",
        "--mount",
        "--",
        "sh",
        "-c",
        MOUNT,
        mount_options,
        &at,
    ];
    options(stage).wrapped(&words)
}

#[tokio::test]
async fn a_full_disk_costs_what_was_kept_and_nothing_else() {
    let stage = Steered::new().unwrap();
    stage.istiod.set(&guarded(&stage));
    let options = mounted(&stage, "size=64k");
    let run = stage.start_with(&options).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    kept(&run.proxy).await;
    let state = format!(
        "/proc/{}/root{}",
        run.proxy.pid(),
        directory(&stage).display()
    );
    let state = PathBuf::from(state).join("mesh.state");
    assert!(state.exists());

    let mut document = Document::from(&guarded(&stage));
    let many = Mesh::of(&[&stage.db]);
    for number in 0..600 {
        let mut more = many.clone();
        more.workloads[0].uid = format!("Kubernetes//Pod/other/pod-{number}");
        more.workloads[0].workload_ips.clear();
        document.addresses.extend(Document::from(&more).addresses);
    }
    stage.istiod.set(document);
    let failed = |count| count == 1.0;
    run.proxy
        .metric("culvert_state_failures_total", &[], failed)
        .await;
    run.proxy
        .metric("culvert_state_kept", &[], |kept| kept == 0.0)
        .await;
    assert!(!state.exists(), "an old state is worse than none");
    let told = |line: &testkit::Line| line.message.contains("not kept any longer");
    run.proxy.log().wait("an error", told).await;
    let known = |count| count == 604.0 - 1.0;
    let workloads = [("kind", "workload")];
    run.proxy
        .metric("istio_mesh_resources", &workloads, known)
        .await;
    behaves_as_before(&stage).await;
    assert!(run.proxy.is_ready().await);
}

#[tokio::test]
async fn a_directory_that_cannot_be_written_is_told_of_and_lived_without() {
    let stage = Steered::new().unwrap();
    stage.istiod.set(&guarded(&stage));
    let options = mounted(&stage, "ro");
    let run = stage.start_with(&options).await.unwrap();
    let told = |line: &testkit::Line| line.message.contains("STATE_DIR cannot be used");
    run.proxy.log().wait("a warning", told).await;
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    behaves_as_before(&stage).await;
    let metrics = run.proxy.metrics().await.unwrap();
    assert_eq!(metrics.sum("culvert_state_kept", &[]), 0.0);
}
