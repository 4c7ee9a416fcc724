//! Proof at start that the process, and the kernel below it, can do what every pod will need.

use std::{io, net::Ipv4Addr};

use nix::{
    libc,
    sched::{CloneFlags, setns},
};
use socket2::{Domain, Socket, Type};

use super::{netns::Netns, options::set_transparent, successor::prefer_successor};
use crate::config::{OriginalSource, Sockets};

/// Something that a pod needs and that does not work here.
#[derive(Debug, thiserror::Error)]
#[error("{need}")]
#[non_exhaustive]
pub struct Shortage {
    /// What does not work.
    pub need: Need,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// What serving a pod takes. Its text says what is missing and what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Need {
    /// Namespaces are entered.
    #[error("cannot enter network namespaces; add the capability SYS_ADMIN to the container")]
    EnterNamespaces,
    /// Packets are marked with this number.
    #[error(
        "cannot mark packets with {0:#x}; add the capability NET_ADMIN (or NET_RAW on Linux 5.17 and later) to the container"
    )]
    Mark(u32),
    /// Sockets take the address of the client; without that applications see the pod's own.
    #[error(
        "cannot open transparent sockets, by which applications see the address of the client; add the capability NET_ADMIN \
         or NET_RAW to the container"
    )]
    Transparent,
    /// Two proxies listen on one port during an upgrade.
    #[error(
        "this kernel does not let two sockets share a port (SO_REUSEPORT); set INPOD_PORT_REUSE=false and upgrade without overlap"
    )]
    SharePorts,
    /// The older of two proxies points connections to the younger.
    #[error(
        "this kernel takes no program that chooses between the sockets of a port (SO_ATTACH_REUSEPORT_CBPF); connections that \
         wait while a proxy is replaced may be reset"
    )]
    Steer,
    /// Redirected connections tell where they were going.
    #[error(
        "this kernel does not tell where a redirected connection was going (SO_ORIGINAL_DST); load nf_conntrack on the node"
    )]
    OriginalDestination,
    /// There are IPv6 sockets.
    #[error("this kernel has no IPv6; set IPV6_ENABLED=false to say that this is meant")]
    Ipv6,
}

impl Need {
    /// Whether no pod could be served without it.
    #[must_use]
    pub fn is_vital(self, sockets: &Sockets) -> bool {
        match self {
            Self::EnterNamespaces | Self::Mark(_) | Self::SharePorts => true,
            Self::Transparent => sockets.original_source == OriginalSource::Required,
            // Modules may come with the agent's first rules, and the rest has a fallback.
            Self::Steer | Self::OriginalDestination | Self::Ipv6 => false,
        }
    }
}

/// Fails as the need would.
type Attempt = fn(&Sockets) -> io::Result<()>;

/// Tries what serving pods with these options takes: all that does not work.
#[must_use]
pub fn shortages(sockets: &Sockets) -> Vec<Shortage> {
    let mut needs: Vec<(Need, Attempt)> = vec![(Need::EnterNamespaces, |_| enter_own())];
    if let Some(mark) = sockets.mark {
        needs.push((Need::Mark(mark), mark_one));
    }
    if sockets.original_source != OriginalSource::Off {
        needs.push((Need::Transparent, |_| {
            set_transparent(&fresh(Domain::IPV4)?, Ipv4Addr::UNSPECIFIED.into())
        }));
    }
    if sockets.reuse_port {
        needs.push((Need::SharePorts, |_| {
            fresh(Domain::IPV4)?.set_reuse_port(true)
        }));
        needs.push((Need::Steer, |_| steer_one()));
    }
    needs.push((Need::OriginalDestination, |_| original_destination()));
    if sockets.ipv6 {
        needs.push((Need::Ipv6, |_| fresh(Domain::IPV6).map(drop)));
    }
    needs
        .into_iter()
        .filter_map(|(need, attempt)| {
            let source = attempt(sockets).err()?;
            Some(Shortage { need, source })
        })
        .collect()
}

fn fresh(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM, None)
}

fn enter_own() -> io::Result<()> {
    let own = Netns::current()?;
    Ok(setns(&*own, CloneFlags::CLONE_NEWNET)?)
}

fn mark_one(sockets: &Sockets) -> io::Result<()> {
    let socket = fresh(Domain::IPV4)?;
    sockets.mark.map_or(Ok(()), |mark| socket.set_mark(mark))
}

fn steer_one() -> io::Result<()> {
    let socket = fresh(Domain::IPV4)?;
    socket.set_reuse_port(true)?;
    prefer_successor(&socket)
}

/// A socket that was never redirected has no original destination, and the kernel says so, unless it does not know the question.
fn original_destination() -> io::Result<()> {
    match fresh(Domain::IPV4)?.original_dst_v4() {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listen::testing::sockets;

    #[test]
    fn nothing_is_short_with_the_capabilities() {
        let short = shortages(&sockets());
        assert!(short.is_empty(), "{short:?}");
    }

    #[test]
    fn the_message_names_the_capability_and_what_the_kernel_said() {
        for (need, named) in [
            (Need::EnterNamespaces, "SYS_ADMIN"),
            (Need::Mark(1337), "NET_ADMIN"),
            (Need::Transparent, "NET_RAW"),
            (Need::OriginalDestination, "nf_conntrack"),
        ] {
            assert!(need.to_string().contains(named), "{need}");
        }
        assert!(Need::Mark(1337).to_string().contains("0x539"));
    }

    #[test]
    fn transparency_is_vital_only_where_it_is_required() {
        let sockets = |original_source| Sockets {
            original_source,
            ..sockets()
        };
        assert!(!Need::Transparent.is_vital(&sockets(OriginalSource::Auto)));
        assert!(Need::Transparent.is_vital(&sockets(OriginalSource::Required)));
        assert!(Need::EnterNamespaces.is_vital(&sockets(OriginalSource::Off)));
    }
}
