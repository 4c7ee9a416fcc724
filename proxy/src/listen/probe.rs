//! Whether what a pod sends is redirected to this proxy: asked of the rules themselves, by a connection.
//!
//! The rules are the CNI agent's, and of two kinds that have nothing in common but their effect; they can be lost, too, while
//! everyone believes in them. So a connection is opened inside the pod, unmarked like an application's, to an address that no host
//! has. If it is accepted, it was by a proxy in the pod. Ours knows the address ([`is_probe`]) and hangs up.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use nix::sys::socket::{getsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{net::TcpSocket, time::timeout};

use super::{netns::Netns, options::tcp_socket};

/// What becomes of the connections that a pod opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Redirection {
    /// They come to a proxy.
    Works,
    /// They leave the pod as they are, unencrypted and unjudged.
    Missing,
    /// The pod has no such address family, or cannot be entered.
    Unknown,
}

/// What a probe of one pod has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Probed {
    /// Connections to IPv4 addresses.
    pub ipv4: Redirection,
    /// Connections to IPv6 addresses.
    pub ipv6: Redirection,
    /// Largest packet in bytes, headers included, that the pod's link to the outside takes; `None` without an IPv4 route.
    pub mtu: Option<u32>,
}

impl Probed {
    /// Whether connections of this pod pass the mesh by. Rules for IPv4 alone are what a CNI agent without IPv6 makes.
    pub fn is_unprotected(&self) -> bool {
        use Redirection::{Missing, Works};
        self.ipv4 == Missing || (self.ipv6 == Missing && self.ipv4 != Works)
    }
}

/// Whether a connection to `address` is one of [`probe`]'s.
pub fn is_probe(address: SocketAddr) -> bool {
    address == TARGET_V4 || address == TARGET_V6
}

/// Opens one connection for each address family inside the pod, each for three seconds at most.
pub async fn probe(pod: &Netns) -> Probed {
    let (ipv4, ipv6) = tokio::join!(redirection(pod, TARGET_V4), redirection(pod, TARGET_V6));
    Probed {
        ipv4,
        ipv6,
        mtu: mtu(pod).ok(),
    }
}

async fn redirection(pod: &Netns, target: SocketAddr) -> Redirection {
    let sockets = route(pod, target).and_then(|_| tcp_socket(pod, Domain::for_address(target)));
    let Ok(socket) = sockets else {
        return Redirection::Unknown;
    };
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(target);
    match timeout(LIMIT, connecting).await {
        Ok(Ok(_)) => Redirection::Works,
        // Not even somebody on the way who says that there is no such host has a place in a redirected connection.
        Ok(Err(_)) | Err(_) => Redirection::Missing,
    }
}

/// A socket that holds the pod's route to `target`. Datagrams are not redirected, and none is sent.
fn route(pod: &Netns, target: SocketAddr) -> io::Result<Socket> {
    let kind = Type::DGRAM.nonblocking().cloexec();
    let domain = Domain::for_address(target);
    let socket = pod.enter(|| Socket::new_raw(domain, kind, Some(Protocol::UDP)))??;
    socket.connect(&target.into())?;
    Ok(socket)
}

/// Largest packet in bytes, headers included, on the way out of a namespace.
///
/// # Errors
/// Without an IPv4 route.
pub fn mtu(netns: &Netns) -> io::Result<u32> {
    let socket = route(netns, TARGET_V4)?;
    let mtu = getsockopt(&socket, sockopt::IpMtu)?;
    u32::try_from(mtu).map_err(io::Error::other)
}

/// Set aside for documentation (RFC 5737, RFC 3849): no host has them.
const TARGET_V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 15001);
const TARGET_V6: SocketAddr = SocketAddr::new(
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
    15001,
);
/// Long enough for a listener whose queue was full at the first attempt.
const LIMIT: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listen::{
        accept, bind, original_destination,
        testing::{fresh_netns, ports, run, sockets},
    };

    const RULES: &str = "nft add table ip t; add chain ip t o { type nat hook output priority -100; }; \
         add rule ip t o meta mark & 0xfff != 0x539 tcp dport 1-65535 redirect to :15001";

    #[tokio::test]
    async fn tells_a_pod_with_rules_from_one_without() {
        let pod = fresh_netns();
        assert_eq!(probe(&pod).await.ipv4, Redirection::Unknown);
        pod.enter(|| {
            run("ip link add eth0 mtu 1400 type veth peer name far");
            run("ip link set far up");
            run("ip addr add 10.9.9.9/24 dev eth0");
            run("ip link set eth0 up");
            run("ip route add default dev eth0");
        })
        .unwrap();
        let free = probe(&pod).await;
        assert_eq!(free.ipv4, Redirection::Missing);
        assert_eq!(free.mtu, Some(1400));
        assert!(free.is_unprotected());

        let listeners = bind(&pod, &sockets(), &ports()).unwrap();
        pod.enter(|| run(RULES)).unwrap();
        let (found, (caught, _)) = tokio::join!(probe(&pod), accept(&listeners.outbound));
        assert_eq!(found.ipv4, Redirection::Works);
        assert!(!found.is_unprotected());
        assert!(is_probe(original_destination(&caught).unwrap()));
        assert!(!is_probe("192.0.2.1:80".parse().unwrap()));
    }

    #[test]
    fn rules_for_one_family_are_enough() {
        use Redirection::{Missing, Unknown, Works};
        for (ipv4, ipv6, unprotected) in [
            (Works, Works, false),
            (Works, Missing, false),
            (Missing, Works, true),
            (Unknown, Missing, true),
            (Unknown, Works, false),
            (Unknown, Unknown, false),
        ] {
            let mtu = None;
            let probed = Probed { ipv4, ipv6, mtu };
            assert_eq!(probed.is_unprotected(), unprotected, "{probed:?}");
        }
    }
}
