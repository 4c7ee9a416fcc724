//! Services.

use std::sync::Arc;

use ipnet::IpNet;
use xds_client::proto::workload as pb;

use super::{Converter, Invalid, ip, known, range};
use crate::mesh::{
    Cidr, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, Scope, Service, Vip,
    Visibility, WeightedWaypoint,
};

type VirtualAddresses = (Box<[Vip]>, Box<[Cidr]>);

impl Converter<'_> {
    pub(super) fn service(&mut self, given: &pb::Service) -> Result<Service, Invalid> {
        if given.namespace.contains('/') {
            return Err(Invalid::Namespace(given.namespace.clone()));
        }
        let (vips, cidrs) = self.virtual_addresses(&given.addresses)?;
        let waypoint = given.waypoint.as_ref();
        let waypoint = waypoint
            .map(|given| self.gateway(given, "waypoint"))
            .transpose()?;
        let names: Box<[Arc<str>]> = given
            .subject_alt_names
            .iter()
            .map(|name| self.pool.string(name))
            .collect();
        Ok(Service {
            key: self
                .pool
                .string(&format!("{}/{}", given.namespace, given.hostname)),
            name: self.pool.string(&given.name),
            namespace: self.pool.string(&given.namespace),
            hostname: self.pool.string(&given.hostname),
            vips,
            cidrs,
            ports: self.ports(&given.ports)?,
            identities: names.iter().filter_map(|name| name.parse().ok()).collect(),
            subject_alt_names: names,
            waypoint: waypoint.map(Box::new),
            weighted_waypoints: self.weighted(&given.weighted_waypoints)?,
            load_balancing: load_balancing(given.load_balancing.as_ref())?,
            ip_families: match known(given.ip_families, "ip_families")? {
                pb::IpFamilies::Automatic => IpFamilies::Automatic,
                pb::IpFamilies::Ipv4Only => IpFamilies::Ipv4Only,
                pb::IpFamilies::Ipv6Only => IpFamilies::Ipv6Only,
                pb::IpFamilies::Dual => IpFamilies::Dual,
            },
            canonical: given.canonical,
            visibility: match pb::service::Visibility::try_from(given.visibility) {
                Ok(pb::service::Visibility::Namespace) => Visibility::Namespace,
                Ok(pb::service::Visibility::Public) | Err(_) => Visibility::Public,
            },
        })
    }

    fn virtual_addresses(
        &mut self,
        given: &[pb::NetworkAddress],
    ) -> Result<VirtualAddresses, Invalid> {
        let (mut vips, mut cidrs) = (Vec::new(), Vec::new());
        for address in given {
            let network = self.pool.string(&address.network);
            let field = "addresses";
            let range = match address.length {
                Some(length) => range(&address.address, length, field)?,
                None => IpNet::from(ip(&address.address, field)?),
            };
            if range.prefix_len() == range.max_prefix_len() {
                let ip = range.addr().to_canonical();
                vips.push(Vip { network, ip });
            } else {
                cidrs.push(Cidr { network, range });
            }
        }
        Ok((vips.into(), cidrs.into()))
    }

    fn weighted(
        &mut self,
        given: &[pb::WeightedWaypoint],
    ) -> Result<Box<[WeightedWaypoint]>, Invalid> {
        let field = "weighted_waypoints";
        let convert = |one: &pb::WeightedWaypoint| {
            let destination = one.destination.as_ref();
            let destination = destination.ok_or(Invalid::Destination(field))?;
            Ok(WeightedWaypoint {
                waypoint: self.gateway(destination, field)?,
                weight: one.weight,
            })
        };
        given.iter().map(convert).collect()
    }
}

fn load_balancing(given: Option<&pb::LoadBalancing>) -> Result<LoadBalancing, Invalid> {
    use pb::load_balancing as lb;
    let Some(given) = given else {
        return Ok(LoadBalancing {
            scopes: Box::default(),
            mode: LoadBalancingMode::Any,
            health_policy: HealthPolicy::OnlyHealthy,
        });
    };
    Ok(LoadBalancing {
        scopes: given
            .routing_preference
            .iter()
            .map(|value| scope(*value))
            .collect::<Result<_, _>>()?,
        mode: match known(given.mode, "load_balancing.mode")? {
            lb::Mode::UnspecifiedMode => LoadBalancingMode::Any,
            lb::Mode::Strict => LoadBalancingMode::Strict,
            lb::Mode::Failover => LoadBalancingMode::Failover,
            lb::Mode::Passthrough => LoadBalancingMode::Passthrough,
        },
        health_policy: match known(given.health_policy, "load_balancing.health_policy")? {
            lb::HealthPolicy::OnlyHealthy => HealthPolicy::OnlyHealthy,
            lb::HealthPolicy::AllowAll => HealthPolicy::AllowAll,
        },
    })
}

fn scope(value: i32) -> Result<Scope, Invalid> {
    use pb::load_balancing::Scope as Given;
    let field = "load_balancing.routing_preference";
    match known(value, field)? {
        Given::Region => Ok(Scope::Region),
        Given::Zone => Ok(Scope::Zone),
        Given::Subzone => Ok(Scope::Subzone),
        Given::Node => Ok(Scope::Node),
        Given::Cluster => Ok(Scope::Cluster),
        Given::Network => Ok(Scope::Network),
        Given::UnspecifiedScope => Err(Invalid::Value { field, value }),
    }
}
