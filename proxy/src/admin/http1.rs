//! The server that the endpoints share.

use std::{
    collections::{HashMap, hash_map::Entry},
    convert::Infallible,
    error::Error,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use serde::Serialize;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

pub(super) const JSON: &str = "application/json";

/// The body of every answer.
pub(super) type Body = UnsyncBoxBody<Bytes, fmt::Error>;

/// Listens on `port` of every address: IPv6 and IPv4 in one socket, or IPv4 alone.
///
/// # Errors
/// What the operating system says.
pub fn bind(port: u16, ipv6: bool) -> io::Result<TcpListener> {
    let any = if ipv6 {
        IpAddr::from(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::from(Ipv4Addr::UNSPECIFIED)
    };
    listen(SocketAddr::new(any, port))
}

/// Listens on `port` of loopback: IPv4, and IPv6 where the system has it. Nobody outside of this network namespace gets here.
///
/// # Errors
/// What the operating system says. That there is no IPv6 is none.
pub fn bind_loopback(port: u16, ipv6: bool) -> io::Result<Vec<TcpListener>> {
    let mut listeners = vec![listen((Ipv4Addr::LOCALHOST, port).into())?];
    if ipv6 {
        match listen((Ipv6Addr::LOCALHOST, port).into()) {
            Ok(listener) => listeners.push(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            Err(error) if error.raw_os_error() == Some(NO_FAMILY) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(listeners)
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(address.ip().is_loopback())?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Answers requests with `handler` until `stop` fires, then lets those in flight end.
///
/// # Cancel safety
/// Dropping the future closes all connections.
pub(super) async fn serve<H, F>(listener: TcpListener, handler: H, stop: CancellationToken)
where
    H: Fn(&Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let handler = Arc::new(handler);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let crowd = Arc::new(Crowd::default());
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased; // stopping goes before accepting
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            ((stream, client), slot) = accept(&listener, &slots) => {
                let Some(guest) = crowd.admit(client.ip()) else {
                    tracing::debug!(%client, "connection refused: too many from this address");
                    continue;
                };
                let (handler, stop) = (Arc::clone(&handler), stop.clone());
                connections.spawn(async move {
                    let _held = (slot, guest);
                    connection(stream, handler, stop).await;
                });
            }
        }
    }
    drop(listener);
    let finished = async { while connections.join_next().await.is_some() {} };
    if timeout(STOP_LIMIT, finished).await.is_err() {
        connections.shutdown().await;
    }
}

/// A text answer.
pub(super) fn text(status: StatusCode, text: String) -> Response<Body> {
    let mut response = empty(status);
    *response.body_mut() = full(Bytes::from(text));
    let plain = HeaderValue::from_static("text/plain");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

/// A small document.
pub(super) fn json(document: &impl Serialize) -> Response<Body> {
    match serde_json::to_string_pretty(document) {
        Ok(body) => {
            let mut response = text(StatusCode::OK, body + "\n");
            let content_type = HeaderValue::from_static(JSON);
            response.headers_mut().insert(CONTENT_TYPE, content_type);
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// An answer of bytes, without content type.
pub(super) fn bytes(bytes: Bytes) -> Response<Body> {
    Response::new(full(bytes))
}

/// An answer without body and content type.
pub(super) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(full(Bytes::new()));
    *response.status_mut() = status;
    response
}

fn full(bytes: Bytes) -> Body {
    Full::new(bytes)
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// Takes a slot, then a connection. An error of `accept` is that connection's, or means that the
/// process has no descriptors left: waiting a little serves both.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> ((TcpStream, SocketAddr), Option<OwnedSemaphorePermit>) {
    let slot = Arc::clone(slots).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok(accepted) => return (accepted, slot),
            Err(error) => {
                tracing::debug!(error = &error as &dyn Error, "accept failed");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Who is connected, so that one address does not take all slots.
#[derive(Debug, Default)]
struct Crowd(Mutex<HashMap<IpAddr, usize>>);

/// One connection of an address.
#[derive(Debug)]
struct Guest {
    crowd: Arc<Crowd>,
    address: IpAddr,
}

impl Crowd {
    /// Lets one more in, unless there are [`MAX_FROM_ONE`].
    fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Guest> {
        let address = address.to_canonical();
        let mut crowd = self.0.lock();
        let present = crowd.entry(address).or_default();
        (*present < MAX_FROM_ONE).then(|| {
            *present += 1;
            Guest {
                crowd: Arc::clone(self),
                address,
            }
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut crowd = self.crowd.0.lock();
        if let Entry::Occupied(mut present) = crowd.entry(self.address) {
            *present.get_mut() -= 1;
            if *present.get() == 0 {
                present.remove();
            }
        }
    }
}

async fn connection<H, F>(stream: TcpStream, handler: Arc<H>, stop: CancellationToken)
where
    H: Fn(&Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let socket = SockRef::from(&stream);
    let options = socket.set_tcp_nodelay(true);
    let options = options.and_then(|()| socket.set_tcp_user_timeout(Some(STALL_LIMIT)));
    if let Err(error) = options {
        tracing::debug!(error = &error as &dyn Error, "socket options failed");
    }
    let service = service_fn(|request| {
        let response = handler(&request);
        async move { Ok::<_, Infallible>(response.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .half_close(true)
        .max_buf_size(READ_BUFFER_BYTES)
        .header_read_timeout(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let whole = async {
        tokio::select! {
            biased; // an answer that is ready goes out before the connection is told to end
            ended = connection.as_mut() => return ended,
            () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        connection.as_mut().await
    };
    match timeout(CONNECTION_LIMIT, whole).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::debug!(error = &error as &dyn Error, "connection ended");
        }
        Err(_) => tracing::debug!("connection cut: it lasted too long"),
    }
}

/// The system knows no IPv6 (`EAFNOSUPPORT`).
const NO_FAMILY: i32 = nix::libc::EAFNOSUPPORT;
/// Listen backlog.
const BACKLOG: i32 = 128;
/// Connections served at a time; more wait in the backlog.
const MAX_CONNECTIONS: usize = 128;
/// Of these, how many one address gets.
const MAX_FROM_ONE: usize = 64;
/// How long a client may take nothing of what it is sent.
const STALL_LIMIT: Duration = Duration::from_secs(15);
/// Read buffer of a connection, and so the longest request head.
const READ_BUFFER_BYTES: usize = 8 << 10;
/// Longest wait for a complete request head; idle connections end after the same time.
const HEAD_LIMIT: Duration = Duration::from_secs(2);
/// Longest life of a connection, more than the longest profile takes.
const CONNECTION_LIMIT: Duration = Duration::from_secs(330);
/// How long a stop waits for requests in flight.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_gets_its_share_and_others_theirs() {
        let crowd = Arc::new(Crowd::default());
        let (greedy, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let guests: Vec<_> = (0..MAX_FROM_ONE)
            .filter_map(|_| crowd.admit(greedy))
            .collect();
        assert_eq!(guests.len(), MAX_FROM_ONE);
        let mapped = Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped();
        assert!(crowd.admit(greedy).is_none() && crowd.admit(mapped.into()).is_none());
        assert!(crowd.admit(other).is_some());
        drop(guests);
        assert!(crowd.0.lock().is_empty());
        assert!(crowd.admit(greedy).is_some());
    }
}
