//! Slots on a connection.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use super::{Fate, OpenError, PoolMetrics, Sender};

/// How far a connection is.
#[derive(Clone)]
pub(super) enum State {
    Opening,
    Ready(Sender),
    Failed(Arc<OpenError>),
}

/// How much a connection carries. Shared by its task, which must not hold the connection itself:
/// it closes when nobody does.
pub(super) struct Load {
    streams: AtomicUsize,
    limit: AtomicUsize,
    configured: usize,
    idle_since: Mutex<Instant>,
    /// Until when the connection counts as one that carries bulk.
    bulk_until: Mutex<Option<Instant>>,
    closing: AtomicBool,
    cut: AtomicBool,
    opening: OnceLock<Opening>,
    metrics: PoolMetrics,
}

/// When a connection came to be.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::exhaustive_structs, reason = "three moments")]
pub struct Opening {
    /// The dial began.
    pub began: Instant,
    /// TCP was there.
    pub connected: Instant,
    /// TLS was there.
    pub shaken: Instant,
}

impl Load {
    pub(super) fn new(limit: u16, metrics: PoolMetrics) -> Self {
        let configured = usize::from(limit).max(1);
        Self {
            streams: AtomicUsize::new(0),
            limit: AtomicUsize::new(configured),
            configured,
            idle_since: Mutex::new(Instant::now()),
            bulk_until: Mutex::new(None),
            closing: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            opening: OnceLock::new(),
            metrics,
        }
    }

    /// Notes when the connection came to be.
    pub(super) fn opened(&self, opening: Opening) {
        self.opening.get_or_init(|| opening);
    }

    /// Open streams and those about to be opened.
    pub(super) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// Takes over what the peer allows, within what we were configured to use.
    pub(super) fn limit_to(&self, peer: usize) {
        // A peer that allows none at all keeps its one stream waiting, not the pool spinning.
        let limit = peer.clamp(1, self.configured);
        self.limit.store(limit, Ordering::Relaxed);
    }

    pub(super) fn idle_since(&self) -> Instant {
        *self.idle_since.lock()
    }

    /// Notes that the connection moves much at the moment.
    pub(super) fn carry_bulk(&self, now: Instant) {
        *self.bulk_until.lock() = Some(now + BULK_LASTS);
    }

    /// Whether the connection has moved much lately.
    pub(super) fn carries_bulk(&self) -> bool {
        let until = *self.bulk_until.lock();
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Marks the connection as one that gets no more streams.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    /// Notes that the connection is cut because its peer is revoked; its streams break after this.
    pub(super) fn cut(&self) {
        self.close();
        self.cut.store(true, Ordering::Release);
    }

    pub(super) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Takes a slot if there is one. Called under the lock of the shelf.
    fn enter(&self) -> bool {
        let free = self.has_room();
        if free {
            self.streams.fetch_add(1, Ordering::Relaxed);
            self.metrics.streams().inc();
        }
        free
    }

    pub(super) fn has_room(&self) -> bool {
        let room = self.streams() < self.limit.load(Ordering::Relaxed);
        room && !self.closing.load(Ordering::Relaxed)
    }

    /// Gives a slot back if there are too many, and tells whether.
    fn leave_surplus(&self) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        let fewer = |streams| (streams > limit).then(|| streams - 1);
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        let left = self.streams.fetch_update(set, fetch, fewer).is_ok();
        if left {
            self.metrics.streams().dec();
        }
        left
    }

    fn leave(&self) {
        self.metrics.streams().dec();
        if self.streams.fetch_sub(1, Ordering::Relaxed) == 1 {
            *self.idle_since.lock() = Instant::now();
        }
    }
}

/// How long after bulk was moved a connection counts as one that carries it.
const BULK_LASTS: Duration = Duration::from_secs(1);

/// Tells bulk from what many small streams move: [`Self::CHUNK`] bytes within [`Self::TIME`], 50 MB/s.
pub(super) struct Pace {
    since: Instant,
    before: u64,
}

impl Pace {
    const CHUNK: u64 = 1 << 20;
    const TIME: Duration = Duration::from_millis(20);

    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            before: 0,
        }
    }

    /// Notes at `load` that bulk is moved, if it is; `moved` counts the bytes of the connection so far.
    pub(super) fn follow(&mut self, moved: u64, load: &Load) {
        if moved - self.before < Self::CHUNK {
            return;
        }
        let now = Instant::now();
        if now - self.since <= Self::TIME {
            load.carry_bulk(now);
        }
        (self.since, self.before) = (now, moved);
    }
}

/// A connection as the shelf and its leases hold it.
pub(super) struct Tunnel {
    pub(super) load: Arc<Load>,
    state: watch::Receiver<State>,
}

impl Tunnel {
    pub(super) const fn new(load: Arc<Load>, state: watch::Receiver<State>) -> Self {
        Self { load, state }
    }
}

/// One slot, taken. Given back when dropped.
pub(in crate::tunnel) struct Lease {
    tunnel: Arc<Tunnel>,
    /// Whether the slot was given back already.
    returned: bool,
}

impl Lease {
    /// Takes a slot of `tunnel`. Called under the lock of the shelf.
    pub(super) fn take(tunnel: &Arc<Tunnel>) -> Option<Self> {
        tunnel.load.enter().then(|| Self {
            tunnel: Arc::clone(tunnel),
            returned: false,
        })
    }

    pub(super) fn tunnel(&self) -> Arc<Tunnel> {
        Arc::clone(&self.tunnel)
    }

    pub(in crate::tunnel) fn opening(&self) -> Option<Opening> {
        self.tunnel.load.opening.get().copied()
    }

    pub(in crate::tunnel) fn fate(&self) -> Fate {
        Fate {
            shared: Some(Arc::clone(&self.tunnel.load)),
            inner: None,
        }
    }

    /// The connection, once it is open.
    pub(super) async fn sender(&self) -> Result<Sender, Arc<OpenError>> {
        let _waits = self.tunnel.load.metrics.waits();
        let mut state = self.tunnel.state.clone();
        let settled = state.wait_for(|state| !matches!(state, State::Opening));
        // The sender of the state is gone only if the task of the connection was ended.
        let state = settled.await.map(|state| state.clone());
        match state.unwrap_or_else(|_| State::Failed(Arc::new(OpenError::Closed))) {
            State::Ready(sender) => Ok(sender),
            State::Failed(error) => Err(error),
            State::Opening => Err(Arc::new(OpenError::Closed)),
        }
    }

    /// Gives the slot back if more were given out than the peer turned out to allow.
    pub(super) fn is_surplus(&mut self) -> bool {
        self.returned = self.tunnel.load.leave_surplus();
        self.returned
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.returned {
            self.tunnel.load.leave();
        }
    }
}

impl fmt::Debug for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Load({} streams)", self.streams())
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease(one of {})", self.tunnel.load.streams())
    }
}
