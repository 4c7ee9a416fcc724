//! The `istio_tcp_*` families: one table of series, each holding its labels once.

mod families;
mod lasting;

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use prometheus_client::registry::Registry;
use tokio::time::Instant;

use self::lasting::Lasting;
use super::{
    labels::{Label, Labels, Reporter, ResponseFlag},
    latency::{Latencies, Step},
    names::{Fold, Names, Pool},
    reason::Reason,
    refusals::Refusals,
    series::{Counted, Entry, Key, Table},
};
use crate::config::{AccessLog, LabelProfile, Metrics};

/// Counts connections and bytes by who talks to whom. Clones share one table.
///
/// The table is bounded. Where its last eighth begins, flows of new label sets are counted by namespace, with `other`
/// in the place of names; where that is full too, under `other` altogether. Sets that no flow used for long are evicted
/// ([`Self::evict_idle`]) and make room again; one that comes back begins at 0.
#[derive(Debug, Clone, Default)]
pub struct Traffic(Arc<Inner>);

/// The counters of one open flow: some 90 bytes and no lock. Dropping it counts the flow as closed
/// without failure.
#[must_use = "dropping the meter closes the flow"]
pub struct Meter {
    flow: Watch,
    end: End,
}

/// How a flow ended, as far as it is counted.
#[derive(Debug, Clone, Copy)]
struct End {
    flag: ResponseFlag,
    /// Whether a policy said no, here or at the other end: flags tell only the former.
    denied: bool,
}

/// A look at an open flow from outside of its task.
#[derive(Debug, Clone)]
pub struct Watch(Arc<Flow>);

/// One flow.
#[derive(Debug)]
struct Flow {
    counted: Arc<Entry<Counters>>,
    /// The flow's names, where the series it is counted under has others.
    own: Option<Box<Names>>,
    received: AtomicU64,
    sent: AtomicU64,
    opened: Instant,
    traffic: Traffic,
}

/// What is counted under one label set.
#[derive(Debug, Clone)]
pub struct Series(Arc<Entry<Counters>>);

/// Counts an accepted socket as open until dropped.
#[derive(Debug)]
#[must_use = "dropping the guard counts the socket as closed"]
pub struct SocketGuard {
    traffic: Traffic,
    reporter: Reporter,
}

impl Traffic {
    /// An empty table within the bounds of `settings`; flows are logged as `access_log` says. What is not counted by labels is exported through `registry`, the
    /// rest by [`Self::write`].
    pub fn register(registry: &mut Registry, settings: Metrics, access_log: AccessLog) -> Self {
        let traffic = Self(Arc::new(Inner {
            settings,
            access_log,
            latencies: Latencies::register(registry),
            ..Inner::default()
        }));
        registry.register_collector(Box::new(traffic.clone()));
        traffic
    }

    /// Counts a flow as opened. The labels are looked up here and never again; a new series shares the names that others
    /// have.
    pub fn open(&self, labels: &Labels<Label<'_>>) -> Meter {
        let (counted, own) = self.0.open(labels);
        let flow = Flow {
            counted,
            own,
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            opened: Instant::now(),
            traffic: self.clone(),
        };
        Meter {
            flow: Watch(Arc::new(flow)),
            end: End {
                flag: ResponseFlag::None,
                denied: false,
            },
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

    pub(super) fn access_log(&self) -> &AccessLog {
        &self.0.access_log
    }

    pub(super) fn lasting(&self) -> &Lasting {
        &self.0.lasting
    }

    /// Counts a flow that goes from socket to socket within the node, once and not per reporter.
    pub fn without_tunnel(&self) {
        self.0.without_tunnel.fetch_add(1, Relaxed);
    }

    /// How long the steps of flows take.
    pub fn latencies(&self) -> &Latencies {
        &self.0.latencies
    }

    /// What was refused or failed.
    pub fn refusals(&self) -> &Refusals {
        &self.0.refusals
    }

    /// All label sets held, in no particular order.
    pub fn series(&self) -> Vec<Series> {
        self.0.table.all().into_iter().map(Series).collect()
    }

    /// Number of label sets held.
    pub fn series_count(&self) -> usize {
        self.0.table.len()
    }

    /// Bytes that the label sets take, their shared names not counted.
    pub fn series_bytes(&self) -> usize {
        self.series_count() * SERIES_BYTES
    }

    /// Evicts at once label sets without open flows: all of them, or those that none used lately. Tells how many.
    pub fn shed(&self, all: bool) -> u64 {
        let evicted = self.0.table.shed(all);
        self.0.names.sweep();
        evicted
    }

    /// Evicts label sets without open flows that no flow used for the configured time, and up to an eighth of that longer.
    /// Never ends.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn evict_idle(&self) {
        match self.0.settings.idle {
            Some(idle) => self.0.table.evict_idle(idle, || self.0.names.sweep()).await,
            None => std::future::pending().await,
        }
    }
}

impl Meter {
    /// Counts `bytes` carried from client to server.
    pub fn received(&self, bytes: u64) {
        let Flow {
            counted, received, ..
        } = &*self.flow.0;
        received.fetch_add(bytes, Relaxed);
        counted.series.received.fetch_add(bytes, Relaxed);
    }

    /// Counts `bytes` carried from server to client.
    pub fn sent(&self, bytes: u64) {
        let Flow { counted, sent, .. } = &*self.flow.0;
        if sent.fetch_add(bytes, Relaxed) == 0 && bytes > 0 {
            let (reporter, took) = (self.flow.labels().reporter, self.flow.opened().elapsed());
            let latencies = self.flow.traffic().latencies();
            latencies.observe(Step::FirstByte, reporter, took);
        }
        counted.series.sent.fetch_add(bytes, Relaxed);
    }

    /// What this flow carried so far: (client to server, server to client), in bytes.
    pub fn totals(&self) -> (u64, u64) {
        self.flow.totals()
    }

    /// The same flow, for others to look at.
    pub fn watch(&self) -> Watch {
        self.flow.clone()
    }

    /// Ends the flow under `flag`.
    pub fn close(mut self, flag: ResponseFlag) {
        self.end.flag = flag;
    }

    /// Sets why the drop will close the flow.
    pub(super) fn end_with(&mut self, reason: Reason) {
        self.end = End {
            flag: reason.flag(),
            denied: reason.is_denial(),
        };
    }

    pub(super) fn flow(&self) -> &Watch {
        &self.flow
    }
}

impl Watch {
    /// What the flow carried so far: (client to server, server to client), in bytes.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        (self.0.received.load(Relaxed), self.0.sent.load(Relaxed))
    }

    /// Who talks to whom, whatever it is counted under; what is not known is `None`.
    #[must_use]
    pub fn labels(&self) -> &Names {
        let counted = &self.0.counted.series;
        self.0.own.as_deref().unwrap_or(&counted.names)
    }

    /// When the flow was opened.
    #[must_use]
    pub fn opened(&self) -> Instant {
        self.0.opened
    }

    pub(super) fn traffic(&self) -> &Traffic {
        &self.0.traffic
    }
}

impl Series {
    /// Who talks to whom, as far as the metrics tell; what is not known is `None`.
    #[must_use]
    pub fn labels(&self) -> &Names {
        &self.0.series.names
    }

    /// Flows opened so far.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.0.series.opened.load(Relaxed)
    }

    /// Bytes carried so far: (client to server, server to client).
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        let Counters { received, sent, .. } = &self.0.series;
        (received.load(Relaxed), sent.load(Relaxed))
    }

    /// Flows that a policy forbade, here or at the other end.
    #[must_use]
    pub fn denied(&self) -> u64 {
        let failures = self.0.series.failures.get();
        failures.map_or(0, |failures| failures.denied.load(Relaxed))
    }

    /// Flows that failed, those that were denied included.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.0.series.failures().map(|(_, count)| count).sum()
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.flow.0.counted.series.close(self.end);
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

#[derive(Debug, Default)]
struct Inner {
    settings: Metrics,
    access_log: AccessLog,
    lasting: Lasting,
    table: Table<Counters>,
    names: Pool,
    /// Flows counted under `other` names within their namespaces, and altogether.
    folded: [AtomicU64; 2],
    source_sockets: Sockets,
    destination_sockets: Sockets,
    retries: AtomicU64,
    without_tunnel: AtomicU64,
    refusals: Refusals,
    latencies: Latencies,
}

#[derive(Debug, Default)]
struct Sockets {
    opened: AtomicU64,
    closed: AtomicU64,
}

impl Inner {
    /// The series under which a flow with `labels` is counted, and the flow's own names if that has others.
    fn open(&self, labels: &Labels<Label<'_>>) -> (Arc<Entry<Counters>>, Option<Box<Names>>) {
        let Metrics {
            labels: profile,
            max_series: most,
            ..
        } = self.settings;
        let limited = labels.limited_to(profile);
        let key = |fold| Wanted {
            labels: limited.folded(fold),
            names: &self.names,
        };
        let opened = |counters: &Counters| {
            counters.opened.fetch_add(1, Relaxed);
        };
        let own = || Some(Box::new(Names::of(labels)));
        let plain = key(Fold::Nothing);
        if let Some(entry) = self.table.touch(&plain, most - most / RESERVE, opened) {
            let own = if profile == LabelProfile::Full {
                None
            } else {
                own()
            };
            return (entry, own);
        }
        let [by_namespace, as_other] = &self.folded;
        if let Some(entry) = self.table.touch(&key(Fold::Names), most, opened) {
            by_namespace.fetch_add(1, Relaxed);
            return (entry, own());
        }
        as_other.fetch_add(1, Relaxed);
        // Four sets at most.
        let entry = self.table.touch_always(&key(Fold::Everything), opened);
        (entry, own())
    }

    fn sockets(&self, reporter: Reporter) -> &Sockets {
        match reporter {
            Reporter::Source => &self.source_sockets,
            Reporter::Destination => &self.destination_sockets,
        }
    }
}

/// One label set and its counters. Bytes and openings are only ever counted without a flag; a
/// failed flow is one closing and one failure under its flag, so one number per flag says both.
/// Takes some 120 bytes, its place in the table included; parties and services are shared.
#[derive(Debug)]
struct Counters {
    names: Names,
    opened: AtomicU64,
    closed: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    /// Most series never need them.
    failures: OnceLock<Box<Failures>>,
}

/// Failed flows of one label set.
#[derive(Debug, Default)]
struct Failures {
    /// By [`ResponseFlag::failure_index`].
    by_flag: [AtomicU64; ResponseFlag::FAILURES.len()],
    /// Those of them that a policy forbade.
    denied: AtomicU64,
}

/// The labels of a series, and the names it will share if it has to be made.
struct Wanted<'a> {
    labels: Labels<Label<'a>>,
    names: &'a Pool,
}

impl std::hash::Hash for Wanted<'_> {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.labels.hash(state);
    }
}

impl Key for Wanted<'_> {
    type Series = Counters;

    fn names(&self, series: &Counters) -> bool {
        series.names.same(&self.labels)
    }

    fn make(&self) -> Counters {
        Counters {
            names: self.names.names(&self.labels),
            opened: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            failures: OnceLock::new(),
        }
    }
}

impl Counted for Counters {
    fn in_use(&self) -> bool {
        // Openings wait for whoever asks; a closing that comes late makes the answer yes, not no.
        self.closings() < self.opened.load(Relaxed)
    }
}

impl Counters {
    fn close(&self, end: End) {
        let Some(index) = end.flag.failure_index() else {
            self.closed.fetch_add(1, Relaxed);
            return;
        };
        let failures = self.failures.get_or_init(Box::default);
        if end.denied {
            failures.denied.fetch_add(1, Relaxed);
        }
        if let Some(counter) = failures.by_flag.get(index) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Closed flows under any flag.
    fn closings(&self) -> u64 {
        let failed: u64 = self.failures().map(|(_, count)| count).sum();
        self.closed.load(Relaxed) + failed
    }

    /// Flags under which flows of this series failed, with their number.
    fn failures(&self) -> impl Iterator<Item = (ResponseFlag, u64)> {
        ResponseFlag::FAILURES
            .into_iter()
            .zip(self.failures.get().into_iter().flat_map(|all| &all.by_flag))
            .map(|(flag, count)| (flag, count.load(Relaxed)))
            .filter(|&(_, count)| count > 0)
    }
}

/// What a series takes with its counts of references and its place in the table.
const SERIES_BYTES: usize = size_of::<Entry<Counters>>() + 4 * size_of::<usize>();
/// The part of the table, one of so many, that is kept for flows counted by namespace.
const RESERVE: usize = 8;

#[cfg(test)]
mod tests;
