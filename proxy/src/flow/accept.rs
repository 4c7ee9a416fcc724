//! The accept loop that all three listeners of a pod share.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::{JoinError, JoinSet},
    time::{Instant, sleep, timeout_at},
};

use super::{Pod, Stop};
use crate::{
    budget::{Held, Owner, Pressure, Relief, pressure},
    listen,
    relay::Socket,
    telemetry::{Attempt, Limit, Reason, Reporter, SocketGuard},
};

/// Accepts until `stop` asks it not to, runs `handle` for each connection in a task of its own,
/// and ends when all of them have, or at once when `stop` forces it.
pub(super) async fn serve<H, F>(
    pod: Arc<Pod>,
    listener: Arc<TcpListener>,
    reporter: Reporter,
    stop: Stop,
    handle: H,
) where
    H: Fn(Arc<Pod>, TcpStream, SocketAddr) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut flows = JoinSet::new();
    let ended = Arc::new(Ended::default());
    loop {
        tokio::select! {
            biased; // stopping goes before accepting
            () = stop.accept.cancelled() => break,
            () = ended.some.notified() => reap(&mut flows),
            accepted = next(&pod, &listener, flows.len()) => {
                let Some((socket, peer)) = accepted else { continue };
                if pod.is_to_blame() {
                    refuse(&pod, reporter, socket, peer);
                    continue;
                }
                let counted = pod.shared().traffic.socket(reporter);
                let held = pod.share().hold(Owner::Flow);
                let flow = handle(Arc::clone(&pod), socket, peer);
                let end = End(Arc::clone(&ended));
                flows.spawn(Counted { flow, _counted: counted, _held: held, _end: end });
            }
        }
    }
    tokio::select! {
        biased;
        () = stop.force.cancelled() => {}
        () = run_dry(&listener, |socket, peer| {
            flows.spawn(handle(Arc::clone(&pod), socket, peer));
        }) => {}
    }
    drop(listener);
    tokio::select! {
        biased;
        () = stop.force.cancelled() => {}
        () = finish(&mut flows) => {}
    }
    flows.shutdown().await;
}

/// Why a pod gets nothing new.
#[derive(Debug, thiserror::Error)]
#[error("memory is short, and this pod holds most of it")]
pub(super) struct Greedy;

/// Resets a connection, and tells of it.
fn refuse(pod: &Pod, reporter: Reporter, socket: TcpStream, peer: SocketAddr) {
    let attempt = Attempt {
        reporter,
        source: peer,
        destination: None,
    };
    let traffic = &pod.shared().traffic;
    traffic.reject(attempt, Reason::Overloaded, &Greedy);
    drop(Socket::new(socket));
}

/// The next connection. `None` if nothing is to be accepted for now beside so many that are open: what comes waits in the
/// listener's queue.
///
/// # Cancel safety
/// Nothing is lost when the future is dropped.
async fn next(pod: &Pod, listener: &TcpListener, open: usize) -> Option<(TcpStream, SocketAddr)> {
    let pause = match pressure() {
        Pressure::Calm => Duration::ZERO,
        Pressure::Tight => SLOW,
        Pressure::Critical => SLOWER,
    };
    if !pause.is_zero() {
        Relief::AcceptSlowed.count(1);
        sleep(pause).await;
    }
    let descriptors = &pod.shared().descriptors;
    if descriptors.is_short() {
        pod.hits(Limit::Descriptors);
    } else if pod.has_room(open) {
        let (socket, peer) = listen::accept(listener).await;
        descriptors.note(&socket);
        if !descriptors.is_exhausted() {
            return Some((socket, peer));
        }
        // It came long after the look above, as one may to every listener.
        pod.hits(Limit::Descriptors);
        drop(Socket::new(socket));
    }
    sleep(PAUSE).await;
    None
}

/// Accepts what is on its way to a listener that is about to close: what its queue holds when it
/// closes is reset. New connections go to the successor from here on, if there is one.
async fn run_dry(listener: &TcpListener, mut take: impl FnMut(TcpStream, SocketAddr)) {
    if let Err(error) = listen::prefer_successor(listener) {
        tracing::debug!(%error, "cannot point new connections to a successor");
    }
    let latest = Instant::now() + LONGEST_DRY;
    loop {
        let until = latest.min(Instant::now() + QUIET);
        match timeout_at(until, listen::accept(listener)).await {
            Ok((socket, peer)) => take(socket, peer),
            Err(_) => return,
        }
    }
}

/// Pause before each connection of a listener while memory is short: five hundred in a second, then fifty.
const SLOW: Duration = Duration::from_millis(2);
const SLOWER: Duration = Duration::from_millis(20);
/// How long nothing is accepted once there is no room.
const PAUSE: Duration = Duration::from_millis(100);
/// A queue into which nothing comes for this long is dry: handshakes under way are done by then.
const QUIET: Duration = Duration::from_millis(100);
/// How long connections may keep coming before the listener closes all the same.
const LONGEST_DRY: Duration = Duration::from_millis(500);

/// Flows of a listener that have ended. What is left of them waits in the set of tasks until some have: one that woke the
/// listener's task each time would cost every short connection two wake-ups, of which the second is on another processor.
#[derive(Default)]
struct Ended {
    count: AtomicUsize,
    some: Notify,
}

/// Flows that end before what is left of them is taken away.
const REAPED: usize = 8;

/// Counts the end of a flow when it is dropped.
struct End(Arc<Ended>);

impl Drop for End {
    fn drop(&mut self) {
        let before = self.0.count.fetch_add(1, Ordering::Relaxed);
        if before % REAPED == REAPED - 1 {
            self.0.some.notify_one();
        }
    }
}

/// Takes away what is left of flows that have ended, without asking to be woken by the others.
fn reap(flows: &mut JoinSet<()>) {
    while let Some(end) = flows.try_join_next() {
        tell_panic(end);
    }
}

async fn finish(flows: &mut JoinSet<()>) {
    while let Some(end) = flows.join_next().await {
        tell_panic(end);
    }
}

/// A panic ends its flow only, and is told.
pub(super) fn tell_panic(end: Result<(), JoinError>) {
    if let Err(error) = end
        && error.is_panic()
    {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "a flow ended by a panic"
        );
    }
}

pin_project! {
    /// A flow with the count of its socket. An `async` block in its place would hold the flow twice.
    struct Counted<F> {
        #[pin]
        flow: F,
        _counted: SocketGuard,
        _held: Held,
        _end: End,
    }
}

impl<F: Future<Output = ()>> Future for Counted<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.project().flow.poll(cx)
    }
}
