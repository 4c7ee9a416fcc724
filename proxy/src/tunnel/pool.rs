//! The HBONE connections of one captured pod, shared by its flows.
//!
//! A flow takes a lease on a connection before it asks for a stream and gives it back when the
//! stream is gone. Leases are counted under the lock that guards the map, also on connections that
//! are still being opened, so that no burst overshoots the limit and flows for one key wait for
//! the same attempt: it succeeds or fails once for all of them. A connection that carries bulk gets no
//! new streams while another one has room, or a few of its key can still be opened.

mod lease;
mod metrics;
mod nested;
mod shelf;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    future::poll_fn,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use cert_agent::{SpiffeId, Tracker};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use rustls::ClientConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    pin, select,
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};

pub(super) use self::lease::Lease;
pub use self::lease::Opening;
pub use self::metrics::PoolMetrics;
pub use self::nested::Nested;
use self::{
    lease::{Load, Pace, State, Tunnel},
    shelf::Shelf,
};
use super::{
    age::Retirement,
    client::{self, Answer, Driver, Failed, Request, Sender},
    cut::Cut,
    error::{ConnectError, OpenError},
    tls,
};
use crate::{
    budget::{Pressure, Relief, pressure},
    config,
    relay::Buffers,
    telemetry::{Reporter, Step},
};

/// Connections that a request tries before it gives up: more than a chain of closing ones.
const TRIES: usize = 4;

/// How long a connection is kept idle beside another one of its key that has room: what a burst
/// opened goes soon after it.
const SPARE_RELEASE: Duration = Duration::from_secs(10);

/// How long a connection is kept idle while memory is very short.
const SHORT_RELEASE: Duration = Duration::from_secs(1);

/// What makes two requests share a connection: all of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_structs, reason = "a plain record, built by `flow`")]
pub struct Key {
    /// Who asks.
    pub source: SpiffeId,
    /// Who may answer; sorted and without duplicates, so that equal sets are equal keys.
    pub expected: Arc<[SpiffeId]>,
    /// Where the peer listens.
    pub destination: SocketAddr,
    /// The pod's own address.
    pub source_ip: IpAddr,
}

/// What the pool needs from the room above to open a connection; not asked while one is shared.
pub trait Dial: Send + Sync + 'static {
    /// The transport.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Connects to `to` from inside the pod. Has its own time limit; a timeout is told apart by
    /// [`io::ErrorKind::TimedOut`].
    fn dial(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<Self::Io>>;

    /// How `key.source` speaks TLS now, with peers of `key.expected`.
    fn tls<'a>(
        &'a self,
        key: &'a Key,
    ) -> BoxFuture<'a, Result<Credentials, Box<dyn std::error::Error + Send + Sync>>>;
}

/// What a connection proves its identity with.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "a plain record, built by `flow`")]
pub struct Credentials {
    /// Presents the certificate.
    pub config: Arc<ClientConfig>,
    /// The end of the certificate.
    pub not_after: SystemTime,
    /// Has the peer's certificates checked while the connection lives.
    pub tracker: Option<Tracker>,
}

/// What became of the connections below a stream: a shared one, and one inside that.
#[derive(Debug, Clone, Default)]
pub struct Fate {
    shared: Option<Arc<Load>>,
    inner: Option<Arc<Load>>,
}

impl Fate {
    /// Whether one of them was cut because the peer's certificate is revoked.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        let each = [&self.shared, &self.inner];
        each.into_iter().flatten().any(|load| load.is_cut())
    }

    /// That of a stream on a connection inside.
    fn and(self, inner: Arc<Load>) -> Self {
        Self {
            inner: Some(inner),
            ..self
        }
    }
}

/// The pool of one pod. Dropping it ends all its connections and the streams on them.
pub struct Pool<D> {
    shelf: Arc<Shelf>,
    dial: Arc<D>,
    config: Arc<config::Tunnel>,
    buffers: Buffers,
    tasks: Mutex<JoinSet<()>>,
    metrics: PoolMetrics,
}

impl<D> fmt::Debug for Pool<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("connections", &self.connections())
            .finish_non_exhaustive()
    }
}

impl<D> Pool<D> {
    /// Connections held, those being opened included.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shelf.len()
    }

    /// Lets go of all connections: each closes with GOAWAY when its last stream ends.
    pub fn release(&self) {
        self.shelf.clear();
    }
}

impl<D: Dial> Pool<D> {
    /// An empty pool.
    pub fn new(config: Arc<config::Tunnel>, dial: D, buffers: Buffers) -> Self {
        Self {
            shelf: Arc::new(Shelf::new()),
            dial: Arc::new(dial),
            config,
            buffers,
            tasks: Mutex::new(JoinSet::new()),
            metrics: PoolMetrics::default(),
        }
    }

    /// The same pool, counted in `metrics`.
    #[must_use]
    pub fn counted(self, metrics: PoolMetrics) -> Self {
        Self { metrics, ..self }
    }

    /// Opens a stream on a connection of `key`, which is opened if there is none with room.
    /// A request that its peer never handled is tried again on another connection.
    ///
    /// # Errors
    /// If no connection can be opened, or the answer is not 200 or does not come in time.
    /// # Cancel safety
    /// Dropping the future resets this stream only; a connection being opened goes on for others.
    pub async fn connect(&self, key: &Key, request: &Request) -> Result<Answer, ConnectError> {
        // Boxed: the steps need a kilobyte that the flow need not hold while it relays.
        Box::pin(self.try_connect(key, request)).await
    }

    async fn try_connect(&self, key: &Key, request: &Request) -> Result<Answer, ConnectError> {
        let mut refused = 0;
        let mut tries = 0;
        loop {
            let mut lease = self.lease(key);
            let sender = lease.sender().await?;
            if lease.is_surplus() {
                continue;
            }
            let tunnel = lease.tunnel();
            let error = match sender.request(request, Some(lease)).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::Final(error)) => return Err(error),
                Err(Failed::Unsent(error)) => error,
                Err(Failed::Unhandled(error)) => {
                    refused += 1;
                    error
                }
            };
            self.shelf.forget(key, &tunnel);
            tries += 1;
            if refused > 1 || tries >= TRIES {
                return Err(error);
            }
        }
    }

    /// A slot on a connection that has one, or on a new one.
    fn lease(&self, key: &Key) -> Lease {
        self.shelf.lease(key, || {
            let (opened, state) = watch::channel(State::Opening);
            let load = Arc::new(Load::new(
                self.config.pool_max_streams,
                self.metrics.clone(),
            ));
            let task = Task {
                key: key.clone(),
                shelf: Arc::clone(&self.shelf),
                dial: Arc::clone(&self.dial),
                config: Arc::clone(&self.config),
                buffers: self.buffers.clone(),
                load: Arc::clone(&load),
                metrics: self.metrics.clone(),
            };
            self.spawn(task.run(opened));
            Arc::new(Tunnel::new(load, state))
        })
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        while let Some(ended) = tasks.try_join_next() {
            if let Err(error) = ended {
                tracing::error!(%error, "a tunnel ended abnormally");
            }
        }
        tasks.spawn(task);
    }
}

/// Opens one connection and drives it to its end.
struct Task<D> {
    key: Key,
    shelf: Arc<Shelf>,
    dial: Arc<D>,
    config: Arc<config::Tunnel>,
    buffers: Buffers,
    load: Arc<Load>,
    metrics: PoolMetrics,
}

impl<D> Drop for Task<D> {
    /// However this ends, by a panic too, nobody may be sent to a connection that is none.
    fn drop(&mut self) {
        self.shelf.remove(&self.key, &self.load);
    }
}

/// What ends a connection that works.
struct Ends {
    age: Retirement,
    cut: Cut,
}

impl<D: Dial> Task<D> {
    async fn run(self, opened: watch::Sender<State>) {
        let _connection = self.metrics.connection();
        match Box::pin(self.open()).await {
            Ok((sender, driver, ends)) => {
                self.load.limit_to(driver.peer_limit());
                opened.send_replace(State::Ready(sender));
                // The state now lives as long as the shelf or a lease holds it.
                drop(opened);
                let driver = self.drive(driver, ends).await;
                // Nobody waits for a stream of what has ended.
                self.shelf.remove(&self.key, &self.load);
                Box::pin(driver.linger()).await;
            }
            Err(error) => {
                // First off the shelf: who comes later starts a new attempt.
                self.shelf.remove(&self.key, &self.load);
                opened.send_replace(State::Failed(Arc::new(error)));
            }
        }
    }

    async fn open(&self) -> Result<(Sender, Driver<TlsIo<D>>, Ends), OpenError> {
        let (to, settings) = (self.key.destination, &self.config);
        let Credentials {
            config,
            not_after,
            tracker,
        } = self
            .dial
            .tls(&self.key)
            .await
            .map_err(OpenError::Identity)?;
        let dialled = Instant::now();
        let io = self.dial.dial(to).await.map_err(|source| {
            if source.kind() == io::ErrorKind::TimedOut {
                let port = to.port();
                OpenError::DialTimeout { port, source }
            } else {
                OpenError::Dial(source)
            }
        })?;
        let (limit, began) = (settings.handshake_timeout, Instant::now());
        let io = tls::connect(io, config, to.ip(), &self.buffers, limit).await?;
        let shaken = Instant::now();
        self.load.opened(Opening {
            began: dialled,
            connected: began,
            shaken,
        });
        let latencies = self.metrics.latencies();
        latencies.observe(Step::Handshake, Reporter::Source, shaken - began);
        let ends = Ends {
            age: Retirement::new(settings.max_age, not_after, io.peer_certificates()),
            cut: Cut::new(tracker, io.peer_certificates(), || {}),
        };
        let (sender, driver) = client::handshake(io, settings).await?;
        Ok((sender, driver, ends))
    }

    /// Runs the connection; once it was idle for long or has reached its age, takes it off the shelf, whereupon it closes
    /// with its last stream. Once the peer is revoked, closes it at once.
    async fn drive(
        &self,
        mut driver: Driver<TlsIo<D>>,
        Ends { age, cut }: Ends,
    ) -> Driver<TlsIo<D>> {
        let load = &self.load;
        let mut pace = Pace::new();
        let running = poll_fn(|cx| {
            driver.poll_run(cx, |limit, moved| {
                load.limit_to(limit);
                pace.follow(moved.both(), load);
                load.streams()
            })
        });
        let retiring = async {
            pin!(running);
            select! {
                () = &mut running => return,
                () = self.idle() => {}
                () = age.due() => {
                    load.close();
                    self.shelf.remove(&self.key, load);
                }
            }
            running.await;
        };
        select! {
            () = retiring => {}
            () = cut.fired() => {
                // First off the shelf, so that nobody else gets a stream that is about to break.
                load.cut();
                self.shelf.remove(&self.key, load);
            }
        }
        if let Some(flood) = driver.flood() {
            let limits = self.metrics.limits();
            limits.hit(flood.limit(), &self.key.destination);
        }
        driver
    }

    /// Ready when the connection was retired because nobody used it.
    async fn idle(&self) {
        let configured = self.config.pool_idle_release;
        let look = configured.min(SPARE_RELEASE);
        loop {
            let release = match pressure() {
                Pressure::Calm => configured,
                Pressure::Tight => configured.min(SPARE_RELEASE),
                Pressure::Critical => configured.min(SHORT_RELEASE),
            };
            let idle = self.load.idle_since().elapsed();
            let spare = release.min(look);
            if self.shelf.retire(&self.key, &self.load, release, spare) {
                let early = release < configured && idle < configured;
                Relief::TunnelClosed.count(early.into());
                return;
            }
            let due = self.load.idle_since() + release;
            let next = Instant::now() + look;
            sleep_until(if due > Instant::now() {
                due.min(next)
            } else {
                next
            })
            .await;
        }
    }
}

type TlsIo<D> = tls::Tls<<D as Dial>::Io>;
