//! The life of one identity's certificate: pure bookkeeping, told the time by its caller.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    sync::watch,
    task::{AbortHandle, Id},
    time::Instant,
};

use super::{
    reach::Reach,
    snapshot::{CertificateState, Overview, Stage},
};
use crate::{Retry, Svid};

/// This moment on both clocks: retries follow the monotonic one, validity the wall clock, and
/// renewals whichever is ahead, so that neither a step of the wall clock nor a suspended machine
/// delays them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) mono: Instant,
    pub(crate) wall: SystemTime,
}

/// One identity.
#[derive(Debug)]
pub(crate) struct Entry {
    held: Option<Held>,
    phase: Phase,
    keep: Keep,
    failing: Option<Failing>,
    /// No attempt before this moment, whoever asks.
    earliest: Instant,
    /// Whether anybody took or asked for the certificate since the last attempt ended.
    used: AtomicBool,
    /// The source had something newer while an attempt was running.
    outdated: bool,
    /// Rung at the end of each attempt; dropped with the entry.
    outcomes: watch::Sender<()>,
}

/// A certificate and when it came.
#[derive(Debug)]
struct Held {
    svid: Arc<Svid>,
    since: SystemTime,
}

/// What happens next.
#[derive(Debug)]
enum Phase {
    /// An attempt is to be made.
    Due { urgency: Urgency, at: Instant },
    /// A certificate is held until its renewal.
    Held(Renewal),
    /// An attempt is running.
    Running {
        task: AbortHandle,
        urgency: Urgency,
        since: Instant,
    },
    /// An attempt was given up, but its task has not ended yet; no other may start before.
    Ending { task: Id, urgency: Urgency },
}

/// When to renew: at the first of these.
#[derive(Debug, Clone, Copy)]
struct Renewal {
    mono: Instant,
    wall: SystemTime,
}

impl Renewal {
    fn after(pause: Duration, now: Now) -> Self {
        Self {
            mono: now.mono + pause,
            wall: now.wall + pause,
        }
    }

    /// The same moment on the monotonic clock, as things look now.
    fn at(self, now: Now) -> Instant {
        let left = self.wall.duration_since(now.wall).unwrap_or_default();
        self.mono.min(now.mono + left)
    }
}

/// Whose turn it is; the first goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    RealTime,
    WarmUp,
    Background,
}

/// A place in the queue; the first goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) urgency: Urgency,
    /// The last attempt failed.
    again: bool,
    at: Instant,
}

/// For how long the identity stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// Until it is forgotten.
    Wanted,
    /// While it is used.
    OnDemand,
    /// The workload has left: until this moment, in case it returns.
    Until(Instant),
}

/// A streak of failed attempts.
#[derive(Debug)]
struct Failing {
    since: Instant,
    attempts: u32,
    reason: Arc<str>,
    retry: Retry,
}

impl Entry {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            held: None,
            phase: Phase::Due {
                urgency: Urgency::WarmUp,
                at: now,
            },
            keep: Keep::OnDemand,
            failing: None,
            earliest: now,
            used: AtomicBool::new(false),
            outdated: false,
            outcomes: watch::Sender::new(()),
        }
    }

    /// The certificate for a handshake, unless it has expired.
    pub(crate) fn usable(&self, wall: SystemTime) -> Option<Arc<Svid>> {
        let svid = self.valid(wall)?;
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        Some(Arc::clone(svid))
    }

    pub(crate) fn is_valid(&self, wall: SystemTime) -> bool {
        self.valid(wall).is_some()
    }

    /// The certificate, unless it has expired; not taken for a handshake.
    pub(crate) fn valid(&self, wall: SystemTime) -> Option<&Arc<Svid>> {
        let svid = &self.held.as_ref()?.svid;
        svid.is_valid_at(wall).then_some(svid)
    }

    /// The entry as it is, for people to look at.
    pub(crate) fn overview(&self, wall: SystemTime) -> Overview {
        Overview {
            state: self.state(wall),
            stage: self.stage(wall),
            svid: self.held.as_ref().map(|held| Arc::clone(&held.svid)),
            obtained_at: self.held.as_ref().map(|held| held.since),
            last_failure: self.failure(),
        }
    }

    pub(crate) fn state(&self, wall: SystemTime) -> CertificateState {
        if self.is_valid(wall) {
            CertificateState::Available
        } else if matches!(self.keep, Keep::Until(_)) {
            CertificateState::Unavailable("the identity is no longer needed".into())
        } else if let Some(failing) = &self.failing {
            CertificateState::Unavailable(Arc::clone(&failing.reason))
        } else if self.held.is_some() {
            CertificateState::Unavailable("certificate expired".into())
        } else {
            CertificateState::Initializing
        }
    }

    fn stage(&self, wall: SystemTime) -> Stage {
        if matches!(self.keep, Keep::Until(_)) {
            return Stage::Forgotten;
        }
        match (&self.held, &self.phase) {
            (Some(_), Phase::Held(_)) if self.is_valid(wall) => Stage::Held,
            (Some(_), _) if self.is_valid(wall) => Stage::Renewing,
            (Some(_), _) => Stage::Expired,
            (None, _) if self.failing.is_some() => Stage::Failing,
            (None, Phase::Running { .. }) => Stage::Fetching,
            (None, Phase::Due { .. } | Phase::Ending { .. } | Phase::Held(_)) => Stage::Queued,
        }
    }

    pub(crate) fn failure(&self) -> Option<Arc<str>> {
        let failing = self.failing.as_ref()?;
        Some(Arc::clone(&failing.reason))
    }

    /// The failure, if it has lasted for `patience`, will not go away by itself, or cannot be
    /// made good before `deadline`.
    pub(crate) fn hopeless(
        &self,
        now: Instant,
        patience: Duration,
        deadline: Instant,
    ) -> Option<Arc<str>> {
        let failing = self.failing.as_ref()?;
        let lasting = now.duration_since(failing.since) >= patience;
        let hopeless = lasting || failing.retry == Retry::Slowly || self.earliest >= deadline;
        hopeless.then(|| Arc::clone(&failing.reason))
    }

    /// A connection waits for the certificate: the next attempt is urgent.
    pub(crate) fn demand(&mut self, now: Now) -> watch::Receiver<()> {
        self.used.store(true, Ordering::Relaxed);
        if !self.is_valid(now.wall) {
            if matches!(self.keep, Keep::Until(_)) {
                self.keep = Keep::OnDemand;
            }
            self.hurry(Urgency::RealTime, now);
        }
        self.outcomes.subscribe()
    }

    /// A workload of the identity is here.
    pub(crate) fn want(&mut self, now: Now) {
        let returns = matches!(self.keep, Keep::Until(_));
        self.keep = Keep::Wanted;
        // A pause after failures is served out unless the identity had left: what they were about may be over.
        if (returns || matches!(self.phase, Phase::Held(_))) && !self.is_valid(now.wall) {
            self.hurry(Urgency::WarmUp, now);
        }
    }

    /// Has the next attempt made as soon as allowed, with at least `wanted`; one that runs already
    /// counts as that urgent from now on.
    fn hurry(&mut self, wanted: Urgency, now: Now) {
        let soonest = self.earliest.max(now.mono);
        match &mut self.phase {
            Phase::Due { urgency, at } => {
                *urgency = wanted.min(*urgency);
                *at = soonest.min(*at);
            }
            Phase::Running { urgency, .. } | Phase::Ending { urgency, .. } => {
                *urgency = wanted.min(*urgency);
            }
            Phase::Held(_) => {
                let (urgency, at) = (wanted, soonest);
                self.phase = Phase::Due { urgency, at };
            }
        }
    }

    /// The source has a newer certificate.
    pub(crate) fn refresh(&mut self, now: Now) {
        match &mut self.phase {
            Phase::Held(renewal) => *renewal = Renewal::after(Duration::ZERO, now),
            // It may have been asked before the newer one was there.
            Phase::Running { .. } => self.outdated = true,
            // Whatever it failed for before.
            Phase::Due { .. } => self.hurry(Urgency::Background, now),
            Phase::Ending { .. } => {}
        }
    }

    /// The last workload of the identity has left. Who waits for a first certificate learns it.
    pub(crate) fn forget(&mut self, now: Now, grace: Duration) {
        self.give_up(now);
        self.failing = None;
        if !matches!(self.keep, Keep::Until(_)) {
            self.keep = Keep::Until(now.mono + grace);
        }
        if !self.is_valid(now.wall) {
            self.outcomes = watch::Sender::new(());
        }
    }

    /// Gives up a running attempt, to be made again after a pause.
    fn give_up(&mut self, now: Now) {
        if let Phase::Running { task, urgency, .. } = &self.phase {
            task.abort();
            self.phase = Phase::Ending {
                task: task.id(),
                urgency: *urgency,
            };
            self.earliest = now.mono + MIN_SPACING;
        }
    }

    /// Whatever ran has ended with those who ran it.
    pub(crate) fn restart(&mut self, now: Now) {
        self.give_up(now);
        if let Phase::Ending { task, .. } = self.phase {
            self.reap(task);
        }
    }

    /// The task of an attempt that was given up has ended. `false` if it is not ours.
    pub(crate) fn reap(&mut self, ended: Id) -> bool {
        match self.phase {
            Phase::Ending { task, urgency } if task == ended => {
                let at = self.earliest;
                self.phase = Phase::Due { urgency, at };
                true
            }
            Phase::Ending { .. } | Phase::Running { .. } | Phase::Due { .. } | Phase::Held(_) => {
                false
            }
        }
    }

    /// Whether the entry can be dropped: its grace is over, or nobody has used it for long.
    pub(crate) fn is_over(&self, now: Now) -> bool {
        if matches!(self.phase, Phase::Ending { .. }) || now.mono < self.earliest {
            return false;
        }
        match self.keep {
            Keep::Wanted => false,
            Keep::Until(end) => now.mono >= end,
            Keep::OnDemand => {
                let stale = match self.phase {
                    Phase::Held(renewal) => renewal.at(now) <= now.mono,
                    Phase::Due { .. } => {
                        let failing = self.failing.as_ref();
                        failing.is_some_and(|failing| failing.attempts >= UNUSED_ATTEMPTS)
                    }
                    Phase::Running { .. } | Phase::Ending { .. } => false,
                };
                stale && !self.used.load(Ordering::Relaxed)
            }
        }
    }

    /// The entry's place in the queue, if an attempt is due. An identity that has failed lets others of its urgency go
    /// first, since it may fail again.
    pub(crate) fn due(&self, now: Now) -> Option<Rank> {
        let (urgency, at) = self.next_attempt(now)?;
        let again = self.failing.is_some();
        (at <= now.mono).then_some(Rank { urgency, again, at })
    }

    /// When the entry next needs attention by itself.
    pub(crate) fn wake_at(&self, now: Now) -> Option<Instant> {
        if let Keep::Until(end) = self.keep {
            return Some(end.max(self.earliest));
        }
        self.next_attempt(now).map(|(_, at)| at)
    }

    fn next_attempt(&self, now: Now) -> Option<(Urgency, Instant)> {
        if matches!(self.keep, Keep::Until(_)) {
            return None;
        }
        let (urgency, at) = match self.phase {
            Phase::Due { urgency, at } => (urgency, at),
            Phase::Held(renewal) => (Urgency::Background, renewal.at(now)),
            Phase::Running { .. } | Phase::Ending { .. } => return None,
        };
        Some((urgency, at.max(self.earliest)))
    }

    pub(crate) fn started(&mut self, task: AbortHandle, urgency: Urgency, since: Instant) {
        self.outdated = false;
        self.phase = Phase::Running {
            task,
            urgency,
            since,
        };
    }

    pub(crate) fn runs(&self, id: Id) -> bool {
        matches!(&self.phase, Phase::Running { task, .. } if task.id() == id)
    }

    /// How urgent the running attempt is, and since when it runs.
    pub(crate) fn running(&self) -> Option<(Urgency, Instant)> {
        match self.phase {
            Phase::Running { urgency, since, .. } => Some((urgency, since)),
            Phase::Due { .. } | Phase::Held(_) | Phase::Ending { .. } => None,
        }
    }

    /// Stores a certificate. Its renewal is due after a part of what remains of its life: counted
    /// from now, because half the life of a backdated one may be over already.
    pub(crate) fn succeeded(&mut self, svid: Arc<Svid>, now: Now, jitter: Jitter) {
        let mut pause = svid.remaining(now.wall).mul_f64(jitter.renewal);
        if self.outdated {
            pause = Duration::ZERO;
        }
        self.phase = Phase::Held(Renewal::after(pause.max(MIN_SPACING), now));
        let since = now.wall;
        self.held = Some(Held { svid, since });
        self.failing = None;
        self.ended(now.mono + MIN_SPACING);
    }

    /// Notes a failure; the next attempt follows after a growing pause. If the authority was out of `reach` and nothing valid is
    /// held, it may be the entry's turn to find out whether it is back.
    pub(crate) fn failed(
        &mut self,
        (reason, retry): (Arc<str>, Retry),
        now: Now,
        jitter: Jitter,
        reach: Option<&mut Reach>,
    ) {
        let before = self.failing.take();
        let (since, attempts) =
            before.map_or((now.mono, 0), |failing| (failing.since, failing.attempts));
        let mut pause = back_off(attempts).mul_f64(jitter.back_off);
        if retry == Retry::Slowly {
            pause = pause.max(SLOW_PAUSE);
        }
        if let Some(svid) = self.valid(now.wall) {
            pause = pause.min(svid.remaining(now.wall));
        } else if let Some(reach) = reach {
            pause = reach.sooner(pause, now.mono, jitter.back_off);
        }
        let spacing = match retry {
            Retry::Soon => MIN_SPACING,
            Retry::After(wait) => wait.clamp(MIN_SPACING, MAX_HINT),
            Retry::Slowly => SLOW_SPACING,
        };
        self.phase = Phase::Due {
            urgency: Urgency::Background,
            at: now.mono + pause.max(spacing),
        };
        self.failing = Some(Failing {
            since,
            attempts: attempts.saturating_add(1),
            reason,
            retry,
        });
        self.ended(now.mono + spacing);
    }

    /// The authority has answered another entry, for the first time since `before`. An attempt that waits because of an outage that
    /// began since then goes ahead; whoever fails by itself is not concerned.
    pub(crate) fn hear_of_answer(&mut self, before: Option<Instant>, now: Now) {
        let Some(failing) = &self.failing else {
            return;
        };
        let in_outage = before.is_none_or(|before| failing.since > before);
        let lacking = failing.retry == Retry::Soon && !self.is_valid(now.wall);
        if in_outage
            && lacking
            && let Phase::Due { at, .. } = &mut self.phase
        {
            *at = now.mono.min(*at);
        }
    }

    fn ended(&mut self, earliest: Instant) {
        self.earliest = earliest;
        self.used.store(false, Ordering::Relaxed);
        self.outcomes.send_replace(());
    }
}

/// Random factors, so that what was fetched together is not renewed together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Jitter {
    /// The part of a certificate's remaining life after which it is renewed.
    renewal: f64,
    /// 0.8 to 1.2.
    back_off: f64,
}

impl Jitter {
    /// Renewal within `window`; what is no part of a life counts as half of it.
    pub(crate) fn random((from, to): (f64, f64)) -> Self {
        let renewal = from + (to - from) * rand::random::<f64>();
        Self {
            renewal: if (0.0..=1.0).contains(&renewal) {
                renewal
            } else {
                0.5
            },
            back_off: 0.8 + 0.4 * rand::random::<f64>(),
        }
    }
}

/// The pause after `attempts` earlier failures: 1 s, 2 s, 4 s … 128 s, 150 s.
fn back_off(attempts: u32) -> Duration {
    Duration::from_secs(1)
        .saturating_mul(2_u32.saturating_pow(attempts))
        .min(MAX_BACK_OFF)
}

/// Between two attempts for one identity, whoever asks.
const MIN_SPACING: Duration = Duration::from_secs(1);
/// The same after a failure that needs somebody's hand.
const SLOW_SPACING: Duration = Duration::from_secs(5);
/// And while nobody asks.
const SLOW_PAUSE: Duration = Duration::from_secs(30);
const MAX_BACK_OFF: Duration = Duration::from_secs(150);
/// How long a source may have us wait: a slip of its must not take an identity out for a day.
const MAX_HINT: Duration = Duration::from_secs(600);
/// After so many failures in a row, an identity that nobody asked for again is dropped.
const UNUSED_ATTEMPTS: u32 = 8;
