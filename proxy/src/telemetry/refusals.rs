//! What was refused or failed of late, and how often for which reason.

use std::{
    collections::VecDeque,
    error::Error,
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::SystemTime,
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{
    Reason,
    causes::with_causes,
    labels::{Reporter, label},
};

/// Counts refusals by reason, and keeps the last 200 of them. Clones share.
#[derive(Debug, Clone, Default)]
pub struct Refusals(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    refused: Counts,
    failed: Counts,
    recent: Mutex<VecDeque<Arc<Refusal>>>,
}

/// A connection that was refused, or failed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Refusal {
    /// When it was told.
    pub at: SystemTime,
    /// Which side of the connection this proxy was.
    pub reporter: Reporter,
    /// Whether it was counted as opened before.
    pub phase: Phase,
    /// Who connected.
    pub source: SocketAddr,
    /// What was wanted, or dialled for it; `None` if that could not be read.
    pub destination: Option<SocketAddr>,
    /// The pod that connected, if it is known.
    pub source_pod: Option<Arc<str>>,
    /// The pod or service that was wanted, if it is known.
    pub destination_name: Option<Arc<str>>,
    /// Why.
    pub reason: Reason,
    /// Why, in words: the error with its causes, 400 bytes at most.
    pub error: Box<str>,
}

/// How far a connection had come when it was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Not even counted as opened: `culvert_flows_refused_total`.
    Early,
    /// Counted as opened: `culvert_flows_failed_total`.
    Opened,
}

impl Refusals {
    /// Counts and keeps one.
    pub(super) fn tell(&self, refusal: Refusal) {
        let counts = match refusal.phase {
            Phase::Early => &self.0.refused,
            Phase::Opened => &self.0.failed,
        };
        counts.count(refusal.reporter, refusal.reason);
        let mut recent = self.0.recent.lock();
        if recent.len() >= KEPT {
            recent.pop_front();
        }
        recent.push_back(Arc::new(refusal));
    }

    /// The last ones, latest first.
    #[must_use]
    pub fn recent(&self) -> Vec<Arc<Refusal>> {
        self.0.recent.lock().iter().rev().map(Arc::clone).collect()
    }

    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        self.0.refused.encode(
            encoder,
            "culvert_flows_refused",
            "Connections refused before they counted as opened (unstable).",
        )?;
        self.0.failed.encode(
            encoder,
            "culvert_flows_failed",
            "Connections that failed after they counted as opened (unstable).",
        )
    }
}

/// An error with its causes on one line, cut at [`MAX_ERROR_BYTES`].
pub(super) fn in_words(error: &(dyn Error + 'static)) -> Box<str> {
    let mut text = with_causes(error);
    text.truncate(text.floor_char_boundary(MAX_ERROR_BYTES));
    text.into()
}

/// One counter per reporter and reason.
#[derive(Debug)]
struct Counts([[AtomicU64; Reason::ALL.len()]; REPORTERS.len()]);

impl Counts {
    fn count(&self, reporter: Reporter, reason: Reason) {
        let row = REPORTERS.iter().position(|one| *one == reporter);
        let counter = row.and_then(|row| self.0.get(row)?.get(reason.index()));
        if let Some(counter) = counter {
            counter.fetch_add(1, Relaxed);
        }
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str) -> fmt::Result {
        let all = REPORTERS.into_iter().zip(&self.0);
        let mut samples = all
            .flat_map(|(reporter, row)| {
                let row = Reason::ALL.into_iter().zip(row);
                row.map(move |(reason, count)| (Cause(reporter, reason), count.load(Relaxed)))
            })
            .filter(|(_, count)| *count > 0)
            .peekable();
        if samples.peek().is_none() {
            return Ok(()); // a family without samples is left out
        }
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (cause, count) in samples {
            family
                .encode_family(&cause)?
                .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        Ok(())
    }
}

impl Default for Counts {
    fn default() -> Self {
        Self(std::array::from_fn(|_| {
            std::array::from_fn(|_| AtomicU64::new(0))
        }))
    }
}

#[derive(Debug)]
struct Cause(Reporter, Reason);

impl EncodeLabelSet for Cause {
    fn encode(&self, set: &mut LabelSetEncoder<'_>) -> fmt::Result {
        label(set, "reporter", self.0.as_str())?;
        label(set, "reason", self.1.as_str())
    }
}

const REPORTERS: [Reporter; 2] = [Reporter::Source, Reporter::Destination];
/// Refusals that are kept: a few hundred bytes each.
const KEPT: usize = 200;
/// The most that is kept of an error's words.
const MAX_ERROR_BYTES: usize = 400;

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn refusal(port: u16) -> Refusal {
        Refusal {
            at: SystemTime::UNIX_EPOCH,
            reporter: Reporter::Source,
            phase: Phase::Early,
            source: SocketAddr::from(([10, 0, 0, 1], port)),
            destination: None,
            source_pod: None,
            destination_name: None,
            reason: Reason::NoHealthyUpstream,
            error: "no healthy upstream".into(),
        }
    }

    #[test]
    fn keeps_the_latest_and_no_more_than_that() {
        let refusals = Refusals::default();
        for port in 0..1000 {
            refusals.tell(refusal(port));
        }
        let recent = refusals.recent();
        assert_eq!(recent.len(), KEPT);
        assert_eq!(recent[0].source.port(), 999);
        assert_eq!(recent[KEPT - 1].source.port(), 800);
    }

    #[test]
    fn words_of_an_error_are_one_chain_and_bounded() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        assert_eq!(
            &*in_words(&Outer(io::Error::other("inner"))),
            "outer: inner"
        );
        let long = in_words(&io::Error::other("\u{f6}".repeat(1000)));
        assert!(long.len() <= MAX_ERROR_BYTES && long.len() >= MAX_ERROR_BYTES - 1);
    }
}
