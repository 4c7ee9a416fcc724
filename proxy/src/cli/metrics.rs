//! The sections [`Metrics`] and [`AccessLog`].

use std::time::Duration;

use super::{
    reader::Reader,
    value::{self, Reject},
};
use crate::config::{AccessLog, LabelProfile, Metrics};

pub(super) fn parse(reader: &mut Reader<'_>) -> Metrics {
    let default = Metrics::default();
    let labels = reader.typed("METRICS_LABELS", |text| match text {
        "full" => Ok(LabelProfile::Full),
        "kiali" => Ok(LabelProfile::Kiali),
        "minimal" => Ok(LabelProfile::Minimal),
        _ => Err(Reject::new("not a label profile", "full, kiali or minimal")),
    });
    let idle = reader.typed("METRICS_IDLE", seconds_or_never);
    Metrics {
        labels: labels.unwrap_or(default.labels),
        max_series: reader.integer(
            "METRICS_MAX_SERIES",
            &(MIN_SERIES..=MAX_SERIES),
            default.max_series,
        ),
        idle: idle.unwrap_or(default.idle),
    }
}

pub(super) fn access_log(reader: &mut Reader<'_>) -> AccessLog {
    let namespaces = reader.text("ACCESS_LOG_NAMESPACES").map(|text| {
        let names = text.split(',').map(str::trim);
        names
            .filter(|name| !name.is_empty())
            .map(Box::from)
            .collect()
    });
    let progress = reader.typed("ACCESS_LOG_PROGRESS", seconds_or_never);
    AccessLog {
        namespaces,
        sampled: reader.integer("ACCESS_LOG_SAMPLING", &(0..=100), 100),
        progress: progress.flatten(),
    }
}

/// A duration of at least a second; `0s` is never.
fn seconds_or_never(text: &str) -> Result<Option<Duration>, Reject> {
    match value::duration(text)? {
        Duration::ZERO => Ok(None),
        short if short < Duration::from_secs(1) => {
            let accepted = "a duration of 1s or more, or 0s for never";
            Err(Reject::new("too short", accepted))
        }
        long => Ok(Some(long)),
    }
}

const MIN_SERIES: usize = 64;
const MAX_SERIES: usize = 1_000_000;
