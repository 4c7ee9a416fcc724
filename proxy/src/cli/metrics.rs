//! The section [`Metrics`].

use std::time::Duration;

use super::{
    reader::Reader,
    value::{self, Reject},
};
use crate::config::{LabelProfile, Metrics};

pub(super) fn parse(reader: &mut Reader<'_>) -> Metrics {
    let default = Metrics::default();
    let labels = reader.typed("METRICS_LABELS", |text| match text {
        "full" => Ok(LabelProfile::Full),
        "kiali" => Ok(LabelProfile::Kiali),
        "minimal" => Ok(LabelProfile::Minimal),
        _ => Err(Reject::new("not a label profile", "full, kiali or minimal")),
    });
    let idle = reader.typed("METRICS_IDLE", |text| match value::duration(text)? {
        Duration::ZERO => Ok(None),
        idle if idle < SHORTEST_IDLE => {
            let accepted = "a duration of 1s or more, or 0s to keep all series";
            Err(Reject::new("too short", accepted))
        }
        idle => Ok(Some(idle)),
    });
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

/// A series must outlive several scrapes, or its counts are lost between them.
const SHORTEST_IDLE: Duration = Duration::from_secs(1);
const MIN_SERIES: usize = 64;
const MAX_SERIES: usize = 1_000_000;
