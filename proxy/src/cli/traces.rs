//! The section [`Traces`]: the variables that OpenTelemetry names, as far as they concern spans.

use std::time::Duration;

use super::{control, fault::Given, reader::Reader, server, value::Reject};
use crate::config::{Header, Sampler, Traces};

/// Every variable is checked; without an endpoint there are no traces.
pub(super) fn parse(reader: &mut Reader<'_>) -> Option<Traces> {
    let general = endpoint(reader, "OTEL_EXPORTER_OTLP_ENDPOINT");
    let endpoint = endpoint(reader, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").or(general);
    let roots = reader.path("OTEL_EXPORTER_OTLP_CERTIFICATE");
    let headers = headers(reader);
    let sampler = sampler(reader);
    let errors_always = reader.boolean("TRACES_ERRORS_ALWAYS", true);
    let queue = reader.integer("OTEL_BSP_MAX_QUEUE_SIZE", &(1..=MAX_QUEUE), 2048);
    let delay = reader.integer("OTEL_BSP_SCHEDULE_DELAY", &(1..=60_000), 5000_u64);
    let service = reader.text("OTEL_SERVICE_NAME").unwrap_or("culvert");
    Some(Traces {
        endpoint: endpoint?,
        roots,
        headers,
        service: service.to_owned(),
        sampler,
        errors_always,
        queue,
        delay: Duration::from_millis(delay),
    })
}

fn endpoint(reader: &mut Reader<'_>, key: &str) -> Option<http::Uri> {
    let text = reader.text(key)?;
    let given = if text.contains('@') {
        Given::Secret
    } else {
        Given::Value(text.to_owned())
    };
    reader.keep(key, given, server::uri(text))
}

/// `name=value` with commas between.
fn headers(reader: &mut Reader<'_>) -> Vec<Header> {
    let key = "OTEL_EXPORTER_OTLP_HEADERS";
    let mut headers = Vec::new();
    for pair in reader.text(key).unwrap_or_default().split(',') {
        let pair = pair.trim();
        if pair.is_empty() {
            continue;
        }
        let outcome = match pair.split_once('=') {
            Some((name, value)) => control::header(name.trim(), value.trim()),
            None => Err(Reject::new("not name=value", "name=value,name=value")),
        };
        headers.extend(reader.keep(key, Given::Secret, outcome));
    }
    headers
}

fn sampler(reader: &mut Reader<'_>) -> Sampler {
    let ratio = reader.typed("OTEL_TRACES_SAMPLER_ARG", |text| {
        let ratio = text.parse::<f64>().ok();
        ratio
            .filter(|ratio| (0.0..=1.0).contains(ratio))
            .ok_or_else(|| Reject::new("not a ratio", "a number from 0 to 1"))
    });
    let ratio = ratio.unwrap_or(1.0);
    let sampler = reader.typed("OTEL_TRACES_SAMPLER", |name| {
        let (follows_parent, rest) = match name.strip_prefix("parentbased_") {
            Some(rest) => (true, rest),
            None => (false, name),
        };
        match rest {
            "always_on" => Ok(Sampler::new(1.0, follows_parent)),
            "always_off" => Ok(Sampler::new(0.0, follows_parent)),
            "traceidratio" => Ok(Sampler::new(ratio, follows_parent)),
            _ => Err(Reject::new(
                "not a sampler",
                "always_on, always_off or traceidratio, with parentbased_ before it or not",
            )),
        }
    });
    sampler.unwrap_or_else(|| Sampler::new(ratio, true))
}

/// Some hundred megabytes of spans.
const MAX_QUEUE: usize = 100_000;
