//! The work behind an [`Agent`](super::Agent): which identity is next, calling the source, and
//! what becomes of its answers. Decisions about one identity are those of [`Entry`].

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::{Id, JoinError, JoinSet},
    time::{Instant, timeout},
};

use super::{
    AgentOptions, Inner, SvidError,
    entry::{Entry, Jitter, Now, Rank, Urgency},
    metrics::Failure,
    snapshot::Overview,
};
use crate::{ObtainError, Origin, Retry, SpiffeId, Svid, error_text::chain_text};

/// What became of one attempt.
type Outcome = Result<Svid, ObtainError>;

impl Inner {
    pub(super) fn now(&self) -> Now {
        Now {
            mono: Instant::now(),
            wall: self.options.clock.now(),
        }
    }

    /// What is held, sorted by identity.
    pub(super) fn overviews(&self) -> Vec<(SpiffeId, Overview)> {
        let wall = self.options.clock.now();
        let entries = self.entries.read();
        let mut all: Vec<_> = entries
            .iter()
            .map(|(id, entry)| (id.clone(), entry.overview(wall)))
            .collect();
        drop(entries);
        all.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        all
    }

    /// Asks for `id` on behalf of a waiting connection.
    pub(super) fn demand(&self, id: &SpiffeId) -> watch::Receiver<()> {
        let now = self.now();
        let mut entries = self.entries.write();
        let outcomes = entries
            .entry(id.clone())
            .or_insert_with(|| Entry::new(now.mono))
            .demand(now);
        self.bell.notify_one();
        outcomes
    }

    /// The last failure, if waiting on for `id` until `deadline` makes no sense.
    pub(super) fn hopeless(&self, id: &SpiffeId, deadline: Instant) -> Option<Arc<str>> {
        let (now, patience) = (Instant::now(), self.options.wait);
        let entries = self.entries.read();
        entries.get(id)?.hopeless(now, patience, deadline)
    }

    pub(super) fn timed_out(&self, id: &SpiffeId) -> SvidError {
        let failure = self.entries.read().get(id).and_then(Entry::failure);
        let (id, waited) = (id.clone(), self.options.wait);
        match failure {
            Some(reason) => SvidError::Unavailable { id, reason },
            None => SvidError::Timeout { id, waited },
        }
    }

    /// Puts back what an earlier `run` left in flight.
    pub(super) fn restart(&self) {
        let now = self.now();
        for entry in self.entries.write().values_mut() {
            entry.restart(now);
        }
    }

    /// Starts what is due while there is room, most urgent first; says when to look again.
    pub(super) fn start_due(self: &Arc<Self>, fetches: &mut JoinSet<Outcome>) -> Instant {
        let now = self.now();
        let mut entries = self.entries.write();
        let gone: Vec<_> = entries
            .extract_if(|_, entry| entry.is_over(now))
            .map(|(id, _)| id)
            .collect();
        let mut room = Room::new(&self.options, now.mono);
        for (urgency, since) in entries.values().filter_map(Entry::running) {
            room.occupy(urgency, since);
        }
        let mut due: Vec<_> = entries
            .iter_mut()
            .filter_map(|(id, entry)| Some((entry.due(now)?, id, entry)))
            .collect();
        due.sort_unstable_by_key(|(rank, ..)| *rank);
        for (Rank { urgency, .. }, id, entry) in due {
            if !room.take(urgency) {
                break; // nor is there room for what is less urgent
            }
            let fetch = Arc::clone(self).fetch(id.clone());
            entry.started(fetches.spawn(fetch), urgency, now.mono);
        }
        // What is due but found no room is started when a running call ends, or has taken too long to count.
        let wake_at = entries
            .values()
            .filter(|entry| entry.due(now).is_none())
            .filter_map(|entry| entry.wake_at(now))
            .chain(room.freed_at)
            .min();
        drop(entries);
        for id in gone {
            self.source.release(&id);
        }
        // The wall clock may be set, or the machine suspended, while we sleep.
        let look_again = now.mono + CLOCK_CHECK;
        wake_at.map_or(look_again, |at| at.min(look_again))
    }

    async fn fetch(self: Arc<Self>, id: SpiffeId) -> Outcome {
        let limit = self.options.fetch_deadline;
        let began = Instant::now();
        let answer = timeout(limit, self.source.obtain(&id)).await;
        self.metrics.called(began.elapsed());
        let obtained = answer.map_err(|_| ObtainError::Deadline(limit))??;
        let now = self.options.clock.now();
        Ok(Svid::accept(&id, obtained, &self.context, now)?)
    }

    /// Has certificates that are revoked by now replaced. Once for each change of the lists: whatever an authority gives below a
    /// revoked certificate of its own is revoked, too.
    pub(super) fn replace_revoked(&self) {
        let now = self.now();
        let held: Vec<_> = {
            let entries = self.entries.read();
            let held = entries
                .iter()
                .filter_map(|(id, entry)| Some((id.clone(), Arc::clone(entry.valid(now.wall)?))));
            held.collect()
        };
        for (id, _) in held.iter().filter(|(_, svid)| svid.is_revoked()) {
            tracing::warn!(%id, "the certificate is revoked; another is asked for");
            if let Some(entry) = self.entries.write().get_mut(id) {
                entry.refresh(now);
            }
        }
    }

    /// Books the end of a fetch.
    pub(super) fn finish(&self, end: Result<(Id, Outcome), JoinError>) {
        let now = self.now();
        // Before the entries are locked, but not earlier: whatever lists come later find the certificate among those held.
        let is_revoked = matches!(&end, Ok((_, Ok(svid))) if svid.is_revoked());
        let task = match &end {
            Ok((task, _)) => *task,
            Err(error) => error.id(),
        };
        let mut entries = self.entries.write();
        if entries.values_mut().any(|entry| entry.reap(task)) {
            return; // given up meanwhile: whatever came is discarded
        }
        let mut reach = self.reach.lock();
        if matches!(end, Ok((_, Ok(_)))) {
            let before = reach.answer(now.mono);
            for entry in entries.values_mut() {
                entry.hear_of_answer(before, now);
            }
        }
        let Some((id, entry)) = entries.iter_mut().find(|(_, entry)| entry.runs(task)) else {
            return;
        };
        let mut unreached = false;
        let (failure, reason, retry) = match end {
            Ok((_, Ok(svid))) => {
                self.metrics.succeeded();
                tracing::debug!(%id, "obtained a certificate");
                let (origin, jitter) = (svid.origin(), Jitter::random(self.options.renewal_window));
                entry.succeeded(Arc::new(svid), now, jitter);
                if is_revoked {
                    came_revoked(id, entry, origin, now);
                }
                return;
            }
            Ok((_, Err(error))) => {
                unreached = matches!(error, ObtainError::Unreachable(_));
                (Failure::of(&error), chain_text(&error), error.retry())
            }
            Err(error) => {
                tracing::error!(%id, %error, "the source of certificates panicked");
                let reason = "the source of certificates panicked".to_owned();
                (Failure::Panic, reason, Retry::Soon)
            }
        };
        self.metrics.failed(failure);
        if entry.is_valid(now.wall) {
            tracing::info!(%id, reason, "renewal failed; the certificate is still valid");
        } else {
            tracing::warn!(%id, reason, "no certificate");
        }
        let jitter = Jitter::random(self.options.renewal_window);
        let reach = unreached.then_some(&mut *reach);
        entry.failed((reason.into(), retry), now, jitter, reach);
    }
}

/// Has the revoked certificate that has come for `id` replaced, once, unless the authority has only just given it.
fn came_revoked(id: &SpiffeId, entry: &mut Entry, origin: Origin, now: Now) {
    match origin {
        Origin::Issued => {
            tracing::warn!(%id, "the authority gave a certificate that is revoked: peers will refuse it");
        }
        Origin::Kept => {
            tracing::warn!(%id, "the certificate of an earlier process is revoked; another is asked for");
            entry.refresh(now);
        }
    }
}

/// How many more calls of the source may start.
///
/// A call that has gone unanswered for [`SLOW`] leaves its place to others, or a few that hang would keep all identities
/// waiting until their deadline. It goes on: giving it up would leave a slow authority with nothing to show for its work.
struct Room {
    now: Instant,
    /// For calls that have just begun.
    quick: usize,
    /// Of these, for what no connection waits for.
    unhurried: usize,
    /// For calls that have left their place.
    slow: usize,
    /// When the next call leaves its place.
    freed_at: Option<Instant>,
}

impl Room {
    fn new(options: &AgentOptions, now: Instant) -> Self {
        let quick = options.max_fetches.max(1);
        Self {
            now,
            quick,
            unhurried: quick - quick / 4,
            slow: options.max_slow_fetches,
            freed_at: None,
        }
    }

    /// Counts a running call.
    fn occupy(&mut self, urgency: Urgency, since: Instant) {
        let slow_at = since + SLOW;
        if slow_at > self.now {
            self.freed_at = Some(self.freed_at.map_or(slow_at, |at| at.min(slow_at)));
        } else if self.slow > 0 {
            self.slow -= 1;
            return;
        }
        let unhurried = usize::from(urgency != Urgency::RealTime);
        self.quick = self.quick.saturating_sub(1);
        self.unhurried = self.unhurried.saturating_sub(unhurried);
    }

    /// Takes a place for an attempt, if there is one.
    fn take(&mut self, urgency: Urgency) -> bool {
        let unhurried = urgency != Urgency::RealTime;
        if self.quick == 0 || (unhurried && self.unhurried == 0) {
            return false;
        }
        self.occupy(urgency, self.now);
        true
    }
}

/// Half of what a connection waits for, so that one that finds all places taken by calls that hang has time for its own.
const SLOW: Duration = Duration::from_secs(5);
/// How often the wall clock is looked at, at least.
const CLOCK_CHECK: Duration = Duration::from_secs(60);
