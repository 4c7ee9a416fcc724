//! Which names the mesh answers, and with what. Pure, but for the order of the records.

use std::{cmp::Reverse, net::IpAddr, sync::Arc};

use super::names::{Candidate, Match, Viewpoint, candidates, exact_then_wildcards};
use crate::mesh::{Health, HealthPolicy, IpFamilies, Service, State, Workload};

/// Address families that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

/// What the mesh says to a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// The name that the records belong to, where it is another than the one asked for.
    pub(super) alias: Option<String>,
    /// The addresses; none is an answer, too.
    pub(super) addresses: Vec<IpAddr>,
    /// Whether the service has the family at all.
    pub(super) supported: bool,
}

/// Everything that answers depend on besides the mesh.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules<'a> {
    /// DNS domain of the cluster.
    pub(super) cluster_domain: &'a str,
    /// Search domains of the client; `None` for those of its namespace.
    pub(super) search: Option<&'a [String]>,
    /// The namespace that goes before others where neither the client's nor a canonical one has the name.
    pub(super) preferred_namespace: Option<&'a str>,
    /// Whether IPv6 addresses are told.
    pub(super) ipv6: bool,
}

/// The answer of the mesh to a query of `client` for `name` (lower case, without the final dot); `None` if it has none, and
/// somebody else is to be asked.
pub(super) fn find(
    state: &State,
    client: &Workload,
    rules: &Rules<'_>,
    name: &str,
    family: Family,
) -> Option<Found> {
    let from = Viewpoint {
        namespace: client.namespace(),
        cluster_domain: rules.cluster_domain,
        search: rules.search,
    };
    for Candidate { host, stripped } in candidates(name, &from) {
        for (host, matched) in exact_then_wildcards(&host) {
            if let Some(service) = best(state, client, rules, &host) {
                let supported = supports(&service, family) && (rules.ipv6 || family == Family::V4);
                let addresses = if supported {
                    addresses(state, &service, client, family)
                } else {
                    Vec::new()
                };
                return Some(Found {
                    alias: stripped.filter(|_| matched == Match::Exact),
                    addresses,
                    supported,
                });
            }
        }
    }
    None
}

/// The service of a host name that the client means: one of its namespace, else a canonical one, else one of the
/// preferred namespace, else the first by key, so that every node decides alike.
fn best(state: &State, client: &Workload, rules: &Rules<'_>, host: &str) -> Option<Arc<Service>> {
    let namespace = client.namespace();
    let usable = state.services_named(host).filter(|service| {
        service.visible_to(Some(namespace))
            && (!service.vips().is_empty() || is_headless(host, rules.cluster_domain))
    });
    let rank = |service: &Service| {
        (
            service.namespace() == namespace,
            service.canonical(),
            rules.preferred_namespace == Some(service.namespace()),
            Reverse(Arc::clone(service.key())),
        )
    };
    usable.max_by_key(|service| rank(service)).cloned()
}

/// A service of Kubernetes without an address of its own stands for its endpoints.
fn is_headless(host: &str, cluster_domain: &str) -> bool {
    let rest = host.strip_suffix(cluster_domain);
    rest.is_some_and(|rest| rest.ends_with(".svc."))
}

fn supports(service: &Service, family: Family) -> bool {
    match service.ip_families() {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::Ipv4Only => family == Family::V4,
        IpFamilies::Ipv6Only => family == Family::V6,
    }
}

fn addresses(state: &State, service: &Service, client: &Workload, family: Family) -> Vec<IpAddr> {
    let of_family = |ip: &IpAddr| ip.is_ipv4() == (family == Family::V4);
    if !service.vips().is_empty() {
        let vips = service.vips().iter();
        let near = vips
            .filter(|vip| vip.network == *client.network())
            .map(|vip| vip.ip);
        return near.filter(of_family).take(MAX_ADDRESSES).collect();
    }
    let any_health = service.load_balancing().health_policy == HealthPolicy::AllowAll;
    let endpoints = state.endpoints(service).map(|endpoint| endpoint.workload);
    let eligible = endpoints.filter(|one| any_health || one.health() == Health::Healthy);
    let first = eligible.filter_map(|one| one.addresses().iter().copied().find(of_family));
    first.take(MAX_ADDRESSES).collect()
}

/// As many as fit into a message over TCP together with names and options.
const MAX_ADDRESSES: usize = 1_000;

#[cfg(test)]
mod tests;
