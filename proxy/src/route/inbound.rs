//! Inbound validation, I1 to I7, and the guess which service an inbound connection was for.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use super::{Authority, InboundRefusal, LoopGuard, Owner, owner, upstream::referenced};
use crate::mesh::{
    Destination, GatewayAddress, PortMap, Service, State, TargetPort, TunnelProtocol, Workload,
};

/// What is known of one CONNECT.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::exhaustive_structs, reason = "a query is built by its caller")]
pub struct InboundQuery<'a> {
    /// The pod that was reached.
    pub local: &'a Arc<Workload>,
    /// The address at which the TLS connection arrived.
    pub local_ip: IpAddr,
    /// What the peer asks for.
    pub authority: &'a Authority,
    /// `host=` of the peer's `forwarded` header.
    pub forwarded_host: Option<&'a str>,
    /// Whether application tunnels with a PROXY header go to loopback (`LOCALHOST_APP_TUNNEL`).
    pub localhost_app_tunnel: bool,
}

/// What is known of one connection to the plaintext port.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::exhaustive_structs, reason = "a query is built by its caller")]
pub struct PlaintextQuery<'a> {
    /// The pod that was reached.
    pub local: &'a Arc<Workload>,
    /// What the peer dialled.
    pub destination: SocketAddr,
}

/// Where an inbound connection is delivered.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct InboundRoute {
    /// Pod address and resolved port: what policy judges and telemetry reports.
    pub destination: SocketAddr,
    /// What to dial; differs from `destination` for application tunnels on loopback only.
    pub to: SocketAddr,
    /// From which address.
    pub from: ClientAddress,
    /// What a PROXY header in front of the bytes must name.
    pub proxy_target: Option<ProxyTarget>,
    /// The service this connection was probably meant for.
    pub service: Option<Arc<Service>>,
}

/// What a peer asked for, as a PROXY header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProxyTarget {
    /// Its address.
    pub address: SocketAddr,
    /// Host name of its service, if it belongs to one.
    pub service: Option<Arc<str>>,
}

/// The source address of the connection to the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientAddress {
    /// The peer's own, where the system allows it.
    Original,
    /// Loopback.
    Loopback,
}

/// Decides where a CONNECT is delivered: always in the local pod.
///
/// # Errors
/// [`InboundRefusal`] says why not, and with which status.
pub fn inbound(
    state: &State,
    guard: &LoopGuard,
    ask: &InboundQuery<'_>,
) -> Result<InboundRoute, InboundRefusal> {
    let local_ip = ask.local_ip.to_canonical();
    let port = match ask.authority {
        Authority::Address(address) => {
            belongs_here(state, ask.local, local_ip, address.ip())?;
            address.port()
        }
        Authority::Host { name, port } => host_port(state, ask.local, local_ip, (name, *port))?,
    };
    let tunnel = ask.local.application_tunnel();
    let final_port = tunnel.and_then(|tunnel| tunnel.port).unwrap_or(port);
    if guard.covers(port) || guard.covers(final_port) {
        return Err(InboundRefusal::Recursion); // I6, also for what an application tunnel names
    }
    let destination = SocketAddr::new(local_ip, final_port);
    let mut route = InboundRoute {
        destination,
        to: destination,
        from: ClientAddress::Original,
        proxy_target: None,
        service: guess_service(state, ask.local, ask.forwarded_host, final_port).cloned(),
    };
    if tunnel.is_some_and(|tunnel| tunnel.protocol == TunnelProtocol::Proxy) {
        route.proxy_target = Some(proxy_target(state, ask.local, ask.authority)?);
        if ask.localhost_app_tunnel {
            route.to.set_ip(loopback_like(local_ip));
            route.from = ClientAddress::Loopback;
        }
    }
    Ok(route)
}

/// Decides where a connection to the plaintext port is delivered: where it was sent.
///
/// # Errors
/// [`InboundRefusal::Recursion`] if that is a port of this proxy, on whatever address.
pub fn inbound_plaintext(
    state: &State,
    guard: &LoopGuard,
    ask: &PlaintextQuery<'_>,
) -> Result<InboundRoute, InboundRefusal> {
    let port = ask.destination.port();
    if guard.covers(port) {
        return Err(InboundRefusal::Recursion);
    }
    let destination = SocketAddr::new(ask.destination.ip().to_canonical(), port);
    Ok(InboundRoute {
        destination,
        to: destination,
        from: ClientAddress::Original,
        proxy_target: None,
        service: guess_service(state, ask.local, None, port).cloned(),
    })
}

/// The service that an inbound connection to `port` of `local` was probably meant for: of those
/// that select the pod, the one the peer names, else the first that leads to this port.
#[must_use]
pub fn guess_service<'a>(
    state: &'a State,
    local: &'a Workload,
    forwarded_host: Option<&str>,
    port: u16,
) -> Option<&'a Arc<Service>> {
    let named = forwarded_host.and_then(|host| {
        let mut services = state.services_of(local).map(|(service, _)| service);
        services.find(|service| service.is_named(host))
    });
    named.or_else(|| {
        state
            .services_of(local)
            .find(|(service, ports)| leads_to(service, ports, port))
            .map(|(service, _)| service)
    })
}

fn leads_to(service: &Service, own: &PortMap, port: u16) -> bool {
    let mut pairs = service.ports().pairs().iter().chain(own.pairs());
    pairs.any(|(_, target)| *target == port)
}

/// I2 to I4: the named address is the pod's own, or that of something the pod is a waypoint of.
fn belongs_here(
    state: &State,
    local: &Workload,
    local_ip: IpAddr,
    named: IpAddr,
) -> Result<(), InboundRefusal> {
    if named == local_ip || local.application_tunnel().is_some() {
        return Ok(());
    }
    let waypoints: Vec<&GatewayAddress> = match owner(state, local.network(), named, None) {
        Owner::Service(service) => waypoints_of(service).collect(),
        Owner::Workload(workload) => workload.waypoint().into_iter().collect(),
        Owner::Nobody => {
            let network = Arc::clone(local.network());
            return Err(InboundRefusal::IpMismatch {
                local: local_ip,
                named,
                missing: Some(Destination::Address { network, ip: named }),
            });
        }
    };
    is_among(state, local, local_ip, waypoints).map_err(|missing| InboundRefusal::IpMismatch {
        local: local_ip,
        named,
        missing,
    })
}

/// Every waypoint that the outbound side may choose, the weighted ones included.
fn waypoints_of(service: &Service) -> impl Iterator<Item = &GatewayAddress> {
    let weighted = service.weighted_waypoints().iter();
    weighted
        .filter(|weighted| weighted.weight > 0)
        .map(|weighted| &weighted.waypoint)
        .chain(service.waypoint())
}

/// Whether the pod is one of these.
///
/// # Errors
/// If it is not: one of them that nobody told of, if there is one.
fn is_among<'a>(
    state: &State,
    local: &Workload,
    local_ip: IpAddr,
    waypoints: impl IntoIterator<Item = &'a GatewayAddress>,
) -> Result<(), Option<Destination>> {
    let mut missing = None;
    for waypoint in waypoints {
        match is_waypoint(state, local, local_ip, waypoint) {
            Some(true) => return Ok(()),
            Some(false) => {}
            None => missing = missing.or_else(|| Some(waypoint.destination.clone())),
        }
    }
    Err(missing)
}

/// `None` if nobody told what the reference means.
fn is_waypoint(
    state: &State,
    local: &Workload,
    local_ip: IpAddr,
    waypoint: &GatewayAddress,
) -> Option<bool> {
    match referenced(state, None, waypoint) {
        Owner::Service(service) => {
            let mut mine = state.services_of(local);
            Some(mine.any(|(mine, _)| Arc::ptr_eq(mine, service)))
        }
        Owner::Workload(workload) => Some(workload.addresses().contains(&local_ip)),
        Owner::Nobody => None,
    }
}

/// I5 for a host name: the port of this pod behind a service port. The pod has to be an endpoint of that service, or its waypoint,
/// or have an application behind a tunnel that knows what to do with any.
fn host_port(
    state: &State,
    local: &Workload,
    local_ip: IpAddr,
    (host, port): (&Arc<str>, u16),
) -> Result<u16, InboundRefusal> {
    let mut mine = state.services_of(local);
    let (service, mapped) = match mine.find(|(service, _)| service.is_named(host)) {
        Some((service, ports)) => (service, ports.get(port).filter(|target| *target != 0)),
        None => {
            let service = visible_service(state, local, host)?;
            if local.application_tunnel().is_none() {
                let waypoint = is_among(state, local, local_ip, waypoints_of(service));
                waypoint.map_err(|missing| InboundRefusal::ForeignHost {
                    host: Arc::clone(host),
                    missing,
                })?;
            }
            (service, None)
        }
    };
    let numbered = || match service.target_port(port) {
        Some(TargetPort::Number(number)) => Some(number),
        Some(TargetPort::Named) | None => None,
    };
    mapped
        .or_else(numbered)
        .ok_or_else(|| InboundRefusal::NoTargetPort {
            host: Arc::clone(host),
            port,
        })
}

fn visible_service<'a>(
    state: &'a State,
    local: &Workload,
    host: &Arc<str>,
) -> Result<&'a Arc<Service>, InboundRefusal> {
    state
        .service_by_host(host, Some(local.namespace()))
        .ok_or_else(|| InboundRefusal::UnknownHost {
            host: Arc::clone(host),
            missing: own_service(local, host),
        })
}

/// The service of this host name that the workload itself says it belongs to, known or not.
fn own_service(local: &Workload, host: &Arc<str>) -> Option<Destination> {
    let mut keys = local
        .links()
        .iter()
        .map(|link| link.service.split_once('/'));
    let (namespace, _) = keys.find(|key| key.is_some_and(|(_, name)| name == &**host))??;
    Some(Destination::Host {
        namespace: namespace.into(),
        hostname: Arc::clone(host),
    })
}

/// The target a PROXY header names: the authority's address, else an address of its service, best
/// one of the own network, and best IPv4.
fn proxy_target(
    state: &State,
    local: &Workload,
    authority: &Authority,
) -> Result<ProxyTarget, InboundRefusal> {
    let (address, service) = match authority {
        Authority::Address(address) => {
            let service = match owner(state, local.network(), address.ip(), None) {
                Owner::Service(service) => Some(service),
                Owner::Workload(_) | Owner::Nobody => None,
            };
            (*address, service)
        }
        Authority::Host { name, port } => {
            let service = visible_service(state, local, name)?;
            let vips = service.vips().iter();
            let vip = vips
                .max_by_key(|vip| (vip.network == *local.network(), vip.ip.is_ipv4()))
                .ok_or_else(|| InboundRefusal::NoVirtualAddress(Arc::clone(name)))?;
            (SocketAddr::new(vip.ip, *port), Some(service))
        }
    };
    Ok(ProxyTarget {
        address,
        service: service.map(|service| Arc::clone(service.hostname())),
    })
}

fn loopback_like(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

#[cfg(test)]
mod tests;
