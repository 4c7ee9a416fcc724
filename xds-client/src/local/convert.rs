//! From records of the file to the messages of the control plane.

use std::net::IpAddr;

use super::{NamedPolicy, record};
use crate::proto::{security, workload as pb};

/// An endpoint that a service lists.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    /// Uid of the workload.
    pub(super) workload: String,
    ports: Vec<pb::Port>,
}

pub(super) fn workload(from: record::Workload) -> Result<pb::Workload, String> {
    let uid = if from.uid.is_empty() {
        record::default_uid(&from.cluster_id, &from.namespace, &from.name)
            .ok_or("a workload needs a uid or a name")?
    } else {
        from.uid
    };
    let services = from.services.into_iter();
    let services = services.map(|(key, ports)| {
        (
            key,
            pb::PortList {
                ports: port_list(&ports),
            },
        )
    });
    Ok(pb::Workload {
        uid,
        name: from.name,
        namespace: from.namespace,
        addresses: from.workload_ips.into_iter().map(octets).collect(),
        hostname: from.hostname,
        network: from.network,
        tunnel_protocol: match from.protocol {
            record::Protocol::Tcp => pb::TunnelProtocol::None.into(),
            record::Protocol::Hbone => pb::TunnelProtocol::Hbone.into(),
        },
        trust_domain: from.trust_domain,
        service_account: from.service_account,
        waypoint: from.waypoint.map(gateway).transpose()?,
        network_gateway: from.network_gateway.map(gateway).transpose()?,
        node: from.node,
        canonical_name: from.canonical_name,
        canonical_revision: from.canonical_revision,
        workload_type: workload_type(&from.workload_type).into(),
        workload_name: from.workload_name,
        native_tunnel: from.native_tunnel,
        application_tunnel: from.application_tunnel.as_ref().map(application_tunnel),
        services: services.collect(),
        authorization_policies: from.authorization_policies,
        status: match from.status {
            record::Status::Healthy => pb::WorkloadStatus::Healthy.into(),
            record::Status::Unhealthy => pb::WorkloadStatus::Unhealthy.into(),
        },
        cluster_id: from.cluster_id,
        locality: from.locality.map(|from| pb::Locality {
            region: from.region,
            zone: from.zone,
            subzone: from.subzone,
        }),
        network_mode: match from.network_mode {
            record::NetworkMode::Standard => pb::NetworkMode::Standard.into(),
            record::NetworkMode::HostNetwork => pb::NetworkMode::HostNetwork.into(),
        },
        extensions: Vec::new(),
        capacity: from.capacity,
    })
}

pub(super) fn service(from: record::Service) -> Result<(pb::Service, Vec<Endpoint>), String> {
    let mut addresses = Vec::with_capacity(from.vips.len() + from.cidr_vips.len());
    for vip in &from.vips {
        addresses
            .push(network_address(vip).ok_or_else(|| format!("vips: `{vip}` is not network/ip"))?);
    }
    addresses.extend(from.cidr_vips.into_iter().map(|vip| pb::NetworkAddress {
        network: vip.network,
        address: octets(vip.cidr.0.addr()),
        length: Some(vip.cidr.0.prefix_len().into()),
    }));
    let endpoints = from.endpoints.into_iter().map(|(key, from)| Endpoint {
        workload: if from.workload_uid.is_empty() {
            key
        } else {
            from.workload_uid
        },
        ports: port_list(&from.port),
    });
    let endpoints = endpoints.collect();
    let service = pb::Service {
        name: from.name,
        namespace: from.namespace,
        hostname: from.hostname,
        addresses,
        ports: port_list(&from.ports),
        subject_alt_names: from.subject_alt_names,
        waypoint: from.waypoint.map(gateway).transpose()?,
        load_balancing: from.load_balancer.map(|from| load_balancing(&from)),
        ip_families: match from.ip_families {
            None => pb::IpFamilies::Automatic.into(),
            Some(record::IpFamilies::Dual) => pb::IpFamilies::Dual.into(),
            Some(record::IpFamilies::Ipv4) => pb::IpFamilies::Ipv4Only.into(),
            Some(record::IpFamilies::Ipv6) => pb::IpFamilies::Ipv6Only.into(),
        },
        canonical: from.canonical,
        weighted_waypoints: weighted(from.weighted_waypoints)?,
        visibility: match from.visibility {
            record::Visibility::Public => pb::service::Visibility::Public.into(),
            record::Visibility::Namespace => pb::service::Visibility::Namespace.into(),
        },
        ..pb::Service::default()
    };
    Ok((service, endpoints))
}

/// Adds what a service says of an endpoint to what the workload says itself, which goes before it.
pub(super) fn link(workload: &mut pb::Workload, service: &str, endpoint: &Endpoint) {
    let own = workload.services.entry(service.to_owned()).or_default();
    let own = &mut own.ports;
    for listed in &endpoint.ports {
        if !own
            .iter()
            .any(|port| port.service_port == listed.service_port)
        {
            own.push(*listed);
        }
    }
}

pub(super) fn policy(from: record::Policy) -> Result<NamedPolicy, String> {
    let clause = |matches: Vec<record::Match>| security::Clause {
        matches: matches.into_iter().map(one_match).collect(),
    };
    let rule = |clauses: Vec<Vec<record::Match>>| security::Rule {
        clauses: clauses.into_iter().map(clause).collect(),
    };
    if from.name.is_empty() {
        return Err("a policy needs a name".to_owned());
    }
    Ok(NamedPolicy {
        name: format!("{}/{}", from.namespace, from.name),
        policy: security::Authorization {
            name: from.name,
            namespace: from.namespace,
            scope: match from.scope {
                record::PolicyScope::Global => security::Scope::Global.into(),
                record::PolicyScope::Namespace => security::Scope::Namespace.into(),
                record::PolicyScope::WorkloadSelector => security::Scope::WorkloadSelector.into(),
            },
            action: match from.action {
                record::Action::Allow => security::Action::Allow.into(),
                record::Action::Deny => security::Action::Deny.into(),
            },
            rules: from.rules.into_iter().map(rule).collect(),
            dry_run: from.dry_run,
            extensions: Vec::new(),
        },
    })
}

fn one_match(from: record::Match) -> security::Match {
    security::Match {
        namespaces: each(from.namespaces, string_match),
        not_namespaces: each(from.not_namespaces, string_match),
        principals: each(from.principals, string_match),
        not_principals: each(from.not_principals, string_match),
        source_ips: each(from.source_ips, range),
        not_source_ips: each(from.not_source_ips, range),
        destination_ips: each(from.destination_ips, range),
        not_destination_ips: each(from.not_destination_ips, range),
        destination_ports: from.destination_ports,
        not_destination_ports: from.not_destination_ports,
        service_accounts: each(from.service_accounts, service_account),
        not_service_accounts: each(from.not_service_accounts, service_account),
        extensions: Vec::new(),
    }
}

fn each<T, U>(from: Vec<T>, convert: impl Fn(T) -> U) -> Vec<U> {
    from.into_iter().map(convert).collect()
}

fn string_match(from: record::StringMatch) -> security::StringMatch {
    use security::string_match::MatchType;
    let kind = match from {
        record::StringMatch::Exact(text) => MatchType::Exact(text),
        record::StringMatch::Prefix(text) => MatchType::Prefix(text),
        record::StringMatch::Suffix(text) => MatchType::Suffix(text),
        record::StringMatch::Presence => MatchType::Presence(()),
    };
    security::StringMatch {
        match_type: Some(kind),
    }
}

fn range(record::Range(from): record::Range) -> security::Address {
    security::Address {
        address: octets(from.addr()),
        length: from.prefix_len().into(),
    }
}

fn service_account(from: record::ServiceAccount) -> security::ServiceAccountMatch {
    security::ServiceAccountMatch {
        namespace: from.namespace,
        service_account: from.service_account,
    }
}

fn gateway(from: record::Gateway) -> Result<pb::GatewayAddress, String> {
    use pb::gateway_address::Destination;
    let record::Gateway {
        destination,
        hbone_mtls_port,
    } = from;
    let (namespace, hostname) = destination.split_once('/').ok_or_else(|| {
        format!("destination: `{destination}` is neither network/ip nor namespace/hostname")
    })?;
    let destination = network_address(&destination).map_or_else(
        || {
            Destination::Hostname(pb::NamespacedHostname {
                namespace: namespace.to_owned(),
                hostname: hostname.to_owned(),
            })
        },
        Destination::Address,
    );
    Ok(pb::GatewayAddress {
        destination: Some(destination),
        hbone_mtls_port,
    })
}

fn weighted(from: Vec<record::WeightedWaypoint>) -> Result<Vec<pb::WeightedWaypoint>, String> {
    let convert = |from: record::WeightedWaypoint| {
        Ok(pb::WeightedWaypoint {
            destination: Some(gateway(from.destination)?),
            weight: from.weight,
        })
    };
    from.into_iter().map(convert).collect()
}

/// Reads `network/ip`.
fn network_address(text: &str) -> Option<pb::NetworkAddress> {
    let (network, ip) = text.split_once('/')?;
    Some(pb::NetworkAddress {
        network: network.to_owned(),
        address: octets(ip.parse().ok()?),
        length: None,
    })
}

fn load_balancing(from: &record::LoadBalancer) -> pb::LoadBalancing {
    use pb::load_balancing as lb;
    let scope = |from: &record::Scope| match from {
        record::Scope::Region => lb::Scope::Region.into(),
        record::Scope::Zone => lb::Scope::Zone.into(),
        record::Scope::Subzone => lb::Scope::Subzone.into(),
        record::Scope::Node => lb::Scope::Node.into(),
        record::Scope::Cluster => lb::Scope::Cluster.into(),
        record::Scope::Network => lb::Scope::Network.into(),
    };
    pb::LoadBalancing {
        routing_preference: from.routing_preferences.iter().map(scope).collect(),
        mode: match from.mode {
            record::Mode::Standard => lb::Mode::UnspecifiedMode.into(),
            record::Mode::Strict => lb::Mode::Strict.into(),
            record::Mode::Failover => lb::Mode::Failover.into(),
            record::Mode::Passthrough => lb::Mode::Passthrough.into(),
        },
        health_policy: match from.health_policy {
            record::HealthPolicy::OnlyHealthy => lb::HealthPolicy::OnlyHealthy.into(),
            record::HealthPolicy::AllowAll => lb::HealthPolicy::AllowAll.into(),
        },
    }
}

fn application_tunnel(from: &record::ApplicationTunnel) -> pb::ApplicationTunnel {
    use pb::application_tunnel::Protocol;
    pb::ApplicationTunnel {
        protocol: match from.protocol {
            record::TunnelProtocol::None => Protocol::None.into(),
            record::TunnelProtocol::Proxy => Protocol::Proxy.into(),
        },
        port: from.port.unwrap_or_default(),
    }
}

fn workload_type(from: &str) -> pb::WorkloadType {
    pb::WorkloadType::from_str_name(&from.to_ascii_uppercase())
        .unwrap_or(pb::WorkloadType::Deployment)
}

fn port_list(from: &record::Ports) -> Vec<pb::Port> {
    let port = |(service_port, target_port): (&record::Port, &u32)| pb::Port {
        service_port: service_port.0,
        target_port: *target_port,
        app_protocol: 0,
    };
    from.iter().map(port).collect()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().into(),
        IpAddr::V6(v6) => v6.octets().into(),
    }
}
