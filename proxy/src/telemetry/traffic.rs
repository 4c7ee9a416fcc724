//! The `istio_tcp_*` families: one table of series, each holding its labels once.

use std::{
    fmt,
    hash::BuildHasher,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use foldhash::quality::RandomState;
use hashbrown::HashTable;
use parking_lot::RwLock;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, NoLabelSet},
    metrics::MetricType,
    registry::Registry,
};

use super::{
    labels::{Label, Labels, Reporter, ResponseFlag, Stored, label},
    refusals::Refusals,
};

/// Counts connections and bytes by who talks to whom. Clones share one table.
#[derive(Debug, Clone, Default)]
pub struct Traffic(Arc<Inner>);

/// The counters of one open flow: 24 bytes, 32 more that it shares with a [`Watch`], and no lock.
/// Dropping it counts the flow as closed without failure.
#[must_use = "dropping the meter closes the flow"]
pub struct Meter {
    series: Arc<Series>,
    carried: Arc<Carried>,
    end: ResponseFlag,
}

/// A look at an open flow from outside of its task.
#[derive(Debug, Clone)]
pub struct Watch {
    series: Arc<Series>,
    carried: Arc<Carried>,
}

/// What one flow carried.
#[derive(Debug, Default)]
struct Carried {
    received: AtomicU64,
    sent: AtomicU64,
}

/// Counts an accepted socket as open until dropped.
#[derive(Debug)]
#[must_use = "dropping the guard counts the socket as closed"]
pub struct SocketGuard {
    traffic: Traffic,
    reporter: Reporter,
}

impl Traffic {
    /// An empty table, exported through `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let traffic = Self::default();
        registry.register_collector(Box::new(traffic.clone()));
        traffic
    }

    /// Counts a flow as opened. The labels are looked up here and never again; those of a new
    /// series are stored, shared strings without a copy.
    pub fn open(&self, labels: &Labels<Label<'_>>) -> Meter {
        let series = self.0.series(labels);
        series.opened.fetch_add(1, Relaxed);
        Meter {
            series,
            carried: Arc::default(),
            end: ResponseFlag::None,
        }
    }

    /// Counts a socket accepted on an in-pod listener.
    pub fn socket(&self, reporter: Reporter) -> SocketGuard {
        self.0.sockets(reporter).opened.fetch_add(1, Relaxed);
        SocketGuard {
            traffic: self.clone(),
            reporter,
        }
    }

    /// Counts a connection for which another endpoint is tried.
    pub fn retried(&self) {
        self.0.retries.fetch_add(1, Relaxed);
    }

    /// What was refused or failed.
    pub fn refusals(&self) -> &Refusals {
        &self.0.refusals
    }

    /// All series, in no particular order.
    pub fn series(&self) -> Vec<Arc<Series>> {
        self.0.table.read().iter().map(Arc::clone).collect()
    }

    /// Number of label sets seen.
    pub fn series_count(&self) -> usize {
        self.0.table.read().len()
    }
}

impl Meter {
    /// Counts `bytes` carried from client to server.
    pub fn received(&self, bytes: u64) {
        self.carried.received.fetch_add(bytes, Relaxed);
        self.series.received.fetch_add(bytes, Relaxed);
    }

    /// Counts `bytes` carried from server to client.
    pub fn sent(&self, bytes: u64) {
        self.carried.sent.fetch_add(bytes, Relaxed);
        self.series.sent.fetch_add(bytes, Relaxed);
    }

    /// What this flow carried so far: (client to server, server to client), in bytes.
    pub fn totals(&self) -> (u64, u64) {
        self.carried.totals()
    }

    /// The same flow, for others to look at.
    pub fn watch(&self) -> Watch {
        Watch {
            series: Arc::clone(&self.series),
            carried: Arc::clone(&self.carried),
        }
    }

    /// Ends the flow under `flag`.
    pub fn close(mut self, flag: ResponseFlag) {
        self.end_with(flag);
    }

    /// Sets the flag under which the drop will close the flow.
    pub(super) fn end_with(&mut self, flag: ResponseFlag) {
        self.end = flag;
    }

    pub(super) fn labels(&self) -> &Labels<Stored> {
        &self.series.labels
    }

    pub(super) fn refusals(&self) -> &Refusals {
        &self.series.refusals
    }
}

impl Carried {
    fn totals(&self) -> (u64, u64) {
        (self.received.load(Relaxed), self.sent.load(Relaxed))
    }
}

impl Watch {
    /// What the flow carried so far: (client to server, server to client), in bytes.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        self.carried.totals()
    }

    /// Who talks to whom; what is not known is `None`.
    #[must_use]
    pub fn labels(&self) -> &Labels<Option<Arc<str>>> {
        &self.series.labels
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.series.close(self.end);
    }
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (received, sent) = self.totals();
        f.debug_struct("Meter")
            .field("received", &received)
            .field("sent", &sent)
            .finish_non_exhaustive()
    }
}

impl Drop for SocketGuard {
    fn drop(&mut self) {
        let sockets = self.traffic.0.sockets(self.reporter);
        sockets.closed.fetch_add(1, Relaxed);
    }
}

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.series();
        for family in &FAMILIES {
            family.encode(&all, &mut encoder)?;
        }
        self.0.encode_sockets(&mut encoder)?;
        self.0.encode_retries(&mut encoder)?;
        self.0.refusals.encode(&mut encoder)
    }
}

#[derive(Debug, Default)]
struct Inner {
    hasher: RandomState,
    table: RwLock<HashTable<Arc<Series>>>,
    source_sockets: Sockets,
    destination_sockets: Sockets,
    retries: AtomicU64,
    refusals: Refusals,
}

#[derive(Debug, Default)]
struct Sockets {
    opened: AtomicU64,
    closed: AtomicU64,
}

impl Inner {
    fn series(&self, labels: &Labels<Label<'_>>) -> Arc<Series> {
        let hash = self.hasher.hash_one(labels);
        let same = |series: &Arc<Series>| series.labels.same(labels);
        if let Some(series) = self.table.read().find(hash, same) {
            return Arc::clone(series);
        }
        let mut table = self.table.write();
        let entry = table.entry(hash, same, |series| series.hash);
        let entry = entry.or_insert_with(|| Arc::new(Series::new(hash, labels, &self.refusals)));
        Arc::clone(entry.get())
    }

    fn sockets(&self, reporter: Reporter) -> &Sockets {
        match reporter {
            Reporter::Source => &self.source_sockets,
            Reporter::Destination => &self.destination_sockets,
        }
    }

    fn encode_sockets(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let seen = [Reporter::Source, Reporter::Destination].map(|reporter| {
            let sockets = self.sockets(reporter);
            // Closed first: a socket that opens in between then counts as open, not as minus one.
            let closed = sockets.closed.load(Relaxed);
            (reporter, sockets.opened.load(Relaxed), closed)
        });
        if seen.iter().all(|&(_, opened, _)| opened == 0) {
            return Ok(());
        }
        let mut family = encoder.encode_descriptor(
            "istio_tcp_sockets_open",
            "Sockets accepted from or for workloads and still open (unstable).",
            None,
            MetricType::Gauge,
        )?;
        for (reporter, opened, closed) in seen.into_iter().filter(|&(_, opened, _)| opened > 0) {
            family
                .encode_family(&ReporterLabel(reporter))?
                .encode_gauge(&opened.saturating_sub(closed))?;
        }
        Ok(())
    }

    fn encode_retries(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let retries = self.retries.load(Relaxed);
        if retries == 0 {
            return Ok(());
        }
        let mut family = encoder.encode_descriptor(
            "istio_tcp_connection_retries",
            "Attempts at another endpoint after one could not be reached (unstable).",
            None,
            MetricType::Counter,
        )?;
        family.encode_counter::<NoLabelSet, _, u64>(&retries, None)
    }
}

/// One label set and its counters. Bytes and openings are only ever counted without a flag; a
/// failed flow is one closing and one failure under its flag, so one number per flag says both.
/// With all names shared, a series takes some 470 bytes, its place in the table included.
#[derive(Debug)]
pub struct Series {
    hash: u64,
    labels: Labels<Stored>,
    refusals: Refusals,
    opened: AtomicU64,
    closed: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    /// By [`ResponseFlag::failure_index`]; most series never need them.
    failures: OnceLock<Box<[AtomicU64; ResponseFlag::FAILURES.len()]>>,
}

impl Series {
    fn new(hash: u64, labels: &Labels<Label<'_>>, refusals: &Refusals) -> Self {
        Self {
            hash,
            labels: labels.store(),
            refusals: refusals.clone(),
            opened: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            failures: OnceLock::new(),
        }
    }

    /// Who talks to whom; what is not known is `None`.
    #[must_use]
    pub fn labels(&self) -> &Labels<Option<Arc<str>>> {
        &self.labels
    }

    /// Flows opened so far.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.opened.load(Relaxed)
    }

    /// Bytes carried so far: (client to server, server to client).
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        (self.received.load(Relaxed), self.sent.load(Relaxed))
    }

    fn close(&self, flag: ResponseFlag) {
        let counter = match flag.failure_index() {
            None => Some(&self.closed),
            Some(index) => self.failures.get_or_init(Box::default).get(index),
        };
        if let Some(counter) = counter {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Flags under which flows of this series failed, with their number.
    pub fn failures(&self) -> impl Iterator<Item = (ResponseFlag, u64)> {
        ResponseFlag::FAILURES
            .into_iter()
            .zip(self.failures.get().into_iter().flat_map(|all| all.iter()))
            .map(|(flag, count)| (flag, count.load(Relaxed)))
            .filter(|&(_, count)| count > 0)
    }
}

/// One of the families over the table.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Opened,
    Closed,
    Received,
    Sent,
    Failed,
}

const FAMILIES: [Family; 5] = [
    Family {
        name: "istio_tcp_connections_opened",
        help: "TCP connections opened.",
        kind: Kind::Opened,
    },
    Family {
        name: "istio_tcp_connections_closed",
        help: "TCP connections closed.",
        kind: Kind::Closed,
    },
    Family {
        name: "istio_tcp_received_bytes",
        help: "Bytes carried from client to server.",
        kind: Kind::Received,
    },
    Family {
        name: "istio_tcp_sent_bytes",
        help: "Bytes carried from server to client.",
        kind: Kind::Sent,
    },
    Family {
        name: "istio_tcp_connections_failed",
        help: "TCP connections that ended with a failure (unstable).",
        kind: Kind::Failed,
    },
];

impl Family {
    fn encode(&self, all: &[Arc<Series>], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut samples = all
            .iter()
            .flat_map(|series| self.kind.samples(series))
            .peekable();
        if samples.peek().is_none() {
            return Ok(()); // a family without samples is left out
        }
        let mut family =
            encoder.encode_descriptor(self.name, self.help, None, MetricType::Counter)?;
        for (labels, value) in samples {
            family
                .encode_family(&labels)?
                .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }
}

impl Kind {
    /// The samples of one series in this family.
    fn samples(self, series: &Series) -> impl Iterator<Item = (SampleLabels<'_>, u64)> {
        let (plain, flagged) = match self {
            Self::Opened => (Some(&series.opened), false),
            Self::Closed => (Some(&series.closed), true),
            Self::Received => (Some(&series.received), false),
            Self::Sent => (Some(&series.sent), false),
            Self::Failed => (None, true),
        };
        // Closings appear with the first one; the others exist from the opening on.
        let hide_zero = matches!(self, Self::Closed);
        let plain = plain
            .map(|counter| (ResponseFlag::None, counter.load(Relaxed)))
            .filter(|&(_, value)| value > 0 || !hide_zero);
        let failures = flagged.then(|| series.failures()).into_iter().flatten();
        plain.into_iter().chain(failures).map(|(flag, value)| {
            let labels = SampleLabels {
                labels: &series.labels,
                flag,
            };
            (labels, value)
        })
    }
}

#[derive(Debug)]
struct SampleLabels<'a> {
    labels: &'a Labels<Stored>,
    flag: ResponseFlag,
}

impl EncodeLabelSet for SampleLabels<'_> {
    fn encode(&self, set: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.labels.encode(self.flag, set)
    }
}

#[derive(Debug)]
struct ReporterLabel(Reporter);

impl EncodeLabelSet for ReporterLabel {
    fn encode(&self, set: &mut LabelSetEncoder<'_>) -> fmt::Result {
        label(set, "reporter", self.0.as_str())
    }
}

#[cfg(test)]
mod tests;
