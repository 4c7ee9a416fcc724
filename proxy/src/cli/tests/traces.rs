//! The variables of OpenTelemetry.

use std::{collections::BTreeSet, time::Duration};

use super::given;
use crate::config::{Sampler, Traces};

const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://tempo:4317");

fn traces(more: &[(&str, &str)]) -> Traces {
    let mut variables = vec![ENDPOINT];
    variables.extend(more);
    given(&variables).config().traces.unwrap()
}

#[test]
fn without_an_endpoint_there_are_none() {
    let sampler = ("OTEL_TRACES_SAMPLER", "always_on");
    assert!(given(&[sampler]).config().traces.is_none());
    let told = traces(&[]);
    assert_eq!(told.endpoint, "http://tempo:4317/");
    assert_eq!(told.sampler, Sampler::new(1.0, true));
    assert_eq!((told.service.as_str(), told.queue), ("culvert", 2048));
    assert_eq!(told.delay, Duration::from_secs(5));
    assert!(told.errors_always && told.headers.is_empty() && told.roots.is_none());
    let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector:4317");
    assert_eq!(traces(&[own]).endpoint, "https://collector:4317/");
}

#[test]
fn each_sampler_has_its_ratio() {
    let tenth = ("OTEL_TRACES_SAMPLER_ARG", "0.1");
    for (name, ratio, follows_parent) in [
        ("always_on", 1.0, false),
        ("always_off", 0.0, false),
        ("traceidratio", 0.1, false),
        ("parentbased_always_on", 1.0, true),
        ("parentbased_always_off", 0.0, true),
        ("parentbased_traceidratio", 0.1, true),
    ] {
        let told = traces(&[tenth, ("OTEL_TRACES_SAMPLER", name)]);
        assert_eq!(told.sampler, Sampler::new(ratio, follows_parent), "{name}");
    }
}

#[test]
fn faults_are_told() {
    for fault in [
        ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5"),
        ("OTEL_TRACES_SAMPLER_ARG", "NaN"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://a"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
    ] {
        let faulty = given(&[ENDPOINT, fault]).faulty();
        assert_eq!(faulty, BTreeSet::from([fault.0.to_owned()]), "{fault:?}");
    }
    let headers = ("OTEL_EXPORTER_OTLP_HEADERS", "a=b, C=d=e");
    let headers = traces(&[headers]).headers;
    let pairs: Vec<_> = headers
        .iter()
        .map(|it| (it.name.as_str(), it.value.to_str().unwrap()))
        .collect();
    assert_eq!(pairs, [("a", "b"), ("c", "d=e")]);
    assert!(!format!("{headers:?}").contains("d=e"));
}
