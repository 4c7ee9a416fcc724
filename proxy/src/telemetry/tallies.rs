//! Counters by label set that nobody holds on to: made when something happens, forgotten when nothing did for long.

use std::{fmt, future::pending, hash::Hash, marker::PhantomData, sync::Arc};

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::TypedMetric,
    registry::Unit,
};

use super::series::{Counted, Entry, Key, Table};
use crate::config::Metrics;

/// A table of `C`, one for each label set `L`, within the bounds that traffic has too.
#[derive(Debug)]
pub(super) struct Tallies<L, C> {
    table: Table<Tally<L, C>>,
    settings: Metrics,
}

/// What was counted under one label set.
#[derive(Debug)]
pub(super) struct Tally<L, C> {
    labels: L,
    counts: C,
}

/// All label sets at one moment.
pub(super) struct Readings<L, C>(Vec<Arc<Entry<Tally<L, C>>>>);

/// A family over the label sets.
pub(super) struct Family<'a> {
    /// Without suffix and unit.
    pub(super) name: &'a str,
    /// With its full stop.
    pub(super) help: &'a str,
    pub(super) unit: Option<Unit>,
}

impl<L: Hash + Eq + Clone, C: Default> Tallies<L, C> {
    /// Nothing counted yet.
    pub(super) fn new(settings: Metrics) -> Self {
        Self {
            table: Table::default(),
            settings,
        }
    }

    /// Has `count` count under `labels`, or where there are too many label sets under those that `other` makes of them,
    /// which must be few.
    pub(super) fn count(&self, labels: &L, other: impl FnOnce(&L) -> L, count: impl Fn(&C)) {
        let count = |tally: &Tally<L, C>| count(&tally.counts);
        let most = self.settings.max_series;
        if self.table.touch(&Wanted::of(labels), most, count).is_none() {
            let other = other(labels);
            self.table.touch_always(&Wanted::of(&other), count);
        }
    }

    /// As they are now. No lock is held while they are looked at.
    pub(super) fn read(&self) -> Readings<L, C> {
        Readings(self.table.all())
    }

    /// Forgets label sets under which nothing was counted for the configured time. Never ends.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn evict_idle(&self) {
        match self.settings.idle {
            Some(idle) => self.table.evict_idle(idle, || {}).await,
            None => pending().await,
        }
    }
}

impl<L: EncodeLabelSet, C> Readings<L, C> {
    /// Writes one family: a sample for each label set of which `metric` makes one. Without any it is left out.
    pub(super) fn encode<M: EncodeMetric + TypedMetric>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        family: &Family<'_>,
        metric: impl Fn(&C) -> Option<&M>,
    ) -> fmt::Result {
        let samples = self.0.iter().filter_map(|entry| {
            let Tally { labels, counts } = &entry.series;
            Some((labels, metric(counts)?))
        });
        let mut samples = samples.peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let Family { name, help, unit } = family;
        let mut encoder = encoder.encode_descriptor(name, help, unit.as_ref(), M::TYPE)?;
        for (labels, metric) in samples {
            metric.encode(encoder.encode_family(labels)?)?;
        }
        Ok(())
    }
}

impl<L, C> Counted for Tally<L, C> {
    fn in_use(&self) -> bool {
        false
    }
}

/// Labels that are looked for.
struct Wanted<'a, L, C> {
    labels: &'a L,
    counts: PhantomData<C>,
}

impl<'a, L, C> Wanted<'a, L, C> {
    fn of(labels: &'a L) -> Self {
        Self {
            labels,
            counts: PhantomData,
        }
    }
}

impl<L: Hash, C> Hash for Wanted<'_, L, C> {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.labels.hash(state);
    }
}

impl<L: Hash + Eq + Clone, C: Default> Key for Wanted<'_, L, C> {
    type Series = Tally<L, C>;

    fn names(&self, series: &Tally<L, C>) -> bool {
        series.labels == *self.labels
    }

    fn make(&self) -> Tally<L, C> {
        Tally {
            labels: self.labels.clone(),
            counts: C::default(),
        }
    }
}
