//! The process: arguments, configuration, privileges, limits, signals.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{sync::Arc, time::Duration};

use nix::sys::signal::Signal;
use testkit::{
    Mesh, NodeRun, Pod, PodSpec, Proxy, ProxyOptions, World,
    raw::{
        RawClient,
        frames::{ACK, Frame, kind},
    },
    stage::ForeignClient,
    traffic::{self, Behaviour},
    wait,
};
use tokio::time::Instant;

/// A proxy that is not expected to live, its exit code, and what it wrote.
async fn outcome(options: &ProxyOptions, world: &World) -> (Option<i32>, String) {
    let mut proxy = options.start(world.node(0)).unwrap();
    let status = proxy.exit(wait::SOON).await.unwrap();
    (status.code(), proxy.log().tail(200))
}

#[tokio::test]
async fn arguments_are_those_of_the_chart() {
    let world = World::new(1).unwrap();
    let options = ProxyOptions::new(&world, world.node(0));
    let (code, text) = outcome(&options.clone().arguments(&["version"]), &world).await;
    assert_eq!((code, text.lines().count()), (Some(0), 1), "{text}");
    assert!(text.starts_with("version.BuildInfo{Version:"), "{text}");
    let (code, text) = outcome(&options.clone().arguments(&["help"]), &world).await;
    assert!(code == Some(0) && text.contains("proxy"), "{text}");
    let (code, text) = outcome(&options.arguments(&["bogus"]), &world).await;
    assert!(code == Some(1) && text.contains("bogus"), "{text}");
}

#[tokio::test]
async fn bad_configuration_is_reported_all_at_once() {
    let world = World::new(1).unwrap();
    Mesh::default()
        .write(&ProxyOptions::mesh_file(&world))
        .unwrap();
    let options = ProxyOptions::new(&world, world.node(0));
    let bad = options
        .clone()
        .env("KEEPALIVE_ENABLED", "1")
        .env("SECRET_TTL", "soon")
        .env("PROXY_MODE", "other")
        .env("RUST_LOG", "info,loud")
        .env("FAKE_CA_ROOT_KEY", "/nowhere/key.pem")
        .env("LOCAL_XDS_PATH", "/nowhere/mesh.yaml");
    let (code, text) = outcome(&bad, &world).await;
    assert_eq!(code, Some(1));
    for word in [
        "KEEPALIVE_ENABLED",
        "\"1\"",
        "SECRET_TTL",
        "soon",
        "PROXY_MODE",
        "other",
        "loud",
        "/nowhere/key.pem",
        "/nowhere/mesh.yaml",
    ] {
        assert!(
            text.contains(word.trim_matches('"')),
            "{word} is not in\n{text}"
        );
    }
    let (code, text) = outcome(&options.clone().env("LOCAL_XDS", "workloads: []"), &world).await;
    assert!(code == Some(1) && text.contains("LOCAL_XDS_PATH"), "{text}");
    let (code, text) = outcome(&options.env("LOCAL_XDS_PATH", "/nowhere/mesh.yaml"), &world).await;
    assert!(
        code == Some(1) && text.contains("/nowhere/mesh.yaml"),
        "{text}"
    );
}

#[tokio::test]
async fn what_can_hardly_be_meant_is_warned_of() {
    let stage = Stage::new();
    let doubtful = [
        ("KEEPALIVE_TIME", "0s"),
        ("KEEPALIVE_INTERVAL", "1d"),
        ("KEEPALIVE_RETRIES", "200"),
        ("PACKET_MARK", "1336"),
        ("HTTP2_CONNECTION_WINDOW_SIZE", "4194304"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "101"),
    ];
    let plain = stage.options();
    let options = doubtful
        .iter()
        .fold(plain.clone(), |options, (key, value)| {
            options.env(key, value)
        });
    let options = [options, plain];
    for (options, expected) in options.iter().zip([1, 0]) {
        let run = stage.start(options).await;
        for (key, _) in doubtful {
            let told = |line: &testkit::Line| line.level == "warn" && line.raw.contains(key);
            assert_eq!(run.proxy.log().since(0, told).len(), expected, "{key}");
        }
    }
}

/// Without these capabilities, as `setpriv` writes them.
fn bounded(options: ProxyOptions, dropped: &str) -> ProxyOptions {
    options.wrapped(&["setpriv", &format!("--bounding-set={dropped}")])
}

#[tokio::test]
async fn missing_privileges_are_named() {
    let world = World::new(1).unwrap();
    Mesh::default()
        .write(&ProxyOptions::mesh_file(&world))
        .unwrap();
    let options = ProxyOptions::new(&world, world.node(0));
    let cases = [
        ("-sys_admin", "add the capability SYS_ADMIN"),
        (
            "-net_admin,-net_raw",
            "add the capability NET_ADMIN (or NET_RAW",
        ),
    ];
    for (dropped, named) in cases {
        let (code, text) = outcome(&bounded(options.clone(), dropped), &world).await;
        assert!(code == Some(1) && text.contains(named), "{code:?} {text}");
    }
    let (code, text) = outcome(&options.env("PROXY_MODE", "dedicated"), &world).await;
    assert!(
        code == Some(1) && text.contains("PROXY_WORKLOAD_INFO"),
        "{text}"
    );
}

#[tokio::test]
async fn who_insists_on_clients_addresses_does_not_start_without() {
    let world = World::new(1).unwrap();
    Mesh::default()
        .write(&ProxyOptions::mesh_file(&world))
        .unwrap();
    // Where no packet is marked, a proxy for one workload asks for no privilege.
    let options = ProxyOptions::new(&world, world.node(0))
        .env("PROXY_MODE", "dedicated")
        .env("PROXY_WORKLOAD_INFO", "shop/web/web");
    let options = bounded(options, "-net_admin,-net_raw");
    let (code, text) = outcome(&options.clone().env("ENABLE_ORIG_SRC", "true"), &world).await;
    let told = "cannot make transparent the listener on port 15001";
    assert!(code == Some(1) && text.contains(told), "{code:?} {text}");
    for (key, value) in [("ENABLE_ORIG_SRC", "false"), ("RUST_LOG", "info")] {
        let mut proxy = options
            .clone()
            .env(key, value)
            .start(world.node(0))
            .unwrap();
        proxy.ready().await;
        proxy.signal(Signal::SIGTERM).unwrap();
        assert!(proxy.exit(wait::SOON).await.unwrap().success());
    }
}

#[tokio::test]
async fn certificates_of_its_own_making_are_warned_of() {
    let stage = Stage::new();
    let run = stage.start(&stage.options()).await;
    let warning =
        |line: &testkit::Line| line.level == "warn" && line.message.starts_with("FAKE_CA is on");
    assert_eq!(run.proxy.log().since(0, warning).len(), 1);
}

#[tokio::test]
async fn bad_records_are_named_and_the_rest_is_used() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let web = node.pod(&PodSpec::captured("web")).unwrap();
    let outside = node.pod(&PodSpec::plain("outside")).unwrap();
    let mut mesh = Mesh::of(&[&web, &outside]);
    let broken = mesh.workload(&outside);
    broken.uid = "broken-record".to_owned();
    broken
        .services
        .insert("no-slash".to_owned(), [(80, 80)].into());
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    let run = NodeRun::start(&world, node, &ProxyOptions::new(&world, node), &[&web])
        .await
        .unwrap();
    run.proxy
        .log()
        .wait("the name of the record", |line| {
            line.raw.contains("broken-record")
        })
        .await;
    let app = outside.serve(7000, Behaviour::Echo).unwrap();
    assert_eq!(web.ask(app.address, b"works").await.unwrap(), b"works");
}

/// The control-plane chapter's example, without a control plane; a slip of the pen in it is found before anybody relies on it.
#[tokio::test]
async fn a_mesh_file_with_a_key_that_nobody_knows_is_refused_at_the_start() {
    let world = World::new(1).unwrap();
    let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let file = ProxyOptions::mesh_file(&world);
    let mut mesh = Mesh::of(&[&web]);
    mesh.workload(&web).set("protcol", "TCP");
    mesh.write(&file).unwrap();
    let (code, text) = outcome(&ProxyOptions::new(&world, world.node(0)), &world).await;
    assert_eq!(code, Some(1), "{text}");
    assert!(
        text.contains("Kubernetes//Pod/shop/web") && text.contains("unknown field `protcol`"),
        "{text}"
    );

    // Later on, the others are used: nothing that works ends because of a file.
    Mesh::of(&[&web]).write(&file).unwrap();
    let mut proxy = ProxyOptions::new(&world, world.node(0))
        .start(world.node(0))
        .unwrap();
    let log = proxy.log();
    log.wait("the file is loaded", |line| {
        line.message.starts_with("mesh file loaded")
    })
    .await;
    mesh.write(&file).unwrap();
    log.wait("the record is named", |line| {
        line.message == "a record of the mesh file is not usable"
    })
    .await;
    proxy.signal(Signal::SIGTERM).unwrap();
    assert!(proxy.exit(wait::SOON).await.unwrap().success());
}

/// One node with a captured pod and a pod outside.
struct Stage {
    world: World,
    web: Arc<Pod>,
    outside: Arc<Pod>,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(1).unwrap();
        let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        let outside = world.node(0).pod(&PodSpec::plain("outside")).unwrap();
        Mesh::of(&[&web])
            .write(&ProxyOptions::mesh_file(&world))
            .unwrap();
        Self {
            world,
            web,
            outside,
        }
    }

    fn options(&self) -> ProxyOptions {
        ProxyOptions::new(&self.world, self.world.node(0))
    }

    async fn start(&self, options: &ProxyOptions) -> NodeRun<'_> {
        NodeRun::start(&self.world, self.world.node(0), options, &[&self.web])
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn a_signal_without_connections_ends_the_process_at_once() {
    let stage = Stage::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut run = stage
            .start(
                &stage
                    .options()
                    .env("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
            )
            .await;
        let asked = Instant::now();
        run.proxy.signal(signal).unwrap();
        assert!(run.proxy.exit(wait::SOON).await.unwrap().success());
        assert!(
            asked.elapsed() < Duration::from_secs(1),
            "{signal}: {:?}",
            asked.elapsed()
        );
    }
}

#[tokio::test]
async fn a_drain_lets_connections_work_until_the_deadline_and_no_longer() {
    let stage = Stage::new();
    let app = stage.outside.serve(7000, Behaviour::Echo).unwrap();
    let mut run = stage
        .start(&stage.options().env("CONNECTION_TERMINATION_DEADLINE", "3s"))
        .await;
    let mut held = stage.web.connect(app.address).await.unwrap();
    traffic::ping(&mut held, b"before").await.unwrap();
    let asked = Instant::now();
    run.proxy.signal(Signal::SIGTERM).unwrap();
    let refused = async || stage.web.connect(app.address).await.is_err().then_some(());
    wait::until(
        Duration::from_secs(2),
        "new connections are refused",
        refused,
    )
    .await;
    run.session.closed(wait::SOON).await.unwrap();
    assert!(!run.proxy.is_ready().await);
    run.proxy.signal(Signal::SIGTERM).unwrap();
    traffic::ping(&mut held, b"draining").await.unwrap();
    traffic::closed(&mut held, wait::SOON).await.unwrap();
    let lived = asked.elapsed();
    assert!(
        lived > Duration::from_millis(2500) && lived < Duration::from_secs(5),
        "{lived:?}"
    );
    assert!(run.proxy.exit(wait::SOON).await.unwrap().success());
    let drained =
        |line: &testkit::Line| line.field("error") == "connection closed due to connection drain";
    assert!(
        !run.proxy.log().since(0, drained).is_empty(),
        "{}",
        run.proxy.log().tail(20)
    );
}

#[tokio::test]
async fn a_second_interrupt_ends_a_drain() {
    let stage = Stage::new();
    let app = stage.outside.serve(7000, Behaviour::Echo).unwrap();
    let mut run = stage
        .start(
            &stage
                .options()
                .env("CONNECTION_TERMINATION_DEADLINE", "60s"),
        )
        .await;
    let mut held = stage.web.connect(app.address).await.unwrap();
    traffic::ping(&mut held, b"open").await.unwrap();
    run.proxy.signal(Signal::SIGINT).unwrap();
    run.session.closed(wait::SOON).await.unwrap();
    traffic::ping(&mut held, b"draining").await.unwrap();
    run.proxy.signal(Signal::SIGINT).unwrap();
    assert!(
        run.proxy
            .exit(Duration::from_secs(2))
            .await
            .unwrap()
            .success()
    );
}

#[tokio::test]
async fn a_drain_says_goaway_and_lets_streams_finish() {
    let foreign = ForeignClient::new().unwrap();
    foreign
        .mesh()
        .write(&ProxyOptions::mesh_file(&foreign.world))
        .unwrap();
    let node = foreign.world.node(0);
    let options =
        ProxyOptions::new(&foreign.world, node).env("CONNECTION_TERMINATION_DEADLINE", "20s");
    let mut run = NodeRun::start(&foreign.world, node, &options, &[&foreign.api])
        .await
        .unwrap();
    let _app = foreign.api.serve(8080, Behaviour::Echo).unwrap();
    let client = foreign.client().await;
    let mut tunnel = client.tunnel(&foreign.target(8080)).await.unwrap();
    tunnel.ping(b"before").await.unwrap();
    run.proxy.signal(Signal::SIGTERM).unwrap();
    client
        .frames
        .wait("GOAWAY", |frame| frame.error_code() == Some(0))
        .await;
    tunnel.ping(b"during").await.unwrap();
    assert!(
        RawClient::connect(foreign.peer.netns(), foreign.hbone(), &foreign.hello())
            .await
            .is_err()
    );
    tunnel.finish().unwrap();
    assert!(tunnel.read_to_end().await.unwrap().is_empty());
    assert!(run.proxy.exit(wait::SOON).await.unwrap().success());
}

/// The first GOAWAY leaves room for what is on its way, the second one says what was taken; all of that is answered, and lives on
/// until the deadline.
#[tokio::test]
async fn a_drain_says_goaway_twice_and_serves_what_came_between() {
    let foreign = ForeignClient::new().unwrap();
    foreign
        .mesh()
        .write(&ProxyOptions::mesh_file(&foreign.world))
        .unwrap();
    let node = foreign.world.node(0);
    let options =
        ProxyOptions::new(&foreign.world, node).env("CONNECTION_TERMINATION_DEADLINE", "4s");
    let run = NodeRun::start(&foreign.world, node, &options, &[&foreign.api]).await;
    let mut run = run.unwrap();
    let _app = foreign.api.serve(8080, Behaviour::Echo).unwrap();
    let target = foreign.target(8080);
    let connect = [(":method", "CONNECT"), (":authority", &*target)];
    let mut wire = foreign.wire().await;
    wire.headers(1, &connect).await.unwrap();
    let is_answer = |frame: &Frame| (frame.kind, frame.stream) == (kind::HEADERS, 1);
    wire.until(is_answer).await.unwrap();

    run.proxy.signal(Signal::SIGTERM).unwrap();
    let signalled = Instant::now();
    let (mut limits, mut answered) = (Vec::new(), false);
    while limits.len() < 2 || !answered {
        let frame = wire.next().await.unwrap();
        if frame.kind == kind::GOAWAY {
            assert_eq!(frame.error_code(), Some(0));
            limits.push(u32::from_be_bytes(frame.payload[..4].try_into().unwrap()));
            if limits.len() == 1 {
                wire.headers(3, &connect).await.unwrap();
            }
        } else if frame.kind == kind::PING && frame.flags & ACK == 0 {
            let same = frame.payload;
            wire.send(kind::PING, ACK, 0, &same).await.unwrap();
        } else {
            answered |= (frame.kind, frame.stream) == (kind::HEADERS, 3);
        }
    }
    assert_eq!(limits, [0x7fff_ffff, 3]);
    for stream in [1, 3] {
        wire.send(kind::DATA, 0, stream, b"during").await.unwrap();
        let echo = |frame: &Frame| (frame.kind, frame.stream) == (kind::DATA, stream);
        assert_eq!(wire.until(echo).await.unwrap().payload, b"during");
    }
    while wire.next().await.is_ok() {}
    let lasted = signalled.elapsed();
    assert!(
        (Duration::from_secs(3)..Duration::from_secs(6)).contains(&lasted),
        "{lasted:?}"
    );
    assert!(run.proxy.exit(wait::SOON).await.unwrap().success());
}

async fn max_fds(proxy: &Proxy<'_>) -> f64 {
    proxy
        .metric("process_max_fds", &[], |limit| limit > 0.0)
        .await
}

#[tokio::test]
async fn the_soft_descriptor_limit_is_raised() {
    let stage = Stage::new();
    let run = stage.start(&stage.options().nofile(256, 4096)).await;
    assert_eq!(max_fds(&run.proxy).await, 4096.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_descriptors_are_short_the_rest_works_without_spinning_and_it_passes() {
    let stage = Stage::new();
    let app = stage.outside.serve(7000, Behaviour::Echo).unwrap();
    let run = stage.start(&stage.options().nofile(128, 128)).await;
    let mut held = Vec::new();
    for _ in 0..100 {
        // Those that find no descriptor left wait, or are reset.
        held.extend(stage.web.connect(app.address).await);
    }
    let short = [("limit", "descriptors")];
    run.proxy
        .metric("culvert_limits_hit_total", &short, |hits| hits > 0.0)
        .await;
    // What the proxy does beside traffic takes of the reserve for a moment.
    let kept = async || {
        (105..=122)
            .contains(&run.proxy.open_files().unwrap())
            .then_some(())
    };
    wait::until(wait::SOON, "a reserve of descriptors is left", kept).await;
    assert!(run.proxy.document("/config_dump").await.is_ok());
    for _ in 0..40 {
        // Each end of a flow lets in another.
        drop(held.remove(0));
        held.extend(stage.web.connect(app.address).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    wait::until(wait::SOON, "the reserve outlives churn", kept).await;
    let before = run.proxy.cpu_time().unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let spent = run.proxy.cpu_time().unwrap() - before;
    assert!(
        spent < Duration::from_millis(400),
        "{spent:?} of processor time in two idle seconds"
    );
    drop(held);
    let served = async || {
        stage
            .web
            .ask(app.address, b"again")
            .await
            .ok()
            .filter(|answer| answer == b"again")
    };
    wait::until(wait::SOON, "service resumes", served).await;
}

/// With everything that it can be told to watch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_process_sleeps() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let pods = ["one", "two"].map(|name| node.pod(&PodSpec::captured(name)).unwrap());
    let mesh = Mesh::of(&[&pods[0], &pods[1]]);
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    let roots = world.file("roots.pem");
    std::fs::write(&roots, world.authority().root_pem()).unwrap();
    let options = ProxyOptions::new(&world, node)
        .env("MEMORY_BUDGET", "1000000000")
        .env("TRUST_BUNDLE_PATH", &roots.display().to_string())
        .env("CRL_PATH", &world.file("crl.pem").display().to_string());
    let run = NodeRun::start(&world, node, &options, &[&pods[0], &pods[1]])
        .await
        .unwrap();
    // What follows a start: leftovers are swept, memory goes back to the system.
    let window = Duration::from_secs(5);
    tokio::time::sleep(window).await;
    let before = run.proxy.sleeps().unwrap();
    tokio::time::sleep(window).await;
    let after = run.proxy.sleeps().unwrap();
    let since = |(thread, count): (&_, &u64)| count - before.get(thread).unwrap_or(&0);
    let woken: u64 = after.iter().map(since).sum();
    assert!(woken <= 3 * window.as_secs(), "{woken} times in {window:?}");
}

// NET_RAW marks packets on Linux 5.17 and later.
#[tokio::test]
async fn one_of_two_network_privileges_is_enough() {
    let stage = Stage::new();
    let app = stage.web.serve(8080, Behaviour::Whoami).unwrap();
    for dropped in ["-net_admin", "-net_raw"] {
        let _run = stage.start(&bounded(stage.options(), dropped)).await;
        let seen = stage.outside.seen_as(app.address).await.unwrap();
        assert_eq!(seen.ip(), stage.outside.ip4(), "{dropped}");
    }
}

#[tokio::test]
async fn dedicated_mode_needs_no_agent() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let web = node.pod(&PodSpec::plain("web")).unwrap();
    let mut mesh = Mesh::of(&[&web]);
    mesh.workload(&web).protocol = "HBONE".to_owned();
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    let options = ProxyOptions::new(&world, node)
        .env("PROXY_MODE", "dedicated")
        .env("PROXY_WORKLOAD_INFO", "shop/web/web");
    let proxy = options.start_in(web.netns(), "dedicated").unwrap();
    proxy.ready().await;
    let hello = testkit::raw::Hello::new(
        &world
            .authority()
            .issue("spiffe://cluster.local/ns/shop/sa/peer")
            .unwrap(),
    );
    let peer = node.pod(&PodSpec::plain("peer")).unwrap();
    let client = RawClient::connect(peer.netns(), web.at(15008), &hello)
        .await
        .unwrap();
    assert_eq!(client.server_id, Some(web.spiffe_id()));
}
