//! The one connection that all calls share.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tonic::transport::Channel;

use super::Connect;
use crate::error_text::chain_text;

/// Opens a connection when one is needed, and lets it go when it failed or nobody needs it any longer.
pub(super) struct Connection<C> {
    connect: C,
    held: Held,
    /// Taken while connecting, so that those who come meanwhile use the same connection, or fail with it; if the one who
    /// connects gives up, the next one does.
    connecting: tokio::sync::Mutex<()>,
    failures: Mutex<Failures>,
    /// The task that lets the held connection go.
    release: Mutex<JoinSet<()>>,
}

/// Attempts to connect that failed.
#[derive(Default)]
struct Failures {
    count: u64,
    /// The last one, with its causes.
    last: Arc<str>,
}

type Held = Arc<Mutex<Option<Arc<Open>>>>;

/// An open connection. Those who use it hold clones.
struct Open {
    channel: Channel,
    used: Mutex<Instant>,
}

impl<C: Connect> Connection<C> {
    pub(super) fn new(connect: C) -> Self {
        Self {
            connect,
            held: Held::default(),
            connecting: tokio::sync::Mutex::default(),
            failures: Mutex::default(),
            release: Mutex::default(),
        }
    }

    pub(super) fn connect(&self) -> &C {
        &self.connect
    }

    /// The connection, opened first if there is none, or if a new one would be another.
    ///
    /// # Errors
    /// Why there is none, causes included. All who wait for one attempt share its failure: one after the other, each
    /// would wait for those before it as well.
    /// # Cancel safety
    /// An unfinished connection is closed.
    pub(super) async fn lease(&self) -> Result<Lease, Arc<str>> {
        let failures = self.failures.lock().count;
        let _connecting = self.connecting.lock().await;
        let held = self.held.lock().clone();
        let old = match held {
            Some(open) if self.connect.is_current().await => return Ok(self.lend(open, true)),
            old => old,
        };
        {
            let now = self.failures.lock();
            if old.is_none() && now.count != failures {
                return Err(Arc::clone(&now.last));
            }
        }
        match (self.connect.connect().await, old) {
            (Ok(channel), _) => Ok(self.lend(self.hold(channel), false)),
            (Err(error), Some(open)) => {
                tracing::warn!(
                    error = &*error as &dyn std::error::Error,
                    "no new connection to the certificate authority; the old one is used on"
                );
                Ok(self.lend(open, true))
            }
            (Err(error), None) => Err(self.failed(&*error)),
        }
    }

    fn failed(&self, error: &(dyn std::error::Error + 'static)) -> Arc<str> {
        let text = Arc::from(chain_text(error));
        let mut failures = self.failures.lock();
        failures.count += 1;
        failures.last = Arc::clone(&text);
        text
    }

    fn hold(&self, channel: Channel) -> Arc<Open> {
        let used = Mutex::new(Instant::now());
        let open = Arc::new(Open { channel, used });
        *self.held.lock() = Some(Arc::clone(&open));
        let mut release = JoinSet::new();
        release.spawn(let_go_when_idle(Arc::clone(&self.held)));
        *self.release.lock() = release;
        open
    }

    fn lend(&self, open: Arc<Open>, reused: bool) -> Lease {
        Lease {
            open,
            held: Arc::clone(&self.held),
            reused,
            proved: false,
        }
    }
}

impl<C> fmt::Debug for Connection<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("open", &self.held.lock().is_some())
            .finish_non_exhaustive()
    }
}

/// The connection for one call. Unless the call proved that it works, also when the call was given up, nobody else gets
/// it after this: one that lost its way answers nobody.
pub(super) struct Lease {
    open: Arc<Open>,
    held: Held,
    reused: bool,
    proved: bool,
}

impl Lease {
    pub(super) fn channel(&self) -> Channel {
        self.open.channel.clone()
    }

    /// Whether an earlier call had made it.
    pub(super) fn is_reused(&self) -> bool {
        self.reused
    }

    /// The server has answered.
    pub(super) fn proved(&mut self) {
        self.proved = true;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self.open.used.lock() = Instant::now();
        let mut held = self.held.lock();
        let mine = |open: &Arc<Open>| Arc::ptr_eq(open, &self.open);
        if !self.proved && held.as_ref().is_some_and(mine) {
            *held = None;
        }
    }
}

/// Ends when the connection has been let go, by itself or by others.
async fn let_go_when_idle(held: Held) {
    loop {
        let idle_at = match held.lock().as_ref() {
            Some(open) if Arc::strong_count(open) > 1 => Instant::now() + IDLE,
            Some(open) => *open.used.lock() + IDLE,
            None => return,
        };
        if idle_at <= Instant::now() {
            held.lock().take();
            return;
        }
        sleep_until(idle_at).await;
    }
}

/// Renewals of several identities often come close together.
const IDLE: Duration = Duration::from_secs(90);
