//! TCP below TLS, and HTTP/2 above it.

use std::{
    future::ready,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::Uri;
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::oneshot,
};
use tonic::transport::{Channel, Endpoint};
use tower::{ServiceExt as _, service_fn};

use super::{ConnectError, Target};

/// Looks up the host and connects to the first of its addresses that answers; IPv4 and IPv6 race.
pub(super) async fn dial(uri: &Uri) -> Result<TcpStream, ConnectError> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(TCP_LIMIT));
    connector.set_tcp_user_timeout(Some(SILENCE_LIMIT));
    connector.set_keepalive(Some(KEEPALIVE_IDLE));
    connector.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    connector.set_keepalive_retries(Some(KEEPALIVE_PROBES));
    match connector.oneshot(uri.clone()).await {
        Ok(stream) => Ok(stream.into_inner()),
        Err(error) => Err(ConnectError::Tcp {
            uri: uri.clone(),
            source: error.into(),
        }),
    }
}

/// Starts HTTP/2 and waits for the server to speak: `hyper` by itself calls a connection ready that nobody answers.
pub(super) async fn over<S>(stream: S, target: &Target) -> Result<Channel, ConnectError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (heard_tx, heard_rx) = oneshot::channel();
    let stream = Listening {
        stream,
        heard: Some(heard_tx),
    };
    // The channel would connect again by itself, with roots and a name check of the past.
    let mut only = Some(TokioIo::new(stream));
    let once = service_fn(move |_| {
        let ended = || io::Error::new(io::ErrorKind::NotConnected, "the connection has ended");
        ready(only.take().ok_or_else(ended))
    });
    let uri = &target.uri;
    let mut endpoint = Endpoint::from(uri.clone())
        .keep_alive_timeout(PING_LIMIT)
        // istiod takes offence at any ping of a connection without a request.
        .keep_alive_while_idle(false);
    if let Some(interval) = target.ping_interval {
        endpoint = endpoint.http2_keep_alive_interval(interval);
    }
    let channel = endpoint
        .connect_with_connector(once)
        .await
        .map_err(|source| ConnectError::Http2 {
            uri: uri.clone(),
            source,
        })?;
    match heard_rx.await {
        Ok(()) => Ok(channel),
        Err(_) => Err(ConnectError::Closed { uri: uri.clone() }),
    }
}

/// Tells when the peer first said something; dropped untold with the stream.
struct Listening<S> {
    stream: S,
    heard: Option<oneshot::Sender<()>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Listening<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before
            && let Some(heard) = self.heard.take()
        {
            // Nobody waits any more if the attempt was given up.
            let _ = heard.send(());
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Listening<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// For TCP alone, shared by the addresses of the host.
const TCP_LIMIT: Duration = Duration::from_secs(5);
/// For what we sent to be acknowledged, by TCP: the kernel by itself tries for a quarter of an hour, with ever longer pauses.
const SILENCE_LIMIT: Duration = Duration::from_secs(20);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(300);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(75);
const KEEPALIVE_PROBES: u32 = 9;
const PING_LIMIT: Duration = Duration::from_secs(10);
