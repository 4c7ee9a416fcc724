//! The outbound decision as a value, and how its last part, an address, is put in.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use cert_agent::SpiffeId;
use rand::{Rng, seq::IndexedRandom};

use super::{
    Authority, HBONE_PORT, Refusal,
    upstream::{Place, Upstream, place},
};
use crate::mesh::{Destination, Protocol, Service, Workload};

/// The decision.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Outbound {
    /// Plain TCP to what was dialled: nobody in the mesh owns it, or its service wants it so (O8).
    Passthrough {
        /// The dialled address.
        to: SocketAddr,
        /// The service that asked for it, if one did.
        service: Option<Arc<Service>>,
    },
    /// Plain TCP to a workload that does not speak HBONE (O12).
    Direct {
        /// Workload address and target port.
        to: SocketAddr,
        /// The workload.
        workload: Arc<Workload>,
        /// The service that was dialled, if one was.
        service: Option<Arc<Service>>,
    },
    /// One HBONE tunnel (O4b, O10, O11).
    Hbone(Hop),
    /// A tunnel within a tunnel, through a gateway of another network (O4a, O9).
    Nested {
        /// To the gateway.
        outer: Hop,
        /// What runs inside.
        inner: InnerHop,
    },
    /// The next hop has a host name only: resolve it, then ask [`Lookup::resolved`].
    Resolve(Lookup),
    /// Close the connection.
    Refuse(Refusal),
}

impl Outbound {
    /// What nobody told, and might lead elsewhere if somebody did: the owner of the dialled address, in the
    /// network of the source, or a waypoint or gateway.
    #[must_use]
    pub fn missing(&self, source: &Workload) -> Option<Destination> {
        match self {
            Self::Passthrough { to, service: None } => Some(Destination::Address {
                network: Arc::clone(source.network()),
                ip: to.ip(),
            }),
            Self::Refuse(refusal) => refusal.missing().cloned(),
            Self::Passthrough {
                service: Some(_), ..
            }
            | Self::Direct { .. }
            | Self::Hbone(_)
            | Self::Nested { .. }
            | Self::Resolve(_) => None,
        }
    }
}

/// One HBONE tunnel.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Hop {
    /// Where to connect.
    pub to: SocketAddr,
    /// What to ask for.
    pub authority: Authority,
    /// Identities of which the server must have one; sorted, without duplicates, so that two
    /// equal expectations compare equal.
    pub expected: Arc<[SpiffeId]>,
    /// Who is dialled.
    pub workload: Arc<Workload>,
    /// The service the application dialled, if it dialled one.
    pub service: Option<Arc<Service>>,
    /// In which role the workload is dialled.
    pub via: Via,
}

/// In which role a hop is dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Via {
    /// As the target itself.
    Workload,
    /// As the waypoint of a service or workload.
    Waypoint,
    /// As the gateway to another network.
    Gateway,
}

/// The tunnel inside the one to a gateway.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct InnerHop {
    /// Service host name and port, as in the outer tunnel.
    pub authority: Authority,
    /// Identities of which the far end must have one: those that the service of the chosen hop lists.
    pub expected: Arc<[SpiffeId]>,
    /// The workload chosen on the other network; usually stands for all of them.
    pub workload: Arc<Workload>,
    /// The service the application dialled.
    pub service: Arc<Service>,
}

/// A decision that lacks nothing but the address of a host name.
#[derive(Debug, Clone)]
pub struct Lookup(Box<Unplaced>);

#[derive(Debug, Clone)]
struct Unplaced {
    hostname: Arc<str>,
    near: IpAddr,
    leg: Leg,
}

impl Lookup {
    /// The name to resolve, with the proxy's own resolver.
    #[must_use]
    pub fn hostname(&self) -> &Arc<str> {
        &self.0.hostname
    }

    /// The workload that is known by that name only.
    #[must_use]
    pub fn workload(&self) -> &Arc<Workload> {
        &self.0.leg.workload
    }

    /// Completes the decision with what the name resolved to: a random address of the family that
    /// was dialled, else a random one of the others, else a refusal.
    #[must_use]
    pub fn resolved(self, addresses: &[IpAddr], rng: &mut impl Rng) -> Outbound {
        let Unplaced { near, leg, .. } = *self.0;
        let mut usable: Vec<IpAddr> = addresses.iter().map(IpAddr::to_canonical).collect();
        if usable.iter().any(|ip| ip.is_ipv4() == near.is_ipv4()) {
            usable.retain(|ip| ip.is_ipv4() == near.is_ipv4());
        }
        match usable.choose(rng) {
            Some(ip) => leg.land(*ip),
            None => Outbound::Refuse(leg.unresolved()),
        }
    }

    /// The refusal if the name cannot be resolved.
    #[must_use]
    pub fn unresolved(&self) -> Refusal {
        self.0.leg.unresolved()
    }
}

/// A next hop that lacks its address.
#[derive(Debug, Clone)]
pub(super) struct Leg {
    workload: Arc<Workload>,
    port: u16,
    /// The service the application dialled.
    service: Option<Arc<Service>>,
    way: Way,
}

#[derive(Debug, Clone)]
enum Way {
    Plain,
    /// A tunnel to the target itself, whose address becomes the authority.
    Target(Arc<[SpiffeId]>),
    Waypoint(Authority, Arc<[SpiffeId]>),
    Gateway(Arc<[SpiffeId]>, InnerHop),
}

impl Leg {
    /// The target itself, in a tunnel if it speaks HBONE (O11, O12).
    pub(super) fn target(next: &Upstream<'_>) -> Self {
        let way = match next.workload.protocol() {
            Protocol::Hbone => Way::Target(expected(Some(next.workload), next.service)),
            Protocol::Tcp => Way::Plain,
        };
        Self::new(next, next.service, way)
    }

    /// A waypoint, asked for what the application dialled.
    pub(super) fn waypoint(
        next: &Upstream<'_>,
        dialled: SocketAddr,
        service: Option<&Arc<Service>>,
    ) -> Self {
        let expected = expected(Some(next.workload), next.service);
        let way = Way::Waypoint(Authority::Address(dialled), expected);
        Self::new(next, service, way)
    }

    /// A gateway, with the tunnel to run inside.
    pub(super) fn gateway(next: &Upstream<'_>, inner: InnerHop) -> Self {
        let service = Arc::clone(&inner.service);
        let expected = expected(Some(next.workload), next.service);
        Self::new(next, Some(&service), Way::Gateway(expected, inner))
    }

    fn new(next: &Upstream<'_>, service: Option<&Arc<Service>>, way: Way) -> Self {
        Self {
            workload: Arc::clone(next.workload),
            port: next.port,
            service: service.cloned(),
            way,
        }
    }

    fn unresolved(&self) -> Refusal {
        Refusal::Unresolved(self.workload.uid().into())
    }

    /// Puts the address in, or asks for a look-up of the host name.
    pub(super) fn place(self, next: &Upstream<'_>) -> Result<Outbound, Refusal> {
        match place(
            next.workload,
            next.service.map(|service| &**service),
            next.near,
        ) {
            Place::At(ip) => Ok(self.land(ip)),
            Place::Named(hostname) => Ok(Outbound::Resolve(Lookup(Box::new(Unplaced {
                hostname: Arc::clone(hostname),
                near: next.near,
                leg: self,
            })))),
            Place::Nowhere => Err(no_way_to(next.workload)),
        }
    }

    fn land(self, ip: IpAddr) -> Outbound {
        let Self {
            workload,
            port,
            service,
            way,
        } = self;
        let address = SocketAddr::new(ip, port);
        let (to, authority, expected, via, inner) = match way {
            Way::Plain => {
                return Outbound::Direct {
                    to: address,
                    workload,
                    service,
                };
            }
            Way::Target(expected) => {
                let to = SocketAddr::new(ip, HBONE_PORT);
                (
                    to,
                    Authority::Address(address),
                    expected,
                    Via::Workload,
                    None,
                )
            }
            Way::Waypoint(authority, expected) => {
                (address, authority, expected, Via::Waypoint, None)
            }
            Way::Gateway(expected, inner) => {
                let authority = inner.authority.clone();
                (address, authority, expected, Via::Gateway, Some(inner))
            }
        };
        let hop = Hop {
            to,
            authority,
            expected,
            workload,
            service,
            via,
        };
        match inner {
            None => Outbound::Hbone(hop),
            Some(inner) => Outbound::Nested { outer: hop, inner },
        }
    }
}

pub(super) fn no_way_to(workload: &Workload) -> Refusal {
    Refusal::NoValidDestination(workload.uid().into())
}

/// The identities of which the server must have one: those that the service of the hop lists, and
/// the workload's own. Sorted and unique.
pub(super) fn expected(
    workload: Option<&Workload>,
    service: Option<&Arc<Service>>,
) -> Arc<[SpiffeId]> {
    let listed = service.map_or(&[][..], |service| service.identities());
    let own = workload.and_then(Workload::identity);
    match (own, listed) {
        (Some(own), []) => Arc::new([own.clone()]), // the common case takes one allocation
        _ => {
            let mut all: Vec<SpiffeId> = listed.iter().chain(own).cloned().collect();
            all.sort_unstable();
            all.dedup();
            all.into()
        }
    }
}
