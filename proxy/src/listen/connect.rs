//! Connections from inside a pod: to its application, or out into the network.

use std::{
    error::Error,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use nix::libc;
use socket2::{Domain, Socket};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tracing::warn;

use super::{
    netns::Netns,
    options::{set_liveness, set_mark, set_transparent, tcp_socket},
    ports::{PortLease, Range, SourcePorts},
    throttle::Throttle,
};
use crate::{
    config::{OriginalSource, Sockets},
    telemetry::Reason,
};

/// The address that the other side of a new connection sees.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum LocalAddress<'a> {
    /// The pod's own, chosen by routing.
    Any,
    /// That of the client on whose behalf the connection is made. Taken as [`Self::Any`] if it is
    /// the destination itself (a pod that calls itself) or of the other address family.
    Client {
        /// The client's address.
        ip: IpAddr,
        /// The ports in use in this pod.
        ports: &'a SourcePorts,
    },
}

/// An established connection, and the source port that it occupies.
#[derive(Debug)]
#[non_exhaustive]
pub struct Upstream {
    /// The connection.
    pub stream: TcpStream,
    /// To be dropped after the stream is closed; `None` if the kernel chose the port.
    pub port: Option<PortLease>,
}

/// A connection could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No answer within the limit: typically packets are dropped on the way.
    #[error("no answer from {to} within {limit:?}")]
    Timeout {
        /// The destination.
        to: SocketAddr,
        /// How long it was given.
        limit: Duration,
    },
    /// The destination, or the way to it, said no.
    #[error("cannot connect to {to}")]
    Connect {
        /// The destination.
        to: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket could not be prepared: our fault, or that of the pod's namespace.
    #[error("cannot prepare a socket towards {to}")]
    Prepare {
        /// The destination.
        to: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What descriptors are left is not spent on traffic.
    #[error("no descriptor is left for a connection to {to}; raise the limit of open files")]
    NoDescriptors {
        /// The destination.
        to: SocketAddr,
    },
    /// Every source port of this client towards this destination is in use.
    #[error("all source ports of {client} towards {to} are in use")]
    PortsExhausted {
        /// The client.
        client: IpAddr,
        /// The destination.
        to: SocketAddr,
    },
}

impl ConnectError {
    /// Whether the destination or the way to it is at fault, and not what this side has left.
    #[must_use]
    pub const fn is_of_destination(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Connect { .. } => true,
            Self::Prepare { .. } | Self::NoDescriptors { .. } | Self::PortsExhausted { .. } => {
                false
            }
        }
    }

    /// What metrics and logs call this failure.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Timeout { .. } => Reason::ConnectTimeout,
            Self::Connect { .. } => Reason::ConnectRefused,
            Self::Prepare { .. } | Self::NoDescriptors { .. } | Self::PortsExhausted { .. } => {
                Reason::NoSocket
            }
        }
    }
}

/// Connects to `to` from inside `netns`, within `sockets.connect_timeout` all told.
///
/// # Errors
/// [`ConnectError`].
/// # Cancel safety
/// Dropping the future closes the socket and frees its port.
pub async fn connect(
    netns: &Netns,
    sockets: &Sockets,
    to: SocketAddr,
    from: LocalAddress<'_>,
) -> Result<Upstream, ConnectError> {
    let attempt = Attempt { netns, sockets, to };
    let limit = sockets.connect_timeout;
    let connected = timeout(limit, async {
        match from {
            LocalAddress::Client { ip, ports } if attempt.suits(ip) => {
                attempt.on_behalf_of(ip, ports).await
            }
            LocalAddress::Any | LocalAddress::Client { .. } => attempt.as_the_pod().await,
        }
    });
    connected
        .await
        .unwrap_or(Err(ConnectError::Timeout { to, limit }))
}

#[derive(Clone, Copy)]
struct Attempt<'a> {
    netns: &'a Netns,
    sockets: &'a Sockets,
    to: SocketAddr,
}

impl Attempt<'_> {
    fn suits(&self, client: IpAddr) -> bool {
        client != self.to.ip() && client.is_ipv4() == self.to.is_ipv4()
    }

    async fn as_the_pod(&self) -> Result<Upstream, ConnectError> {
        let socket = self.socket().map_err(|e| self.unprepared(e))?;
        let stream = finish(socket, self.to).await.map_err(|e| self.refused(e))?;
        Ok(Upstream { stream, port: None })
    }

    /// Typically one `bind` and one `connect`. A port held by a listener fails at the first; a
    /// tuple that the kernel still remembers (`TIME_WAIT`, or of a proxy we are replacing) fails
    /// at the second and takes a new socket.
    async fn on_behalf_of(
        &self,
        client: IpAddr,
        ports: &SourcePorts,
    ) -> Result<Upstream, ConnectError> {
        let mut refusal = None;
        for round in 0..MAX_ROUNDS {
            let socket = self.socket().map_err(|e| self.unprepared(e))?;
            if let Err(error) = set_transparent(&socket, client) {
                return self.without_address_of(client, error).await;
            }
            let range = if round < PREFERRED_ROUNDS {
                Range::Preferred
            } else {
                Range::Extension
            };
            let lease = self.bind(&socket, client, ports, range)?;
            match finish(socket, self.to).await {
                Ok(stream) => {
                    let port = Some(lease);
                    return Ok(Upstream { stream, port });
                }
                Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
                    lease.refused();
                    refusal = Some(error);
                }
                Err(error) => return Err(self.refused(error)),
            }
        }
        Err(refusal.map_or(
            ConnectError::PortsExhausted {
                client,
                to: self.to,
            },
            |error| self.refused(error),
        ))
    }

    /// Binds to a free port of the client.
    fn bind(
        &self,
        socket: &Socket,
        client: IpAddr,
        ports: &SourcePorts,
        range: Range,
    ) -> Result<PortLease, ConnectError> {
        let to = self.to;
        // The same port may serve other destinations, and other clients' addresses.
        socket
            .set_reuse_address(true)
            .map_err(|e| self.unprepared(e))?;
        for _ in 0..MAX_BINDS {
            let lease = ports
                .take(client, to, range)
                .ok_or(ConnectError::PortsExhausted { client, to })?;
            match socket.bind(&SocketAddr::new(client, lease.port()).into()) {
                Ok(()) => return Ok(lease),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(self.unprepared(error)),
            }
        }
        Err(ConnectError::PortsExhausted { client, to })
    }

    /// Transparency was there when the pod's listeners were made and is not any more.
    async fn without_address_of(
        &self,
        client: IpAddr,
        error: io::Error,
    ) -> Result<Upstream, ConnectError> {
        static TOLD: Throttle = Throttle::new();
        if self.sockets.original_source == OriginalSource::Required {
            return Err(self.unprepared(error));
        }
        if TOLD.admits() {
            warn!(
                %client,
                error = &error as &dyn Error,
                "the application sees the address of the pod instead of its client's"
            );
        }
        self.as_the_pod().await
    }

    fn socket(&self) -> io::Result<Socket> {
        let socket = tcp_socket(self.netns, Domain::for_address(self.to))?;
        set_mark(&socket, self.sockets)?;
        socket.set_tcp_nodelay(true)?;
        set_liveness(&socket, self.sockets)?;
        Ok(socket)
    }

    fn unprepared(&self, source: io::Error) -> ConnectError {
        let to = self.to;
        ConnectError::Prepare { to, source }
    }

    fn refused(&self, source: io::Error) -> ConnectError {
        let to = self.to;
        ConnectError::Connect { to, source }
    }
}

async fn finish(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    TcpSocket::from_std_stream(socket.into()).connect(to).await
}

/// Sockets spent on one connection before it is given up; the later ones look below 10240.
const MAX_ROUNDS: u32 = 16;
/// Ports of the preferred range tried, at places far from each other: when these are all
/// remembered, most of the range is.
const PREFERRED_ROUNDS: u32 = 4;
/// Ports tried per socket while listeners hold them.
const MAX_BINDS: u32 = 64;

#[cfg(test)]
mod tests;
