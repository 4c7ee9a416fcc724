//! One HBONE connection seen from its client: opening it, driving it, asking it for streams.
//!
//! [`super::Pool`] shares connections, and opens those inside others.

use std::{
    fmt::Display,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use h2::client::{Builder, Connection, SendRequest};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, uri};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use super::{
    error::{ConnectError, OpenError, is_hangup},
    flood::{Flood, KEPT_RESETS, Watch},
    headers::{self, BAGGAGE, FORWARDED, NETWORK, TRACEPARENT},
    keepalive::Keepalive,
    pool::{Fate, Lease, Opening},
    queue::{Queued, SEND_BUFFER, small_frames},
    stream::Stream,
    turn::{Moved, Turn, Turnwise, turnwise},
    window::Window,
};
use crate::config;

/// Stands for "no SETTINGS yet" in `max_concurrent_send_streams`. The library replaces it by the
/// peer's limit, or by `usize::MAX` if the peer sets none.
const NO_SETTINGS: usize = usize::MAX - 1;

/// What a CONNECT says.
#[derive(Debug, Clone)]
pub struct Request {
    uri: Uri,
    headers: [(http::HeaderName, HeaderValue); 3],
    network: Option<HeaderValue>,
}

impl Request {
    /// A CONNECT to `authority` with the headers that are always sent.
    ///
    /// # Errors
    /// If `authority` is not one.
    pub fn new(
        authority: &(impl Display + ?Sized),
        baggage: HeaderValue,
        forwarded: HeaderValue,
        traceparent: HeaderValue,
    ) -> Result<Self, ConnectError> {
        let mut parts = uri::Parts::default();
        let invalid = |error: http::Error| ConnectError::Request(Arc::new(error));
        let authority = uri::Authority::try_from(headers::text(authority));
        let authority = authority.map_err(|e| invalid(e.into()))?;
        parts.authority = Some(authority);
        Ok(Self {
            uri: Uri::from_parts(parts).map_err(|e| invalid(e.into()))?,
            headers: [
                (BAGGAGE, baggage),
                (FORWARDED, forwarded),
                (TRACEPARENT, traceparent),
            ],
            network: None,
        })
    }

    /// Adds the sender's network, as the inner request of a double tunnel does.
    #[must_use]
    pub fn from_network(mut self, network: HeaderValue) -> Self {
        self.network = Some(network);
        self
    }

    fn to_http(&self) -> http::Request<()> {
        let mut request = http::Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = self.uri.clone();
        let headers = request.headers_mut();
        headers.reserve(self.headers.len() + 1);
        for (name, value) in &self.headers {
            headers.insert(name.clone(), value.clone());
        }
        if let Some(network) = &self.network {
            headers.insert(NETWORK, network.clone());
        }
        request
    }
}

/// A stream that the peer granted.
#[derive(Debug)]
#[non_exhaustive]
pub struct Answer {
    /// The bytes.
    pub stream: Stream,
    /// Headers of the 200.
    pub headers: HeaderMap,
    /// Why the stream broke, if it does.
    pub fate: Fate,
    /// When the connection below it came to be; maybe long ago.
    pub opening: Option<Opening>,
}

/// Opens HTTP/2 over an established session.
pub(super) async fn handshake<T: AsyncRead + AsyncWrite + Unpin>(
    io: T,
    config: &config::Tunnel,
) -> Result<(Sender, Driver<T>), OpenError> {
    let opening = async {
        let (io, turn) = turnwise(io, Watch::new(0, config), None);
        let (send, connection) = Builder::new()
            .enable_push(false)
            .initial_window_size(config.stream_window)
            .initial_connection_window_size(config.connection_window)
            .max_frame_size(config.frame_size)
            .max_header_list_size(config.client_max_header_bytes)
            .initial_max_send_streams(NO_SETTINGS)
            .max_send_buffer_size(SEND_BUFFER)
            .max_concurrent_reset_streams(KEPT_RESETS)
            .data_frame_budget(small_frames(config))
            .handshake(io)
            .await?;
        let mut driver = Driver::new(connection, turn, config);
        poll_fn(|cx| driver.poll_settings(cx)).await?;
        driver.turn.defer();
        Ok((
            Sender {
                send,
                answer_timeout: config.answer_timeout,
            },
            driver,
        ))
    };
    timeout(config.preface_timeout, opening)
        .await
        .map_err(|_| OpenError::SettingsTimeout(config.preface_timeout))?
}

/// Asks one connection for streams.
#[derive(Clone)]
pub struct Sender {
    send: SendRequest<Queued>,
    answer_timeout: std::time::Duration,
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

/// How far a failed request got.
pub(super) enum Failed {
    /// The connection takes no more requests; the peer never saw this one.
    Unsent(ConnectError),
    /// The peer said that it did not handle it.
    Unhandled(ConnectError),
    /// It may have been handled.
    Final(ConnectError),
}

impl Sender {
    /// Opens a stream and waits for the peer's answer.
    ///
    /// # Errors
    /// If the answer is not 200 or does not come in time, or the connection is gone.
    /// # Cancel safety
    /// Dropping the future resets this stream only.
    pub async fn connect(&self, request: &Request) -> Result<Answer, ConnectError> {
        self.request(request, None)
            .await
            .map_err(|failed| match failed {
                Failed::Unsent(error) | Failed::Unhandled(error) | Failed::Final(error) => error,
            })
    }

    pub(super) async fn request(
        &self,
        request: &Request,
        lease: Option<Lease>,
    ) -> Result<Answer, Failed> {
        let unsent = |error: h2::Error| Failed::Unsent(error.into());
        let mut send = self.send.clone();
        poll_fn(|cx| send.poll_ready(cx)).await.map_err(unsent)?;
        let (answer, sender) = send
            .send_request(request.to_http(), false)
            .map_err(unsent)?;
        drop(send);
        let answer = match timeout(self.answer_timeout, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) if is_unhandled(&error) => return Err(Failed::Unhandled(error.into())),
            Ok(Err(error)) => return Err(Failed::Final(error.into())),
            Err(_) => {
                let error = ConnectError::AnswerTimeout(self.answer_timeout);
                return Err(Failed::Final(error));
            }
        };
        if answer.status() != StatusCode::OK {
            return Err(Failed::Final(ConnectError::Refused(answer.status())));
        }
        let (head, receiver) = answer.into_parts();
        let fate = lease.as_ref().map(Lease::fate).unwrap_or_default();
        Ok(Answer {
            fate,
            opening: lease.as_ref().and_then(Lease::opening),
            stream: Stream::new(sender, receiver, lease),
            headers: head.headers,
        })
    }
}

/// The peer refused the stream, or was closing before it saw it; or it has hung up, as one does that was started anew while
/// its connections were idle. It may then have seen the request, but nothing of the application's.
fn is_unhandled(error: &h2::Error) -> bool {
    is_hangup(error)
        || error.is_remote()
            && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// The work of one client connection: frames, PINGs, windows.
pub struct Driver<T> {
    connection: Connection<Turnwise<T>, Queued>,
    turn: Turn<T>,
    keepalive: Option<Keepalive>,
    window: Window,
    /// Whether the connection has come to its orderly end.
    is_closed: bool,
}

impl<T> std::fmt::Debug for Driver<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    fn new(
        mut connection: Connection<Turnwise<T>, Queued>,
        turn: Turn<T>,
        config: &config::Tunnel,
    ) -> Self {
        let pings = connection.ping_pong();
        Self {
            connection,
            turn,
            keepalive: pings.map(|pings| Keepalive::new(pings, config)),
            window: Window::new(config),
            is_closed: false,
        }
    }

    /// Runs the connection until it is closed, by either side, or the peer stops answering.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection at once.
    pub async fn run(mut self) {
        poll_fn(|cx| self.poll_run(cx, |_, _| 1)).await;
        self.linger().await;
    }

    /// Once the connection has ended: waits a little for the peer's end, if that was an orderly one.
    pub(super) async fn linger(&self) {
        if self.is_closed {
            self.turn.linger().await;
        }
    }

    /// Streams the peer allows at once.
    pub(super) fn peer_limit(&self) -> usize {
        self.connection.max_concurrent_send_streams()
    }

    /// What the peer did too much of, if that ended the connection.
    pub(super) fn flood(&self) -> Option<Flood> {
        self.turn.flood()
    }

    /// Ready when the connection has ended. `streams` learns the peer's limit and what was moved so far, and tells
    /// how many streams are open.
    pub(super) fn poll_run(
        &mut self,
        cx: &mut Context<'_>,
        streams: impl FnOnce(usize, Moved) -> usize,
    ) -> Poll<()> {
        let open = streams(self.peer_limit(), self.turn.moved());
        ready!(self.turn.poll_begin(cx, open));
        if let Poll::Ready(end) = Pin::new(&mut self.connection).poll(cx) {
            self.is_closed = end.is_ok();
            if let Err(error) = end {
                tracing::debug!(%error, "connection ended");
            }
            return Poll::Ready(());
        }
        let moved = self.turn.poll_end(cx);
        if self.turn.flood().is_some() {
            return Poll::Ready(());
        }
        let Some(keepalive) = &mut self.keepalive else {
            return Poll::Pending;
        };
        let dead = keepalive.poll_dead(cx, moved.received);
        let seen = (open, moved.received);
        self.window.follow(&mut self.connection, keepalive, seen);
        dead
    }

    fn poll_settings(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), OpenError>> {
        let end = Pin::new(&mut self.connection).poll(cx);
        if self.peer_limit() != NO_SETTINGS {
            return Poll::Ready(Ok(()));
        }
        end.map(|end| Err(end.map_or_else(OpenError::Http2, |()| OpenError::Closed)))
    }
}

impl From<h2::Error> for OpenError {
    fn from(error: h2::Error) -> Self {
        Self::Http2(error)
    }
}
