//! Faults: all of them at once, in words that help, and never a panic.

use proptest::{collection::btree_map, prelude::*};

use super::{Given, given};
use crate::config::Ports;

#[test]
fn tells_all_faults_together() {
    let faults = given(&[
        ("AUTH_TOKEN", "to\u{7}ken"),
        ("CA_ADDRESS", ""),
        ("CA_HEADER_BAD NAME", "hidden"),
        ("OPENBAO_ADDRESS", "http://bao"),
        ("OPENBAO_AUTH_METHOD", "ldap"),
        ("OPENBAO_MOUNT", "../sys"),
        ("OPENBAO_POLL_INTERVAL", "10ms"),
        ("OPENBAO_ROLE_ID_PATH", "role"),
        ("OPENBAO_ROOT_MOUNTS", "pki, a?b"),
        ("FAKE_CA_ROOT_KEY", "-----BEGIN PRIVATE KEY-----"),
        ("HTTP2_FRAME_SIZE", "16383"),
        ("INSTANCE_IP", "node-1"),
        ("ISTIO_META_DNS_CAPTURE", "no"),
        ("ENABLE_PROXY", "false"),
        ("LOCAL_XDS", "{}"),
        ("LOCAL_XDS_PATH", "mesh.yaml"),
        ("PACKET_MARK", ""),
        ("PROXY_CONFIG", "concurrency: x\nproxyMetadata: {A: [1]}"),
        ("PROXY_MODE", "both"),
        ("RUST_LOG", "info,loud"),
        ("SECRET_TTL", "tomorrow\nor later"),
        ("XDS_ADDRESS", "ftp://istiod"),
        ("ZTUNNEL_RESOURCE_CPU_LIMIT", "-1"),
    ])
    .file(
        "/etc/istio/config/mesh",
        "defaultConfig: {statsPort: 65536}",
    )
    .read()
    .unwrap_err();
    assert_eq!(faults.to_string(), include_str!("faults.txt").trim_end());
}

#[test]
fn tells_the_faults_of_files_with_the_others() {
    let mesh = "workloads: [{uid: a, protcol: TCP}, {uid: b, name: [1]}]";
    let variables = [
        ("FAKE_CA", "true"),
        ("FAKE_CA_ROOT_CERT", "/c.pem"),
        ("FAKE_CA_ROOT_KEY", "/k.pem"),
        ("LOCAL_XDS_PATH", "/mesh.yaml"),
    ];
    let told = |surroundings: Given| surroundings.read().unwrap_err().to_string();
    let faults = told(given(&variables).file("/mesh.yaml", mesh));
    for part in [
        "has 4 faults",
        "FAKE_CA_ROOT_CERT=\"/c.pem\": cannot be read",
        "FAKE_CA_ROOT_KEY=\"/k.pem\": cannot be read",
        "LOCAL_XDS_PATH: a: workloads[0]: unknown field `protcol`",
        "LOCAL_XDS_PATH: b: workloads[1]: ",
    ] {
        assert!(faults.contains(part), "{part} is not in\n{faults}");
    }
    let pems = given(&variables).file("/c.pem", "no").file("/k.pem", "PEM");
    let faults = told(pems);
    for part in [
        "has 2 faults",
        "FAKE_CA_ROOT_CERT and FAKE_CA_ROOT_KEY: ",
        "LOCAL_XDS_PATH=\"/mesh.yaml\": cannot be read",
    ] {
        assert!(faults.contains(part), "{part} is not in\n{faults}");
    }
    let text = [("LOCAL_XDS", "workloads: 1"), ("RUST_LOG", "loud")];
    let faults = given(&text).faulty();
    assert_eq!(faults, ["LOCAL_XDS", "RUST_LOG"].map(str::to_owned).into());
    // Alone, it is told by who loads it.
    given(&[("LOCAL_XDS", "workloads: 1")]).config();
}

#[test]
fn refuses_what_makes_no_sense() {
    let dns = "ISTIO_META_DNS_PROXY_ADDR";
    for (key, value) in [
        ("SECRET_TTL", "0"),
        ("SECRET_TTL", "999ms"),
        ("OPENBAO_POLL_INTERVAL", "0s"),
        ("INSTANCE_IP", "10.0.0"),
        (dns, "127.0.0.1:0"),
        (dns, "localhost:0"),
        ("RUST_LOG", "info,access=loud"),
    ] {
        assert_eq!(given(&[(key, value)]).faulty(), [key.to_owned()].into());
    }
    given(&[("INSTANCE_IP", "fd00::9"), ("SECRET_TTL", "1s")]).config();
}

#[test]
fn keeps_the_ports_of_the_process_apart() {
    let Ports {
        readiness,
        outbound,
        inbound_plaintext,
        hbone,
        socks5,
        ..
    } = given(&[]).config().ports;
    for key in ["proxyAdminPort", "statsPort"] {
        for port in [
            0,
            readiness,
            outbound,
            inbound_plaintext,
            hbone,
            socks5,
            15053,
        ] {
            let document = format!("{key}: {port}");
            let faults = given(&[("PROXY_CONFIG", &document)]).faulty();
            assert_eq!(faults, [format!("PROXY_CONFIG: {key}")].into(), "{port}");
        }
    }
    for document in ["statsPort: 15000", "{proxyAdminPort: 9, statsPort: 9}"] {
        let faults = given(&[("PROXY_CONFIG", document)]).faulty();
        assert_eq!(faults, ["proxyAdminPort and statsPort".to_owned()].into());
    }
    let swapped = "{proxyAdminPort: 15020, statsPort: 15000}";
    let ports = given(&[("PROXY_CONFIG", swapped)]).config().ports;
    assert_eq!((ports.admin, ports.stats), (15020, 15000));
}

#[test]
fn refuses_headers_with_binary_values() {
    for key in ["XDS_HEADER_X-Bin", "CA_HEADER_x-bin"] {
        let faults = given(&[(key, "dmFsdWU")]).read().unwrap_err().to_string();
        assert!(faults.contains(key), "{faults}");
    }
    given(&[("XDS_HEADER_x-bin-not", "value")]).read().unwrap();
}

#[test]
fn abridges_long_values() {
    let long = "µ".repeat(10_000);
    let text = given(&[("INPOD_UDS", &long)])
        .read()
        .unwrap_err()
        .to_string();
    assert!(text.len() < 400, "{text}");
}

#[test]
fn never_repeats_a_document_or_credentials() {
    for (key, value) in [
        ("PROXY_CONFIG", "{proxyMetadata: {T: s3cret"),
        ("PROXY_CONFIG", "s3cret"),
        ("PROXY_CONFIG", "concurrency: [s3cret]"),
        ("PROXY_CONFIG", "proxyMetadata: s3cret"),
        ("PROXY_CONFIG", "proxyMetadata: {T: [s3cret]}"),
        ("XDS_ADDRESS", "https://user:s3cret@istiod"),
        ("CA_ADDRESS", "user:s3cret@istiod:1"),
        ("AUTH_TOKEN", "s3cret\n"),
        ("XDS_HEADER_A", "s3cret\n"),
        ("XDS_ROOT_CA", "-----BEGIN CERTIFICATE-----s3cret"),
        ("OPENBAO_ADDRESS", "https://user:s3cret@bao"),
        ("OPENBAO_TOKEN_PATH", "hvs.s3cret"),
        ("OPENBAO_SECRET_ID_PATH", "s3cret"),
        ("OPENBAO_JWT_PATH", "eyJs3cret"),
        ("KUBERNETES_ACCOUNT_PATH", "eyJs3cret"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:s3cret@tempo"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization s3cret"),
    ] {
        let text = given(&[(key, value)]).read().expect_err(key).to_string();
        assert!(text.contains(key) && !text.contains("s3cret"), "{text}");
    }
}

const KEYS: &[&str] = &[
    "XDS_ADDRESS",
    "CA_ADDRESS",
    "CA_PROVIDER",
    "OPENBAO_ADDRESS",
    "OPENBAO_ROOT_CA",
    "OPENBAO_NAMESPACE",
    "OPENBAO_MOUNT",
    "OPENBAO_ROLE",
    "OPENBAO_ROOT_MOUNTS",
    "OPENBAO_AUTH_METHOD",
    "OPENBAO_AUTH_MOUNT",
    "OPENBAO_AUTH_ROLE",
    "OPENBAO_JWT_PATH",
    "OPENBAO_JWT_SOURCE",
    "OPENBAO_JWT_AUDIENCE",
    "KUBERNETES_ACCOUNT_PATH",
    "OPENBAO_ROLE_ID_PATH",
    "OPENBAO_SECRET_ID_PATH",
    "OPENBAO_TOKEN_PATH",
    "OPENBAO_POLL_INTERVAL",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "TRACES_ERRORS_ALWAYS",
    "XDS_ROOT_CA",
    "CA_ROOT_CA",
    "ALT_XDS_HOSTNAME",
    "ALT_CA_HOSTNAME",
    "AUTH_TOKEN",
    "CA_CERT_WATCHER",
    "SECRET_TTL",
    "XDS_ON_DEMAND",
    "XDS_HEADER_X",
    "CA_HEADER_X",
    "XDS_HEADER_",
    "PREFERED_SERVICE_NAMESPACE",
    "LOCAL_XDS_PATH",
    "LOCAL_XDS",
    "FAKE_CA",
    "FAKE_CA_ROOT_CERT",
    "FAKE_CA_ROOT_KEY",
    "NODE_NAME",
    "POD_NAME",
    "POD_NAMESPACE",
    "SERVICE_ACCOUNT",
    "TRUST_DOMAIN",
    "TRUST_DOMAINS",
    "TRUST_BUNDLE_PATH",
    "TRUST_BUNDLE_GRACE",
    "INSTANCE_IP",
    "NETWORK",
    "ISTIO_META_CLUSTER_ID",
    "CLUSTER_ID",
    "CLUSTER_DOMAIN",
    "ISTIO_META_ISTIO_VERSION",
    "KUBERNETES_SERVICE_HOST",
    "ENABLE_PROXY",
    "PROXY_MODE",
    "PROXY_WORKLOAD_INFO",
    "INPOD_UDS",
    "INPOD_PORT_REUSE",
    "WORKLOAD_WAIT",
    "PACKET_MARK",
    "ENABLE_ORIG_SRC",
    "IPV6_ENABLED",
    "LOCALHOST_APP_TUNNEL",
    "ENABLE_RESPONSE_BAGGAGE",
    "UNSTABLE_ENABLE_SOCKS5",
    "CRL_PATH",
    "STATE_DIR",
    "STATE_KEYS",
    "STATE_MAX_BYTES",
    "POOL_MAX_STREAMS_PER_CONNECTION",
    "POOL_UNUSED_RELEASE_TIMEOUT",
    "HBONE_MAX_AGE",
    "HBONE_PEER_TIMEOUT",
    "SAME_NODE",
    "SAME_NODE_NAMESPACES",
    "HTTP2_STREAM_WINDOW_SIZE",
    "HTTP2_CONNECTION_WINDOW_SIZE",
    "HTTP2_FRAME_SIZE",
    "KEEPALIVE_ENABLED",
    "KEEPALIVE_TIME",
    "KEEPALIVE_INTERVAL",
    "KEEPALIVE_RETRIES",
    "USER_TIMEOUT_ENABLED",
    "TLS12_ENABLED",
    "COMPLIANCE_POLICY",
    "RUST_LOG",
    "LOG_FORMAT",
    "AUTHZ_POLICY_INFO_LOGGING",
    "METRICS_LABELS",
    "METRICS_MAX_SERIES",
    "METRICS_IDLE",
    "ACCESS_LOG_NAMESPACES",
    "ACCESS_LOG_SAMPLING",
    "ACCESS_LOG_PROGRESS",
    "CONNECTION_TERMINATION_DEADLINE",
    "TERMINATION_GRACE_PERIOD_SECONDS",
    "ZTUNNEL_WORKER_THREADS",
    "ZTUNNEL_CPU_LIMIT",
    "ZTUNNEL_RESOURCE_CPU_LIMIT",
    "ZTUNNEL_RESOURCE_CPU_REQUEST",
    "PROXY_CONFIG",
    "ISTIO_META_DNS_CAPTURE",
    "ISTIO_META_DNS_PROXY_ADDR",
    "ISTIO_METAJSON_X",
];

#[test]
fn the_readme_names_every_variable() {
    let readme = include_str!("../../../../README.md");
    let documented = |key: &str| readme.contains(&format!("`{key}`"));
    for key in KEYS {
        let family = key
            .rsplit_once('_')
            .map(|(stem, _)| format!("{stem}_<NAME>"));
        assert!(
            documented(key) || family.is_some_and(|key| documented(&key)),
            "{key}"
        );
    }
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof![
        proptest::sample::select(KEYS).prop_map(str::to_owned),
        ".{0,12}"
    ]
}

/// Anything, with a preference for what nearly parses.
fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        ".{0,40}",
        "[0-9]{0,40}(\\.[0-9]{0,40})?(m|%)?",
        "([0-9]{1,20} ?(ns|us|µs|ms|s|m|h|d|w|mon|y)? ?[+*]? ?){0,4}",
        "(https?://)?[a-z@:./\\[\\]-]{0,20}(:[0-9]{0,6})?",
        "\\{?(proxyMetadata|concurrency|statsPort|discoveryAddress)?:? ?[\\[{&*!]?[a-z0-9]{0,4}.{0,10}",
        "(localhost|[0-9.]{0,12}|\\[[0-9a-f:]{0,9}\\]):[0-9]{0,7}",
        "-----BEGIN [A-Z]{0,12}-----.{0,30}",
    ]
}

proptest! {
    /// Any surroundings give a configuration or faults that can be printed.
    #[test]
    fn nothing_in_the_environment_panics(
        variables in btree_map(key(), value(), 0..8),
        mesh in proptest::option::of(value()),
        cpus in 0_usize..100_000,
    ) {
        let mut surroundings = given(&[]).cpus(cpus);
        surroundings.variables = variables;
        if let Some(text) = mesh {
            surroundings = surroundings.file("/etc/istio/config/mesh", &text);
        }
        match surroundings.read() {
            Ok(config) => {
                prop_assert!(config.runtime.worker_threads >= 1);
                prop_assert!(serde_yaml_ng::to_string(&config).is_ok());
            }
            Err(faults) => prop_assert!(faults.iter().count() > 0 && !faults.to_string().is_empty()),
        }
    }
}
