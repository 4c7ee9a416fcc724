//! Workloads, and what other records have in common with them.

use std::net::IpAddr;

use serde::{Serialize, Serializer};

use super::is_empty;
use crate::mesh::{
    ApplicationTunnel, GatewayAddress, Health, Link, NetworkMode, Protocol, TunnelProtocol,
    Workload,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WorkloadRecord<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    application_tunnel: Option<Tunnel>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    authorization_policies: &'a [std::sync::Arc<str>],
    #[serde(skip_serializing_if = "is_empty")]
    canonical_name: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    canonical_revision: &'a str,
    capacity: u32,
    cluster_id: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    hostname: &'a str,
    #[serde(skip_serializing_if = "Locality::is_empty")]
    locality: Locality<'a>,
    name: &'a str,
    namespace: &'a str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    native_tunnel: bool,
    #[serde(skip_serializing_if = "is_empty")]
    network: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_gateway: Option<Gateway>,
    network_mode: &'static str,
    #[serde(skip_serializing_if = "is_empty")]
    node: &'a str,
    protocol: &'static str,
    #[serde(skip_serializing_if = "is_empty")]
    service_account: &'a str,
    #[serde(skip_serializing_if = "Links::is_empty")]
    services: Links<'a>,
    status: &'static str,
    #[serde(skip_serializing_if = "is_empty")]
    trust_domain: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    uid: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<Gateway>,
    workload_ips: &'a [IpAddr],
    #[serde(skip_serializing_if = "is_empty")]
    workload_name: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    workload_type: &'static str,
}

impl<'a> WorkloadRecord<'a> {
    pub(super) fn of(workload: &'a Workload) -> Self {
        Self {
            application_tunnel: workload.application_tunnel().map(Tunnel::of),
            authorization_policies: workload.authorization_policies(),
            canonical_name: workload.canonical_name(),
            canonical_revision: workload.canonical_revision(),
            capacity: workload.capacity(),
            cluster_id: workload.cluster_id(),
            hostname: workload.hostname(),
            locality: Locality {
                region: workload.region(),
                zone: workload.zone(),
                subzone: workload.subzone(),
            },
            name: workload.name(),
            namespace: workload.namespace(),
            native_tunnel: workload.native_tunnel(),
            network: workload.network(),
            network_gateway: workload.network_gateway().map(Gateway::of),
            network_mode: match workload.network_mode() {
                NetworkMode::Standard => "Standard",
                NetworkMode::HostNetwork => "HostNetwork",
            },
            node: workload.node(),
            protocol: match workload.protocol() {
                Protocol::Hbone => "HBONE",
                Protocol::Tcp => "TCP",
            },
            service_account: workload.service_account(),
            services: Links(workload.links()),
            status: status(workload.health()),
            trust_domain: workload.trust_domain(),
            uid: workload.uid(),
            waypoint: workload.waypoint().map(Gateway::of),
            workload_ips: workload.addresses(),
            workload_name: workload.workload_name(),
            workload_type: workload.workload_type().as_str(),
        }
    }
}

pub(super) fn status(health: Health) -> &'static str {
    match health {
        Health::Healthy => "Healthy",
        Health::Unhealthy => "Unhealthy",
    }
}

/// A waypoint or network gateway.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Gateway {
    destination: String,
    hbone_mtls_port: u16,
}

impl Gateway {
    pub(super) fn of(gateway: &GatewayAddress) -> Self {
        Self {
            destination: gateway.destination.to_string(),
            hbone_mtls_port: gateway.hbone_mtls_port,
        }
    }
}

#[derive(Serialize)]
struct Tunnel {
    protocol: &'static str,
    port: Option<u16>,
}

impl Tunnel {
    fn of(tunnel: ApplicationTunnel) -> Self {
        Self {
            protocol: match tunnel.protocol {
                TunnelProtocol::None => "NONE",
                TunnelProtocol::Proxy => "PROXY",
            },
            port: tunnel.port,
        }
    }
}

#[derive(Serialize)]
struct Locality<'a> {
    region: &'a str,
    zone: &'a str,
    subzone: &'a str,
}

impl Locality<'_> {
    fn is_empty(&self) -> bool {
        [self.region, self.zone, self.subzone]
            .iter()
            .all(|part| part.is_empty())
    }
}

/// The keys of the services.
struct Links<'a>(&'a [Link]);

impl Links<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Links<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|link| &*link.service))
    }
}
