//! The sockets of the DNS proxy: listening ones on a pod's loopback, and those that ask its upstreams.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, UdpSocket};

use super::{
    bind::{BindError, Step},
    netns::Netns,
    options::{set_mark, tcp_socket},
    successor::deal_to_all,
};
use crate::config::{DnsCapture, Sockets};

/// The bound sockets of one address.
#[derive(Debug)]
#[non_exhaustive]
pub struct DnsSockets {
    /// Datagrams.
    pub udp: UdpSocket,
    /// Connections.
    pub tcp: TcpListener,
}

/// Binds the DNS sockets of a pod inside `netns`: one pair for each address. An address of IPv6 that the pod does not have
/// is left out; nothing is bound where names are not captured.
///
/// Call it within the runtime that will serve.
///
/// # Errors
/// [`BindError`] of the first socket that failed; none exists then.
pub fn bind_dns(
    netns: &Netns,
    sockets: &Sockets,
    capture: &DnsCapture,
) -> Result<Vec<DnsSockets>, BindError> {
    let addresses: Vec<SocketAddr> = match capture {
        DnsCapture::Off => Vec::new(),
        DnsCapture::At(address) => vec![*address],
        DnsCapture::Loopback(port) => {
            let v6 = sockets.ipv6.then_some(IpAddr::from(Ipv6Addr::LOCALHOST));
            let all = [Some(Ipv4Addr::LOCALHOST.into()), v6];
            all.into_iter()
                .flatten()
                .map(|ip| (ip, *port).into())
                .collect()
        }
    };
    let mut bound = Vec::with_capacity(addresses.len());
    for address in addresses {
        match pair(netns, sockets, address) {
            Ok(pair) => bound.push(pair),
            Err(error) if address.is_ipv6() && is_absent(&error.source) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bound)
}

/// A socket inside `netns` that talks to `server` alone, from a port that the kernel draws.
///
/// # Errors
/// If it cannot be made, or there is no route to the server.
pub async fn dns_client(
    netns: &Netns,
    sockets: &Sockets,
    server: SocketAddr,
) -> io::Result<UdpSocket> {
    let socket = udp_socket(netns, Domain::for_address(server))?;
    set_mark(&socket, sockets)?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(server).await?;
    Ok(socket)
}

fn pair(netns: &Netns, sockets: &Sockets, address: SocketAddr) -> Result<DnsSockets, BindError> {
    let port = address.port();
    let at = |step| move |source| BindError { port, step, source };
    let domain = Domain::for_address(address);
    let prepared = |socket: Socket| {
        let configure = || {
            set_mark(&socket, sockets)?;
            if sockets.reuse_port {
                socket.set_reuse_port(true)
            } else {
                socket.set_reuse_address(true)
            }
        };
        configure().map_err(at(Step::Configure))?;
        socket.bind(&address.into()).map_err(at(Step::Bind))?;
        Ok(socket)
    };
    let tcp = prepared(tcp_socket(netns, domain).map_err(at(Step::Create))?)?;
    tcp.listen(sockets.backlog).map_err(at(Step::Listen))?;
    let udp = prepared(udp_socket(netns, domain).map_err(at(Step::Create))?)?;
    deal_to_all(&tcp);
    deal_to_all(&udp);
    Ok(DnsSockets {
        udp: UdpSocket::from_std(udp.into()).map_err(at(Step::Register))?,
        tcp: TcpListener::from_std(tcp.into()).map_err(at(Step::Register))?,
    })
}

fn udp_socket(netns: &Netns, domain: Domain) -> io::Result<Socket> {
    let kind = Type::DGRAM.nonblocking().cloexec();
    netns.enter(|| Socket::new_raw(domain, kind, Some(Protocol::UDP)))?
}

/// Whether the pod has no IPv6, or none on its loopback.
fn is_absent(error: &io::Error) -> bool {
    let absent = [libc::EAFNOSUPPORT, libc::EADDRNOTAVAIL];
    error
        .raw_os_error()
        .is_some_and(|code| absent.contains(&code))
}
