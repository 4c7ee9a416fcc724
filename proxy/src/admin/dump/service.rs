//! Services and their endpoints.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Serialize, Serializer};

use super::workload::{Gateway, status};
use crate::mesh::{
    Cidr, Endpoint, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, Mesh, PortMap,
    Scope, Service, Visibility, WeightedWaypoint, Workload,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceRecord<'a> {
    canonical: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cidr_vips: Vec<CidrVip<'a>>,
    endpoints: Endpoints,
    hostname: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip_families: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load_balancer: Option<Balancer>,
    name: &'a str,
    namespace: &'a str,
    ports: Ports<'a>,
    subject_alt_names: &'a [Arc<str>],
    vips: Vec<String>,
    visibility: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<Gateway>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    weighted_waypoints: Vec<Weighted>,
}

impl<'a> ServiceRecord<'a> {
    /// Reads the endpoints from `mesh`, under a lock of its own.
    pub(super) fn of(service: &'a Service, mesh: &Mesh) -> Self {
        Self {
            canonical: service.canonical(),
            cidr_vips: service.cidrs().iter().map(CidrVip::of).collect(),
            endpoints: Endpoints::of(mesh.read().endpoints(service)),
            hostname: service.hostname(),
            ip_families: match service.ip_families() {
                IpFamilies::Automatic => None,
                IpFamilies::Ipv4Only => Some("IPv4"),
                IpFamilies::Ipv6Only => Some("IPv6"),
                IpFamilies::Dual => Some("Dual"),
            },
            load_balancer: Balancer::of(service.load_balancing()),
            name: service.name(),
            namespace: service.namespace(),
            ports: Ports(service.ports()),
            subject_alt_names: service.subject_alt_names(),
            vips: service.vips().iter().map(ToString::to_string).collect(),
            visibility: match service.visibility() {
                Visibility::Public => "Public",
                Visibility::Namespace => "Namespace",
            },
            waypoint: service.waypoint().map(Gateway::of),
            weighted_waypoints: service
                .weighted_waypoints()
                .iter()
                .map(Weighted::of)
                .collect(),
        }
    }
}

#[derive(Serialize)]
struct CidrVip<'a> {
    network: &'a str,
    cidr: String,
}

impl<'a> CidrVip<'a> {
    fn of(cidr: &'a Cidr) -> Self {
        Self {
            network: &cidr.network,
            cidr: cidr.range.to_string(),
        }
    }
}

#[derive(Serialize)]
struct Weighted {
    destination: Gateway,
    weight: u32,
}

impl Weighted {
    fn of(weighted: &WeightedWaypoint) -> Self {
        Self {
            destination: Gateway::of(&weighted.waypoint),
            weight: weighted.weight,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Balancer {
    health_policy: &'static str,
    mode: &'static str,
    routing_preferences: Vec<&'static str>,
}

impl Balancer {
    /// `None` if nothing was asked for.
    fn of(balancing: &LoadBalancing) -> Option<Self> {
        let is_default = balancing.scopes.is_empty()
            && balancing.mode == LoadBalancingMode::Any
            && balancing.health_policy == HealthPolicy::OnlyHealthy;
        (!is_default).then(|| Self {
            health_policy: match balancing.health_policy {
                HealthPolicy::OnlyHealthy => "OnlyHealthy",
                HealthPolicy::AllowAll => "AllowAll",
            },
            mode: match balancing.mode {
                LoadBalancingMode::Any => "Standard",
                LoadBalancingMode::Strict => "Strict",
                LoadBalancingMode::Failover => "Failover",
                LoadBalancingMode::Passthrough => "Passthrough",
            },
            routing_preferences: balancing.scopes.iter().map(scope).collect(),
        })
    }
}

fn scope(scope: &Scope) -> &'static str {
    match scope {
        Scope::Region => "Region",
        Scope::Zone => "Zone",
        Scope::Subzone => "Subzone",
        Scope::Node => "Node",
        Scope::Cluster => "Cluster",
        Scope::Network => "Network",
    }
}

/// `{"80": 8080}`.
struct Ports<'a>(&'a PortMap);

impl Serialize for Ports<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.pairs().iter().copied())
    }
}

/// Endpoints by the uid of their workload.
struct Endpoints(Vec<(Arc<Workload>, PortMap)>);

impl Endpoints {
    fn of<'a>(endpoints: impl Iterator<Item = Endpoint<'a>>) -> Self {
        let held = |endpoint: Endpoint<'_>| (Arc::clone(endpoint.workload), endpoint.ports.clone());
        let mut all: Vec<_> = endpoints.map(held).collect();
        all.sort_by(|(one, _), (other, _)| one.uid().cmp(other.uid()));
        Self(all)
    }
}

impl Serialize for Endpoints {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let entry =
            |(workload, ports)| (Workload::uid(workload), EndpointRecord::of(workload, ports));
        serializer.collect_map(
            self.0
                .iter()
                .map(|(workload, ports)| entry((workload, ports))),
        )
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointRecord<'a> {
    port: Ports<'a>,
    status: &'static str,
    workload_uid: &'a str,
}

impl<'a> EndpointRecord<'a> {
    fn of(workload: &'a Workload, ports: &'a PortMap) -> Self {
        Self {
            port: Ports(ports),
            status: status(workload.health()),
            workload_uid: workload.uid(),
        }
    }
}

/// Endpoints that wait for their service, by its key.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct Staged(BTreeMap<Arc<str>, Endpoints>);

impl Staged {
    pub(super) fn of(mesh: &Mesh) -> Self {
        let state = mesh.read();
        let staged = state.staged_services();
        Self(
            staged
                .map(|(key, endpoints)| (Arc::clone(key), Endpoints::of(endpoints)))
                .collect(),
        )
    }
}
