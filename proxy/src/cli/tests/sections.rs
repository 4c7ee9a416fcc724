//! The table of each section: one setting in, one field out.

use std::{path::Path, time::Duration};

use super::{Texts, given};
use crate::{
    cli::{Environment, logging},
    config::{
        AuthToken, CertificateSource, DnsCapture, Keepalive, LabelProfile, LogFormat, MaxAge,
        OriginalSource, PqcPolicy, ProxyMode, RootSource, WorkloadRef,
    },
};

const PEM: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";

#[test]
fn the_defaults_are_those_of_the_contract() {
    let config = given(&[]).config();
    let identity = &config.identity;
    assert_eq!(&*identity.instance_ip, "1.1.1.1");
    assert_eq!(&*identity.cluster_id, "Kubernetes");
    assert_eq!(&*identity.cluster_domain, "cluster.local");
    assert_eq!(&*identity.istio_version, "unknown");
    assert!(identity.own.is_none() && identity.node_name.is_none());
    assert_eq!(config.control.xds.unwrap().uri, "https://localhost:15012/");
    assert_eq!(config.control.secret_ttl, Duration::from_secs(86_400));
    assert!(config.control.token.is_none() && config.control.local.is_none());
    assert!(config.capture.enabled && !config.capture.socks5);
    assert_eq!(config.capture.workload_wait, Duration::from_secs(10));
    assert_eq!(config.capture.dns, DnsCapture::Loopback(15053));
    assert_eq!(
        config.capture.agent_socket.to_str(),
        Some("/var/run/ztunnel/ztunnel.sock")
    );
    let sockets = &config.sockets;
    assert_eq!(sockets.mark, Some(1337));
    assert!(sockets.reuse_port && sockets.ipv6 && sockets.user_timeout.is_none());
    assert_eq!(sockets.tunnel_timeout, Some(Duration::from_secs(15)));
    assert_eq!(sockets.original_source, OriginalSource::Auto);
    let keepalive = Keepalive {
        time: Duration::from_secs(180),
        interval: Duration::from_secs(180),
        retries: 9,
    };
    assert_eq!(sockets.keepalive, Some(keepalive));
    let tunnel = &config.tunnel;
    assert_eq!(tunnel.stream_window, 4_194_304);
    assert_eq!(tunnel.connection_window, 16_777_216);
    assert_eq!(
        (tunnel.frame_size, tunnel.pool_max_streams),
        (1_048_576, 100)
    );
    assert_eq!(tunnel.pool_idle_release, Duration::from_secs(300));
    assert_eq!(tunnel.max_age, MaxAge::Unlimited);
    assert!(!config.tls.tls12 && config.tls.pqc == PqcPolicy::Default);
    assert!(config.inbound.baggage && config.inbound.localhost_app_tunnel);
}

#[test]
fn age_of_connections() {
    let age = |text| given(&[("HBONE_MAX_AGE", text)]);
    let accepted = |text| age(text).config().tunnel.max_age;
    assert_eq!(accepted("certificate"), MaxAge::Certificate);
    assert_eq!(accepted("90m"), MaxAge::For(Duration::from_secs(5400)));
    assert_eq!(accepted("1"), MaxAge::For(Duration::from_secs(1)));
    for refused in ["", "0", "999ms", "Certificate", "never"] {
        assert!(age(refused).read().is_err(), "{refused}");
    }
}

#[test]
fn limits() {
    let config = given(&[
        ("DESCRIPTOR_RESERVE", "50"),
        ("MAX_FLOWS_PER_POD", "10"),
        ("MAX_HANDSHAKES_PER_POD", "20"),
        ("MAX_HANDSHAKES_PER_PEER", "30"),
        ("HTTP2_MAX_STREAMS", "40"),
        ("HTTP2_MAX_HEADER_BYTES", "5000"),
        ("HTTP2_MAX_CONTROL_FRAMES", "60"),
        ("HTTP2_MAX_RESETS", "70"),
        ("LISTEN_BACKLOG", "80"),
    ])
    .config();
    assert_eq!(config.sockets.backlog, 80);
    let limits = &config.limits;
    assert_eq!(limits.descriptor_reserve, Some(50));
    let counts = [
        limits.flows_per_pod,
        limits.handshakes_per_pod,
        limits.handshakes_per_peer,
    ];
    assert_eq!(counts, [10, 20, 30]);
    let tunnel = &config.tunnel;
    assert_eq!(tunnel.server_max_streams, 40);
    assert_eq!(tunnel.server_max_header_bytes, 5000);
    assert_eq!((tunnel.max_control_frames, tunnel.max_resets), (60, 70));
    for key in [
        "MAX_FLOWS_PER_POD",
        "MAX_HANDSHAKES_PER_POD",
        "MAX_HANDSHAKES_PER_PEER",
        "HTTP2_MAX_STREAMS",
        "HTTP2_MAX_HEADER_BYTES",
        "HTTP2_MAX_CONTROL_FRAMES",
        "HTTP2_MAX_RESETS",
        "LISTEN_BACKLOG",
    ] {
        assert!(given(&[(key, "0")]).read().is_err(), "{key}");
    }
    assert!(given(&[("DESCRIPTOR_RESERVE", "65536")]).read().is_err());
}

#[test]
fn memory_budget() {
    let budget = |text| given(&[("MEMORY_BUDGET", text)]);
    for (text, bytes) in [
        ("0", None),
        ("33554432", Some(32 << 20)),
        ("40000Ki", Some(40_000 << 10)),
        ("512Mi", Some(512 << 20)),
        ("2Gi", Some(2 << 30)),
    ] {
        assert_eq!(budget(text).config().limits.memory_budget, bytes, "{text}");
    }
    for refused in ["", "-1", "1Mi", "512M", "0.5Gi", "Mi", "99999999999Gi"] {
        assert!(budget(refused).read().is_err(), "{refused}");
    }
    let of_group = |path: &str, text: &str| {
        let environment = given(&[]).file(path, text);
        environment.config().limits.memory_budget
    };
    let (second, first) = (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    );
    assert_eq!(given(&[]).config().limits.memory_budget, None);
    assert_eq!(of_group(second, "max\n"), None);
    assert_eq!(of_group(second, "1000000000\n"), Some(800_000_000));
    assert_eq!(of_group(first, "1000000000\n"), Some(800_000_000));
    assert_eq!(of_group(first, "9223372036854771712\n"), None);
}

#[test]
fn last_known_state() {
    let kept = |variables: &[_]| given(variables).config().control.last_known;
    assert_eq!(kept(&[]), None);
    let directory = ("STATE_DIR", "/var/lib/culvert");
    let default = kept(&[directory]).unwrap();
    assert_eq!(default.directory.to_str(), Some(directory.1));
    assert_eq!(default.max_bytes, 256 << 20);
    let small = kept(&[directory, ("STATE_MAX_BYTES", "65536")]);
    assert_eq!(small.unwrap().max_bytes, 65_536);
    let keys = |variables: &[_]| given(variables).config().control.kept_keys;
    assert_eq!(keys(&[directory]), None);
    let below = keys(&[directory, ("STATE_KEYS", "tmpfs")]);
    assert_eq!(below, Some("/var/lib/culvert/keys".into()));
    assert_eq!(
        keys(&[("STATE_KEYS", "/run/keys")]),
        Some("/run/keys".into())
    );
    for refused in [
        ("STATE_DIR", "state"),
        ("STATE_MAX_BYTES", "65535"),
        ("STATE_KEYS", "tmpfs"),
        ("STATE_KEYS", "disk"),
    ] {
        assert_eq!(given(&[refused]).faulty(), [refused.0.to_owned()].into());
    }
}

#[test]
fn flows_within_the_node() {
    let direct = |variables: &[_], namespace: &str| {
        let config = given(variables).config();
        config.same_node.is_direct(namespace)
    };
    assert!(!direct(&[], "shop"));
    assert!(direct(&[("SAME_NODE", "direct")], "shop"));
    let some = [("SAME_NODE_NAMESPACES", "shop=direct, bank=hbone,")];
    assert!(direct(&some, "shop") && !direct(&some, "bank") && !direct(&some, "other"));
    for refused in [
        "shop",
        "shop=",
        "=direct",
        "shop=fast",
        "shop=direct;bank=direct",
    ] {
        let faulty = given(&[("SAME_NODE_NAMESPACES", refused)]).faulty();
        assert_eq!(
            faulty,
            ["SAME_NODE_NAMESPACES".to_owned()].into(),
            "{refused}"
        );
    }
    assert!(given(&[("SAME_NODE", "Direct")]).read().is_err());
}

#[test]
fn identity() {
    let id = |variables: &[_]| given(variables).config().identity;
    assert_eq!(&*id(&[("CLUSTER_ID", "b")]).cluster_id, "b");
    let both = [("CLUSTER_ID", "b"), ("ISTIO_META_CLUSTER_ID", "a")];
    assert_eq!(&*id(&both).cluster_id, "a");
    let in_metadata = [("PROXY_CONFIG", "proxyMetadata: {CLUSTER_ID: x}")];
    assert_eq!(&*id(&in_metadata).cluster_id, "Kubernetes");
    let own = [
        ("POD_NAME", "p"),
        ("POD_NAMESPACE", "n"),
        ("SERVICE_ACCOUNT", "s"),
    ];
    for left_out in 0..own.len() {
        let mut incomplete = own.to_vec();
        incomplete.remove(left_out);
        assert!(id(&incomplete).own.is_none(), "{incomplete:?}");
    }
    let mut complete = own.to_vec();
    complete.push(("TRUST_DOMAIN", "td.example"));
    assert_eq!(&*id(&complete).own.unwrap().trust_domain, "td.example");
    assert!(given(&[("TRUST_DOMAIN", "a/b")]).read().is_err());
    let json = [
        ("ISTIO_METAJSON_A", r#"{"x":[1]}"#),
        ("ISTIO_METAJSON_B", "{"),
    ];
    let json = id(&json).json_metadata;
    assert_eq!(json.len(), 1);
    assert_eq!(json["A"]["x"][0], 1);
}

#[test]
fn node_metadata_comes_in_three_layers() {
    let config = given(&[(
        "PROXY_CONFIG",
        "proxyMetadata: {B: env-document}\nstatsPort: 3",
    )])
    .file(
        "/etc/istio/config/mesh",
        "defaultConfig:\n  proxyMetadata: {ISTIO_META_A: file, ISTIO_META_B: file}\n  \
             proxyAdminPort: 1\n  statsPort: 2\n  discoveryAddress: mesh:1\nother: {}",
    )
    .config();
    let metadata = &config.identity.metadata;
    assert_eq!((&*metadata["A"], &*metadata["B"]), ("file", "env-document"));
    assert_eq!((config.ports.admin, config.ports.stats), (1, 3));
    assert_eq!(config.control.xds.unwrap().uri, "https://mesh:1/");
}

#[test]
fn documents_that_say_nothing() {
    for text in ["", " \n", "# nothing", "null", "{}", "proxyMetadata:"] {
        given(&[("PROXY_CONFIG", text)]).config();
        given(&[]).file("/etc/istio/config/mesh", text).config();
    }
}

#[test]
fn addresses() {
    let in_cluster = given(&[("KUBERNETES_SERVICE_HOST", "x")]).config();
    let istiod = "https://istiod.istio-system.svc:15012/";
    assert_eq!(in_cluster.control.xds.unwrap().uri, istiod);
    for good in ["[::1]:15012", "http://a:1", "https://10.0.0.1", "a"] {
        given(&[("XDS_ADDRESS", good), ("CA_ADDRESS", good)]).config();
    }
    for bad in [
        "https://",
        "unix:///x",
        "a b",
        "://",
        "a:99999",
        ":15012",
        "u@h",
    ] {
        let faulty = given(&[("XDS_ADDRESS", bad), ("CA_ADDRESS", bad)]).faulty();
        let both = ["XDS_ADDRESS".to_owned(), "CA_ADDRESS".to_owned()];
        assert_eq!(faulty, both.into(), "{bad}");
    }
    let alternative = given(&[("ALT_XDS_HOSTNAME", "x.example")]).config();
    let host = alternative.control.xds.unwrap().alternative_host;
    assert_eq!(host.as_deref(), Some("x.example"));
    assert!(given(&[("ALT_CA_HOSTNAME", "not a name")]).read().is_err());
    let watches = |pairs| given(pairs).config().control.watches_ca_roots;
    assert!(watches(&[]) && !watches(&[("CA_CERT_WATCHER", "false")]));
}

#[test]
fn certificates() {
    let source = |variables: &[_]| given(variables).config().control.certificates;
    assert!(matches!(source(&[]), CertificateSource::Istio(_)));
    let fake = ("FAKE_CA", "true");
    let fresh = source(&[fake, ("CA_ADDRESS", "")]);
    assert!(matches!(fresh, CertificateSource::InProcess { root: None }));
    let files = given(&[
        fake,
        ("FAKE_CA_ROOT_CERT", "c.pem"),
        ("FAKE_CA_ROOT_KEY", "/k.pem"),
    ]);
    let directory = tempfile::tempdir().unwrap();
    let [certificate, key] = authority(directory.path());
    let files = files.file("c.pem", &certificate).file("/k.pem", &key);
    let CertificateSource::InProcess { root } = files.config().control.certificates else {
        panic!("FAKE_CA=true signs in this process");
    };
    assert_eq!(root, Some(("c.pem".into(), "/k.pem".into())));
    assert_eq!(
        given(&[("CA_ADDRESS", "")]).faulty(),
        ["CA_ADDRESS".to_owned()].into()
    );
    assert!(
        given(&[fake, ("FAKE_CA_ROOT_CERT", "c.pem")])
            .read()
            .is_err()
    );
    assert!(given(&[fake, ("CA_ADDRESS", "a b")]).read().is_err());
}

/// A CA's certificate and key, by way of these files.
fn authority(directory: &Path) -> [String; 2] {
    let authority = testkit::Authority::new("a root").unwrap();
    authority.write(directory).unwrap();
    let (certificate, key) = testkit::Authority::files(directory);
    [certificate, key].map(|file| std::fs::read_to_string(file).unwrap())
}

#[test]
fn roots_and_tokens() {
    let roots = |text| {
        given(&[("XDS_ROOT_CA", text)])
            .config()
            .control
            .xds
            .unwrap()
            .roots
    };
    assert_eq!(roots("SYSTEM"), RootSource::System);
    assert_eq!(roots(PEM), RootSource::Pem(PEM.into()));
    assert_eq!(
        roots("/no/such.pem"),
        RootSource::File("/no/such.pem".into())
    );
    assert_eq!(roots("no-such.pem"), RootSource::File("no-such.pem".into()));
    let token = |text| given(&[("AUTH_TOKEN", text)]);
    let default = "/var/run/secrets/tokens/istio-token";
    let found = given(&[]).file(default, "t").config().control.token;
    assert_eq!(found, Some(AuthToken::File(default.into())));
    for path in ["/later", "./later", "../later"] {
        let expected = Some(AuthToken::File(path.into()));
        assert_eq!(token(path).config().control.token, expected);
    }
    let relative = token("tokens/t")
        .file("tokens/t", "x")
        .config()
        .control
        .token;
    assert_eq!(relative, Some(AuthToken::File("tokens/t".into())));
    let literal = token("eyJh.eyJp.c2ln").config().control.token;
    assert_eq!(literal, Some(AuthToken::Literal("eyJh.eyJp.c2ln".into())));
}

#[test]
fn the_wait_for_the_own_record_is_bounded() {
    let wait = |text| given(&[("WORKLOAD_WAIT", text)]);
    for (text, seconds) in [("0", 0), ("2s", 2), ("1m", 60), ("60", 60)] {
        let expected = Duration::from_secs(seconds);
        assert_eq!(wait(text).config().capture.workload_wait, expected);
    }
    for bad in ["", "soon", "-1s", "61s", "1h"] {
        let text = wait(bad).read().unwrap_err().to_string();
        let says = text.contains("WORKLOAD_WAIT") && text.contains("up to 1m");
        assert!(says, "{text}");
    }
}

#[test]
fn capture() {
    let dns = |text| given(&[("ISTIO_META_DNS_PROXY_ADDR", text)]);
    assert_eq!(
        dns("localhost:53").config().capture.dns,
        DnsCapture::Loopback(53)
    );
    for address in ["127.0.0.1:5353", "[::1]:5353"] {
        let expected = DnsCapture::At(address.parse().unwrap());
        assert_eq!(dns(address).config().capture.dns, expected);
    }
    for bad in [
        "",
        "localhost",
        "localhost:0",
        "localhost:65536",
        "1.2.3.4",
        "host:53",
    ] {
        assert!(dns(bad).read().is_err(), "{bad:?}");
    }
    for (text, on) in [("true", true), ("TRUE", true), ("1", false), ("", false)] {
        let config = given(&[("ISTIO_META_DNS_CAPTURE", text)]).config();
        assert_eq!(config.capture.dns != DnsCapture::Off, on, "{text:?}");
    }
    let dns_only = given(&[("ENABLE_PROXY", "false")]).config();
    assert!(!dns_only.capture.enabled);
    let neither = [
        ("ENABLE_PROXY", "false"),
        ("ISTIO_META_DNS_CAPTURE", "false"),
    ];
    assert_eq!(given(&neither).faulty(), ["ENABLE_PROXY".to_owned()].into());
}

#[test]
fn modes() {
    let mode = ("PROXY_MODE", "dedicated");
    let config = given(&[mode, ("PROXY_WORKLOAD_INFO", "n/p/s")]).config();
    let workload = WorkloadRef::new("n", "p", "s");
    assert_eq!(config.capture.mode, ProxyMode::Dedicated(workload));
    assert_eq!(config.sockets.mark, None);
    let marked = [mode, ("PROXY_WORKLOAD_INFO", "n/p/s"), ("PACKET_MARK", "7")];
    assert_eq!(given(&marked).config().sockets.mark, Some(7));
    assert_eq!(
        given(&[mode]).faulty(),
        ["PROXY_WORKLOAD_INFO".to_owned()].into()
    );
    for bad in ["", "a/b", "a/b/c/d", "a//c", "//", "/a/b/c"] {
        assert!(
            given(&[mode, ("PROXY_WORKLOAD_INFO", bad)]).read().is_err(),
            "{bad:?}"
        );
    }
    given(&[("PROXY_WORKLOAD_INFO", "only read in dedicated mode")]).config();
}

#[test]
fn sockets() {
    let of = |variables: &[_]| given(variables).config().sockets;
    assert_eq!(
        of(&[("ENABLE_ORIG_SRC", "true")]).original_source,
        OriginalSource::Required
    );
    assert_eq!(
        of(&[("ENABLE_ORIG_SRC", "false")]).original_source,
        OriginalSource::Off
    );
    assert_eq!(of(&[("KEEPALIVE_ENABLED", "false")]).keepalive, None);
    let extreme = of(&[
        ("KEEPALIVE_TIME", "24h"),
        ("KEEPALIVE_INTERVAL", "0"),
        ("KEEPALIVE_RETRIES", "1000"),
        ("USER_TIMEOUT_ENABLED", "true"),
    ]);
    let keepalive = Keepalive {
        time: Duration::from_secs(32_767),
        interval: Duration::from_secs(1),
        retries: 127,
    };
    assert_eq!(extreme.keepalive, Some(keepalive));
    assert_eq!(
        extreme.user_timeout,
        Some(Duration::from_secs(32_767 + 127))
    );
    assert_eq!(of(&[("PACKET_MARK", "4294967295")]).mark, Some(u32::MAX));
    for (text, timeout) in [("0", None), ("2s", Some(2)), ("1h", Some(3600))] {
        let told = of(&[("HBONE_PEER_TIMEOUT", text)]).tunnel_timeout;
        assert_eq!(told, timeout.map(Duration::from_secs), "{text}");
    }
    for bad in ["", "1s", "61m", "soon"] {
        let faulty = given(&[("HBONE_PEER_TIMEOUT", bad)]).faulty();
        assert_eq!(faulty, ["HBONE_PEER_TIMEOUT".to_owned()].into(), "{bad}");
    }
}

type Variables<'a> = &'a [(&'a str, &'a str)];

#[test]
fn trust_bundle() {
    let default = "/var/run/secrets/istio/root-cert.pem";
    let table: &[(Variables<'_>, Option<&str>)] = &[
        (&[], Some(default)),
        (&[("CA_ROOT_CA", "/a.pem")], Some("/a.pem")),
        (&[("CA_ROOT_CA", "SYSTEM")], None),
        (&[("TRUST_BUNDLE_PATH", "NONE")], None),
        (&[("TRUST_BUNDLE_PATH", "b.pem")], Some("b.pem")),
        (&[("FAKE_CA", "true")], None),
        (
            &[("FAKE_CA", "true"), ("TRUST_BUNDLE_PATH", "b.pem")],
            Some("b.pem"),
        ),
    ];
    for (variables, file) in table {
        let tls = given(variables).config().tls;
        assert_eq!(
            tls.trust_file.as_deref(),
            file.map(Path::new),
            "{variables:?}"
        );
        assert_eq!(tls.trust_grace, Duration::from_hours(1));
    }
    let tls = given(&[("TRUST_BUNDLE_GRACE", "0s")]).config().tls;
    assert!(tls.trust_grace.is_zero());
}

#[test]
fn tunnel_and_tls() {
    let tls = given(&[("TLS12_ENABLED", "true"), ("COMPLIANCE_POLICY", "pqc")])
        .config()
        .tls;
    assert!(tls.tls12 && tls.pqc == PqcPolicy::Required && tls.ignored_policy.is_none());
    let other = given(&[("TLS12_ENABLED", "1"), ("COMPLIANCE_POLICY", "fips")])
        .config()
        .tls;
    assert!(!other.tls12 && other.pqc == PqcPolicy::Default);
    assert_eq!(other.ignored_policy.as_deref(), Some("fips"));
    let tls = given(&[("TRUST_DOMAINS", "b.example, a,,a")]).config().tls;
    assert_eq!(tls.trust_domains.to_vec(), ["a".into(), "b.example".into()]);
    assert!(given(&[("TRUST_DOMAINS", "a,B")]).read().is_err());
    for (key, low, high) in [
        ("HTTP2_STREAM_WINDOW_SIZE", "1", "2147483647"),
        ("HTTP2_CONNECTION_WINDOW_SIZE", "1", "2147483647"),
        ("HTTP2_FRAME_SIZE", "16384", "16777215"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "1", "65535"),
    ] {
        given(&[(key, low)]).config();
        given(&[(key, high)]).config();
        for bad in ["0", "2147483648", "+1", "1_000", "0x10", " 5", ""] {
            assert!(given(&[(key, bad)]).read().is_err(), "{key}={bad}");
        }
    }
}

#[test]
fn logs_are_told_how_before_anything_else() {
    let of = |variables: &[(&str, &str)]| {
        let files = Texts::default();
        logging(&Environment::new(given(variables).variables, 1, &files))
    };
    let default = of(&[]);
    assert_eq!(
        (&*default.filter, default.format),
        ("info", LogFormat::Text)
    );
    assert!(!default.policy_at_info);
    let set = of(&[
        ("RUST_LOG", "access=debug"),
        ("LOG_FORMAT", "json"),
        ("AUTHZ_POLICY_INFO_LOGGING", "true"),
    ]);
    assert_eq!(
        (&*set.filter, set.format),
        ("access=debug", LogFormat::Json)
    );
    assert!(set.policy_at_info);
    assert_eq!(of(&[("LOG_FORMAT", "JSON")]).format, LogFormat::Text);
}

#[test]
fn metrics() {
    let of = |variables: &[(&str, &str)]| given(variables).config().metrics;
    let default = of(&[]);
    assert_eq!(default.labels, LabelProfile::Full);
    assert_eq!(default.max_series, 10_000);
    assert_eq!(default.idle, Some(Duration::from_secs(1_800)));
    let set = of(&[
        ("METRICS_LABELS", "kiali"),
        ("METRICS_MAX_SERIES", "64"),
        ("METRICS_IDLE", "0s"),
    ]);
    assert_eq!(set.labels, LabelProfile::Kiali);
    assert_eq!((set.max_series, set.idle), (64, None));
    let log = given(&[
        ("ACCESS_LOG_NAMESPACES", "shop, ,bank"),
        ("ACCESS_LOG_SAMPLING", "5"),
        ("ACCESS_LOG_PROGRESS", "1m"),
    ]);
    let log = log.config().access_log;
    assert_eq!(log.namespaces, Some(["shop".into(), "bank".into()].into()));
    assert_eq!(
        (log.sampled, log.progress),
        (5, Some(Duration::from_secs(60)))
    );
    let log = given(&[]).config().access_log;
    assert_eq!(
        (log.namespaces, log.sampled, log.progress),
        (None, 100, None)
    );
    for (key, bad) in [
        ("ACCESS_LOG_SAMPLING", "101"),
        ("ACCESS_LOG_PROGRESS", "10ms"),
        ("METRICS_LABELS", "Full"),
        ("METRICS_MAX_SERIES", "63"),
        ("METRICS_MAX_SERIES", "1000001"),
        ("METRICS_IDLE", "999ms"),
        ("METRICS_IDLE", "never"),
    ] {
        let faults = given(&[(key, bad)]).faulty();
        assert!(faults.contains(key), "{key}={bad}");
    }
}
