//! What the tests of several modules share.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "not a part of the proxy: a panic is a failed test"
)]

use std::{future::poll_fn, sync::Arc, time::Duration};

use bytes::Bytes;
use cert_agent::{Agent, AgentOptions, CsrSource, InProcessCa, SpiffeId, Svid};
use http::HeaderValue;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, duplex},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{
    Cut, Incoming,
    client::{self, Driver, Request, Sender},
    serve,
};
use crate::{
    config,
    relay::{Appetite, Buffers, Endpoint, Fault, Payload},
};

pub(super) fn request() -> Request {
    let value = HeaderValue::from_static;
    Request::new(
        "10.0.0.5:80",
        value(""),
        value("for=\"1.2.3.4:5\""),
        value("t"),
    )
    .unwrap()
}

pub(super) fn spiffe(name: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "test", name).unwrap()
}

/// Certificates of several identities under one root.
pub(super) async fn svids(names: &[&str]) -> Vec<Arc<Svid>> {
    let source = Arc::new(CsrSource::new(InProcessCa::random().unwrap()));
    let agent = Agent::new(source, AgentOptions::default());
    let stop = CancellationToken::new();
    let fetch = async {
        let mut held = Vec::new();
        for name in names {
            held.push(agent.svid(&spiffe(name)).await.unwrap());
        }
        stop.cancel();
        held
    };
    tokio::join!(fetch, agent.run(stop.clone())).0
}

/// Tasks that end with the test.
#[derive(Default)]
pub(super) struct Tasks(Mutex<JoinSet<()>>);

impl Tasks {
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.lock().spawn(task);
    }

    /// How many have ended since this was last asked.
    pub(super) fn ended(&self) -> usize {
        let mut tasks = self.0.lock();
        std::iter::from_fn(|| tasks.try_join_next()).count()
    }
}

/// Serves `io` with `handler` in a task.
pub(super) fn serve_in<T, H, F>(tasks: &Tasks, io: T, stop: &CancellationToken, handler: H)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Incoming) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let stop = stop.clone();
    tasks.spawn(async move {
        let _ = serve(io, &config::Tunnel::default(), stop, Cut::never(), handler).await;
    });
}

/// A client connection without TLS, driven in a task.
pub(super) async fn client(tasks: &Tasks, io: DuplexStream) -> Sender {
    let (sender, driver): (_, Driver<_>) = client::handshake(io, &config::Tunnel::default())
        .await
        .unwrap();
    tasks.spawn(driver.run());
    sender
}

/// A client connection, and a server that runs `handler`.
pub(super) async fn connected<H, F>(tasks: &Tasks, stop: &CancellationToken, handler: H) -> Sender
where
    H: Fn(Incoming) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (near, far) = duplex(64 << 10);
    serve_in(tasks, far, stop, handler);
    client(tasks, near).await
}

/// Accepts and sends everything back.
pub(super) async fn echo(incoming: Incoming) {
    let Ok(mut stream) = incoming.responder.accept(None) else {
        return;
    };
    while let Ok(Some(bytes)) = take(&mut stream).await {
        put(&mut stream, bytes).await;
    }
    let _ = finish(&mut stream).await;
}

pub(super) async fn take(stream: &mut impl Endpoint) -> Result<Option<Bytes>, Fault> {
    let (mut appetite, buffers) = (Appetite::default(), Buffers::new());
    let taken = poll_fn(|cx| stream.poll_take(cx, &mut appetite, &buffers)).await?;
    let bytes = taken.map(|mut payload| {
        let count = bytes::Buf::remaining(&payload);
        bytes::Buf::copy_to_bytes(&mut payload, count)
    });
    if let Some(bytes) = &bytes {
        stream.release(bytes.len());
    }
    Ok(bytes)
}

pub(super) async fn put(stream: &mut impl Endpoint, bytes: impl Into<Bytes>) {
    let mut payload = Payload::Shared(bytes.into());
    while bytes::Buf::has_remaining(&payload) {
        let sent = poll_fn(|cx| {
            std::task::ready!(stream.poll_room(cx))?;
            stream.poll_put(cx, &mut payload)
        });
        if sent.await.is_err() {
            return;
        }
    }
}

pub(super) async fn finish(stream: &mut impl Endpoint) -> Result<(), Fault> {
    poll_fn(|cx| stream.poll_finish(cx)).await
}

/// Fails instead of hanging.
pub(super) async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), what)
        .await
        .expect("happens soon")
}
