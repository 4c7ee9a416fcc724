//! The options that every socket of the data plane carries.

use std::{io, net::IpAddr, time::Duration};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::TcpStream;

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

/// Has the kernel notice that the host at the other end of a connection that is to carry a tunnel is gone.
///
/// # Errors
/// If the kernel refuses an option.
pub fn watch_peer(stream: &TcpStream, sockets: &Sockets) -> io::Result<()> {
    set_tunnel_liveness(&SockRef::from(stream), sockets)
}

/// Has the kernel notice that the host at the other end of a tunnel is gone: when it has acknowledged nothing for
/// `sockets.tunnel_timeout`, be it data or the probes of an idle connection. This wakes nobody up.
///
/// An end that is alive but says nothing is left to PINGs, which are slower to give up. Only one that has not even read for
/// that long, so that its window is full, counts as gone too; that never happens to tunnels between proxies that work, since
/// they read whatever their streams are doing.
pub(super) fn set_tunnel_liveness(socket: &Socket, sockets: &Sockets) -> io::Result<()> {
    let Some(timeout) = sockets.tunnel_timeout else {
        return Ok(());
    };
    socket.set_tcp_user_timeout(Some(timeout))?;
    if sockets.keepalive.is_some() {
        // The user timeout ends the probing; their number is that of the time that is left.
        let probes = TcpKeepalive::new()
            .with_time(timeout / 2)
            .with_interval((timeout / 4).max(Duration::from_secs(1)))
            .with_retries(2);
        socket.set_tcp_keepalive(&probes)?;
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
