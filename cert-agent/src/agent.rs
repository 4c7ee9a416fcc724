//! Holds one certificate per identity, renews it in time, and hands it to handshakes.

mod entry;
mod keeper;
pub(crate) mod metrics;
mod reach;
pub(crate) mod snapshot;

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use parking_lot::{Mutex, RwLock};
use prometheus_client::registry::Registry;
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::{Instant, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Clock, Revocations, SanRule, Source, SpiffeId, Svid, TlsOptions, TrustBundle, svid::TlsContext,
};
use entry::Entry;
use metrics::Metrics;
use reach::Reach;
use snapshot::IdentityStatus;

/// The certificates of this process. Clones share them.
///
/// One future, [`run`](Self::run), owns all work: without it running, nothing is fetched.
#[derive(Clone)]
pub struct Agent(Arc<Inner>);

/// How an [`Agent`] behaves.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AgentOptions {
    /// The TLS of the configurations.
    pub tls: TlsOptions,
    /// Roots that peers may have besides those that came with a certificate.
    pub trust: TrustBundle,
    /// Which peers count no longer.
    pub revocations: Revocations,
    /// Which name a certificate must carry.
    pub san_rule: SanRule,
    /// How long a connection waits for a certificate. Default 10 s.
    pub wait: Duration,
    /// How long one call of the source may take. Default 90 s: some authorities take a minute.
    pub fetch_deadline: Duration,
    /// How many calls of the source may be in flight, at least 1. Default 8. A quarter of them,
    /// rounded down, is kept for identities that a connection waits for, so that warm-ups and
    /// renewals cannot keep it out.
    pub max_fetches: usize,
    /// How many calls that have gone unanswered for 5 s may be in flight besides, so that those
    /// that hang keep nobody out. Default 24.
    pub max_slow_fetches: usize,
    /// After which part of its remaining life, counted from its receipt, a certificate is renewed:
    /// at random between these two. Default 0.5 to 0.7.
    pub renewal_window: (f64, f64),
    /// How long a forgotten certificate is kept in case its workload returns. Default 60 s.
    pub forget_grace: Duration,
    /// The wall clock that validity is judged by.
    pub clock: Clock,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            tls: TlsOptions::default(),
            trust: TrustBundle::default(),
            revocations: Revocations::off(),
            san_rule: SanRule::Requested,
            wait: Duration::from_secs(10),
            fetch_deadline: Duration::from_secs(90),
            max_fetches: 8,
            max_slow_fetches: 24,
            renewal_window: (0.5, 0.7),
            forget_grace: Duration::from_secs(60),
            clock: Clock::system(),
        }
    }
}

struct Inner {
    source: Arc<dyn Source>,
    context: TlsContext,
    options: AgentOptions,
    entries: RwLock<HashMap<SpiffeId, Entry>>,
    metrics: Metrics,
    /// Locked after the entries.
    reach: Mutex<Reach>,
    /// Rung when an entry may have become due.
    bell: Notify,
}

impl Agent {
    /// An agent that gets its certificates from `source`.
    #[must_use]
    pub fn new(source: Arc<dyn Source>, options: AgentOptions) -> Self {
        Self(Arc::new(Inner {
            source,
            context: TlsContext::new(options.tls.clone(), options.san_rule)
                .trusting(options.trust.clone())
                .checking(options.revocations.clone()),
            options,
            entries: RwLock::default(),
            metrics: Metrics::new(),
            reach: Mutex::default(),
            bell: Notify::new(),
        }))
    }

    /// Roots that peers may have besides those that came with a certificate.
    #[must_use]
    pub fn trust(&self) -> &TrustBundle {
        &self.0.options.trust
    }

    /// Which peers count no longer.
    #[must_use]
    pub fn revocations(&self) -> &Revocations {
        &self.0.options.revocations
    }

    /// Exports what the agent does and holds through `registry`, under `istio_certificate_`.
    pub fn register_metrics(&self, registry: &mut Registry) {
        metrics::register(self, registry);
    }

    /// The certificate of `id` if one is held and may be presented now.
    #[must_use]
    pub fn current(&self, id: &SpiffeId) -> Option<Arc<Svid>> {
        let entries = self.0.entries.read();
        entries.get(id)?.usable(self.0.options.clock.now())
    }

    /// The certificate of `id`, fetched first if none is held: waits up to
    /// [`AgentOptions::wait`]. Never returns one that has expired. All callers of one identity
    /// share one fetch, which goes ahead of warm-ups and renewals.
    ///
    /// A caller of a failing identity has it tried again, at most once per second and not before
    /// the source allows it. It waits on through failures while the identity has been failing for
    /// less than the wait and may be tried again in time, and else learns of the first.
    ///
    /// # Errors
    /// [`SvidError`] if none was obtained in time.
    /// # Cancel safety
    /// Dropping the future loses nothing; the fetch goes on.
    pub async fn svid(&self, id: &SpiffeId) -> Result<Arc<Svid>, SvidError> {
        match self.current(id) {
            Some(svid) => Ok(svid),
            None => Box::pin(self.awaited(id)).await,
        }
    }

    async fn awaited(&self, id: &SpiffeId) -> Result<Arc<Svid>, SvidError> {
        let _counted = self.0.metrics.waiting();
        let deadline = Instant::now() + self.0.options.wait;
        loop {
            let mut outcomes = self.0.demand(id);
            // Only now: an outcome before the subscription would be missed.
            if let Some(svid) = self.current(id) {
                return Ok(svid);
            }
            match timeout_at(deadline, outcomes.changed()).await {
                Err(_) => return Err(self.0.timed_out(id)),
                Ok(Err(_)) => return Err(SvidError::Forgotten(id.clone())),
                Ok(Ok(())) => {}
            }
            if let Some(svid) = self.current(id) {
                return Ok(svid);
            }
            if let Some(reason) = self.0.hopeless(id, deadline) {
                let id = id.clone();
                return Err(SvidError::Unavailable { id, reason });
            }
        }
    }

    /// Has a certificate of `id` fetched and kept renewed until [`forget`](Self::forget).
    pub fn prefetch(&self, id: &SpiffeId) {
        self.0
            .entries
            .write()
            .entry(id.clone())
            .or_insert_with(|| Entry::new(Instant::now()))
            .want(self.0.now());
        self.0.bell.notify_one();
    }

    /// Has the certificate of `id` replaced soon, if one is held: its source has a newer one.
    pub fn refresh(&self, id: &SpiffeId) {
        if let Some(entry) = self.0.entries.write().get_mut(id) {
            entry.refresh(self.0.now());
        }
        self.0.bell.notify_one();
    }

    /// Ends renewals of `id`. A valid certificate is kept for [`AgentOptions::forget_grace`], in
    /// case the workload returns; without one, waiting callers fail at once. A running fetch is
    /// given up, and its result discarded. Connections are not touched.
    pub fn forget(&self, id: &SpiffeId) {
        if let Some(entry) = self.0.entries.write().get_mut(id) {
            entry.forget(self.0.now(), self.0.options.forget_grace);
        }
        self.0.bell.notify_one();
    }

    /// Fetches and renews until `stop` fires, and replaces a certificate that revocation lists name; all tasks have ended when it returns.
    ///
    /// A source that panics has failed; the next attempt follows as after any failure.
    ///
    /// # Cancel safety
    /// Dropping the future aborts running fetches; they are made again by the next `run`.
    pub async fn run(&self, stop: CancellationToken) {
        let mut fetches = JoinSet::new();
        let mut lists = self.0.options.revocations.changes();
        self.0.restart();
        loop {
            let wake_at = self.0.start_due(&mut fetches);
            tokio::select! {
                biased; // stopping goes first, results before new work
                () = stop.cancelled() => break,
                Some(end) = fetches.join_next_with_id() => self.0.finish(end),
                () = self.0.bell.notified() => {}
                () = changed(&mut lists) => self.0.replace_revoked(),
                () = sleep_until(wake_at) => {}
            }
        }
        fetches.shutdown().await;
    }

    /// What is held, sorted by identity. Contains no private key.
    #[must_use]
    pub fn snapshot(&self) -> Vec<IdentityStatus> {
        snapshot::describe(self.0.overviews())
    }
}

/// Ready at the next change, if there can be one.
///
/// # Cancel safety
/// Nothing is lost.
async fn changed(lists: &mut Option<watch::Receiver<u64>>) {
    let is_over = match lists {
        Some(lists) => lists.changed().await.is_err(),
        None => true,
    };
    if is_over {
        std::future::pending::<()>().await;
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("options", &self.0.options)
            .finish_non_exhaustive()
    }
}

/// Why there is no certificate for a connection.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SvidError {
    /// The source fails.
    #[error("no certificate for {id}: {reason}")]
    Unavailable {
        /// The identity.
        id: SpiffeId,
        /// The last failure, in full.
        reason: Arc<str>,
    },
    /// The source has not answered yet.
    #[error("no certificate for {id} within {waited:?}")]
    Timeout {
        /// The identity.
        id: SpiffeId,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The last workload of the identity has left.
    #[error("no certificate for {0}: the identity is no longer needed")]
    Forgotten(SpiffeId),
}

#[cfg(test)]
mod tests;
