//! The listening sockets of one pod.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use nix::libc;
use socket2::{Domain, Socket};
use tokio::net::TcpListener;

use super::{
    netns::Netns,
    options::{set_liveness, set_mark, set_transparent, set_tunnel_liveness, tcp_socket},
    successor::deal_to_all,
    watch::Watch,
};
use crate::config::{OriginalSource, Ports, Sockets};

/// The bound listeners of one pod. Nothing is accepted yet, but the kernel already queues.
#[derive(Debug)]
#[non_exhaustive]
pub struct PodListeners {
    /// Connections that the pod opens, redirected.
    pub outbound: Arc<TcpListener>,
    /// Plaintext connections to the pod, redirected.
    pub inbound_plaintext: Arc<TcpListener>,
    /// HBONE, addressed to the pod directly.
    pub hbone: Arc<TcpListener>,
    /// Whether upstream sockets in this pod may take the address of the client.
    pub transparent: bool,
    ports: [u16; 3],
}

impl PodListeners {
    /// Tells later which of them still listen.
    pub fn watch(&self) -> Watch {
        let [outbound, inbound_plaintext, hbone] = self.ports;
        Watch::new([
            (outbound, &self.outbound),
            (inbound_plaintext, &self.inbound_plaintext),
            (hbone, &self.hbone),
        ])
    }
}

/// A listener of a pod could not be made. The pod's other listeners are closed again.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} the listener on port {port}{hint}", hint = self.hint())]
#[non_exhaustive]
pub struct BindError {
    /// The port of the listener.
    pub port: u16,
    /// What failed.
    pub step: Step,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// The steps of making a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Entering the namespace and creating the socket.
    Create,
    /// Setting its options.
    Configure,
    /// Binding it to the port.
    Bind,
    /// Listening.
    Listen,
    /// Making it transparent, where the configuration requires that.
    MakeTransparent,
    /// Handing it to the runtime.
    Register,
}

impl BindError {
    /// What an operator can do about it.
    fn hint(&self) -> &'static str {
        if self.source.kind() == io::ErrorKind::AddrInUse {
            "; does the pod, or a proxy of another user id, use it?"
        } else {
            ""
        }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Create => "create",
            Self::Configure => "configure",
            Self::Bind => "bind",
            Self::Listen => "start",
            Self::MakeTransparent => "make transparent",
            Self::Register => "register",
        })
    }
}

/// Binds all listeners of a pod inside `netns`, without waiting for anything. Either all of them
/// listen afterwards or none exists.
///
/// Call it within the runtime that will accept: the listeners register with its event loop.
///
/// # Errors
/// [`BindError`] of the first listener that failed.
pub fn bind(netns: &Netns, sockets: &Sockets, ports: &Ports) -> Result<PodListeners, BindError> {
    let make = Make { netns, sockets };
    let (outbound, first) = make.listener(ports.outbound, Liveness::Probed)?;
    let (inbound_plaintext, second) = make.listener(ports.inbound_plaintext, Liveness::Probed)?;
    let (hbone, third) = make.listener(ports.hbone, Liveness::Tunnel)?;
    Ok(PodListeners {
        outbound: outbound.into(),
        inbound_plaintext: inbound_plaintext.into(),
        hbone: hbone.into(),
        transparent: first && second && third,
        ports: [ports.outbound, ports.inbound_plaintext, ports.hbone],
    })
}

/// Binds the SOCKS5 listener of a pod inside `netns`, on its loopback. Call it as [`bind`].
///
/// # Errors
/// [`BindError`].
pub fn bind_socks5(netns: &Netns, sockets: &Sockets, port: u16) -> Result<TcpListener, BindError> {
    let socket = tcp_socket(netns, Domain::IPV4);
    let step = Step::Create;
    let socket = socket.map_err(|source| BindError { port, step, source })?;
    let address = (Ipv4Addr::LOCALHOST, port).into();
    let (listener, _) = Make { netns, sockets }.listen(socket, address, Liveness::Probed)?;
    Ok(listener)
}

/// Who notices that the peer of an accepted connection is gone. Accepted sockets inherit
/// `SO_MARK`, `TCP_NODELAY`, keepalive and user timeout from their listener, so they are set once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Liveness {
    /// As configured for what applications see.
    Probed,
    /// As tunnels have it, beside their PINGs.
    Tunnel,
}

struct Make<'a> {
    netns: &'a Netns,
    sockets: &'a Sockets,
}

impl Make<'_> {
    /// A listener, and whether it is transparent.
    fn listener(&self, port: u16, liveness: Liveness) -> Result<(TcpListener, bool), BindError> {
        let at = |step| move |source| BindError { port, step, source };
        let (socket, address) = self.socket(port).map_err(at(Step::Create))?;
        self.listen(socket, address, liveness)
    }

    fn listen(
        &self,
        socket: Socket,
        address: SocketAddr,
        liveness: Liveness,
    ) -> Result<(TcpListener, bool), BindError> {
        let port = address.port();
        let at = |step| move |source| BindError { port, step, source };
        self.configure(&socket, address, liveness)
            .map_err(at(Step::Configure))?;
        socket.bind(&address.into()).map_err(at(Step::Bind))?;
        socket
            .listen(self.sockets.backlog)
            .map_err(at(Step::Listen))?;
        deal_to_all(&socket);
        let transparent = self
            .probe_transparency(&socket)
            .map_err(at(Step::MakeTransparent))?;
        let listener = TcpListener::from_std(socket.into()).map_err(at(Step::Register))?;
        Ok((listener, transparent))
    }

    /// One dual-stack socket; IPv4 alone where IPv6 is turned off or absent from the kernel.
    fn socket(&self, port: u16) -> io::Result<(Socket, SocketAddr)> {
        if self.sockets.ipv6 {
            match tcp_socket(self.netns, Domain::IPV6) {
                Ok(socket) => return Ok((socket, (Ipv6Addr::UNSPECIFIED, port).into())),
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                Err(error) => return Err(error),
            }
        }
        let socket = tcp_socket(self.netns, Domain::IPV4)?;
        Ok((socket, (Ipv4Addr::UNSPECIFIED, port).into()))
    }

    fn configure(&self, socket: &Socket, at: SocketAddr, liveness: Liveness) -> io::Result<()> {
        set_mark(socket, self.sockets)?;
        if at.is_ipv6() {
            // A pod may run with bindv6only=1, which would leave IPv4 uncaptured.
            socket.set_only_v6(false)?;
        }
        if self.sockets.reuse_port {
            socket.set_reuse_port(true)?;
        } else {
            // Connections of a predecessor in TIME_WAIT must not keep the port.
            socket.set_reuse_address(true)?;
        }
        socket.set_tcp_nodelay(true)?;
        match liveness {
            Liveness::Probed => set_liveness(socket, self.sockets),
            Liveness::Tunnel => set_tunnel_liveness(socket, self.sockets),
        }
    }

    /// Redirection does not need a transparent listener; that this option can be set here tells
    /// that it can be set on upstream sockets.
    fn probe_transparency(&self, socket: &Socket) -> io::Result<bool> {
        let set = || set_transparent(socket, Ipv4Addr::UNSPECIFIED.into());
        match self.sockets.original_source {
            OriginalSource::Off => Ok(false),
            OriginalSource::Auto => Ok(set().is_ok()),
            OriginalSource::Required => set().map(|()| true),
        }
    }
}

#[cfg(test)]
mod tests;
