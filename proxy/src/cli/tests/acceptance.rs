//! The acceptance cases of the contract that are about configuration, numbered as there.

use std::time::Duration;

use super::given;
use crate::{
    cli::{Command, command},
    config::{CertificateSource, DnsCapture, MeshSource, ProxyMode, RootSource},
};

fn parse(arguments: &[&str]) -> Result<Command, crate::cli::UsageError> {
    command(arguments.iter().map(Into::into))
}

#[test]
fn case_1_further_arguments_are_ignored() {
    for arguments in [
        &[][..],
        &["proxy"],
        &["proxy", "ztunnel", "extra"],
        &["proxy", "--help", "-x", "--", "-y"],
    ] {
        let parsed = parse(arguments);
        assert!(
            matches!(parsed, Ok(Command::Proxy { .. })),
            "{arguments:?}: {parsed:?}"
        );
    }
    assert_eq!(given(&[]).config().runtime.arguments, "proxy ztunnel");
}

#[test]
fn case_2_only_known_commands_are_accepted() {
    assert!(matches!(parse(&["version"]), Ok(Command::Version { .. })));
    assert!(matches!(parse(&["help", "x"]), Ok(Command::Help { .. })));
    let demo = Command::Demo {
        arguments: vec!["--keep".into()],
    };
    assert_eq!(parse(&["demo", "--keep"]), Ok(demo));
    for word in [
        "bogus",
        "--version",
        "-h",
        "--help",
        "-V",
        "",
        "prox",
        "--",
        "PROXY",
    ] {
        let text = parse(&[word]).expect_err(word).to_string();
        for command in ["proxy", "version", "help", "demo"] {
            assert!(text.contains(command), "{command} in {text}");
        }
    }
}

#[test]
fn case_3_the_variables_of_the_chart_suffice() {
    let config = given(&[
        ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
        ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
        ("RUST_LOG", "info"),
        ("RUST_BACKTRACE", "1"),
        ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
        ("INPOD_ENABLED", "true"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("POD_NAME", "ztunnel-x"),
        ("POD_NAMESPACE", "istio-system"),
        ("NODE_NAME", "node-1"),
        ("INSTANCE_IP", "10.0.0.9"),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("ZTUNNEL_CPU_LIMIT", "4"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
    ])
    .config();
    assert_eq!(config.capture.mode, ProxyMode::Shared);
    let ports = config.ports;
    assert_eq!(
        (ports.admin, ports.stats, ports.readiness),
        (15000, 15020, 15021)
    );
    assert_eq!(config.runtime.worker_threads, 2);
    assert_eq!(&*config.identity.own.unwrap().service_account, "ztunnel");
}

#[test]
fn case_4_a_fault_names_variable_value_and_reason() {
    let faults = given(&[("KEEPALIVE_ENABLED", "1")]).read().unwrap_err();
    assert_eq!(
        faults.to_string(),
        "the configuration has one fault:\n  KEEPALIVE_ENABLED=\"1\": not a boolean; \
         accepted: exactly true or false, in lower case"
    );
}

#[test]
fn case_5_lifetimes_are_durations() {
    for (text, seconds) in [("90m", 5400), ("60", 60)] {
        let config = given(&[("SECRET_TTL", text)]).config();
        assert_eq!(config.control.secret_ttl, Duration::from_secs(seconds));
    }
}

#[test]
fn case_6_an_address_without_scheme_is_https() {
    let config = given(&[("XDS_ADDRESS", "istiod.istio-system.svc:15012")]).config();
    let uri = config.control.xds.unwrap().uri;
    assert_eq!(uri, "https://istiod.istio-system.svc:15012/");
}

#[test]
fn case_7_an_empty_address_turns_xds_off() {
    let config = given(&[("XDS_ADDRESS", ""), ("LOCAL_XDS_PATH", "mesh.yaml")]).config();
    assert!(config.control.xds.is_none());
    assert_eq!(
        config.control.local,
        Some(MeshSource::File("mesh.yaml".into()))
    );
}

#[test]
fn case_8_the_variable_beats_the_discovery_address() {
    let document = r#"{"discoveryAddress":"a:1","proxyMetadata":{}}"#;
    let uri = |variables: &[_]| given(variables).config().control.xds.unwrap().uri;
    assert_eq!(uri(&[("PROXY_CONFIG", document)]), "https://a:1/");
    let both = [("PROXY_CONFIG", document), ("XDS_ADDRESS", "b:2")];
    assert_eq!(uri(&both), "https://b:2/");
}

#[test]
fn case_9_proxy_metadata_may_be_missing() {
    given(&[("PROXY_CONFIG", r#"{"discoveryAddress":"x:1"}"#)]).config();
}

#[test]
fn case_10_variables_beat_proxy_metadata() {
    let document = "proxyMetadata: {ISTIO_META_FOO: a, ISTIO_META_BAR: 1, BAZ: true}";
    let config = given(&[("PROXY_CONFIG", document), ("ISTIO_META_FOO", "b")]).config();
    let metadata: Vec<_> = config.identity.metadata.into_iter().collect();
    let expected = [("BAR", "1"), ("BAZ", "true"), ("FOO", "b")];
    assert_eq!(
        metadata,
        expected.map(|(k, v)| (k.to_owned(), v.to_owned()))
    );
}

#[test]
fn cases_11_to_13_names_for_captured_pods() {
    let off = ("ISTIO_META_DNS_CAPTURE", "false");
    assert_eq!(given(&[off]).config().capture.dns, DnsCapture::Off);
    assert_eq!(
        given(&[("ISTIO_META_DNS_PROXY_ADDR", "nonsense")]).faulty(),
        ["ISTIO_META_DNS_PROXY_ADDR".to_owned()].into()
    );
    let on_demand = ("XDS_ON_DEMAND", "true");
    assert_eq!(
        given(&[on_demand]).faulty(),
        ["XDS_ON_DEMAND".to_owned()].into()
    );
    let refused = given(&[on_demand]).read().unwrap_err().to_string();
    let way_out = refused.contains("ISTIO_META_DNS_CAPTURE=false");
    assert!(refused.contains("XDS_ON_DEMAND") && way_out, "{refused}");
    let still_on = ("ISTIO_META_DNS_CAPTURE", "true");
    assert!(given(&[on_demand, still_on]).read().is_err());
    assert!(given(&[on_demand, off]).config().control.on_demand);
}

#[test]
fn case_14_headers_go_to_their_own_server() {
    let config = given(&[("XDS_HEADER_FOO_Bar", "baz")]).config();
    let xds = config.control.xds.unwrap();
    assert_eq!(xds.headers[0].name, "foo_bar");
    assert_eq!(xds.headers[0].value, "baz");
    let CertificateSource::Istio(ca) = config.control.certificates else {
        panic!("the CA is istiod unless asked otherwise");
    };
    assert!(ca.headers.is_empty());
}

#[test]
fn cases_15_to_17_threads() {
    let limit = "ZTUNNEL_RESOURCE_CPU_LIMIT";
    let request = "ZTUNNEL_RESOURCE_CPU_REQUEST";
    let threads = "ZTUNNEL_WORKER_THREADS";
    let node = ("ZTUNNEL_CPU_LIMIT", "16");
    type Case<'a> = (usize, &'a [(&'a str, &'a str)], usize);
    let table: &[Case<'_>] = &[
        (8, &[], 2),
        (32, &[], 8),
        (8, &[(request, "8")], 8),
        (8, &[(limit, "500m")], 1),
        (8, &[(limit, "500m"), (request, "2")], 2),
        (8, &[(limit, "1.5")], 2),
        (8, &[node, (threads, "30%")], 5),
        (8, &[node, (threads, "0")], 16),
        (8, &[node, (threads, "3")], 3),
        (8, &[node], 4),
        (1, &[(threads, "0.5%")], 1),
        (64, &[(threads, "100%")], 64),
        (8, &[("PROXY_CONFIG", "concurrency: 0")], 8),
        (8, &[("PROXY_CONFIG", "concurrency: 5")], 5),
        (8, &[("PROXY_CONFIG", "concurrency: 5"), (threads, "6")], 6),
        (8, &[("ZTUNNEL_CPU_LIMIT", "0"), (threads, "0")], 1),
    ];
    for (cpus, variables, expected) in table {
        let config = given(variables).cpus(*cpus).config();
        assert_eq!(
            config.runtime.worker_threads, *expected,
            "{cpus} CPUs, {variables:?}"
        );
    }
    for bad in ["150%", "0%", "%", "-1", "", "1.5", "4x", "1e1%"] {
        assert!(given(&[(threads, bad)]).read().is_err(), "{bad:?}");
    }
}

#[test]
fn case_18_the_drain_ends_before_the_pod_does() {
    let grace = "TERMINATION_GRACE_PERIOD_SECONDS";
    let deadline = ("CONNECTION_TERMINATION_DEADLINE", "2s");
    let table: &[(&[(&str, &str)], u64)] = &[
        (&[(grace, "30")], 25),
        (&[(grace, "30"), deadline], 2),
        (&[(grace, "11")], 6),
        (&[(grace, "10")], 9),
        (&[(grace, "1")], 1),
        (&[(grace, "0")], 1),
        (&[], 5),
    ];
    for (variables, seconds) in table {
        let config = given(variables).config();
        assert_eq!(config.drain.deadline.as_secs(), *seconds, "{variables:?}");
    }
}

#[test]
fn case_20_a_missing_root_is_a_file_that_may_appear() {
    let config = given(&[("CA_ROOT_CA", "run/later.pem")]).config();
    let default = "/var/run/secrets/istio/root-cert.pem";
    assert_eq!(
        config.control.xds.unwrap().roots,
        RootSource::File(default.into())
    );
    let CertificateSource::Istio(ca) = config.control.certificates else {
        panic!("the CA is istiod unless asked otherwise");
    };
    assert_eq!(ca.roots, RootSource::File("run/later.pem".into()));
}

#[test]
fn case_31_what_is_unknown_is_ignored() {
    let document = "{tracing: {zipkin: {}}, holdApplicationUntilProxyStarts: true}";
    given(&[("NO_SUCH_THING", "x"), ("PROXY_CONFIG", document)]).config();
}

#[test]
fn case_32_no_secret_is_printed() {
    let config = given(&[
        ("CA_HEADER_AUTHORIZATION", "s3cret"),
        ("XDS_HEADER_AUTHORIZATION", "s3cret"),
        ("AUTH_TOKEN", "s3cret"),
    ])
    .config();
    let yaml = serde_yaml_ng::to_string(&config).unwrap();
    for text in [yaml, format!("{config:?}")] {
        assert!(!text.contains("s3cret"), "{text}");
        assert!(text.contains("authorization: <redacted>"), "{text}");
    }
}
