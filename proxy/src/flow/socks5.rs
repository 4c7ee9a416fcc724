//! Connections that applications ask for by SOCKS5 (RFC 1928) at a port of the pod's loopback, where that is switched on.
//!
//! A request is answered before anything is dialled, as clients of this port expect; then the connection is one like any other that
//! the pod makes. The protocol is three short messages without authentication, less than any library for it.

#[cfg(test)]
mod tests;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::{Pod, Stop, accept, outbound};
use crate::telemetry::{Attempt, Reason, Reporter};

/// Finds addresses of names as the resolver of a pod does.
pub trait Resolve: std::fmt::Debug + Send + Sync + 'static {
    /// An IPv4 address of `name`, if it has one.
    fn ipv4<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Option<Ipv4Addr>>;
}

/// The names that requests may hold; `None` if requests with names are refused.
pub type Names = Option<Arc<dyn Resolve>>;

/// Serves the SOCKS5 listener of `pod`.
pub(super) async fn serve(pod: Arc<Pod>, listener: TcpListener, names: Names, stop: Stop) {
    let handle = move |pod, socket, peer| carry(pod, socket, peer, names.clone());
    accept::serve(pod, listener.into(), Reporter::Source, stop, handle).await;
}

async fn carry(pod: Arc<Pod>, mut downstream: TcpStream, peer: SocketAddr, names: Names) {
    let limit = pod.settings().sockets.connect_timeout;
    let negotiated = Box::pin(timeout(limit, negotiate(&mut downstream, &names))).await;
    match negotiated.unwrap_or(Err(Refused::Timeout)) {
        Ok(to) => outbound::carry_to(pod, downstream, (peer, to)).await,
        Err(refused) => {
            let attempt = Attempt {
                reporter: Reporter::Source,
                source: peer,
                destination: None,
            };
            let traffic = &pod.shared().traffic;
            traffic.reject(attempt, refused.reason(), &refused);
        }
    }
}

/// Why a client gets no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("SOCKS5: the client broke off")]
    Broken(#[from] io::Error),
    #[error("SOCKS5: no request in time")]
    Timeout,
    #[error("SOCKS5: {0}")]
    Violation(&'static str),
    #[error("SOCKS5: cannot resolve {0}")]
    Unresolved(String),
    #[error("SOCKS5: names are not served to this pod")]
    NoNames,
}

impl Refused {
    fn reason(&self) -> Reason {
        match self {
            Self::Broken(_) | Self::Timeout => Reason::ClientGone,
            Self::Violation(_) => Reason::BadRequest,
            Self::Unresolved(_) | Self::NoNames => Reason::Unresolved,
        }
    }

    /// The code of the answer; `None` if nobody would read it.
    fn code(&self) -> Option<u8> {
        match self {
            Self::Broken(_) | Self::Timeout => None,
            Self::NoNames => Some(GENERAL_FAILURE),
            Self::Unresolved(_) => Some(HOST_UNREACHABLE),
            Self::Violation(_) => Some(COMMAND_NOT_SUPPORTED),
        }
    }
}

/// Reads what the client wants, and answers. Takes no byte from the stream that comes after the request.
pub(super) async fn negotiate<T>(stream: &mut T, names: &Names) -> Result<SocketAddr, Refused>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let wanted = match request(stream).await {
        Ok((target, port)) => target.resolve(names).await.map(|ip| (ip, port).into()),
        Err(refused) => Err(refused),
    };
    let code = match &wanted {
        Ok(_) => Some(SUCCEEDED),
        Err(refused) => refused.code(),
    };
    if let Some(code) = code {
        // The bound address that belongs here is nobody's concern; the connection is not there yet.
        let answer = [VERSION, code, 0, IPV4, 0, 0, 0, 0, 0, 0];
        stream.write_all(&answer).await?;
    }
    wanted
}

/// What a client wants to reach.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Address(IpAddr),
    Name(String),
}

impl Target {
    async fn resolve(self, names: &Names) -> Result<IpAddr, Refused> {
        match (self, names) {
            (Self::Address(ip), _) => Ok(ip.to_canonical()),
            // A name in the form of an address is one.
            (Self::Name(name), names) => match (name.parse::<IpAddr>(), names) {
                (Ok(ip), _) => Ok(ip.to_canonical()),
                (Err(_), None) => Err(Refused::NoNames),
                (Err(_), Some(names)) => match names.ipv4(&name).await {
                    Some(ip) => Ok(ip.into()),
                    None => Err(Refused::Unresolved(name)),
                },
            },
        }
    }
}

/// Agrees on a method and reads the request.
async fn request<T>(stream: &mut T) -> Result<(Target, u16), Refused>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let [version, count] = read(stream).await?;
    if version != VERSION {
        return Err(Refused::Violation("another version than 5"));
    }
    let mut methods = vec![0; count.into()];
    stream.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        return Err(Refused::Violation("the client insists on authentication"));
    }
    stream.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    let [version, command, _reserved, kind] = read(stream).await?;
    if version != VERSION || command != CONNECT {
        return Err(Refused::Violation("another command than CONNECT"));
    }
    let target = match kind {
        IPV4 => Target::Address(Ipv4Addr::from(read::<4>(stream).await?).into()),
        IPV6 => Target::Address(Ipv6Addr::from(read::<16>(stream).await?).into()),
        NAME => {
            let [length] = read(stream).await?;
            let mut name = vec![0; length.into()];
            stream.read_exact(&mut name).await?;
            let name = String::from_utf8(name);
            Target::Name(name.map_err(|_| Refused::Violation("a name that is no text"))?)
        }
        _ => return Err(Refused::Violation("an address of unknown type")),
    };
    Ok((target, u16::from_be_bytes(read(stream).await?)))
}

async fn read<const COUNT: usize>(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<[u8; COUNT]> {
    let mut bytes = [0; COUNT];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;
const SUCCEEDED: u8 = 0;
const GENERAL_FAILURE: u8 = 1;
const HOST_UNREACHABLE: u8 = 4;
const COMMAND_NOT_SUPPORTED: u8 = 7;
