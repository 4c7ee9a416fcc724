use super::*;
use crate::{
    config::AccessLog,
    telemetry::{Party, Security, ServiceName},
};
use prometheus_client::registry::Registry;
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

/// A table and all that it exports.
struct Table {
    traffic: Traffic,
    registry: Registry,
}

impl Table {
    fn new(settings: Metrics) -> Self {
        let mut registry = Registry::default();
        let traffic = Traffic::register(&mut registry, settings, AccessLog::default());
        Self { traffic, registry }
    }

    fn scrape(&self) -> String {
        let mut text = String::new();
        self.traffic.write(&mut text).unwrap();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }
}

impl Default for Table {
    fn default() -> Self {
        Self::new(Metrics::default())
    }
}

impl std::ops::Deref for Table {
    type Target = Traffic;

    fn deref(&self) -> &Traffic {
        &self.traffic
    }
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
    let traffic = Table::default();
    let text = traffic.scrape();
    assert!(!text.contains("istio_"), "{text}");
    let meter = traffic.open(&labels(Reporter::Source, "web"));
    let text = traffic.scrape();
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
        samples(&traffic.scrape(), "istio_tcp_connections_closed_total")[0].1,
        1
    );
}

#[test]
fn only_unstable_families_say_so_in_their_help() {
    let traffic = Table::default();
    traffic
        .open(&labels(Reporter::Source, "web"))
        .close(ResponseFlag::Deny);
    drop(traffic.socket(Reporter::Source));
    let text = traffic.scrape();
    let helps: Vec<_> = text
        .lines()
        .filter_map(|l| l.strip_prefix("# HELP "))
        .collect();
    for help in helps.iter().filter(|help| help.starts_with("istio_")) {
        let name = help.split(' ').next().unwrap();
        let unstable = ["istio_tcp_connections_failed", "istio_tcp_sockets_open"].contains(&name);
        assert_eq!(help.contains("(unstable)"), unstable, "{help}");
    }
    assert_eq!(
        helps
            .iter()
            .filter(|help| help.starts_with("istio_"))
            .count(),
        6
    );
    assert!(helps.iter().all(|help| help.ends_with('.')), "{text}");
}

#[test]
fn a_series_has_all_labels_in_order() {
    let traffic = Table::default();
    let _meter = traffic.open(&labels(Reporter::Source, "web"));
    let text = traffic.scrape();
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
    let traffic = Table::default();
    let key = labels(Reporter::Destination, "web");
    let (first, second) = (traffic.open(&key), traffic.open(&key));
    first.received(100);
    second.received(1);
    first.sent(300);
    assert_eq!(first.totals(), (100, 300));
    let text = traffic.scrape();
    assert_eq!(samples(&text, "istio_tcp_received_bytes_total")[0].1, 101);
    assert_eq!(samples(&text, "istio_tcp_sent_bytes_total")[0].1, 300);
    first.close(ResponseFlag::Deny);
    second.close(ResponseFlag::None);
    let text = traffic.scrape();
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
    let traffic = Table::default();
    for (flag, times) in ResponseFlag::FAILURES.into_iter().zip(1..) {
        for _ in 0..times {
            traffic.open(&labels(Reporter::Source, "web")).close(flag);
        }
    }
    let failed = samples(&traffic.scrape(), "istio_tcp_connections_failed_total");
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
    // The shared string is kept, not copied, and so is the party: ours and the one of both reporters.
    assert_eq!(Arc::strong_count(&shared), 2);
    drop(meters);
}

#[test]
fn sockets_are_counted_while_open() {
    let traffic = Table::default();
    let (first, second) = (
        traffic.socket(Reporter::Source),
        traffic.socket(Reporter::Source),
    );
    drop(first);
    let line = |n| format!("istio_tcp_sockets_open{{reporter=\"source\"}} {n}\n");
    assert!(traffic.scrape().contains(&line(1)));
    drop(second);
    let text = traffic.scrape();
    assert!(
        text.contains(&line(0)) && !text.contains("open{reporter=\"destination"),
        "{text}"
    );
}

#[test]
fn a_meter_is_small() {
    let meter = size_of::<Meter>() + size_of::<Flow>();
    assert!(meter <= 72, "{meter}");
    // Parties are pointers, shared by all series of a party.
    let series = size_of::<Entry<Counters>>();
    assert!(series <= 96, "{series}");
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
        let traffic = Table::default();
        let meter = traffic.open(&Labels {
            source,
            ..labels(Reporter::Source, "")
        });
        let printed = samples(&traffic.scrape(), "istio_tcp_connections_opened_total")
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
        let traffic = Table::default();
        let mut key = labels(Reporter::Source, &value);
        key.destination.zone = hostile.as_str().into();
        let _meter = traffic.open(&key);
        let text = traffic.scrape();
        let lines = text.split('\n').filter(|l| l.starts_with("istio_tcp_")).count();
        prop_assert_eq!(lines, 3);
        let (printed, _) = samples(&text, "istio_tcp_connections_opened_total").remove(0);
        let or_unknown = |text: &str| if text.is_empty() { "unknown".to_owned() } else { text.to_owned() };
        prop_assert_eq!(printed.len(), 27);
        prop_assert_eq!(&printed[1].1, &or_unknown(&value));
        prop_assert_eq!(&printed[26].1, &or_unknown(&hostile));
    }
}

/// The value of a label of each sample of a family.
fn values<'a>(samples: &'a [(Vec<(String, String)>, u64)], name: &str) -> Vec<&'a str> {
    let one = |(labels, _): &'a (Vec<(String, String)>, u64)| {
        let label = labels.iter().find(|(key, _)| key == name);
        label.map_or("(none)", |(_, value)| value.as_str())
    };
    samples.iter().map(one).collect()
}

fn bounded(max_series: usize) -> Table {
    Table::new(Metrics {
        max_series,
        ..Metrics::default()
    })
}

#[test]
fn beyond_the_ceiling_flows_are_counted_by_namespace_and_none_is_lost() {
    let traffic = bounded(64);
    let names: Vec<String> = (0..1_000).map(|n| format!("pod-{n}")).collect();
    for name in &names {
        traffic.open(&labels(Reporter::Source, name)).sent(7);
    }
    assert_eq!(
        traffic.series_count(),
        56 + 1,
        "an eighth is kept in reserve"
    );
    let text = traffic.scrape();
    let opened = samples(&text, "istio_tcp_connections_opened_total");
    assert_eq!(opened.iter().map(|(_, count)| count).sum::<u64>(), 1_000);
    let bytes = samples(&text, "istio_tcp_sent_bytes_total");
    assert_eq!(bytes.iter().map(|(_, count)| count).sum::<u64>(), 7_000);
    let folded: Vec<_> = opened
        .into_iter()
        .filter(|(labels, _)| labels[1].1 == "other")
        .collect();
    assert_eq!((folded.len(), folded[0].1), (1, 1_000 - 56));
    for (name, value) in [
        ("source_canonical_service", "other"),
        ("source_principal", "other"),
        ("source_app", "other"),
        ("source_workload_namespace", "shop"),
        ("source_cluster", "Kubernetes"),
        ("destination_service", "other"),
        ("destination_service_namespace", "shop"),
        ("destination_workload", "unknown"),
        ("connection_security_policy", "mutual_tls"),
    ] {
        assert_eq!(values(&folded, name), [value], "{name}");
    }
    assert!(
        text.contains("culvert_traffic_flows_folded_total{into=\"namespace\"} 944\n"),
        "{text}"
    );
}

#[test]
fn beyond_that_everything_is_other_so_that_the_ceiling_holds() {
    let traffic = bounded(64);
    let names: Vec<String> = (0..1_000).map(|n| format!("ns-{n}")).collect();
    for name in &names {
        let mut key = labels(Reporter::Destination, name);
        key.source.namespace = name.as_str().into();
        drop(traffic.open(&key));
    }
    assert_eq!(traffic.series_count(), 64 + 1);
    let text = traffic.scrape();
    let opened = samples(&text, "istio_tcp_connections_opened_total");
    assert_eq!(opened.iter().map(|(_, count)| count).sum::<u64>(), 1_000);
    let rest = opened.iter().find(|(labels, _)| labels[4].1 == "other");
    assert_eq!(rest.unwrap().1, 1_000 - 64);
    // A reader of the mesh drops series with a namespace but without workload or cluster.
    for (labels, _) in &opened {
        let value = |name: &str| {
            labels
                .iter()
                .find(|(key, _)| key == name)
                .unwrap()
                .1
                .as_str()
        };
        for side in ["source", "destination"] {
            let known = value(&format!("{side}_workload_namespace")) != "unknown";
            for name in ["workload", "canonical_service", "cluster"] {
                let name = format!("{side}_{name}");
                assert!(!known || value(&name) != "unknown", "{name} of {labels:?}");
            }
        }
    }
}

#[test]
fn profiles_leave_labels_out_and_add_up_what_then_looks_alike() {
    let flows = |profile| {
        let traffic = Table::new(Metrics {
            labels: profile,
            ..Metrics::default()
        });
        for zone in ["a", "b"] {
            for revision in ["v1", "v2"] {
                let mut key = labels(Reporter::Source, "web");
                key.source.zone = zone.into();
                key.source.canonical_revision = revision.into();
                drop(traffic.open(&key));
            }
        }
        let opened = samples(&traffic.scrape(), "istio_tcp_connections_opened_total");
        let all: u64 = opened.iter().map(|(_, count)| count).sum();
        assert_eq!(all, 4);
        let names: Vec<String> = opened[0].0.iter().map(|(name, _)| name.clone()).collect();
        (opened.len(), names)
    };
    let (series, full) = flows(LabelProfile::Full);
    assert_eq!((series, full.len()), (4, 27));
    let (series, kiali) = flows(LabelProfile::Kiali);
    assert_eq!((series, kiali.len()), (2, 18));
    let (series, minimal) = flows(LabelProfile::Minimal);
    assert_eq!((series, minimal.len()), (1, 8));
    assert!(minimal.iter().all(|name| kiali.contains(name)));
    assert!(kiali.iter().all(|name| full.contains(name)));
    // What the graph and the security badges of Kiali group by; `app` comes from the scrape.
    for name in [
        "reporter",
        "source_cluster",
        "source_workload_namespace",
        "source_workload",
        "source_canonical_service",
        "source_canonical_revision",
        "destination_cluster",
        "destination_service_namespace",
        "destination_service",
        "destination_service_name",
        "destination_workload_namespace",
        "destination_workload",
        "destination_canonical_service",
        "destination_canonical_revision",
        "response_flags",
        "source_principal",
        "destination_principal",
        "connection_security_policy",
    ] {
        assert!(kiali.iter().any(|one| one == name), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn series_of_ended_flows_go_and_begin_at_zero_when_they_come_back() {
    let idle = Metrics::default().idle.unwrap();
    let traffic = Table::default();
    let (web, api) = (
        labels(Reporter::Source, "web"),
        labels(Reporter::Source, "api"),
    );
    let open = traffic.open(&web);
    open.sent(5);
    traffic.open(&api).close(ResponseFlag::Deny);
    assert_eq!(traffic.series_count(), 2);
    let evicting = tokio::time::timeout(idle * 2, traffic.evict_idle());
    evicting.await.unwrap_err();

    let text = traffic.scrape();
    let opened = samples(&text, "istio_tcp_connections_opened_total");
    assert_eq!(values(&opened, "source_workload"), ["web"]);
    assert_eq!(samples(&text, "istio_tcp_sent_bytes_total")[0].1, 5);
    assert!(!text.contains("istio_tcp_connections_failed"), "{text}");
    assert!(
        text.contains("culvert_traffic_series_evicted_total 1\n"),
        "{text}"
    );
    assert!(text.contains("culvert_traffic_series 1\n"), "{text}");

    drop(traffic.open(&api));
    drop(open);
    let opened = samples(&traffic.scrape(), "istio_tcp_connections_opened_total");
    assert_eq!((opened.len(), opened[0].1, opened[1].1), (2, 1, 1));
}
