use prometheus_client::registry::Registry;

use super::*;
use crate::{
    config::{AccessLog, LabelProfile, LogFormat, Metrics},
    telemetry::{Labels, Party, ServiceName, Traffic, labels::Label, logging::tests::capture},
};

fn labels(reporter: Reporter, security: Security) -> Labels<Label<'static>> {
    let party = |name: &'static str, principal: &'static str| Party {
        workload: name.into(),
        canonical_service: name.into(),
        namespace: "shop".into(),
        principal: principal.into(),
        cluster: "Kubernetes".into(),
        ..Party::default()
    };
    Labels {
        reporter,
        security,
        source: party("web", "spiffe://cluster.local/ns/shop/sa/web"),
        destination: party("api", "spiffe://cluster.local/ns/shop/sa/api"),
        service: ServiceName {
            hostname: "api.shop.svc.cluster.local".into(),
            ..ServiceName::default()
        },
    }
}

fn route() -> Route {
    Route {
        source: "10.244.1.7:40112".parse().unwrap(),
        destination: "10.244.2.9:15008".parse().unwrap(),
        hbone: Some(HboneTarget::Address("10.244.2.9:8080".parse().unwrap())),
        source_pod: Some("web-6c9f-abcde".into()),
        destination_pod: Some("api-7d5b-xyz12".into()),
    }
}

/// One flow that carries 67 bytes to the server and 490 back, and ends after 13 ms.
fn flow(
    format: LogFormat,
    labels: &Labels<Label<'_>>,
    route: Route,
    end: impl FnOnce(Access),
) -> Vec<String> {
    capture(format, "access=debug", |_| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let access = Access::open(Traffic::default().open(labels), route);
            access.meter().received(67);
            access.meter().sent(490);
            tokio::time::advance(Duration::from_micros(13_900)).await;
            end(access);
        });
    })
}

const START: &str = "src.addr=10.244.1.7:40112 src.workload=\"web-6c9f-abcde\" \
    src.namespace=\"shop\" src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" \
    src.cluster=\"Kubernetes\" dst.addr=10.244.2.9:15008 dst.hbone_addr=10.244.2.9:8080 \
    dst.service=\"api.shop.svc.cluster.local\" dst.workload=\"api-7d5b-xyz12\" \
    dst.namespace=\"shop\" dst.identity=\"spiffe://cluster.local/ns/shop/sa/api\" \
    dst.cluster=\"Kubernetes\" direction=\"outbound\"";

#[test]
fn a_flow_is_told_in_text_as_log_readers_expect() {
    let labels = labels(Reporter::Source, Security::MutualTls);
    let lines = flow(LogFormat::Text, &labels, route(), |access| {
        access.close(None);
    });
    assert_eq!(
        lines,
        [
            format!("debug\taccess\tconnection opened\t{START}"),
            format!(
                "info\taccess\tconnection complete\t{START} bytes_sent=67 bytes_recv=490 \
                 duration=\"13ms\""
            ),
        ]
    );
}

#[test]
fn a_flow_is_told_in_json_with_numbers_as_numbers() {
    let labels = labels(Reporter::Source, Security::MutualTls);
    let lines = flow(LogFormat::Json, &labels, route(), |access| {
        access.close(None);
    });
    assert_eq!(
        lines[1],
        concat!(
            r#"{"level":"info","scope":"access","message":"connection complete","msg":"connection complete","#,
            r#""src.addr":"10.244.1.7:40112","src.workload":"web-6c9f-abcde","#,
            r#""src.namespace":"shop","src.identity":"spiffe://cluster.local/ns/shop/sa/web","#,
            r#""src.cluster":"Kubernetes","dst.addr":"10.244.2.9:15008","#,
            r#""dst.hbone_addr":"10.244.2.9:8080","dst.service":"api.shop.svc.cluster.local","#,
            r#""dst.workload":"api-7d5b-xyz12","dst.namespace":"shop","#,
            r#""dst.identity":"spiffe://cluster.local/ns/shop/sa/api","dst.cluster":"Kubernetes","#,
            r#""direction":"outbound","bytes_sent":67,"bytes_recv":490,"duration":"13ms"}"#,
        )
    );
}

#[test]
fn absent_values_are_left_out_and_identities_need_tls() {
    let mut labels = labels(Reporter::Destination, Security::Unknown);
    labels.source = Party::default();
    labels.service = ServiceName::default();
    let route = Route {
        hbone: None,
        source_pod: None,
        destination_pod: None,
        ..route()
    };
    let error = std::io::Error::other("explicitly denied by: shop/no-web");
    let lines = flow(LogFormat::Text, &labels, route, |access| {
        let refusals = access.meter().flow().traffic().refusals().clone();
        access.close(Some((Reason::PolicyDenied, &error)));
        let told = refusals.recent();
        assert_eq!(told.len(), 1);
        assert_eq!(
            (told[0].phase, told[0].reason),
            (Phase::Opened, Reason::PolicyDenied)
        );
    });
    assert_eq!(
        lines[1],
        "error\taccess\tconnection complete\tsrc.addr=10.244.1.7:40112 dst.addr=10.244.2.9:15008 \
         dst.workload=\"api\" dst.namespace=\"shop\" dst.cluster=\"Kubernetes\" \
         direction=\"inbound\" bytes_sent=490 bytes_recv=67 duration=\"13ms\" \
         error=\"explicitly denied by: shop/no-web\" reason=\"policy-denied\""
    );
}

#[test]
fn a_dropped_flow_is_told_as_drained_once() {
    let labels = labels(Reporter::Source, Security::MutualTls);
    let route = Route {
        hbone: Some(HboneTarget::Host("api.shop.mesh".into(), 80)),
        ..route()
    };
    let lines = flow(LogFormat::Text, &labels, route, drop);
    assert_eq!(lines.len(), 2);
    assert!(
        lines[1].starts_with("error\taccess\tconnection complete\t"),
        "{}",
        lines[1]
    );
    assert!(
        lines[1].contains(" dst.hbone_addr=api.shop.mesh:80 "),
        "{}",
        lines[1]
    );
    let end =
        "duration=\"13ms\" error=\"connection closed due to connection drain\" reason=\"drained\"";
    assert!(lines[1].ends_with(end), "{}", lines[1]);
}

#[test]
fn a_rejection_tells_four_fields() {
    let error = std::io::Error::other("no healthy upstream: 10.0.0.9:80");
    let source = "10.0.0.1:5".parse().unwrap();
    let traffic = Traffic::default();
    let lines = capture(LogFormat::Text, "access=warn", |_| {
        let destination = Some("10.0.0.9:80".parse().unwrap());
        let outbound = Attempt {
            reporter: Reporter::Source,
            source,
            destination,
        };
        let inbound = Attempt {
            reporter: Reporter::Destination,
            destination: None,
            ..outbound
        };
        traffic.reject(outbound, Reason::NoHealthyUpstream, &error);
        traffic.reject(inbound, Reason::NoHealthyUpstream, &error);
    });
    let error = "error=\"no healthy upstream: 10.0.0.9:80\"";
    let head = "warn\taccess\tconnection failed\tsrc.addr=10.0.0.1:5";
    assert_eq!(
        lines,
        [
            format!("{head} dst.addr=10.0.0.9:80 direction=\"outbound\" {error}"),
            format!("{head} direction=\"inbound\" {error}"),
        ]
    );
    let told = traffic.refusals().recent();
    assert_eq!(told.len(), 2);
    assert_eq!(
        (told[1].phase, told[1].reason, told[1].destination),
        (
            Phase::Early,
            Reason::NoHealthyUpstream,
            Some("10.0.0.9:80".parse().unwrap())
        )
    );
}

#[test]
fn the_record_of_a_flow_is_small() {
    assert!(size_of::<Access>() <= 192, "{}", size_of::<Access>());
}

#[test]
fn durations_are_whole_milliseconds() {
    for (micros, text) in [
        (0, "0ms"),
        (999, "0ms"),
        (13_900, "13ms"),
        (60_000_000, "60000ms"),
    ] {
        assert_eq!(Millis::of(Duration::from_micros(micros)).as_str(), text);
    }
    assert_eq!(Millis::of(Duration::MAX).as_str(), "18446744073709551615ms");
}

#[test]
fn the_log_tells_the_names_that_metrics_give_up() {
    let settings = Metrics {
        labels: LabelProfile::Minimal,
        max_series: 0,
        ..Metrics::default()
    };
    let labels = labels(Reporter::Source, Security::MutualTls);
    let lines = capture(LogFormat::Text, "access=debug", |_| {
        let traffic = Traffic::register(&mut Registry::default(), settings, AccessLog::default());
        let access = Access::open(traffic.open(&labels), route());
        access.close(None);
    });
    let expected = format!("debug\taccess\tconnection opened\t{START}");
    assert_eq!(lines[0], expected);
}

fn logged_as(settings: AccessLog) -> Traffic {
    Traffic::register(&mut Registry::default(), Metrics::default(), settings)
}

#[test]
fn flows_of_other_namespaces_are_not_told() {
    let listed = |names: &[&str]| AccessLog {
        namespaces: Some(names.iter().map(|name| (*name).into()).collect()),
        ..AccessLog::default()
    };
    let failure = std::io::Error::other("broken");
    for (names, lines) in [(&["shop"][..], 2), (&["bank", "shop"], 2), (&["bank"], 0)] {
        let told = capture(LogFormat::Text, "access=debug", |_| {
            let traffic = logged_as(listed(names));
            let labels = labels(Reporter::Source, Security::MutualTls);
            let access = Access::open(traffic.open(&labels), route());
            access.close(Some((Reason::Internal, &failure)));
            assert_eq!(traffic.refusals().recent().len(), 1, "counted all the same");
        });
        assert_eq!(told.len(), lines, "{names:?}: {told:?}");
    }
}

#[test]
fn of_the_flows_that_are_not_sampled_only_failures_are_told() {
    let failure = std::io::Error::other("broken");
    for (sampled, completed) in [(0, 0..=0), (50, 300..=700), (100, 1_000..=1_000)] {
        let told = capture(LogFormat::Text, "access=info", |_| {
            let traffic = logged_as(AccessLog {
                sampled,
                ..AccessLog::default()
            });
            let labels = labels(Reporter::Source, Security::MutualTls);
            for _ in 0..1_000 {
                Access::open(traffic.open(&labels), route()).close(None);
                let failing = Access::open(traffic.open(&labels), route());
                failing.close(Some((Reason::Internal, &failure)));
            }
        });
        let of = |level: &str| told.iter().filter(|line| line.starts_with(level)).count();
        assert_eq!(of("error"), 1_000);
        assert!(completed.contains(&of("info")), "{sampled}: {}", of("info"));
    }
}

#[test]
fn a_flow_that_lasts_is_told_of_now_and_then() {
    let every = Duration::from_secs(60);
    let told = capture(LogFormat::Text, "access=info", |_| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let traffic = logged_as(AccessLog {
                progress: Some(every),
                ..AccessLog::default()
            });
            let labels = labels(Reporter::Source, Security::MutualTls);
            let access = Access::open(traffic.open(&labels), route());
            let short = Access::open(traffic.open(&labels), route());
            let living = async {
                tokio::time::sleep(every / 2).await;
                short.close(None);
                access.meter().received(67);
                tokio::time::sleep(every * 2).await;
                access.close(None);
                tokio::time::sleep(every * 2).await;
            };
            tokio::select! {
                () = traffic.log_progress() => unreachable!("it never ends"),
                () = living => {}
            }
        });
    });
    let progress = |duration: &str| {
        format!(
            "info\taccess\tconnection progress\t{START} bytes_sent=67 bytes_recv=0 duration=\"{duration}\""
        )
    };
    assert_eq!(told.len(), 4, "{told:?}");
    assert!(told[0].contains("connection complete") && told[0].contains("\"30000ms\""));
    assert_eq!(told[1..3], [progress("60000ms"), progress("120000ms")]);
    assert!(told[3].contains("connection complete") && told[3].contains("\"150000ms\""));
}
