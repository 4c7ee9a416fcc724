//! `culvert doctor` on nodes that are well, and on some that are not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use testkit::{
    Authority, Istiod, Mesh, Netns, NodeRun, Pod, PodSpec, ProxyOptions, World,
    mesh::{Match, Policy},
    raw::tls::server_tls,
    traffic,
    traffic::Behaviour,
    wait,
};
use tokio_rustls::TlsAcceptor;

/// What an examination says.
struct Report {
    code: i32,
    json: Value,
}

impl Report {
    /// Severities and texts of a check.
    fn of(&self, check: &str) -> Vec<(&str, &str)> {
        let findings = self.json["findings"].as_array().unwrap().iter();
        findings
            .filter(|one| one["check"] == check)
            .map(|one| {
                (
                    one["severity"].as_str().unwrap(),
                    one["what"].as_str().unwrap(),
                )
            })
            .collect()
    }

    fn has(&self, check: &str, severity: &str, part: &str) {
        let found = self.of(check);
        assert!(
            found
                .iter()
                .any(|(is, what)| *is == severity && what.contains(part)),
            "{check}, {severity}, {part:?}: {:#}",
            self.json
        );
    }
}

/// Runs the command in a namespace, with the variables of a proxy.
async fn examine(netns: &Netns, options: &ProxyOptions, output: &str) -> (i32, String) {
    let options = options.clone().arguments(&["doctor", "--output", output]);
    let mut command = options.command().unwrap();
    command.stderr(Stdio::inherit());
    let running = netns.spawn(command).unwrap();
    let done = wait::within(
        wait::SOON * 4,
        "the report",
        running.child.wait_with_output(),
    )
    .await;
    let done = done.unwrap();
    let text = String::from_utf8(done.stdout).unwrap();
    (done.status.code().unwrap(), text)
}

async fn report(netns: &Netns, options: &ProxyOptions) -> Report {
    let (code, text) = examine(netns, options, "json").await;
    let json = serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text}"));
    Report { code, json }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

fn token(expiry: u64) -> String {
    let claims = json!({"aud": ["istio-ca"], "exp": expiry, "iat": expiry - 3600});
    format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()))
}

/// A node that follows an istiod, and a peer on another one.
struct Clinic {
    world: World,
    istiod: Istiod,
    web: Arc<Pod>,
    api: Arc<Pod>,
}

impl Clinic {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        let api = world.node(1).pod(&PodSpec::captured("api")).unwrap();
        let control = world.node(0).pod(&PodSpec::plain("istiod")).unwrap();
        let options = Istiod::options().token(&token(now() + 3600));
        let istiod = options.start(&world, &control).unwrap();
        istiod.set(&Mesh::of(&[&web, &api]));
        Self {
            world,
            istiod,
            web,
            api,
        }
    }

    fn options(&self, node: usize) -> ProxyOptions {
        let options = ProxyOptions::new(&self.world, self.world.node(node));
        options.follow(&self.istiod).certified_by(&self.istiod)
    }

    async fn node(&self, index: usize, pods: &[&Pod]) -> NodeRun<'_> {
        let options = self.options(index);
        NodeRun::start(&self.world, self.world.node(index), &options, pods)
            .await
            .unwrap()
    }

    fn here(&self) -> &Netns {
        self.world.node(0).proxy_netns()
    }

    /// A report that is made after the proxy has looked at its pods.
    async fn audited(&self) -> Report {
        wait::until(wait::SOON, "the first audit", async || {
            let report = report(self.here(), &self.options(0)).await;
            let young = report
                .of("pods")
                .iter()
                .any(|(severity, _)| *severity == "skipped");
            (!young).then_some(report)
        })
        .await
    }
}

#[tokio::test]
async fn a_node_that_is_well_has_no_findings() {
    let clinic = Clinic::new();
    let _here = clinic.node(0, &[&clinic.web]).await;
    let _there = clinic.node(1, &[&clinic.api]).await;
    let report = clinic.audited().await;
    assert_eq!(report.code, 0, "{:#}", report.json);
    for (check, part) in [
        ("configuration", "can be used"),
        ("proxy", "ready"),
        ("capabilities", "are there"),
        ("kernel", "Linux"),
        ("agent", "talks to the proxy"),
        ("pods", "captured: 1"),
        ("roots", "certificates: 1"),
        ("token", "good for 59 min"),
        ("istiod", "answers"),
        ("peers", "1 of 1"),
        ("probes", "no policy"),
    ] {
        report.has(check, "ok", part);
    }
    assert_eq!(report.json["severity"], "skipped");
    let told = report.json.to_string();
    assert!(!told.contains(clinic.istiod.token().unwrap()));

    let (code, text) = examine(clinic.here(), &clinic.options(0), "text").await;
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("ok    pods          pods served and captured: 1\n"),
        "{text}"
    );
    assert!(text.ends_with("0 errors, 0 warnings\n"), "{text}");
}

#[tokio::test]
async fn broken_pods_and_an_outage_are_told_each_by_itself() {
    let clinic = Clinic::new();
    let node = clinic.world.node(0);
    let bare = node.pod(&PodSpec::plain("bare")).unwrap();
    let small = node.pod(&PodSpec::captured("small")).unwrap();
    let mtu = ["link", "set", "eth0", "mtu", "1200"];
    small.netns().command("ip", &mtu, "").unwrap();
    let _node = clinic.node(0, &[&clinic.web, &bare, &small]).await;
    let report = clinic.audited().await;
    assert_eq!(report.code, 3);
    report.has("pods", "error", "shop/bare is not captured");
    report.has(
        "pods",
        "warning",
        "packets of shop/small may have 1200 bytes",
    );
    assert_eq!(report.of("pods").len(), 2, "{:#}", report.json);
    // Nobody serves the other node.
    report.has("peers", "warning", "10.20.1.10:15008");
    report.has("istiod", "ok", "answers");

    // The same node, seen with other variables.
    clinic.istiod.stop().await;
    let options = clinic.options(0).env("AUTH_TOKEN", &token(now() - 300));
    let broken = self::report(clinic.here(), &options).await;
    broken.has("token", "error", "ended 5 min ago");
    broken.has("istiod", "error", "cannot reach https://10.20.0.");
    broken.has("pods", "error", "shop/bare");
    assert!(!broken.json.to_string().contains(&token(now() - 300)));
}

#[tokio::test]
async fn refused_probes_and_a_pod_that_is_not_served_are_told() {
    let clinic = Clinic::new();
    let mut mesh = Mesh::of(&[&clinic.web, &clinic.api]);
    mesh.policy(Policy::allow("mesh-only", vec![Match::pod(&clinic.api)]));
    clinic.istiod.set(&mesh);
    let node = clinic.world.node(0);
    let _app = clinic.web.serve(8080, Behaviour::Echo).unwrap();
    let run = clinic.node(0, &[&clinic.web]).await;
    // As a kubelet whose address was changed on the way.
    let kubelet = node.pod(&PodSpec::plain("kubelet")).unwrap();
    let probe = kubelet.ask(clinic.web.at(8080), b"alive?").await;
    assert!(probe.is_err(), "{probe:?}");
    let taken = node.pod(&PodSpec::captured("taken")).unwrap();
    let _squatter = traffic::listen(taken.netns(), (Ipv4Addr::UNSPECIFIED, 15008).into()).unwrap();
    let _refused = run.session.add(&taken).await.unwrap();

    let report = clinic.audited().await;
    assert_eq!(report.code, 3);
    report.has("pods", "error", "shop/taken is not served");
    let address = kubelet.ip4().to_string();
    report.has("probes", "warning", &format!("policies refuse {address}"));
    let (code, text) = examine(clinic.here(), &clinic.options(0), "text").await;
    assert_eq!(code, 3);
    let way_out = "-> probes must come from 169.254.7.127";
    assert!(
        text.contains(way_out) && text.contains("\n1 errors, "),
        "{text}"
    );
}

#[tokio::test]
async fn a_node_without_proxy_and_agent_is_examined_as_far_as_it_goes() {
    let clinic = Clinic::new();
    let options = clinic
        .options(0)
        .env("XDS_ROOT_CA", "/nowhere/root-cert.pem");
    let report = report(clinic.here(), &options).await;
    assert_eq!(report.code, 3);
    report.has("proxy", "error", "no proxy answers at 127.0.0.1:15000");
    report.has("agent", "error", "there is no socket");
    report.has("roots", "error", "cannot read /nowhere/root-cert.pem");
    report.has("istiod", "error", "there is no file /nowhere/root-cert.pem");
    report.has("pods", "skipped", "");
    report.has("token", "ok", "good");

    // Faults of the configuration are findings, too, and what needs none is examined.
    let report = self::report(clinic.here(), &options.env("IPV6_ENABLED", "maybe")).await;
    assert_eq!(report.code, 3);
    report.has("configuration", "error", "IPV6_ENABLED");
    report.has("capabilities", "ok", "");
}

#[tokio::test]
async fn missing_capabilities_are_named_by_doctor_and_by_the_proxy() {
    let clinic = Clinic::new();
    let options = clinic.options(0).wrapped(&[
        "setpriv",
        "--bounding-set",
        "-sys_admin,-net_admin,-net_raw",
    ]);
    let report = report(clinic.here(), &options).await;
    for capability in ["SYS_ADMIN", "NET_ADMIN", "NET_RAW"] {
        report.has("capabilities", "error", capability);
    }
    report.has("kernel", "error", "cannot enter network namespaces");
    report.has("kernel", "error", "cannot mark packets");
    let mut proxy = options.start(clinic.world.node(0)).unwrap();
    assert_eq!(proxy.exit(wait::SOON).await.unwrap().code(), Some(1));
    let last_words = proxy.log().tail(8);
    for capability in ["SYS_ADMIN", "NET_ADMIN"] {
        assert!(last_words.contains(capability), "{last_words}");
    }

    // Nothing is lost that cannot be spared.
    let options = clinic
        .options(0)
        .wrapped(&["setpriv", "--bounding-set", "-net_raw"]);
    let report = self::report(clinic.here(), &options).await;
    assert_eq!(report.of("capabilities").len(), 1);
    let proxy = options.start(clinic.world.node(0)).unwrap();
    proxy
        .log()
        .wait("it starts", |line| line.raw.contains("state manager"))
        .await;
}

/// A server whose clock is wrong by this many seconds.
async fn wrong_clock(world: &World, seconds: u64) -> (SocketAddr, tokio::task::JoinSet<()>) {
    let netns = world.node(0).proxy_netns();
    let authority = Authority::new("root").unwrap();
    std::fs::write(world.file("clock-root.pem"), authority.root_pem()).unwrap();
    let server = authority.issue_server(&["127.0.0.1".to_owned()]).unwrap();
    let tls = TlsAcceptor::from(server_tls(&server).unwrap());
    let listener = traffic::listen(netns, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let at = listener.local_addr().unwrap();
    let date = netns.command(
        "date",
        &[
            "-u",
            "-d",
            &format!("{seconds} seconds"),
            "+%a, %d %b %Y %H:%M:%S GMT",
        ],
        "",
    );
    let date = date.unwrap().trim().to_owned();
    let mut serving = tokio::task::JoinSet::new();
    serving.spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let Ok(stream) = tls.accept(socket).await else {
                continue;
            };
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                let response = http::Response::builder()
                    .header("date", &date)
                    .body(())
                    .unwrap();
                let _ = respond.send_response(response, true);
            }
        }
    });
    (at, serving)
}

#[tokio::test]
async fn a_clock_that_is_wrong_is_told() {
    let clinic = Clinic::new();
    let (at, _serving) = wrong_clock(&clinic.world, 630).await;
    let root = clinic.world.file("clock-root.pem").display().to_string();
    let options = clinic
        .options(0)
        .env("CA_ADDRESS", &format!("https://{at}"))
        .env("CA_ROOT_CA", &root);
    let report = report(clinic.here(), &options).await;
    report.has("ca", "ok", "answers");
    report.has(
        "ca",
        "error",
        "the clock of this node is 10 min behind that of the certificate authority",
    );
    assert!(
        report
            .of("istiod")
            .iter()
            .all(|(severity, _)| *severity == "ok")
    );
}
