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

use super::snapshot::CertificateState;
use crate::{Retry, Svid};

/// This moment on both clocks: retries follow the monotonic one, renewals the wall clock, which
/// certificates are judged by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) mono: Instant,
    pub(crate) wall: SystemTime,
}

/// One identity.
#[derive(Debug)]
pub(crate) struct Entry {
    svid: Option<Arc<Svid>>,
    phase: Phase,
    keep: Keep,
    failing: Option<Failing>,
    /// No attempt before this moment, whoever asks.
    earliest: Instant,
    /// Whether anybody took or asked for the certificate since the last attempt ended.
    used: AtomicBool,
    /// Rung at the end of each attempt; dropped with the entry.
    outcomes: watch::Sender<()>,
}

/// What happens next.
#[derive(Debug)]
enum Phase {
    /// An attempt is to be made.
    Due { urgency: Urgency, at: Instant },
    /// A certificate is held; time of its renewal.
    Held { renew_at: SystemTime },
    /// An attempt is running.
    Running(AbortHandle),
}

/// Whose turn it is; the first goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    RealTime,
    WarmUp,
    Background,
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
            svid: None,
            phase: Phase::Due {
                urgency: Urgency::WarmUp,
                at: now,
            },
            keep: Keep::OnDemand,
            failing: None,
            earliest: now,
            used: AtomicBool::new(false),
            outcomes: watch::Sender::new(()),
        }
    }

    /// The certificate for a handshake, unless it has expired.
    pub(crate) fn usable(&self, wall: SystemTime) -> Option<Arc<Svid>> {
        let svid = self.svid.as_ref().filter(|svid| svid.is_valid_at(wall))?;
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        Some(Arc::clone(svid))
    }

    pub(crate) fn is_valid(&self, wall: SystemTime) -> bool {
        self.svid
            .as_ref()
            .is_some_and(|svid| svid.is_valid_at(wall))
    }

    /// The certificate as it is, for dumps.
    pub(crate) fn held(&self) -> Option<Arc<Svid>> {
        self.svid.clone()
    }

    pub(crate) fn state(&self, wall: SystemTime) -> CertificateState {
        if self.is_valid(wall) {
            CertificateState::Available
        } else if let Some(failing) = &self.failing {
            CertificateState::Unavailable(Arc::clone(&failing.reason))
        } else if self.svid.is_some() {
            CertificateState::Unavailable("certificate expired".into())
        } else {
            CertificateState::Initializing
        }
    }

    pub(crate) fn failure(&self) -> Option<Arc<str>> {
        let failing = self.failing.as_ref()?;
        Some(Arc::clone(&failing.reason))
    }

    /// The failure, if it has lasted for `patience` or will not go away by itself.
    pub(crate) fn hopeless(&self, now: Instant, patience: Duration) -> Option<Arc<str>> {
        let failing = self.failing.as_ref()?;
        let lasting = now.duration_since(failing.since) >= patience;
        (lasting || failing.retry == Retry::Slowly).then(|| Arc::clone(&failing.reason))
    }

    /// A connection waits for the certificate: the next attempt is urgent.
    pub(crate) fn demand(&mut self, now: Now) -> watch::Receiver<()> {
        self.used.store(true, Ordering::Relaxed);
        let valid = self.is_valid(now.wall);
        if matches!(self.keep, Keep::Until(_)) && !valid {
            self.keep = Keep::OnDemand;
        }
        let soonest = self.earliest.max(now.mono);
        let at = match self.phase {
            Phase::Due { at, .. } => Some(at.min(soonest)),
            Phase::Held { .. } if !valid => Some(soonest),
            Phase::Held { .. } | Phase::Running(_) => None,
        };
        if let Some(at) = at {
            let urgency = Urgency::RealTime;
            self.phase = Phase::Due { urgency, at };
        }
        self.outcomes.subscribe()
    }

    /// A workload of the identity is here.
    pub(crate) fn want(&mut self, now: Now) {
        self.keep = Keep::Wanted;
        if let (Phase::Held { .. }, false) = (&self.phase, self.is_valid(now.wall)) {
            self.phase = Phase::Due {
                urgency: Urgency::WarmUp,
                at: self.earliest.max(now.mono),
            };
        }
    }

    /// The source has a newer certificate.
    pub(crate) fn refresh(&mut self, now: Now) {
        if let Phase::Held { renew_at } = &mut self.phase {
            *renew_at = now.wall;
        }
    }

    /// The last workload of the identity has left.
    pub(crate) fn forget(&mut self, now: Now, grace: Duration) {
        self.abandon_fetch(now);
        self.keep = Keep::Until(now.mono + grace);
    }

    /// A running attempt is given up, to be made again.
    pub(crate) fn abandon_fetch(&mut self, now: Now) {
        if let Phase::Running(task) = &self.phase {
            task.abort();
            self.phase = Phase::Due {
                urgency: Urgency::Background,
                at: now.mono,
            };
        }
    }

    /// Whether the entry can be dropped: its grace is over, or nobody has used it for long.
    pub(crate) fn is_over(&self, now: Now) -> bool {
        match self.keep {
            Keep::Wanted => false,
            Keep::Until(end) => now.mono >= end,
            Keep::OnDemand => {
                let stale = match &self.phase {
                    Phase::Held { renew_at } => now.wall >= *renew_at,
                    Phase::Due { .. } => {
                        let failing = self.failing.as_ref();
                        failing.is_some_and(|failing| failing.attempts >= UNUSED_ATTEMPTS)
                    }
                    Phase::Running(_) => false,
                };
                stale && !self.used.load(Ordering::Relaxed)
            }
        }
    }

    /// The entry's place in the queue, if an attempt is due.
    pub(crate) fn due(&self, now: Now) -> Option<(Urgency, Instant)> {
        if matches!(self.keep, Keep::Until(_)) {
            return None;
        }
        match self.phase {
            Phase::Due { urgency, at } => (at <= now.mono).then_some((urgency, at)),
            Phase::Held { renew_at } => {
                let overdue = now.wall.duration_since(renew_at).ok()?;
                // A process younger than that has no earlier moment to name.
                let at = now.mono.checked_sub(overdue).unwrap_or(now.mono);
                Some((Urgency::Background, at))
            }
            Phase::Running(_) => None,
        }
    }

    /// When the entry next needs attention.
    pub(crate) fn wake_at(&self, now: Now) -> Option<Instant> {
        if let Keep::Until(end) = self.keep {
            return Some(end);
        }
        match self.phase {
            Phase::Due { at, .. } => Some(at),
            Phase::Held { renew_at } => {
                let left = renew_at.duration_since(now.wall).unwrap_or_default();
                now.mono.checked_add(left)
            }
            Phase::Running(_) => None,
        }
    }

    pub(crate) fn started(&mut self, task: AbortHandle) {
        self.phase = Phase::Running(task);
    }

    pub(crate) fn runs(&self, task: Id) -> bool {
        matches!(&self.phase, Phase::Running(running) if running.id() == task)
    }

    /// Stores a certificate; its renewal is due after half of what remains of its life.
    pub(crate) fn succeeded(&mut self, svid: Arc<Svid>, now: Now, jitter: Jitter) {
        let half = svid.remaining(now.wall).mul_f64(0.5 * jitter.renewal);
        self.phase = Phase::Held {
            renew_at: now.wall + half.max(MIN_SPACING),
        };
        self.svid = Some(svid);
        self.failing = None;
        self.ended(now.mono + MIN_SPACING);
    }

    /// Notes a failure; the next attempt follows after a growing pause.
    pub(crate) fn failed(&mut self, reason: Arc<str>, retry: Retry, now: Now, jitter: Jitter) {
        let before = self.failing.take();
        let (since, attempts) =
            before.map_or((now.mono, 0), |failing| (failing.since, failing.attempts));
        let mut pause = back_off(attempts).mul_f64(jitter.back_off);
        if let Some(svid) = self.svid.as_ref().filter(|svid| svid.is_valid_at(now.wall)) {
            pause = pause.min(svid.remaining(now.wall).max(MIN_SPACING));
        }
        let spacing = match retry {
            Retry::Soon => MIN_SPACING,
            Retry::After(wait) => wait.clamp(MIN_SPACING, MAX_BACK_OFF),
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

    fn ended(&mut self, earliest: Instant) {
        self.earliest = earliest;
        self.used.store(false, Ordering::Relaxed);
        self.outcomes.send_replace(());
    }
}

/// Random factors, so that what was fetched together is not renewed together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Jitter {
    /// 0.9 to 1.1.
    pub(crate) renewal: f64,
    /// 0.8 to 1.2.
    pub(crate) back_off: f64,
}

impl Jitter {
    pub(crate) fn random() -> Self {
        Self {
            renewal: 0.9 + 0.2 * rand::random::<f64>(),
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
const MAX_BACK_OFF: Duration = Duration::from_secs(150);
/// After so many failures in a row, an identity that nobody asked for again is dropped.
const UNUSED_ATTEMPTS: u32 = 8;
