//! Holds one certificate per identity, renews it in time, and hands it to handshakes.

pub(crate) mod entry;
pub(crate) mod snapshot;

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use parking_lot::RwLock;
use tokio::{
    sync::Notify,
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Clock, ObtainError, SanRule, Source, SpiffeId, Svid, TlsOptions, TrustBundle,
    error_text::chain_text, svid::TlsContext,
};
use entry::{Entry, Jitter, Now};
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
    /// Which name a certificate must carry.
    pub san_rule: SanRule,
    /// How long a connection waits for a certificate. Default 10 s.
    pub wait: Duration,
    /// How long one call of the source may take. Default 90 s: some authorities take a minute.
    pub fetch_deadline: Duration,
    /// How many calls of the source may be in flight. Default 8.
    pub max_fetches: usize,
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
            san_rule: SanRule::Requested,
            wait: Duration::from_secs(10),
            fetch_deadline: Duration::from_secs(90),
            max_fetches: 8,
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
                .trusting(options.trust.clone()),
            options,
            entries: RwLock::default(),
            bell: Notify::new(),
        }))
    }

    /// Roots that peers may have besides those that came with a certificate.
    #[must_use]
    pub fn trust(&self) -> &TrustBundle {
        &self.0.options.trust
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
    /// A caller of a failing identity has it tried again, at most once per second; it waits on
    /// through failures while the identity has been failing for less than the wait, and else
    /// learns of the first.
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
        let wait = self.0.options.wait;
        let deadline = Instant::now() + wait;
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
            if let Some(reason) = self.0.hopeless(id) {
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
    /// given up. Connections are not touched.
    pub fn forget(&self, id: &SpiffeId) {
        let now = self.0.now();
        let mut entries = self.0.entries.write();
        let Some(entry) = entries.get_mut(id) else {
            return;
        };
        entry.forget(now, self.0.options.forget_grace);
        if !entry.is_valid(now.wall) {
            entries.remove(id);
            drop(entries);
            self.0.source.release(id);
        }
        self.0.bell.notify_one();
    }

    /// Fetches and renews until `stop` fires; all tasks have ended when it returns.
    ///
    /// # Panics
    /// If the source panics: certificates would silently stop.
    /// # Cancel safety
    /// Dropping the future aborts running fetches; they are made again by the next `run`.
    pub async fn run(&self, stop: CancellationToken) {
        let mut fetches = JoinSet::new();
        self.0.restart();
        loop {
            let wake_at = self.0.start_due(&mut fetches);
            tokio::select! {
                biased; // stopping goes first, results before new work
                () = stop.cancelled() => break,
                Some(end) = fetches.join_next_with_id() => self.0.finish(end),
                () = self.0.bell.notified() => {}
                () = sleep_until(wake_at) => {}
            }
        }
        fetches.shutdown().await;
    }

    /// What is held, sorted by identity. Contains no private key.
    #[must_use]
    pub fn snapshot(&self) -> Vec<IdentityStatus> {
        let wall = self.0.options.clock.now();
        let entries = self.0.entries.read();
        let held: Vec<_> = entries
            .iter()
            .map(|(id, entry)| (id.clone(), entry.state(wall), entry.held()))
            .collect();
        drop(entries);
        snapshot::describe(held)
    }
}

impl Inner {
    fn now(&self) -> Now {
        Now {
            mono: Instant::now(),
            wall: self.options.clock.now(),
        }
    }

    /// Asks for `id` on behalf of a waiting connection.
    fn demand(&self, id: &SpiffeId) -> tokio::sync::watch::Receiver<()> {
        let now = self.now();
        let mut entries = self.entries.write();
        let outcomes = entries
            .entry(id.clone())
            .or_insert_with(|| Entry::new(now.mono))
            .demand(now);
        self.bell.notify_one();
        outcomes
    }

    /// The last failure, if waiting on for `id` makes no sense.
    fn hopeless(&self, id: &SpiffeId) -> Option<Arc<str>> {
        let entries = self.entries.read();
        entries.get(id)?.hopeless(Instant::now(), self.options.wait)
    }

    fn timed_out(&self, id: &SpiffeId) -> SvidError {
        let failure = self.entries.read().get(id).and_then(Entry::failure);
        let (id, waited) = (id.clone(), self.options.wait);
        match failure {
            Some(reason) => SvidError::Unavailable { id, reason },
            None => SvidError::Timeout { id, waited },
        }
    }

    /// Puts back what an earlier `run` left in flight.
    fn restart(&self) {
        let now = self.now();
        for entry in self.entries.write().values_mut() {
            entry.abandon_fetch(now);
        }
    }

    /// Starts what is due while there is room, most urgent first; says when to look again.
    fn start_due(self: &Arc<Self>, fetches: &mut JoinSet<Result<Svid, ObtainError>>) -> Instant {
        let now = self.now();
        let mut entries = self.entries.write();
        let gone: Vec<_> = entries
            .extract_if(|_, entry| entry.is_over(now))
            .map(|(id, _)| id)
            .collect();
        let mut due: Vec<_> = entries
            .iter_mut()
            .filter_map(|(id, entry)| Some((entry.due(now)?, id, entry)))
            .collect();
        due.sort_unstable_by_key(|(rank, ..)| *rank);
        let room = self.options.max_fetches.saturating_sub(fetches.len());
        for (_, id, entry) in due.into_iter().take(room) {
            let fetch = Arc::clone(self).fetch(id.clone());
            entry.started(fetches.spawn(fetch));
        }
        // What is due but found no room is started when a running fetch ends.
        let wake_at = entries
            .values()
            .filter(|entry| entry.due(now).is_none())
            .filter_map(|entry| entry.wake_at(now))
            .min();
        drop(entries);
        for id in gone {
            self.source.release(&id);
        }
        // Renewals follow the wall clock, which may be set while we sleep.
        let look_again = now.mono + CLOCK_CHECK;
        wake_at.map_or(look_again, |at| at.min(look_again))
    }

    async fn fetch(self: Arc<Self>, id: SpiffeId) -> Result<Svid, ObtainError> {
        let limit = self.options.fetch_deadline;
        let obtained = timeout(limit, self.source.obtain(&id))
            .await
            .map_err(|_| ObtainError::Deadline(limit))??;
        let now = self.options.clock.now();
        Ok(Svid::accept(&id, obtained, &self.context, now)?)
    }

    fn finish(&self, end: Result<(Id, Result<Svid, ObtainError>), JoinError>) {
        let (task, result) = match end {
            Ok(finished) => finished,
            // Forgotten meanwhile.
            Err(error) if error.is_cancelled() => return,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let now = self.now();
        let mut entries = self.entries.write();
        let Some((id, entry)) = entries.iter_mut().find(|(_, entry)| entry.runs(task)) else {
            return;
        };
        match result {
            Ok(svid) => {
                tracing::debug!(%id, "obtained a certificate");
                entry.succeeded(Arc::new(svid), now, Jitter::random());
            }
            Err(error) => {
                let reason = chain_text(&error);
                if entry.is_valid(now.wall) {
                    tracing::info!(%id, reason, "renewal failed; the certificate is still valid");
                } else {
                    tracing::warn!(%id, reason, "no certificate");
                }
                entry.failed(reason.into(), error.retry(), now, Jitter::random());
            }
        }
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

/// How often the wall clock is looked at, at least.
const CLOCK_CHECK: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
