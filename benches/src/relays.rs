//! Relays on loopback: plain TCP, and TCP through an HBONE client and server with real TLS.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use cert_agent::{Agent, AgentOptions, CsrSource, InProcessCa, SpiffeId, Svid};
use culvert::{
    config,
    relay::{Appetite, Buffers, Count, Endpoint, Fault, Leave, Payload, Socket, pump},
    tunnel::{Credentials, Cut, Dial, Incoming, Key, Pool, Request, accept, serve},
};
use futures_util::future::BoxFuture;
use http::HeaderValue;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    sync::oneshot,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The name of the threads that relay.
pub const THREADS: &str = "hop-worker";

/// What lies between the client and the server application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "made for its callers to list")]
pub enum Path {
    /// One relay between two sockets.
    Plain,
    /// The same, had it to copy all bytes.
    Copied,
    /// A relay into a tunnel, TLS over loopback, and a relay out of it.
    Hbone,
}

/// A running relay. Dropping it ends all its flows.
#[derive(Debug)]
pub struct Relay {
    runtime: Option<Runtime>,
    /// Where clients connect to reach the server application.
    pub address: SocketAddr,
    /// The buffers of all its flows.
    pub buffers: Buffers,
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Relay {
    /// Starts a relay with `workers` threads in front of the server application at `server`.
    #[must_use]
    pub fn start(path: Path, workers: usize, server: SocketAddr) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(workers)
            .thread_name(THREADS)
            .enable_all()
            .build()
            .unwrap();
        let buffers = Buffers::new();
        let (address_tx, address) = oneshot::channel();
        let tasks = TaskTracker::new();
        let pool = buffers.clone();
        tasks.spawn_on(run(path, server, pool, address_tx), runtime.handle());
        let address = address.blocking_recv().unwrap();
        Self {
            runtime: Some(runtime),
            address,
            buffers,
        }
    }
}

async fn run(path: Path, to: SocketAddr, buffers: Buffers, ready: oneshot::Sender<SocketAddr>) {
    let tasks = TaskTracker::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    match path {
        Path::Plain => {
            ready.send(address).unwrap();
            between_sockets(listener, to, &buffers, Socket::new).await;
        }
        Path::Copied => {
            ready.send(address).unwrap();
            let end = |socket| Opaque(Socket::new(socket));
            between_sockets(listener, to, &buffers, end).await;
        }
        Path::Hbone => {
            let [near, far] = svids().await;
            let hbone = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let destination = hbone.local_addr().unwrap();
            tasks.spawn(serve_all(hbone, far, to, buffers.clone()));
            ready.send(address).unwrap();
            let key = Key {
                source: spiffe("near"),
                expected: Arc::from([spiffe("far")]),
                destination,
                source_ip: address.ip(),
            };
            let pool = Arc::new(Pool::new(Arc::default(), Loopback(near), buffers.clone()));
            let outbound = Arc::new(Outbound { pool, key, buffers });
            loop {
                let (downstream, from) = listener.accept().await.unwrap();
                downstream.set_nodelay(true).unwrap();
                tasks.spawn(carry(Arc::clone(&outbound), downstream, from));
            }
        }
    }
}

/// Relays what `listener` accepts to `to`, both as endpoints that `end` makes.
async fn between_sockets<E: Endpoint + Unpin + Send + 'static>(
    listener: TcpListener,
    to: SocketAddr,
    buffers: &Buffers,
    end: impl Fn(TcpStream) -> E + Copy + Send + 'static,
) {
    let tasks = TaskTracker::new();
    loop {
        let (downstream, _) = listener.accept().await.unwrap();
        downstream.set_nodelay(true).unwrap();
        let buffers = buffers.clone();
        tasks.spawn(async move {
            let upstream = TcpStream::connect(to).await.unwrap();
            upstream.set_nodelay(true).unwrap();
            pump(end(downstream), end(upstream), &Uncounted, &buffers).await;
        });
    }
}

/// A socket that does not tell that it is one.
struct Opaque(Socket);

impl Endpoint for Opaque {
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        self.0.poll_readable(cx)
    }

    fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        appetite: &mut Appetite,
        buffers: &Buffers,
    ) -> Poll<Result<Option<Payload>, Fault>> {
        self.0.poll_take(cx, appetite, buffers)
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        self.0.poll_room(cx)
    }

    fn poll_put(
        &mut self,
        cx: &mut Context<'_>,
        payload: &mut Payload,
    ) -> Poll<Result<usize, Fault>> {
        self.0.poll_put(cx, payload)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        self.0.poll_finish(cx)
    }

    fn release(&mut self, bytes: usize) {
        self.0.release(bytes);
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        self.0.poll_gone(cx)
    }

    fn poll_leave(
        &mut self,
        cx: &mut Context<'_>,
        leave: Leave,
        buffers: &Buffers,
        late: bool,
    ) -> Poll<()> {
        self.0.poll_leave(cx, leave, buffers, late)
    }
}

struct Outbound {
    pool: Arc<Pool<Loopback>>,
    key: Key,
    buffers: Buffers,
}

async fn carry(outbound: Arc<Outbound>, downstream: TcpStream, from: SocketAddr) {
    let value = HeaderValue::from_static;
    let forwarded = HeaderValue::try_from(format!("for=\"{from}\"")).unwrap();
    let request = Request::new(
        "10.0.0.5:80",
        value("k8s.cluster.name=c"),
        forwarded,
        value("t"),
    );
    let opened = outbound
        .pool
        .connect(&outbound.key, &request.unwrap())
        .await;
    let stream = opened.unwrap().stream;
    pump(
        Socket::new(downstream),
        stream,
        &Uncounted,
        &outbound.buffers,
    )
    .await;
}

async fn serve_all(listener: TcpListener, svid: Arc<Svid>, to: SocketAddr, buffers: Buffers) {
    let tasks = TaskTracker::new();
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        socket.set_nodelay(true).unwrap();
        let (tls, buffers) = (svid.server_config(), buffers.clone());
        tasks.spawn(async move {
            let tls = accept(socket, tls, &buffers, Duration::from_secs(10))
                .await
                .unwrap();
            let config = config::Tunnel::default();
            let handler = |incoming: Incoming| deliver(incoming, to, buffers.clone());
            let _ = serve(
                tls,
                &config,
                CancellationToken::new(),
                Cut::never(),
                handler,
            )
            .await;
        });
    }
}

async fn deliver(incoming: Incoming, to: SocketAddr, buffers: Buffers) {
    let upstream = TcpStream::connect(to).await.unwrap();
    upstream.set_nodelay(true).unwrap();
    if let Ok(stream) = incoming.responder.accept(None) {
        pump(stream, Socket::new(upstream), &Uncounted, &buffers).await;
    }
}

struct Uncounted;

impl Count for Uncounted {
    fn received(&self, _: u64) {}
    fn sent(&self, _: u64) {}
}

/// Dials without a namespace to enter.
struct Loopback(Arc<Svid>);

impl Dial for Loopback {
    type Io = TcpStream;

    fn dial(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(async move {
            let socket = TcpStream::connect(to).await?;
            socket.set_nodelay(true)?;
            Ok(socket)
        })
    }

    fn tls<'a>(
        &'a self,
        key: &'a Key,
    ) -> BoxFuture<'a, Result<Credentials, Box<dyn std::error::Error + Send + Sync>>> {
        Box::pin(async {
            Ok(Credentials {
                config: self.0.client_config(&key.expected),
                not_after: self.0.not_after(),
                tracker: None,
            })
        })
    }
}

fn spiffe(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "bench", account).unwrap()
}

async fn svids() -> [Arc<Svid>; 2] {
    let source = Arc::new(CsrSource::new(InProcessCa::random().unwrap()));
    let agent = Agent::new(source, AgentOptions::default());
    let stop = CancellationToken::new();
    let fetch = async {
        let near = agent.svid(&spiffe("near")).await.unwrap();
        let far = agent.svid(&spiffe("far")).await.unwrap();
        stop.cancel();
        [near, far]
    };
    tokio::join!(fetch, agent.run(stop.clone())).0
}
