//! The image, in a container of a real engine: the proxy of one node of a mesh.
//!
//! Built with the feature `image` only, which `make image-test` asks for: it needs root, `dockerd`, and in `CULVERT_IMAGE` the archive.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    mount::umount,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use testkit::{
    Cluster, Mesh, Netns, Node, Pod, PodSpec, ProxyOptions, World, kubetools::deployed,
    metrics::Metrics, traffic::Behaviour, wait,
};

/// A `dockerd` that lives in the network of a node's proxy, so that containers with the network of the host do. Dropping it stops it
/// and its containers.
struct Engine {
    daemon: Child,
    socket: String,
    /// What it leaves mounted: the network of the host, as it sees it.
    mount: PathBuf,
    log: PathBuf,
}

impl Engine {
    async fn start(world: &World, netns: &Netns) -> Self {
        let path = |name: &str| world.file(name).display().to_string();
        let log = world.file("dockerd.log");
        let socket = format!("unix://{}", path("docker.sock"));
        let mut command = Command::new("dockerd");
        command.args([
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
            "--log-level=warn",
        ]);
        command.args(["--host", &socket]);
        command.arg(format!("--data-root={}", path("docker")));
        command.arg(format!("--exec-root={}", path("docker-run")));
        command.arg(format!("--pidfile={}", path("docker.pid")));
        let output = fs::File::create(&log).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output);
        let daemon = netns
            .run(|| command.spawn())
            .expect("dockerd of the package docker.io");
        let engine = Self {
            daemon,
            socket,
            mount: world.file("docker-run/netns/default"),
            log,
        };
        let up = async || engine.ask(&["version"]).ok();
        let up = wait::until(Duration::from_secs(60), "dockerd answers", up);
        up.await;
        engine
    }

    fn ask(&self, arguments: &[&str]) -> Result<String, String> {
        let docker = Command::new("docker")
            .args(["--host", &self.socket])
            .args(arguments)
            .output();
        let output = docker.expect("docker");
        let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stderr))
        }
    }

    /// The name of the image in an archive.
    fn load(&self, archive: &Path) -> String {
        let said = self
            .ask(&["load", "--input", &archive.display().to_string()])
            .unwrap();
        said.strip_prefix("Loaded image: ").unwrap().to_owned()
    }

    /// What starts a proxy in a container, with the privileges of the chart's and our seccomp profile, and shows it the files of the
    /// world.
    fn run(&self, world: &World) -> Vec<String> {
        let files = world.directory().display();
        let profile = deployed("seccomp/culvert.json");
        let mut words: Vec<String> = [
            "docker",
            "--host",
            &self.socket,
            "run",
            "--rm",
            "--network=host",
            "--read-only",
            "--tmpfs=/tmp",
            "--user=0:1337",
            "--cap-drop=ALL",
            "--cap-add=NET_ADMIN",
            "--cap-add=NET_RAW",
            "--cap-add=SYS_ADMIN",
            &format!("--security-opt=seccomp={}", profile.display()),
            &format!("--volume={files}:{files}"),
        ]
        .map(str::to_owned)
        .into();
        words.extend(VARIABLES.map(|name| format!("--env={name}")));
        words
    }
}

impl Drop for Engine {
    #[expect(
        clippy::print_stderr,
        reason = "what one wants to see of a failed test"
    )]
    fn drop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.daemon.id()).unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        self.daemon.wait().unwrap();
        let unmounted = umount(&self.mount);
        if std::thread::panicking() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("--- dockerd, {unmounted:?}\n{log}");
        } else {
            unmounted.unwrap();
        }
    }
}

/// Those of `ProxyOptions::new`, handed on to the container.
const VARIABLES: [&str; 11] = [
    "FAKE_CA",
    "FAKE_CA_ROOT_CERT",
    "FAKE_CA_ROOT_KEY",
    "INPOD_UDS",
    "ISTIO_META_DNS_CAPTURE",
    "LOCAL_XDS_PATH",
    "NODE_NAME",
    "RUST_BACKTRACE",
    "RUST_LOG",
    "XDS_ADDRESS",
    "ZTUNNEL_WORKER_THREADS",
];

#[expect(
    clippy::disallowed_methods,
    reason = "test runs are steered by the environment"
)]
fn archive() -> PathBuf {
    std::env::var_os("CULVERT_IMAGE")
        .expect("CULVERT_IMAGE: run `make image-test`")
        .into()
}

/// What the chart and people who look at the image rely on.
fn is_as_announced(engine: &Engine, image: &str) {
    let size = fs::metadata(archive()).unwrap().len();
    assert!(size < 15_000_000, "{size} bytes");
    let said = engine.ask(&["image", "inspect", image]).unwrap();
    let inspected: Value = serde_json::from_str(&said).unwrap();
    let config = &inspected[0]["Config"];
    assert_eq!(config["User"], "0:1337");
    assert_eq!(config["WorkingDir"], "/");
    assert_eq!(config["Entrypoint"], json!(["/usr/local/bin/culvert"]));
    let variables = config["Env"].as_array().unwrap();
    let mut names = variables.iter().filter_map(Value::as_str);
    assert!(
        names.any(|it| it.starts_with("ISTIO_META_ISTIO_VERSION=")),
        "{variables:?}"
    );
    let label = |name: &str| config["Labels"][format!("org.opencontainers.image.{name}")].as_str();
    assert_eq!(label("version"), Some(env!("CARGO_PKG_VERSION")));
    assert_eq!(label("licenses"), Some("Apache-2.0"));
    for name in ["title", "description", "revision", "created"] {
        assert!(label(name).is_some_and(|it| !it.is_empty()), "{name}");
    }
}

/// Bytes over mutual TLS from one pod to another and back.
async fn talks(from: &Pod, to: &Pod) {
    let app = to.serve(8080, Behaviour::Echo).unwrap();
    let answer = from.ask(app.address, b"hello").await.unwrap();
    assert_eq!(answer, b"hello");
}

fn over_mutual_tls(metrics: &Metrics, reporter: &str) -> f64 {
    let labels = [
        ("reporter", reporter),
        ("connection_security_policy", "mutual_tls"),
    ];
    metrics.sum("istio_tcp_connections_opened_total", &labels)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_of_the_image_is_the_proxy_of_a_node() {
    let world = World::new(2).unwrap();
    let web: Arc<Pod> = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let api: Arc<Pod> = world.node(1).pod(&PodSpec::captured("api")).unwrap();
    let mesh = Mesh::of(&[&web, &api]);
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    let engine = Engine::start(&world, world.node(0).proxy_netns()).await;
    let image = engine.load(&archive());
    is_as_announced(&engine, &image);
    let run = engine.run(&world);
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    let options = |node: &Node| {
        let plain = ProxyOptions::new(&world, node);
        if node.name() == world.node(0).name() {
            plain.wrapped(&run).binary(PathBuf::from(&image))
        } else {
            plain
        }
    };
    let mut cluster = Cluster::run(&world, options, &[&web, &api]).await.unwrap();
    let running = engine
        .ask(&["ps", "--no-trunc", "--format={{.Image}} {{.Command}}"])
        .unwrap();
    assert!(
        running.starts_with(&image) && running.contains("culvert proxy ztunnel"),
        "{running}"
    );

    talks(&web, &api).await;
    talks(&api, &web).await;
    for node in [0, 1] {
        let metrics = cluster.proxy(node).metrics().await.unwrap();
        for reporter in ["source", "destination"] {
            let count = over_mutual_tls(&metrics, reporter);
            assert!(
                (count - 1.0).abs() < f64::EPSILON,
                "node {node}, {reporter}: {count}"
            );
        }
    }

    let container = &mut cluster.nodes[0].proxy;
    container.signal(Signal::SIGTERM).unwrap();
    let end = container.exit(Duration::from_secs(20)).await.unwrap();
    assert!(end.success(), "{end}");
}
