//! The Helm chart, rendered by the real helm: what users of the ztunnel chart rely on, and what is ours.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeMap, fs, process::Command};

use serde_json::{Value, json};
use testkit::kubetools::{deployed, documents, helm, validate};

/// Everything that can be switched on together.
const ALL: &[&str] = &[
    "--set=platform=openshift,revision=r1,logAsJson=true,network=n1,annotations.a=b,labels.team=mesh",
    "--set=podMonitor.enabled=true,podMonitor.interval=15s,prometheusRule.enabled=true,dashboards.enabled=true",
    "--set=networkPolicy.enabled=true,resourceQuotas.enabled=true,peerCaCrl.enabled=true,state.type=emptyDir",
    "--set=seccompProfile.type=Localhost,seccompProfile.localhostProfile=culvert.json,resources.limits.cpu=2",
    "--set=openbao.enabled=true,openbao.address=https://bao:8200,openbao.caSecret=bao,openbao.auth.method=jwt",
    "--set=openbao.jwtSource=kubernetes,openbao.tokenNamespaces={shop,bank},sameNode.namespaces.shop=direct",
    "--set=otlp.endpoint=http://tempo:4317,memoryBudget=64Mi,workerThreads=50%,metrics.labels=minimal",
    "--set=state.keys=true,coreDumps=true,limits.flowsPerPod=2000000,limits.handshakesPerPod=100,limits.handshakesPerPeer=10",
    "--set=limits.streamsPerConnection=50,limits.headerBytes=4096,limits.controlFramesPerSecond=5,limits.resetsPerSecond=7",
    "--set=limits.descriptorReserve=0,limits.listenBacklog=256",
];

fn render(arguments: &[&str]) -> Vec<Value> {
    let text = helm(arguments).unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
    documents(&text).unwrap()
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents.iter().filter(|it| it["kind"] == kind).collect()
}

/// The one `DaemonSet`.
fn daemon_set(arguments: &[&str]) -> Value {
    match *of_kind(&render(arguments), "DaemonSet") {
        [one] => one.clone(),
        ref others => panic!("{others:?}"),
    }
}

fn container(daemon_set: &Value) -> &Value {
    let containers = &daemon_set["spec"]["template"]["spec"]["containers"];
    assert_eq!(containers.as_array().unwrap().len(), 1);
    &containers[0]
}

/// The variables by name; those from the downward API as its field.
fn env(daemon_set: &Value) -> BTreeMap<String, String> {
    let list = container(daemon_set)["env"].as_array().unwrap();
    let one = |it: &Value| {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let from = &it["valueFrom"];
        let value = text(&it["value"])
            .or_else(|| text(&from["fieldRef"]["fieldPath"]))
            .or_else(|| text(&from["resourceFieldRef"]["resource"]));
        (text(&it["name"]).unwrap(), value.unwrap())
    };
    let found: BTreeMap<_, _> = list.iter().map(one).collect();
    assert_eq!(found.len(), list.len(), "a variable is there twice");
    found
}

/// The parts named `name` of a list.
fn named<'a>(list: &'a Value, name: &str) -> &'a Value {
    let mut found = list.as_array().unwrap().iter();
    found
        .find(|it| it["name"] == name)
        .unwrap_or_else(|| panic!("no {name} in {list}"))
}

#[test]
fn the_daemon_set_is_that_of_ztunnel() {
    let set = daemon_set(&["--set=profile=ambient"]);
    let labels = json!({
        "app.kubernetes.io/name": "ztunnel",
        "app.kubernetes.io/instance": "culvert",
        "app.kubernetes.io/managed-by": "Helm",
        "app.kubernetes.io/version": env!("CARGO_PKG_VERSION"),
        "app.kubernetes.io/part-of": "istio",
        "helm.sh/chart": concat!("culvert-", env!("CARGO_PKG_VERSION")),
    });
    assert_eq!(
        set["metadata"],
        json!({ "name": "ztunnel", "namespace": "istio-system", "labels": labels })
    );
    assert_eq!(
        set["spec"]["selector"],
        json!({ "matchLabels": { "app": "ztunnel" } })
    );
    let rolling = json!({ "maxSurge": 1, "maxUnavailable": 0 });
    let strategy = json!({ "type": "RollingUpdate", "rollingUpdate": rolling });
    assert_eq!(set["spec"]["updateStrategy"], strategy);

    let pod = &set["spec"]["template"];
    let mut pod_labels = labels;
    pod_labels["app"] = json!("ztunnel");
    pod_labels["sidecar.istio.io/inject"] = json!("false");
    pod_labels["istio.io/dataplane-mode"] = json!("none");
    let annotations = json!({
        "sidecar.istio.io/inject": "false",
        "prometheus.io/port": "15020",
        "prometheus.io/scrape": "true",
    });
    assert_eq!(
        pod["metadata"],
        json!({ "labels": pod_labels, "annotations": annotations })
    );
    let mut spec = pod["spec"].clone();
    spec.as_object_mut()
        .unwrap()
        .retain(|key, _| key != "containers" && key != "volumes");
    assert_eq!(
        spec,
        json!({
            "serviceAccountName": "ztunnel",
            "priorityClassName": "system-node-critical",
            "terminationGracePeriodSeconds": 30,
            "nodeSelector": { "kubernetes.io/os": "linux" },
            "tolerations": [
                { "effect": "NoSchedule", "operator": "Exists" },
                { "key": "CriticalAddonsOnly", "operator": "Exists" },
                { "effect": "NoExecute", "operator": "Exists" },
            ],
        })
    );
}

#[test]
fn the_container_is_that_of_ztunnel() {
    let set = daemon_set(&["--set=profile=ambient"]);
    let mut container = container(&set).clone();
    container
        .as_object_mut()
        .unwrap()
        .retain(|key, _| key != "env" && key != "volumeMounts");
    assert_eq!(
        container,
        json!({
            "name": "istio-proxy",
            "image": concat!("localhost/culvert:", env!("CARGO_PKG_VERSION")),
            "args": ["proxy", "ztunnel"],
            "ports": [{ "name": "ztunnel-stats", "containerPort": 15020, "protocol": "TCP" }],
            "readinessProbe": { "httpGet": { "path": "/healthz/ready", "port": 15021 } },
            "resources": { "requests": { "cpu": "50m", "memory": "64Mi" } },
            "securityContext": {
                "runAsUser": 0,
                "runAsGroup": 1337,
                "runAsNonRoot": false,
                "privileged": false,
                "allowPrivilegeEscalation": true,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"], "add": ["SYS_ADMIN", "NET_ADMIN", "NET_RAW"] },
            },
        })
    );
    let expected = [
        ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
        ("INPOD_ENABLED", "true"),
        ("INSTANCE_IP", "status.podIP"),
        ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
        ("NODE_NAME", "spec.nodeName"),
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("RUST_BACKTRACE", "1"),
        ("RUST_LOG", "info"),
        ("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
        ("ZTUNNEL_CPU_LIMIT", "limits.cpu"),
        ("ZTUNNEL_RESOURCE_CPU_REQUEST", "50m"),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(env(&set), BTreeMap::from(expected));
}

#[test]
fn the_volumes_are_those_of_ztunnel() {
    let set = daemon_set(&[]);
    let token =
        json!({ "path": "istio-token", "expirationSeconds": 43200, "audience": "istio-ca" });
    let socket = json!({ "path": "/var/run/ztunnel", "type": "DirectoryOrCreate" });
    assert_eq!(
        set["spec"]["template"]["spec"]["volumes"],
        json!([
            { "name": "istio-token", "projected": { "sources": [{ "serviceAccountToken": token }] } },
            { "name": "istiod-ca-cert", "configMap": { "name": "istio-ca-root-cert" } },
            { "name": "cni-ztunnel-sock-dir", "hostPath": socket },
            { "name": "tmp", "emptyDir": {} },
        ])
    );
    assert_eq!(
        container(&set)["volumeMounts"],
        json!([
            { "name": "istio-token", "mountPath": "/var/run/secrets/tokens", "readOnly": true },
            { "name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio", "readOnly": true },
            { "name": "cni-ztunnel-sock-dir", "mountPath": "/var/run/ztunnel" },
            { "name": "tmp", "mountPath": "/tmp" },
        ])
    );
}

/// Values that users of the upstream chart have, and one more: the image.
const UPSTREAM: &str = "
profile: ambient
hub: docker.io/istio
tag: 1.32.0-distroless
image: registry.example/mesh/culvert:1.2.3
resourceName: edge
revision: canary
istioNamespace: mesh-control
caAddress: ca.example:443
terminationGracePeriodSeconds: 60
logLevel: debug
logAsJson: true
imagePullPolicy: Always
imagePullSecrets: [pull]
meshConfig: {accessLogFile: /dev/stdout, defaultConfig: {proxyMetadata: {ISTIO_META_DNS_CAPTURE: 'false'}}}
env: {RUST_LOG: 'info,access=off', SECRET_TTL: 6h, KEEPALIVE_RETRIES: 3, INPOD_ENABLED: null}
resources: {requests: {cpu: 200m, memory: null}, limits: {cpu: 500m}}
tolerations: []
podAnnotations: {example.com/a: b}
updateStrategy: {rollingUpdate: {maxSurge: 0, maxUnavailable: 1}}
global: {network: net-a, logAsJson: false, multiCluster: {clusterName: west}, imagePullPolicy: Never, pilot: {x: y}}
";

#[test]
fn values_of_the_upstream_chart_act_as_there() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("values.yaml");
    fs::write(&file, UPSTREAM).unwrap();
    let all = render(&["-f", file.to_str().unwrap()]);
    let set = of_kind(&all, "DaemonSet")[0];
    assert_eq!(set["metadata"]["name"], "edge");
    assert_eq!(
        set["metadata"]["annotations"],
        json!({ "istio.io/rev": "canary" })
    );
    assert_eq!(set["spec"]["selector"]["matchLabels"]["app"], "ztunnel");
    assert_eq!(
        set["spec"]["updateStrategy"]["rollingUpdate"],
        json!({ "maxSurge": 0, "maxUnavailable": 1 })
    );
    let pod = &set["spec"]["template"];
    let annotation = |name: &str| pod["metadata"]["annotations"][name].as_str().unwrap();
    assert_eq!(annotation("example.com/a"), "b");
    assert_eq!(annotation("prometheus.io/scrape"), "true");
    assert_eq!(pod["spec"]["terminationGracePeriodSeconds"], 60);
    assert!(pod["spec"]["tolerations"].is_null());
    let container = container(set);
    assert_eq!(container["image"], "registry.example/mesh/culvert:1.2.3");
    assert_eq!(container["imagePullPolicy"], "Always");
    let resources = json!({ "requests": { "cpu": "200m" }, "limits": { "cpu": "500m" } });
    assert_eq!(container["resources"], resources);
    let env = env(set);
    for (name, value) in [
        ("XDS_ADDRESS", "istiod-canary.mesh-control.svc:15012"),
        ("CA_ADDRESS", "ca.example:443"),
        ("LOG_FORMAT", "json"),
        ("RUST_LOG", "info,access=off"),
        ("SECRET_TTL", "6h"),
        ("KEEPALIVE_RETRIES", "3"),
        ("NETWORK", "net-a"),
        ("ISTIO_META_CLUSTER_ID", "west"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
        ("ISTIO_META_DNS_CAPTURE", "false"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "60"),
        ("ZTUNNEL_RESOURCE_CPU_LIMIT", "500m"),
        ("ZTUNNEL_RESOURCE_CPU_REQUEST", "200m"),
    ] {
        assert_eq!(env[name], value, "{name}");
    }
    assert!(!env.contains_key("INPOD_ENABLED"), "null takes out");
    let account = of_kind(&all, "ServiceAccount")[0];
    assert_eq!(account["imagePullSecrets"], json!([{ "name": "pull" }]));
}

#[test]
fn the_image_is_put_together_as_upstream() {
    for (arguments, image) in [
        (
            "--set=hub=h.example/x,tag=1.2,variant=debug",
            "h.example/x/culvert:1.2-debug",
        ),
        (
            "--set=global.hub=h.example/x,global.tag=t,image=other",
            "h.example/x/other:t",
        ),
        (
            "--set=hub=mine,global.hub=h.example/x,tag=1",
            "mine/culvert:1",
        ),
        (
            "--set=hub=h,tag=t,variant=v,image=r.example/a@sha256:00",
            "r.example/a@sha256:00",
        ),
    ] {
        assert_eq!(
            container(&daemon_set(&[arguments]))["image"],
            image,
            "{arguments}"
        );
    }
}

#[test]
fn everything_switched_on_is_valid_and_takes_effect() {
    let text = helm(ALL).unwrap();
    assert_eq!(validate(&text).unwrap(), documents(&text).unwrap().len());
    let all = documents(&text).unwrap();
    let kinds: BTreeMap<&str, usize> = all.iter().fold(BTreeMap::new(), |mut kinds, it| {
        *kinds.entry(it["kind"].as_str().unwrap()).or_default() += 1;
        kinds
    });
    let dashboards = fs::read_dir(deployed("grafana")).unwrap().count();
    let expected = [
        ("ClusterRole", 1),
        ("ClusterRoleBinding", 1),
        ("ConfigMap", dashboards),
        ("DaemonSet", 1),
        ("NetworkPolicy", 1),
        ("PodMonitor", 1),
        ("PrometheusRule", 1),
        ("ResourceQuota", 1),
        ("Role", 2),
        ("RoleBinding", 2),
        ("ServiceAccount", 1),
    ];
    assert_eq!(kinds, BTreeMap::from(expected));
    let set = of_kind(&all, "DaemonSet")[0];
    let context = &container(set)["securityContext"];
    assert_eq!(context["seLinuxOptions"], json!({ "type": "spc_t" }));
    let profile = context["seccompProfile"]["localhostProfile"]
        .as_str()
        .unwrap();
    assert!(deployed("seccomp").join(profile).exists(), "{profile}");
    let volumes = &set["spec"]["template"]["spec"]["volumes"];
    assert_eq!(named(volumes, "openbao-ca")["secret"]["secretName"], "bao");
    let keys = json!({ "medium": "Memory", "sizeLimit": "16Mi" });
    assert_eq!(named(volumes, "keys")["emptyDir"], keys);
    let env = env(set);
    for (name, value) in [
        ("CRL_PATH", "/var/run/secrets/istio/crl/ca-crl.pem"),
        ("STATE_DIR", "/var/lib/culvert"),
        ("STATE_KEYS", "/run/culvert"),
        ("CORE_DUMPS", "true"),
        ("MEMORY_BUDGET", "64Mi"),
        ("MAX_FLOWS_PER_POD", "2000000"),
        ("HTTP2_MAX_RESETS", "7"),
        ("DESCRIPTOR_RESERVE", "0"),
        ("LISTEN_BACKLOG", "256"),
        ("SAME_NODE_NAMESPACES", "shop=direct"),
        ("OPENBAO_ROOT_MOUNTS", "pki-root"),
        ("OTEL_TRACES_SAMPLER_ARG", "1"),
    ] {
        assert_eq!(env[name], value, "{name}");
    }
    let board = of_kind(&all, "ConfigMap")[0]["data"].as_object().unwrap();
    let (file, content) = board.iter().next().unwrap();
    let original =
        fs::read_to_string(deployed("grafana").join(file.trim_start_matches("culvert-")));
    assert_eq!(content.as_str().unwrap().trim(), original.unwrap().trim());
}

/// Values, and what is said about them.
const FAULTY: &[(&str, &str)] = &[
    (
        "sameNod.mode=direct",
        "additional properties 'sameNod' not allowed",
    ),
    (
        "defaults.hub=x",
        "additional properties 'defaults' not allowed",
    ),
    (
        "sameNode.mode=fast",
        "value must be one of 'hbone', 'direct'",
    ),
    ("profile=big", "there are: ambient, n100"),
    ("platform=toaster", "there are: gke, k3d"),
    ("terminationGracePeriodSeconds=0", "minimum"),
    (
        "resources.requests.memory=much",
        "/resources/requests/memory",
    ),
    ("workerThreads=200%", "/workerThreads"),
    ("metrics.maxSeries=1", "/metrics/maxSeries"),
    ("otlp.endpoint=tempo:4317", "/otlp/endpoint"),
    (
        "state.type=hostPath,state.hostPath=var",
        "not an absolute path",
    ),
    (
        "memoryBudget=1Gi,resources.limits.memory=512Mi",
        "must be less than",
    ),
    ("memoryBudget=16Mi", "at least 32Mi"),
    ("limits.flowsPerPod=0", "/limits/flowsPerPod"),
    ("state.keys=true", "set state.type"),
    (
        "state.type=hostPath,state.keys=true,state.keysHostPath=run",
        "not an absolute path",
    ),
    ("seccompProfile.type=Localhost", "needs localhostProfile"),
    ("openbao.enabled=true", "is no address of OpenBao"),
    (
        "openbao.enabled=true,openbao.address=https://bao:8200",
        "caConfigMap or caSecret",
    ),
];

#[test]
fn values_that_cannot_work_are_refused_in_words() {
    let bao = "openbao.enabled=true,openbao.address=https://bao:8200,openbao.caSecret=ca";
    let combined = [
        (format!("{bao},caAddress=x:1"), "one of them"),
        (
            format!("{bao},openbao.jwtSource=kubernetes"),
            "openbao.auth.method jwt",
        ),
        (
            format!("{bao},openbao.jwtSource=kubernetes,openbao.auth.method=jwt"),
            "tokenNamespaces",
        ),
    ];
    let combined = combined
        .iter()
        .map(|(values, word)| (values.as_str(), *word));
    for (values, word) in FAULTY.iter().copied().chain(combined) {
        let said = match helm(&["--set", values]) {
            Ok(_) => panic!("{values}: rendered"),
            Err(error) => error.to_string(),
        };
        assert!(said.contains(word), "{values}: {said}");
    }
}

#[test]
fn large_numbers_are_written_out() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("values.yaml");
    let values = "{env: {HTTP2_STREAM_WINDOW_SIZE: 4194304, RATIO: 0.5}, memoryBudget: 67108864}";
    fs::write(&file, values).unwrap();
    let env = env(&daemon_set(&["-f", file.to_str().unwrap()]));
    assert_eq!(env["HTTP2_STREAM_WINDOW_SIZE"], "4194304");
    assert_eq!(env["RATIO"], "0.5");
    assert_eq!(env["MEMORY_BUDGET"], "67108864");
}

#[test]
fn scopes_part_what_is_rendered() {
    let kinds = |scope: &str| {
        let scope = format!("--set=platform=openshift,resourceScope={scope}");
        let kinds = render(&[&scope]);
        kinds
            .iter()
            .map(|it| it["kind"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(kinds("cluster"), ["ClusterRole", "ClusterRoleBinding"]);
    assert_eq!(kinds("namespace"), ["ServiceAccount", "DaemonSet"]);
    assert_eq!(kinds("all").len(), 4);
}

/// With one fault of ours, the proxy lists all that it finds, and ends.
#[test]
fn the_proxy_accepts_what_the_chart_sets() {
    let from_the_cluster = |value: &str| match value {
        "status.podIP" => "10.0.0.7".to_owned(),
        "limits.cpu" => "4".to_owned(),
        value => value.to_owned(),
    };
    for arguments in [&["--set=profile=ambient"], &["--set=profile=n100"], ALL] {
        let output = Command::new(testkit::proxy::binary().unwrap())
            .arg("proxy")
            .env_clear()
            .envs(
                env(&daemon_set(arguments))
                    .iter()
                    .map(|(name, value)| (name, from_the_cluster(value))),
            )
            .env("KUBERNETES_SERVICE_HOST", "10.96.0.1")
            .env("KUBERNETES_SERVICE_PORT", "443")
            .env("KEEPALIVE_ENABLED", "1")
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        let faults: Vec<&str> = said.lines().filter(|line| line.starts_with("  ")).collect();
        assert!(
            matches!(*faults, [one] if one.contains("KEEPALIVE_ENABLED")),
            "{said}"
        );
    }
}

#[test]
fn every_value_is_documented_and_every_variable_known() {
    let values = fs::read_to_string(deployed("chart/values.yaml")).unwrap();
    let values = &documents(&values).unwrap()[0]["_defaults"];
    let readme = fs::read_to_string(deployed("chart/README.md")).unwrap();
    for (key, value) in values.as_object().unwrap() {
        let whole = readme.contains(&format!("`{key}`"));
        let parts = value.as_object().is_some_and(|parts| {
            parts
                .keys()
                .all(|part| readme.contains(&format!("`{key}.{part}")))
        });
        assert!(whole || parts, "chart/README.md does not tell of {key}");
    }
    let readme = include_str!("../../README.md");
    for name in env(&daemon_set(ALL)).keys() {
        let unread = ["INPOD_ENABLED", "RUST_BACKTRACE"].contains(&name.as_str());
        let known =
            unread || name.starts_with("ISTIO_META_") || readme.contains(&format!("`{name}`"));
        assert!(known, "the proxy does not know {name}");
    }
}
