//! A real Prometheus reads what two proxies tell under traffic.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{fs, path::PathBuf, process::Command, sync::Arc, time::Duration};

use serde_json::Value;
use testkit::{
    Cluster, Istiod, Mesh, Pod, PodSpec, Prometheus, ProxyOptions, World, istiod,
    prometheus::Target, proxy::STATS_PORT, sys, traffic::Behaviour, wait,
};
use tokio::time::{Instant, sleep};

/// What consumers of the mesh ask: Istio's dashboards, Kiali's graph and badges, Istio's own tests. `NAMES` are those that
/// Kiali groups its graph by.
const CONSUMERS: &[&str] = &[
    r#"sum by (tag) (istio_build{component="ztunnel"})"#,
    r#"sum by (component, tag) (istio_build)"#,
    r#"sum by (pod) (rate(istio_tcp_connections_opened_total{pod=~"ztunnel-.*"}[10s]))"#,
    r#"sum by (pod) (-rate(istio_tcp_connections_closed_total{pod=~"ztunnel-.*"}[10s]))"#,
    r#"sum by (pod) (rate(istio_tcp_sent_bytes_total{pod=~"ztunnel-.*"}[10s]))"#,
    r#"sum by (pod) (rate(istio_tcp_received_bytes_total{pod=~"ztunnel-.*"}[10s]))"#,
    r#"sum by (pod) (rate(istio_dns_requests_total{pod=~"ztunnel-.*"}[10s]))"#,
    r#"sum by (pod) (rate(istio_xds_connection_terminations_total{pod=~"ztunnel-.*"}[10s]))"#,
    r#"sum by (url) (irate(istio_xds_message_total{pod=~"ztunnel-.*"}[10s]))"#,
    r#"sum by (pod) (workload_manager_active_proxy_count{pod=~"ztunnel-.*"})"#,
    r#"sum by (pod) (workload_manager_pending_proxy_count{pod=~"ztunnel-.*"})"#,
    r#"sum by (pod) (istio_tcp_connections_opened_total{app="ztunnel"}) - sum by (pod) (istio_tcp_connections_closed_total{app="ztunnel"})"#,
    r#"sum by (pod) (process_open_fds{app="ztunnel"})"#,
    r#"sum by (pod) (istio_tcp_sockets_open{app="ztunnel"})"#,
    r#"sum by (destination_service) (rate(istio_tcp_sent_bytes_total{reporter="source",connection_security_policy="mutual_tls",destination_workload_namespace="shop",source_cluster="Kubernetes",destination_cluster="Kubernetes"}[10s]))"#,
    r#"sum by (source_workload, source_workload_namespace) (rate(istio_tcp_received_bytes_total{reporter="source",connection_security_policy!="mutual_tls"}[10s]))"#,
    r#"sum(rate(istio_tcp_sent_bytes_total{app="ztunnel",reporter="source",source_workload_namespace="shop"}[10s])) by (NAMES) > 0"#,
    r#"sum(rate(istio_tcp_received_bytes_total{app="ztunnel",reporter="destination",destination_service=~"^.+\\.shop\\..+$"}[10s])) by (NAMES) > 0"#,
    r#"sum(rate(istio_tcp_sent_bytes_total{app="ztunnel",reporter="destination",destination_workload_namespace="shop"}[10s])) by (NAMES) > 0"#,
    r#"sum(rate(istio_tcp_received_bytes_total{app="ztunnel",reporter="source",source_workload_namespace="shop"}[10s])) by (NAMES) > 0"#,
    r#"sum(rate(istio_tcp_sent_bytes_total{reporter="source",destination_workload="unknown",destination_workload_namespace="unknown"}[10s])) by (NAMES)"#,
    r#"sum(rate(istio_tcp_sent_bytes_total{app="ztunnel",reporter="source"}[10s])) by (NAMES, source_principal, destination_principal, connection_security_policy) > 0"#,
    r#"sum by (source_workload, source_workload_namespace) (rate(istio_tcp_received_bytes_total{reporter="destination",connection_security_policy="mutual_tls",destination_workload="api-deploy",destination_workload_namespace="shop"}[10s])) > 0"#,
    r#"istio_tcp_connections_opened_total{reporter="destination",connection_security_policy="mutual_tls",source_principal="spiffe://cluster.local/ns/shop/sa/web",destination_principal="spiffe://cluster.local/ns/shop/sa/api",source_canonical_service="web-app",source_canonical_revision="v1",source_version="v1",source_workload="web-deploy",source_workload_namespace="shop",destination_canonical_service="api-app",destination_canonical_revision="v1",destination_version="v1",destination_workload="api-deploy",destination_workload_namespace="shop",destination_service="api.shop.svc.cluster.local",destination_service_name="api",destination_service_namespace="shop"}"#,
];
const NAMES: &str = "app,source_cluster,source_workload_namespace,source_workload,source_canonical_service,\
    source_canonical_revision,destination_cluster,destination_service_namespace,destination_service,\
    destination_service_name,destination_workload_namespace,destination_workload,destination_canonical_service,\
    destination_canonical_revision,response_flags";

/// What the linter of Prometheus may say: names that Istio's consumers read as they are.
const LINTS: [&str; 2] = [
    r#"workload_manager_active_proxy_count non-histogram and non-summary metrics should not have "_count" suffix"#,
    r#"workload_manager_pending_proxy_count non-histogram and non-summary metrics should not have "_count" suffix"#,
];

/// `OpenMetrics` in the older format, which the linter reads: there, descriptions of counters carry the suffix.
fn in_the_older_format(exposition: &str) -> String {
    let counter = |name: &str| exposition.contains(&format!("# TYPE {name} counter\n"));
    let line = |line: &str| match *line.splitn(4, ' ').collect::<Vec<_>>() {
        ["#", word @ ("HELP" | "TYPE"), name, rest] if counter(name) => {
            format!("# {word} {name}_total {rest}\n")
        }
        ["#", "UNIT" | "EOF", ..] => String::new(),
        _ => format!("{line}\n"),
    };
    exposition.lines().map(line).collect()
}

fn deployed(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(file)
}

/// Every expression of every dashboard, its variables filled in, with where it stands.
fn dashboards() -> Vec<(String, String)> {
    let mut expressions = Vec::new();
    for file in fs::read_dir(deployed("grafana")).unwrap() {
        let path = file.unwrap().path();
        let board: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let name = path.file_stem().unwrap().to_str().unwrap();
        for panel in board["panels"].as_array().unwrap() {
            let place = format!("{name}: {}", panel["title"].as_str().unwrap());
            for target in panel["targets"].as_array().unwrap() {
                let expression = target["expr"].as_str().unwrap();
                let filled = expression
                    .replace("$pod", ".*")
                    .replace("$__rate_interval", "10s");
                assert!(
                    !filled.contains('$'),
                    "{place}: an unknown variable in {expression}"
                );
                expressions.push((place.clone(), filled));
            }
        }
    }
    assert!(expressions.len() > 40, "{}", expressions.len());
    expressions
}

/// What `promtool` says about `input`, and whether it is content.
fn promtool(arguments: &[&str], input: Option<&str>) -> (bool, String) {
    use std::{io::Write as _, process::Stdio};
    let mut child = Command::new("promtool")
        .args(arguments)
        .env("PATH", sys::tools())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool of the package prometheus");
    let mut stdin = child.stdin.take().unwrap();
    stdin
        .write_all(input.unwrap_or_default().as_bytes())
        .unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[test]
fn the_rules_are_sound_and_their_tests_pass() {
    let rules = deployed("prometheus/rules.yaml");
    let (sound, said) = promtool(&["check", "rules", rules.to_str().unwrap()], None);
    assert!(sound, "{said}");
    let tests = deployed("prometheus/rules_test.yaml");
    let (passed, said) = promtool(&["test", "rules", tests.to_str().unwrap()], None);
    assert!(passed, "{said}");
    let text = fs::read_to_string(&rules).unwrap();
    let readme = fs::read_to_string(deployed("README.md")).unwrap();
    let tested = fs::read_to_string(&tests).unwrap();
    for alert in text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
    {
        assert!(
            readme.contains(&format!("`{alert}`")),
            "{alert} is not documented"
        );
        assert!(
            tested.contains(&format!("\"{alert}\"")),
            "{alert} is not tested"
        );
    }
}

/// Where a family may be absent, an expression returns data whatever it is called: so names are held against the README.
#[test]
fn every_family_of_dashboards_and_rules_is_documented() {
    let readme = fs::read_to_string(deployed("../README.md")).unwrap();
    let rules = fs::read_to_string(deployed("prometheus/rules.yaml")).unwrap();
    let mut texts = dashboards();
    texts.extend(
        rules
            .lines()
            .map(|line| ("a rule".to_owned(), line.to_owned())),
    );
    let mut seen = 0;
    for (place, text) in texts {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let prefixes = ["istio_", "culvert_", "process_", "workload_manager_"];
        for family in words.filter(|word| prefixes.iter().any(|one| word.starts_with(one))) {
            let family = family.trim_end_matches("_bucket");
            assert!(readme.contains(&format!("`{family}")), "{place}: {family}");
            seen += 1;
        }
    }
    assert!(seen > 80, "{seen}");
}

/// Two proxies that follow an istiod, and a Prometheus that scrapes them.
struct Watched<'a> {
    cluster: Cluster<'a>,
    istiod: Istiod,
    prometheus: Prometheus,
}

struct Stage {
    world: World,
    web: Arc<Pod>,
    api: Arc<Pod>,
    outside: Arc<Pod>,
    monitoring: Arc<Pod>,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let pod = |node: usize, spec: &PodSpec| world.node(node).pod(spec).unwrap();
        Self {
            web: pod(0, &PodSpec::captured("web")),
            api: pod(1, &PodSpec::captured("api")),
            outside: pod(1, &PodSpec::plain("outside")),
            monitoring: pod(0, &PodSpec::plain("monitoring")),
            world,
        }
    }

    async fn start(&self) -> Watched<'_> {
        let mut mesh = Mesh::of(&[&self.web, &self.api]);
        mesh.service("api", [10, 96, 0, 1].into(), &[(80, 8080)], &[&self.api]);
        let file = ProxyOptions::mesh_file(&self.world);
        mesh.write(&file).unwrap();
        let at = ([10, 20, 0, 1], istiod::PORT).into();
        let first = self.world.node(0).netns();
        let istiod = Istiod::options()
            .start_at(first, at, self.world.directory())
            .unwrap();
        istiod.follow(&file).await.unwrap();
        // Nobody answers names there, and the kernel says so at once.
        let resolv_conf = self.world.file("resolv.conf");
        fs::write(&resolv_conf, "nameserver 10.20.0.1\n").unwrap();
        let options = |node: &testkit::Node| {
            ProxyOptions::new(&self.world, node)
                .follow(&istiod)
                .env("ISTIO_META_DNS_CAPTURE", "true")
                .env("MEMORY_BUDGET", "1Gi")
                .resolv_conf(resolv_conf.clone())
        };
        let cluster = Cluster::run(&self.world, options, &[&self.web, &self.api])
            .await
            .unwrap();
        let target = |(node, pod): (u8, &str)| Target {
            address: ([10, 20, node, 2], STATS_PORT).into(),
            labels: [
                ("app", "ztunnel"),
                ("pod", pod),
                ("namespace", "istio-system"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec(),
        };
        let targets = [(0, "ztunnel-a"), (1, "ztunnel-b")].map(target);
        let rules = deployed("prometheus/rules.yaml");
        let rules = rules.to_str().unwrap();
        let prometheus = Prometheus::start(&self.world, &self.monitoring, &targets, rules);
        Watched {
            prometheus: prometheus.await.unwrap(),
            cluster,
            istiod,
        }
    }

    /// A little of everything that can happen, until dropped.
    async fn traffic(&self, istiod: &Istiod) {
        let _api = self.api.serve(8080, Behaviour::Sink).unwrap();
        let _outside = self.outside.serve(8080, Behaviour::Sink).unwrap();
        let service = ([10, 96, 0, 1], 80).into();
        loop {
            self.web.ask(service, b"hello").await.unwrap();
            self.web.ask(self.outside.at(8080), b"hello").await.unwrap();
            // Nobody listens there: a failed flow. No TLS: a refused one.
            let _ = self.web.ask(self.api.at(8081), b"hello").await;
            let _ = self
                .outside
                .ask(self.api.at(15008), b"GET / HTTP/1.1\r\n\r\n")
                .await;
            for name in ["api.shop.svc.cluster.local", "elsewhere.example"] {
                let _ = self
                    .web
                    .dig(&["@127.0.0.1", "-p", "15053", name, "A"])
                    .await;
            }
            istiod.reversion();
            istiod.end_streams(Ok(()));
            sleep(Duration::from_millis(500)).await;
        }
    }
}

#[tokio::test]
async fn every_expression_of_dashboards_and_consumers_returns_data() {
    let stage = Stage::new();
    let watched = stage.start().await;
    let mut asked = dashboards();
    let consumers = CONSUMERS.iter().map(|one| one.replace("NAMES", NAMES));
    asked.extend(consumers.map(|one| ("a consumer".to_owned(), one)));
    let recorded = fs::read_to_string(deployed("prometheus/rules.yaml")).unwrap();
    let recorded = recorded
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- record: "));
    asked.extend(recorded.map(|name| ("a rule".to_owned(), name.to_owned())));

    let prometheus = &watched.prometheus;
    let asking = async {
        let limit = Instant::now() + Duration::from_secs(60);
        while !asked.is_empty() {
            let mut without = Vec::new();
            for (place, expression) in std::mem::take(&mut asked) {
                if prometheus.query(&expression).await.unwrap().is_empty() {
                    without.push((place, expression));
                }
            }
            asked = without;
            assert!(
                Instant::now() < limit,
                "no data for {asked:#?}\n{}",
                prometheus.log()
            );
            sleep(Duration::from_millis(500)).await;
        }
        // Kiali hides the proxy's own traffic by this label, so it must be the target's.
        let hidden = r#"istio_tcp_sent_bytes_total{app!="ztunnel"}"#;
        assert!(prometheus.query(hidden).await.unwrap().is_empty());
        let up = prometheus
            .query("min_over_time(up[1m]) == 1")
            .await
            .unwrap();
        assert_eq!(up.len(), 2, "a scrape failed: {}", prometheus.log());
        let firing =
            r#"ALERTS{alertname=~"CulvertDown|CulvertPodsUnprotected|CulvertCertificate.*"}"#;
        assert!(prometheus.query(firing).await.unwrap().is_empty());
    };
    tokio::select! {
        () = asking => {}
        () = stage.traffic(&watched.istiod) => unreachable!("it never ends"),
    }
}

#[tokio::test]
async fn the_linter_of_prometheus_finds_nothing_but_names_that_are_given() {
    let stage = Stage::new();
    let watched = stage.start().await;
    let linting = async {
        let proxy = watched.cluster.proxy(0);
        for name in [
            "istio_tcp_connections_failed_total",
            "istio_dns_requests_total",
        ] {
            proxy.metric(name, &[], |count| count > 0.0).await;
        }
        let exposition = async || proxy.get(STATS_PORT, "/metrics").await.ok();
        let exposition = wait::until(wait::SOON, "a scrape", exposition).await.body;
        let (_, said) = promtool(
            &["check", "metrics"],
            Some(&in_the_older_format(&exposition)),
        );
        let unexpected: Vec<&str> = said.lines().filter(|line| !LINTS.contains(line)).collect();
        assert!(unexpected.is_empty(), "{unexpected:#?}");
    };
    tokio::select! {
        () = linting => {}
        () = stage.traffic(&watched.istiod) => unreachable!("it never ends"),
    }
}
