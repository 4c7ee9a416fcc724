use super::*;
use crate::telemetry::{Party, Security, ServiceName};
use proptest::prelude::*;

fn party<'a>(workload: &'a str, namespace: &'a str) -> Party<Label<'a>> {
    Party {
        workload: workload.into(),
        canonical_service: "svc".into(),
        canonical_revision: "v1".into(),
        namespace: namespace.into(),
        principal: "spiffe://cluster.local/ns/n/sa/s".into(),
        app: "svc".into(),
        cluster: "Kubernetes".into(),
        region: "r".into(),
        zone: "z".into(),
    }
}

fn labels<'a>(reporter: Reporter, workload: &'a str) -> Labels<Label<'a>> {
    Labels {
        reporter,
        security: Security::MutualTls,
        source: party(workload, "shop"),
        destination: Party::default(),
        service: ServiceName {
            hostname: "api.shop.svc.cluster.local".into(),
            namespace: "shop".into(),
            name: "api".into(),
        },
    }
}

fn scrape(registry: &Registry) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
    text
}

/// The samples of a family: (labels in order, value).
fn samples(text: &str, name: &str) -> Vec<(Vec<(String, String)>, u64)> {
    text.lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix('{'))
        .map(|rest| parse_sample(rest).expect("a well-formed sample"))
        .collect()
}

/// Parses `name="value",…} number` by the grammar of OpenMetrics.
fn parse_sample(mut rest: &str) -> Option<(Vec<(String, String)>, u64)> {
    let mut labels = Vec::new();
    loop {
        let (name, tail) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = tail.chars();
        loop {
            match chars.next()? {
                '"' => break,
                '\\' => value.push(match chars.next()? {
                    'n' => '\n',
                    c @ ('"' | '\\') => c,
                    _ => return None,
                }),
                c => value.push(c),
            }
        }
        labels.push((name.to_owned(), value));
        rest = chars.as_str();
        match rest.strip_prefix(',') {
            Some(next) => rest = next,
            None => return Some((labels, rest.strip_prefix("} ")?.parse().ok()?)),
        }
    }
}

#[test]
fn no_family_appears_before_its_first_sample() {
    let mut registry = Registry::default();
    let traffic = Traffic::register(&mut registry);
    assert_eq!(scrape(&registry), "# EOF\n");
    let meter = traffic.open(&labels(Reporter::Source, "web"));
    let text = scrape(&registry);
    for (family, there) in [
        ("# TYPE istio_tcp_connections_opened counter", true),
        ("# TYPE istio_tcp_received_bytes counter", true),
        ("# TYPE istio_tcp_sent_bytes counter", true),
        ("# TYPE istio_tcp_connections_closed counter", false),
        ("# TYPE istio_tcp_connections_failed counter", false),
        ("# TYPE istio_tcp_sockets_open gauge", false),
    ] {
        assert_eq!(text.lines().any(|l| l == family), there, "{family}");
    }
    assert_eq!(samples(&text, "istio_tcp_sent_bytes_total")[0].1, 0);
    drop(meter);
    assert_eq!(
        samples(&scrape(&registry), "istio_tcp_connections_closed_total")[0].1,
        1
    );
}

#[test]
fn only_unstable_families_say_so_in_their_help() {
    let mut registry = Registry::default();
    let traffic = Traffic::register(&mut registry);
    traffic
        .open(&labels(Reporter::Source, "web"))
        .close(ResponseFlag::Deny);
    drop(traffic.socket(Reporter::Source));
    let text = scrape(&registry);
    let helps: Vec<_> = text
        .lines()
        .filter_map(|l| l.strip_prefix("# HELP "))
        .collect();
    assert_eq!(helps.len(), 6, "{text}");
    for help in helps {
        let name = help.split(' ').next().unwrap();
        let unstable = ["istio_tcp_connections_failed", "istio_tcp_sockets_open"].contains(&name);
        assert_eq!(help.contains("(unstable)"), unstable, "{help}");
        assert!(help.ends_with('.'), "{help}");
    }
}

#[test]
fn a_series_has_all_labels_in_order() {
    let mut registry = Registry::default();
    let traffic = Traffic::register(&mut registry);
    let _meter = traffic.open(&labels(Reporter::Source, "web"));
    let text = scrape(&registry);
    let printed = &samples(&text, "istio_tcp_connections_opened_total")[0].0;
    let printed: Vec<_> = printed
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    let principal = "spiffe://cluster.local/ns/n/sa/s";
    assert_eq!(
        printed,
        [
            ("reporter", "source"),
            ("source_workload", "web"),
            ("source_canonical_service", "svc"),
            ("source_canonical_revision", "v1"),
            ("source_workload_namespace", "shop"),
            ("source_principal", principal),
            ("source_app", "svc"),
            ("source_version", "v1"),
            ("source_cluster", "Kubernetes"),
            ("destination_service", "api.shop.svc.cluster.local"),
            ("destination_service_namespace", "shop"),
            ("destination_service_name", "api"),
            ("destination_workload", "unknown"),
            ("destination_canonical_service", "unknown"),
            ("destination_canonical_revision", "unknown"),
            ("destination_workload_namespace", "unknown"),
            ("destination_principal", "unknown"),
            ("destination_app", "unknown"),
            ("destination_version", "unknown"),
            ("destination_cluster", "unknown"),
            ("request_protocol", "tcp"),
            ("response_flags", "-"),
            ("connection_security_policy", "mutual_tls"),
            ("source_region", "r"),
            ("source_zone", "z"),
            ("destination_region", "unknown"),
            ("destination_zone", "unknown"),
        ]
    );
}

#[test]
fn bytes_move_at_once_and_failures_close_under_their_flag() {
    let mut registry = Registry::default();
    let traffic = Traffic::register(&mut registry);
    let key = labels(Reporter::Destination, "web");
    let (first, second) = (traffic.open(&key), traffic.open(&key));
    first.received(100);
    second.received(1);
    first.sent(300);
    assert_eq!(first.totals(), (100, 300));
    let text = scrape(&registry);
    assert_eq!(samples(&text, "istio_tcp_received_bytes_total")[0].1, 101);
    assert_eq!(samples(&text, "istio_tcp_sent_bytes_total")[0].1, 300);
    first.close(ResponseFlag::Deny);
    second.close(ResponseFlag::None);
    let text = scrape(&registry);
    let flags = |name| -> Vec<(String, u64)> {
        let all = samples(&text, name).into_iter();
        all.map(|(labels, value)| (labels[21].1.clone(), value))
            .collect()
    };
    let one = |flag: &str| (flag.to_owned(), 1);
    assert_eq!(
        flags("istio_tcp_connections_opened_total"),
        [("-".to_owned(), 2)]
    );
    assert_eq!(
        flags("istio_tcp_connections_closed_total"),
        [one("-"), one("DENY")]
    );
    assert_eq!(flags("istio_tcp_connections_failed_total"), [one("DENY")]);
    assert_eq!(traffic.series_count(), 1);
}

#[test]
fn every_flag_has_its_own_counter_and_name() {
    let mut registry = Registry::default();
    let traffic = Traffic::register(&mut registry);
    for (flag, times) in ResponseFlag::FAILURES.into_iter().zip(1..) {
        for _ in 0..times {
            traffic.open(&labels(Reporter::Source, "web")).close(flag);
        }
    }
    let failed = samples(&scrape(&registry), "istio_tcp_connections_failed_total");
    let failed: Vec<_> = failed.iter().map(|(l, n)| (l[21].1.as_str(), *n)).collect();
    assert_eq!(
        failed,
        [
            ("DENY", 1),
            ("CONNECT", 2),
            ("TLS_FAILURE", 3),
            ("H2_HANDSHAKE_FAILURE", 4),
            ("NETWORK_POLICY", 5),
            ("IDENTITY_ERROR", 6),
            ("CERT_REVOKED", 7),
        ]
    );
}

#[test]
fn what_prints_alike_is_one_series() {
    let traffic = Traffic::default();
    let shared: Arc<str> = "web".into();
    let mut by_arc = labels(Reporter::Source, "");
    by_arc.source.workload = (&shared).into();
    let meters = [
        traffic.open(&by_arc),
        traffic.open(&labels(Reporter::Source, "web")),
        traffic.open(&labels(Reporter::Source, "")),
        traffic.open(&labels(Reporter::Source, "unknown")),
        traffic.open(&labels(Reporter::Destination, "web")),
    ];
    assert_eq!(traffic.series_count(), 3);
    // The shared string is kept, not copied: ours and the one of the series.
    assert_eq!(Arc::strong_count(&shared), 2);
    drop(meters);
}

#[test]
fn sockets_are_counted_while_open() {
    let mut registry = Registry::default();
    let traffic = Traffic::register(&mut registry);
    let (first, second) = (
        traffic.socket(Reporter::Source),
        traffic.socket(Reporter::Source),
    );
    drop(first);
    let line = |n| format!("istio_tcp_sockets_open{{reporter=\"source\"}} {n}\n");
    assert!(scrape(&registry).contains(&line(1)));
    drop(second);
    let text = scrape(&registry);
    assert!(
        text.contains(&line(0)) && !text.contains("destination"),
        "{text}"
    );
}

#[test]
fn a_meter_is_small() {
    assert!(size_of::<Meter>() <= 32, "{}", size_of::<Meter>());
    // Labels are pointers; the text is shared with the mesh.
    assert!(size_of::<Series>() <= 408, "{}", size_of::<Series>());
}

/// Who the labels name, for each way a connection is seen (path, source record, derived source).
#[test]
fn source_labels_follow_the_order_of_knowledge() {
    let record = || Party {
        workload: "web".into(),
        principal: "spiffe://record".into(),
        ..Party::default()
    };
    let derived = || Party {
        workload: "from-baggage".into(),
        canonical_service: "base".into(),
        principal: "spiffe://tls".into(),
        ..Party::default()
    };
    let cases = [
        (
            "hbone, by address",
            Some(derived()),
            Some(record()),
            ["web", "unknown", "spiffe://tls"],
        ),
        (
            "hbone, other network",
            Some(derived()),
            None,
            ["from-baggage", "base", "spiffe://tls"],
        ),
        (
            "outbound hbone",
            Some(Party::identified("spiffe://own")),
            Some(record()),
            ["web", "unknown", "spiffe://own"],
        ),
        (
            "plaintext",
            None,
            Some(record()),
            ["web", "unknown", "unknown"],
        ),
        ("stranger", None, None, ["unknown", "unknown", "unknown"]),
    ];
    for (case, derived, record, expected) in cases {
        let source = Party::source(derived, record);
        let got = [source.workload, source.canonical_service, source.principal];
        let traffic = Traffic::default();
        let meter = traffic.open(&Labels {
            source,
            ..labels(Reporter::Source, "")
        });
        let mut text = Registry::default();
        text.register_collector(Box::new(traffic));
        let printed = samples(&scrape(&text), "istio_tcp_connections_opened_total")
            .remove(0)
            .0;
        let printed = [1, 2, 5].map(|i: usize| printed[i].1.clone());
        assert_eq!(printed, expected, "{case}: {got:?}");
        drop(meter);
    }
}

proptest! {
    #[test]
    fn any_label_value_survives_the_exposition(value in any::<String>(), hostile in "[\"\\\\\n,={}a]*") {
        let mut registry = Registry::default();
        let traffic = Traffic::register(&mut registry);
        let mut key = labels(Reporter::Source, &value);
        key.destination.zone = hostile.as_str().into();
        let _meter = traffic.open(&key);
        let text = scrape(&registry);
        let lines = text.split('\n').filter(|l| l.starts_with("istio_tcp_")).count();
        prop_assert_eq!(lines, 3);
        let (printed, _) = samples(&text, "istio_tcp_connections_opened_total").remove(0);
        let or_unknown = |text: &str| if text.is_empty() { "unknown".to_owned() } else { text.to_owned() };
        prop_assert_eq!(printed.len(), 27);
        prop_assert_eq!(&printed[1].1, &or_unknown(&value));
        prop_assert_eq!(&printed[26].1, &or_unknown(&hostile));
    }
}
