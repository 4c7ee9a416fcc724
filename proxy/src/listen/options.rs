//! The options that every socket of the data plane carries.

use std::{io, net::IpAddr};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use super::netns::Netns;
use crate::config::Sockets;

/// Creates a non-blocking TCP socket inside `netns`: the only step that must happen there.
pub(super) fn tcp_socket(netns: &Netns, domain: Domain) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    netns.enter(|| Socket::new_raw(domain, kind, Some(Protocol::TCP)))?
}

/// The mark that tells the redirection rules which packets are the proxy's own. It must be there
/// before the socket sends or is sent anything.
pub(super) fn set_mark(socket: &Socket, sockets: &Sockets) -> io::Result<()> {
    sockets.mark.map_or(Ok(()), |mark| socket.set_mark(mark))
}

/// Keepalive and user timeout; without them a half-open connection would be held for ever.
pub(super) fn set_liveness(socket: &Socket, sockets: &Sockets) -> io::Result<()> {
    if let Some(keepalive) = sockets.keepalive {
        let probes = TcpKeepalive::new()
            .with_time(keepalive.time)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.retries);
        socket.set_tcp_keepalive(&probes)?;
    }
    if sockets.user_timeout.is_some() {
        socket.set_tcp_user_timeout(sockets.user_timeout)?;
    }
    Ok(())
}

/// Lets the socket use an address that is not one of the namespace's own.
///
/// This implies what `IP_FREEBIND` allows (the kernel tests both with one predicate), and unlike
/// that option lets the connection be routed; so it stands alone.
pub(super) fn set_transparent(socket: &Socket, address: IpAddr) -> io::Result<()> {
    let socket = SockRef::from(socket);
    match address {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true),
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true),
    }
}
