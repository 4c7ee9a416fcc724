//! One HBONE connection seen from its server.

use std::{
    fmt,
    future::poll_fn,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use h2::{
    RecvStream,
    server::{Builder, Connection, SendResponse},
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::{JoinError, JoinSet},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    cut::Cut,
    error::{Malformed, ServeError, is_hangup},
    flood::{Flood, KEPT_RESETS, Watch},
    frames::Refusals,
    headers::{self, Baggage, TraceParent},
    keepalive::Keepalive,
    queue::{Queued, SEND_BUFFER, small_frames},
    stream::Stream,
    turn::{Turn, Turnwise, turnwise},
    window::Window,
};
use crate::{
    budget::{Pressure, pressure},
    config,
    telemetry::Limit,
};

/// What a client says before its first frame (RFC 9113 §3.4).
const PREFACE_BYTES: usize = 24;

/// How often the streams of a dead connection look whether memory is short.
const LOOK: Duration = Duration::from_secs(1);

/// How long a dying connection may take to say so.
const FAREWELL: Duration = Duration::from_secs(1);

/// A CONNECT whose method and authority are in order.
#[derive(Debug)]
pub struct Connect {
    authority: Box<str>,
    headers: HeaderMap,
}

impl Connect {
    /// `address:port` or `host:port`.
    #[must_use]
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// What the source says about itself.
    #[must_use]
    pub fn baggage(&self) -> Option<Baggage<&str>> {
        Baggage::read(&self.headers)
    }

    /// The service that the client dialled.
    #[must_use]
    pub fn forwarded_host(&self) -> Option<&str> {
        headers::forwarded_host(&self.headers)
    }

    /// The client's trace, unless absent or invalid.
    #[must_use]
    pub fn trace(&self) -> Option<TraceParent> {
        TraceParent::read(&self.headers)
    }

    /// The network of the source, if told.
    #[must_use]
    pub fn network(&self) -> Option<&str> {
        self.headers.get(headers::NETWORK)?.to_str().ok()
    }

    /// All headers.
    #[must_use]
    pub const fn headers(&self) -> &HeaderMap {
        &self.headers
    }
}

/// A stream that a client asks for.
#[derive(Debug)]
#[non_exhaustive]
pub struct Incoming {
    /// What it asks.
    pub connect: Connect,
    /// How to answer.
    pub responder: Responder,
}

/// Answers one CONNECT. Dropped without an answer, it resets the stream (`CANCEL`).
pub struct Responder {
    send: SendResponse<Queued>,
    recv: RecvStream,
}

impl fmt::Debug for Responder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Responder")
            .field(&self.send.stream_id())
            .finish()
    }
}

impl Responder {
    /// Answers 200, with `baggage` if given. Call it once the upstream connection stands.
    ///
    /// # Errors
    /// If the client gave up meanwhile.
    pub fn accept(mut self, baggage: Option<HeaderValue>) -> Result<Stream, h2::Error> {
        let mut answer = Response::new(());
        if let Some(baggage) = baggage {
            answer.headers_mut().insert(headers::BAGGAGE, baggage);
        }
        // Whom [`Self::gone`] left to be woken is the caller; what it does next with the stream would wake it in vain.
        let _ = self
            .send
            .poll_reset(&mut Context::from_waker(Waker::noop()));
        let send = self.send.send_response(answer, false)?;
        Ok(Stream::new(send, self.recv, None))
    }

    /// Answers `status` and ends the stream.
    pub fn refuse(mut self, status: StatusCode) {
        let mut answer = Response::new(());
        *answer.status_mut() = status;
        // A client that has gone needs no answer.
        let _ = self.send.send_response(answer, true);
    }

    /// Ready when the client has given up, so that dialling for it can stop.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn gone(&mut self) {
        let _ = poll_fn(|cx| self.send.poll_reset(cx)).await;
    }
}

/// What a served connection is for.
pub trait Host {
    /// Carries one CONNECT, as a task of its own.
    fn carry(&self, incoming: Incoming) -> impl Future<Output = ()> + Send + 'static;

    /// The client was turned away by a limit, which its connection outlives.
    fn limited(&self, limit: Limit) {
        let _ = limit;
    }
}

impl<H, F> Host for H
where
    H: Fn(Incoming) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    fn carry(&self, incoming: Incoming) -> impl Future<Output = ()> + Send + 'static {
        self(incoming)
    }
}

/// Serves one established session: gives each CONNECT to `host`, which carries it as a task of its
/// own until the connection or this future ends. After `stop` the client is told to go away, and
/// open streams run on until they end or this future is dropped. When `cut` fires, all is over at once.
///
/// # Errors
/// If the client breaks the protocol, floods or falls silent, or the connection is cut.
/// # Cancel safety
/// Dropping the future ends the connection and all its streams.
pub async fn serve<T, H>(
    io: T,
    config: &config::Tunnel,
    stop: CancellationToken,
    cut: Cut,
    host: H,
) -> Result<(), ServeError>
where
    T: AsyncRead + AsyncWrite + Unpin,
    H: Host,
{
    let watch = Watch::new(PREFACE_BYTES, config);
    let (io, turn) = turnwise(io, watch, Some(Refusals::new()));
    let handshake = Builder::new()
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(config.connection_window)
        .max_frame_size(config.frame_size)
        .max_concurrent_streams(config.server_max_streams)
        .max_header_list_size(config.server_max_header_bytes)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(KEPT_RESETS)
        .data_frame_budget(small_frames(config))
        .handshake(io);
    let mut connection = timeout(config.preface_timeout, handshake)
        .await
        .map_err(|_| ServeError::PrefaceTimeout(config.preface_timeout))??;
    turn.defer();
    let pings = connection.ping_pong();
    let mut serving = Serving {
        connection,
        turn,
        keepalive: pings.map(|pings| Keepalive::new(pings, config)),
        window: Window::new(config),
        streams: JoinSet::new(),
        host,
    };
    let end = tokio::select! {
        biased; // a cut connection carries nothing more
        () = cut.fired() => End::Cut,
        end = serving.run(&stop) => end,
    };
    // One that ended within a turn has said nothing of it yet.
    serving.tell_of_limits();
    let end = match end {
        End::Closed => {
            serving.turn.linger().await;
            Ok(())
        }
        End::Failed(error) => Err(error.into()),
        End::Silent => {
            say_farewell(&mut serving.connection, h2::Reason::NO_ERROR).await;
            Err(ServeError::Silent(config.ping_timeout))
        }
        End::Flooded(flood) => {
            say_farewell(&mut serving.connection, h2::Reason::ENHANCE_YOUR_CALM).await;
            Err(ServeError::Flooded(flood))
        }
        End::Cut => {
            say_farewell(&mut serving.connection, h2::Reason::NO_ERROR).await;
            Err(ServeError::Cut)
        }
    };
    let mut streams = serving.streams;
    drop((serving.connection, serving.turn));
    match &end {
        // What it sent to take memory is not kept for who may never read it.
        Err(error) if error.limit().is_some() => streams.shutdown().await,
        _ => finish(streams).await,
    }
    end
}

/// Streams of a dead connection end by themselves, after what they received is delivered: unless memory gets short, because
/// that may take an application for ever.
async fn finish(mut streams: JoinSet<()>) {
    loop {
        match timeout(LOOK, streams.join_next()).await {
            Ok(Some(ended)) => report(ended),
            Ok(None) => return,
            Err(_) if pressure() > Pressure::Calm => return streams.shutdown().await,
            Err(_) => {}
        }
    }
}

/// Polls `run` to its end, or gives `None` when `stop` fires first.
async fn poll_until<R>(
    stop: &CancellationToken,
    run: impl FnMut(&mut Context<'_>) -> Poll<R>,
) -> Option<R> {
    tokio::select! {
        biased; // a stop goes before new streams
        () = stop.cancelled() => None,
        end = poll_fn(run) => Some(end),
    }
}

/// A connection at work.
struct Serving<T, H> {
    connection: Connection<Turnwise<T>, Queued>,
    turn: Turn<T>,
    keepalive: Option<Keepalive>,
    window: Window,
    streams: JoinSet<()>,
    host: H,
}

/// Why a connection is at work no more.
enum End {
    Closed,
    Failed(h2::Error),
    Silent,
    Flooded(Flood),
    Cut,
}

impl<T, H> Serving<T, H>
where
    T: AsyncRead + AsyncWrite + Unpin,
    H: Host,
{
    /// Runs the connection to its end, a graceful one after `stop`.
    async fn run(&mut self, stop: &CancellationToken) -> End {
        let end = poll_until(stop, |cx| self.poll_run(cx)).await;
        match end {
            Some(end) => end,
            None => {
                self.connection.graceful_shutdown();
                poll_fn(|cx| self.poll_run(cx)).await
            }
        }
    }

    fn poll_run(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        ready!(self.turn.poll_begin(cx, self.streams.len()));
        while let Poll::Ready(Some(ended)) = self.streams.poll_join_next(cx) {
            report(ended);
        }
        while let Poll::Ready(accepted) = self.connection.poll_accept(cx) {
            match accepted {
                Some(Ok((request, send))) => self.take(request, send),
                // With no stream open, that is as good as an orderly end.
                Some(Err(error)) if self.streams.is_empty() && is_hangup(&error) => {
                    return Poll::Ready(End::Closed);
                }
                Some(Err(error)) => return Poll::Ready(End::Failed(error)),
                None => return Poll::Ready(End::Closed),
            }
        }
        let received = self.turn.poll_end(cx).received;
        self.tell_of_limits();
        if let Some(flood) = self.turn.flood() {
            return Poll::Ready(End::Flooded(flood));
        }
        let Some(keepalive) = &mut self.keepalive else {
            return Poll::Pending;
        };
        let dead = keepalive.poll_dead(cx, received);
        let seen = (self.streams.len(), received);
        self.window.follow(&mut self.connection, keepalive, seen);
        dead.map(|()| End::Silent)
    }

    /// Tells the host of the limits that the library has turned the client away by.
    fn tell_of_limits(&self) {
        for limit in self.turn.refusals() {
            self.host.limited(limit);
        }
    }

    fn take(&mut self, request: http::Request<RecvStream>, send: SendResponse<Queued>) {
        if let Some(incoming) = check(request, send) {
            self.streams.spawn(self.host.carry(incoming));
        }
    }
}

/// Answers what is no CONNECT to a target with 400.
fn check(request: http::Request<RecvStream>, send: SendResponse<Queued>) -> Option<Incoming> {
    let (head, recv) = request.into_parts();
    let responder = Responder { send, recv };
    match target(&head.method, &head.uri) {
        Ok(authority) => Some(Incoming {
            connect: Connect {
                authority: authority.into(),
                headers: head.headers,
            },
            responder,
        }),
        Err(error) => {
            tracing::debug!(%error, "malformed request");
            responder.refuse(StatusCode::BAD_REQUEST);
            None
        }
    }
}

fn target<'a>(method: &Method, uri: &'a Uri) -> Result<&'a str, Malformed> {
    if method != Method::CONNECT {
        return Err(Malformed::Method(method.clone()));
    }
    Ok(headers::authority(uri)?)
}

/// Tells the client why nothing more comes, if it still reads.
async fn say_farewell<T: AsyncRead + AsyncWrite + Unpin>(
    connection: &mut Connection<Turnwise<T>, Queued>,
    why: h2::Reason,
) {
    connection.abrupt_shutdown(why);
    let closed = poll_fn(|cx| connection.poll_closed(cx));
    let _ = timeout(FAREWELL, closed).await;
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a stream panicked");
    }
}
