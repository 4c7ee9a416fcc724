//! Who and what is asked about.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use crate::{
    admin::Console,
    config::WorkloadRef,
    mesh::{Service, State, Workload},
};

/// The two ends of the connection in question.
pub(super) enum Asked {
    /// Of a workload that has a record.
    Known {
        source: Arc<Workload>,
        from_ip: IpAddr,
        to: SocketAddr,
    },
    /// Of one that has none.
    Unknown { name: String, to: SocketAddr },
}

/// The question cannot be answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unclear {
    #[error("{0:?} is not HOST:PORT")]
    Destination(String),
    #[error(
        "no service of the mesh is called {0:?}, and names outside of it are not resolved here; give an address"
    )]
    Name(String),
    #[error("the service {0} has no address, and no endpoint that has one")]
    NoAddress(Arc<str>),
    #[error("{0:?} names several pods; say NAMESPACE/POD")]
    Ambiguous(String),
}

pub(super) fn asked(console: &Console, from: &str, to: &str) -> Result<Asked, Unclear> {
    let state = console.shared.mesh.read();
    let source = find_source(console, &state, from)?;
    let to = destination(console, &state, source.as_ref(), to)?;
    Ok(match source {
        Some(source) => {
            let ips = source.addresses();
            let same_family = ips.iter().find(|ip| ip.is_ipv4() == to.is_ipv4());
            let from_ip = same_family.or_else(|| ips.first()).copied();
            Asked::Known {
                from_ip: from_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
                source,
                to,
            }
        }
        None => Asked::Unknown {
            name: from.to_owned(),
            to,
        },
    })
}

/// By uid, by address, or by the names of a pod of this node.
fn find_source(
    console: &Console,
    state: &State,
    from: &str,
) -> Result<Option<Arc<Workload>>, Unclear> {
    if let Some(workload) = state.workload(from) {
        return Ok(Some(Arc::clone(workload)));
    }
    if let Ok(ip) = from.parse() {
        let network = &console.shared.settings.network;
        return Ok(state.workload_at(network, ip).cloned());
    }
    let (namespace, name) = from.rsplit_once('/').unzip();
    let name = name.unwrap_or(from);
    let is_it = |who: &WorkloadRef| {
        &*who.name == name && namespace.is_none_or(|namespace| *who.namespace == *namespace)
    };
    let pods = console.pods.pods().into_iter();
    let mut found: Vec<_> = pods.map(|pod| pod.who).filter(is_it).collect();
    found.dedup();
    match found.as_slice() {
        [] => Ok(None),
        [who] => Ok(state.local_workload(who).cloned()),
        _ => Err(Unclear::Ambiguous(from.to_owned())),
    }
}

/// Endpoints that did not answer `source` lately, if it is a pod of this node.
pub(super) fn silent(
    console: &Console,
    state: &State,
    source: &Arc<Workload>,
) -> Vec<Arc<Workload>> {
    let pods = console.pods.pods().into_iter();
    let mut flows = pods
        .filter(|pod| state.local_workload(&pod.who) == Some(source))
        .filter_map(|pod| pod.flows);
    flows
        .next()
        .map(|flows| flows.silent_endpoints())
        .unwrap_or_default()
}

/// An address and port, or a host name of the mesh and port.
fn destination(
    console: &Console,
    state: &State,
    source: Option<&Arc<Workload>>,
    to: &str,
) -> Result<SocketAddr, Unclear> {
    if let Ok(address) = to.parse() {
        return Ok(address);
    }
    let split = to.rsplit_once(':');
    let parsed = split.and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let (host, port) = parsed.ok_or_else(|| Unclear::Destination(to.to_owned()))?;
    let namespace = source.map(|source| &**source.namespace());
    let domain = console.settings.cluster_domain();
    let spellings = [
        Some(host.to_owned()),
        namespace.map(|namespace| format!("{host}.{namespace}.svc.{domain}")),
        Some(format!("{host}.svc.{domain}")),
        Some(format!("{host}.{domain}")),
    ];
    let mut services = spellings.iter().flatten();
    let service = services.find_map(|name| state.service_by_host(name, namespace));
    let service = service.ok_or_else(|| Unclear::Name(host.to_owned()))?;
    let ip = address(state, service, source)
        .ok_or_else(|| Unclear::NoAddress(Arc::clone(service.key())))?;
    Ok(SocketAddr::new(ip, port))
}

/// Where a client that asked for the name would connect: a virtual address of its network, else an endpoint.
fn address(state: &State, service: &Service, source: Option<&Arc<Workload>>) -> Option<IpAddr> {
    let network = source.map(|source| source.network());
    let mut vips = service.vips().iter();
    let vip = vips.find(|vip| network.is_none_or(|network| vip.network == *network));
    vip.map(|vip| vip.ip).or_else(|| {
        let mut endpoints = state.endpoints(service);
        endpoints.find_map(|endpoint| endpoint.workload.addresses().first().copied())
    })
}
