//! Sockets of the stand-in: TLS, HTTP/2, and the faults of a connection.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use hyper::{rt::Executor, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::{Mutex, RwLock};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tower::Service as _;

use crate::{
    raw::frames::{FrameLog, Preface, Tap},
    wait::SOON,
};

/// What the server and its handle share.
#[derive(Debug)]
pub(super) struct Wire {
    /// For connections yet to come.
    pub(super) tls: RwLock<Arc<ServerConfig>>,
    /// Closes the open connections.
    pub(super) cut: Switch,
    /// Says GOAWAY on the open connections; after this long they are closed.
    pub(super) goaway: Switch,
    pub(super) grace: Mutex<Duration>,
    pub(super) valve: Arc<Valve>,
    /// How many there were.
    pub(super) connections: AtomicU64,
    /// What clients sent on each.
    pub(super) frames: Mutex<Vec<FrameLog>>,
}

/// A signal that can be given again and again, each time to those who listen then.
#[derive(Debug, Default)]
pub(super) struct Switch(Mutex<CancellationToken>);

impl Switch {
    fn listen(&self) -> CancellationToken {
        self.0.lock().clone()
    }

    pub(super) fn flip(&self) {
        std::mem::take(&mut *self.0.lock()).cancel();
    }
}

/// What a handler learns of its connection, by way of the request's extensions.
#[derive(Debug, Clone)]
pub(super) struct Hello {
    pub(super) server_name: Option<String>,
    /// Counted from 0.
    pub(super) connection: u64,
}

/// Serves until it is dropped.
pub(super) async fn serve(listener: TcpListener, wire: Arc<Wire>, routes: Routes) {
    let mut connections = JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        connections.spawn(connection(socket, Arc::clone(&wire), routes.clone()));
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(socket: TcpStream, wire: Arc<Wire>, routes: Routes) {
    let (cut, goaway) = (wire.cut.listen(), wire.goaway.listen());
    let _ = socket.set_nodelay(true);
    let acceptor = TlsAcceptor::from(Arc::clone(&*wire.tls.read()));
    let socket = Gated {
        socket,
        valve: Arc::clone(&wire.valve),
    };
    let Ok(Ok(stream)) = timeout(SOON, acceptor.accept(socket)).await else {
        return;
    };
    let server_name = stream.get_ref().1.server_name().map(str::to_owned);
    let connection = wire.connections.fetch_add(1, Ordering::SeqCst);
    let (stream, frames) = Tap::new(stream, Preface::Expected);
    wire.frames.lock().push(frames);
    let hello = Hello {
        server_name,
        connection,
    };
    let service = service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(hello.clone());
        routes.clone().call(request)
    });
    // Dropped with the connection, so no stream outlives it.
    let tasks = Tasks::default();
    let mut serving = std::pin::pin!(
        http2::Builder::new(tasks.clone())
            .timer(TokioTimer::new())
            .initial_stream_window_size(4 * 1024 * 1024)
            .initial_connection_window_size(8 * 1024 * 1024)
            .serve_connection(TokioIo::new(stream), service)
    );
    tokio::select! {
        () = cut.cancelled() => return,
        _ = serving.as_mut() => return,
        () = goaway.cancelled() => serving.as_mut().graceful_shutdown(),
    }
    let grace = *wire.grace.lock();
    tokio::select! {
        () = cut.cancelled() => {}
        _ = serving.as_mut() => {}
        () = sleep(grace) => {}
    }
}

/// The tasks of one connection.
#[derive(Debug, Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        let mut tasks = self.0.lock();
        tasks.spawn(async move {
            task.await;
        });
        while tasks.try_join_next().is_some() {}
    }
}

/// Lets bytes of all connections through, or not.
#[derive(Debug, Default)]
pub(super) struct Valve {
    reads_shut: AtomicBool,
    writes_shut: AtomicBool,
    waiting: Mutex<Vec<Waker>>,
}

impl Valve {
    /// Opens and shuts both directions.
    pub(super) fn set(&self, reads_shut: bool, writes_shut: bool) {
        self.reads_shut.store(reads_shut, Ordering::SeqCst);
        self.writes_shut.store(writes_shut, Ordering::SeqCst);
        for waker in self.waiting.lock().drain(..) {
            waker.wake();
        }
    }

    fn pass(&self, shut: &AtomicBool, context: &Context<'_>) -> Poll<()> {
        let mut waiting = self.waiting.lock();
        if shut.load(Ordering::SeqCst) {
            waiting.push(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    fn reads(&self, context: &Context<'_>) -> Poll<()> {
        self.pass(&self.reads_shut, context)
    }

    fn writes(&self, context: &Context<'_>) -> Poll<()> {
        self.pass(&self.writes_shut, context)
    }
}

/// A socket behind a [`Valve`].
#[derive(Debug)]
struct Gated {
    socket: TcpStream,
    valve: Arc<Valve>,
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.valve.reads(context));
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for Gated {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.valve.writes(context));
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

/// Text metadata of a call.
pub(super) fn headers(metadata: &tonic::metadata::MetadataMap) -> BTreeMap<String, String> {
    let headers = metadata.as_ref().iter();
    headers
        .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())))
        .collect()
}
