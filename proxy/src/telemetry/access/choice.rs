//! Which flows the access log tells, and what it tells while they last.

use rand::RngExt as _;
use tokio::{
    task::yield_now,
    time::{Instant, interval_at},
};

use super::Line;
use crate::{
    config::AccessLog,
    telemetry::{Names, Traffic},
};

/// What is told of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// Opening, progress and end.
    All,
    /// Its end, if it fails.
    Failure,
    /// Nothing.
    Nothing,
}

impl Told {
    /// Decides for one flow; `percent` is a random number below 100.
    pub(super) fn choose(settings: &AccessLog, names: &Names, percent: impl Fn() -> u8) -> Self {
        let listed = |namespaces: &[Box<str>]| {
            let sides = [&names.source.namespace, &names.destination.namespace];
            let mut sides = sides.into_iter().flatten();
            sides.any(|side| namespaces.iter().any(|one| **one == **side))
        };
        match settings {
            AccessLog {
                namespaces: Some(namespaces),
                ..
            } if !listed(namespaces) => Self::Nothing,
            AccessLog { sampled: 100, .. } => Self::All,
            AccessLog { sampled, .. } if percent() < *sampled => Self::All,
            AccessLog { .. } => Self::Failure,
        }
    }
}

/// A random number below 100.
pub(super) fn percent() -> u8 {
    rand::rng().random_range(0..100)
}

impl Traffic {
    /// Logs `connection progress` (info) for each flow that has been open for as long as the settings say, again and again
    /// after that time. Never ends.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn log_progress(&self) {
        let Some(every) = self.access_log().progress else {
            return std::future::pending().await;
        };
        let mut due = interval_at(Instant::now() + every, every);
        loop {
            due.tick().await;
            for (count, (flow, route)) in self.lasting().older_than(every).iter().enumerate() {
                let path = None;
                Line { flow, route, path }.progress();
                if count % BATCH == BATCH - 1 {
                    yield_now().await;
                }
            }
        }
    }
}

/// Records that are written before other tasks have their turn.
const BATCH: usize = 64;
