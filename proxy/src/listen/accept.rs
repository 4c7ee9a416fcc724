//! Accepting connections, and the addresses that a redirected one carries.

use std::{
    error::Error,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use nix::libc;
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tracing::warn;

use super::throttle::Throttle;

/// The next connection and its peer's address, IPv4-mapped addresses reduced to IPv4.
///
/// Errors are not the caller's concern: a connection that broke before it was accepted is passed
/// over, and while descriptors or memory are short this tries again ten times a second, with one
/// warning per second.
///
/// # Cancel safety
/// Nothing is lost when the future is dropped; the connection stays in the listener's queue.
pub async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let (stream, peer) = persist(|| listener.accept()).await;
    (stream, canonical(peer))
}

/// Repeats `attempt` until it succeeds, at a pace that suits the error.
async fn persist<T, F: Future<Output = io::Result<T>>>(attempt: impl Fn() -> F) -> T {
    static SCARCE: Throttle = Throttle::new();
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) if concerns_one_connection(&error) => {}
            Err(error) => {
                if SCARCE.admits() {
                    let cause = &error as &dyn Error;
                    warn!(error = cause, "cannot accept connections, retrying");
                }
                sleep(RETRY).await;
            }
        }
    }
}

/// Where the client meant to go before its connection was redirected to us; the local address for
/// a connection that was not redirected.
///
/// # Errors
/// If not even the local address is known any more.
pub fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    // On a dual-stack listener each call works for its own family and fails for the other.
    let recorded = socket
        .original_dst_v4()
        .or_else(|_| socket.original_dst_v6())
        .ok()
        .and_then(|address| address.as_socket());
    recorded
        .map_or_else(|| stream.local_addr(), Ok)
        .map(canonical)
}

/// `address` with an IPv4-mapped IPv6 address (`::ffff:a.b.c.d`) reduced to IPv4, and without
/// scope and flow label.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(
        match address.ip() {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => ip.to_canonical(),
        },
        address.port(),
    )
}

/// Whether the error tells of the connection at the head of the queue, which is gone with it,
/// rather than of this process or the listener; see accept(2).
fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::ECONNRESET
                | libc::EPROTO
                | libc::EPERM
                | libc::ENETDOWN
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::EINTR
        )
    )
}

/// The pace of retries while the process lacks descriptors or memory.
const RETRY: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reduces_mapped_addresses_only() {
        for (given, expected) in [
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("[2001:db8::1]:80", "[2001:db8::1]:80"),
            ("[::1]:80", "[::1]:80"),
            ("10.0.0.1:80", "10.0.0.1:80"),
        ] {
            let given: SocketAddr = given.parse().unwrap();
            assert_eq!(canonical(given), expected.parse().unwrap());
        }
    }

    #[tokio::test]
    async fn accepts_and_reads_the_local_address_where_nothing_redirects() {
        let listener = TcpListener::bind("[::]:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for target in [
            SocketAddr::from(([127, 0, 0, 1], port)),
            SocketAddr::new("::1".parse().unwrap(), port),
        ] {
            let client = TcpStream::connect(target).await.unwrap();
            let (stream, peer) = accept(&listener).await;
            assert_eq!(peer, client.local_addr().unwrap());
            assert_eq!(original_destination(&stream).unwrap(), target);
        }
    }

    /// How long `persist` takes when each of `codes` fails one attempt.
    async fn time_to_overcome(codes: &[i32]) -> Duration {
        let before = tokio::time::Instant::now();
        let failures = std::cell::RefCell::new(codes.iter());
        persist(|| {
            let failure = failures.borrow_mut().next();
            let error = failure.map(|code| io::Error::from_raw_os_error(*code));
            std::future::ready(error.map_or(Ok(()), Err))
        })
        .await;
        before.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn waits_out_a_shortage_and_passes_over_broken_connections() {
        let shortages = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
        assert_eq!(time_to_overcome(&shortages).await, 4 * RETRY);
        let broken = [libc::ECONNABORTED, libc::EPROTO, libc::EPERM];
        assert_eq!(time_to_overcome(&broken).await, Duration::ZERO);
    }
}
