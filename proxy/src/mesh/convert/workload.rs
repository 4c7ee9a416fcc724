//! Workloads.

use std::{net::IpAddr, sync::Arc};

use cert_agent::SpiffeId;
use xds_client::proto::workload as pb;

use super::{Converter, Invalid, ip, known, port};
use crate::mesh::{
    ApplicationTunnel, GatewayAddress, Health, Link, NetworkMode, Protocol, TunnelProtocol,
    Workload, WorkloadType,
    workload::{Account, AccountNames, Addresses, Place, Profile},
};

impl Converter<'_> {
    pub(super) fn workload(&mut self, given: &pb::Workload) -> Result<Workload, Invalid> {
        if given.uid.is_empty() {
            return Err(Invalid::Empty("uid"));
        }
        let addresses = addresses(&given.addresses)?;
        let health = match known(given.status, "status")? {
            pb::WorkloadStatus::Healthy => Health::Healthy,
            pb::WorkloadStatus::Unhealthy => Health::Unhealthy,
        };
        let (text, uid_end, name_start) = text(&given.uid, &given.name)?;
        let profile = self.profile(given)?;
        Ok(Workload {
            text,
            uid_end,
            name_start,
            profile: self.pool.profiles.intern(profile),
            place: self.place(given),
            addresses,
            capacity: given.capacity.unwrap_or(1),
            health,
        })
    }

    fn profile(&mut self, given: &pb::Workload) -> Result<Profile, Invalid> {
        let links = self.links(given)?;
        let policies = given.authorization_policies.iter();
        let policies = policies.map(|key| self.pool.string(key)).collect();
        Ok(Profile {
            account: self.account(given),
            network: self.pool.string(&given.network),
            hostname: self.pool.string(&given.hostname),
            canonical_name: self.pool.string(&given.canonical_name),
            canonical_revision: self.pool.string(&given.canonical_revision),
            workload_name: self.pool.string(&given.workload_name),
            cluster_id: self.pool.string(or(&given.cluster_id, "Kubernetes")),
            links,
            policies,
            waypoint: self.optional_gateway(given.waypoint.as_ref(), "waypoint")?,
            network_gateway: self
                .optional_gateway(given.network_gateway.as_ref(), "network_gateway")?,
            application_tunnel: given.application_tunnel.as_ref().map(tunnel).transpose()?,
            workload_type: workload_type(given.workload_type),
            protocol: protocol(given.tunnel_protocol)?,
            network_mode: match known(given.network_mode, "network_mode")? {
                pb::NetworkMode::Standard => NetworkMode::Standard,
                pb::NetworkMode::HostNetwork => NetworkMode::HostNetwork,
            },
            native_tunnel: given.native_tunnel,
        })
    }

    fn links(&mut self, given: &pb::Workload) -> Result<Box<[Link]>, Invalid> {
        let mut links = Vec::with_capacity(given.services.len());
        for (key, ports) in &given.services {
            if !key.contains('/') {
                return Err(Invalid::ServiceKey(key.clone()));
            }
            links.push(Link {
                service: self.pool.string(key),
                ports: self.ports(&ports.ports)?,
            });
        }
        links.sort_unstable_by(|one, other| one.service.cmp(&other.service));
        Ok(links.into())
    }

    fn account(&mut self, given: &pb::Workload) -> Arc<Account> {
        let names = AccountNames {
            trust_domain: or(&given.trust_domain, "cluster.local"),
            namespace: &given.namespace,
            service_account: or(&given.service_account, "default"),
        };
        let strings = &mut self.pool.strings;
        self.pool.accounts.intern_by(&names, || {
            let identity =
                SpiffeId::new(names.trust_domain, names.namespace, names.service_account);
            Arc::new(Account {
                trust_domain: strings.intern(names.trust_domain),
                namespace: strings.intern(names.namespace),
                service_account: strings.intern(names.service_account),
                identity: identity.ok(),
            })
        })
    }

    fn place(&mut self, given: &pb::Workload) -> Arc<Place> {
        let nowhere = pb::Locality::default();
        let locality = given.locality.as_ref().unwrap_or(&nowhere);
        let place = Place {
            node: self.pool.string(&given.node),
            region: self.pool.string(&locality.region),
            zone: self.pool.string(&locality.zone),
            subzone: self.pool.string(&locality.subzone),
        };
        self.pool.places.intern(place)
    }

    fn optional_gateway(
        &mut self,
        given: Option<&pb::GatewayAddress>,
        field: &'static str,
    ) -> Result<Option<Arc<GatewayAddress>>, Invalid> {
        let gateway = given.map(|given| self.gateway(given, field)).transpose()?;
        Ok(gateway.map(Arc::new))
    }
}

/// One text for uid and name: the name is nearly always the end of the uid.
fn text(uid: &str, name: &str) -> Result<(Box<str>, u32, u32), Invalid> {
    let offset = |at| u32::try_from(at).map_err(|_| Invalid::TooLong("uid"));
    let uid_end = offset(uid.len())?;
    if uid.ends_with(name) {
        return Ok((uid.into(), uid_end, offset(uid.len() - name.len())?));
    }
    offset(uid.len().saturating_add(name.len()))?;
    Ok(([uid, name].concat().into(), uid_end, uid_end))
}

fn addresses(given: &[Vec<u8>]) -> Result<Addresses, Invalid> {
    let mut ips: Vec<IpAddr> = Vec::with_capacity(given.len());
    for bytes in given {
        let ip = ip(bytes, "addresses")?;
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    Ok(match ips[..] {
        [ip] => Addresses::One(ip),
        _ => Addresses::Other(ips.into()),
    })
}

fn protocol(value: i32) -> Result<Protocol, Invalid> {
    let field = "tunnel_protocol";
    match known(value, field)? {
        pb::TunnelProtocol::None => Ok(Protocol::Tcp),
        pb::TunnelProtocol::Hbone => Ok(Protocol::Hbone),
        pb::TunnelProtocol::LegacyIstioMtls => Err(Invalid::Value { field, value }),
    }
}

fn tunnel(given: &pb::ApplicationTunnel) -> Result<ApplicationTunnel, Invalid> {
    let field = "application_tunnel";
    let number = port(given.port, field)?;
    Ok(ApplicationTunnel {
        protocol: match known(given.protocol, field)? {
            pb::application_tunnel::Protocol::None => TunnelProtocol::None,
            pb::application_tunnel::Protocol::Proxy => TunnelProtocol::Proxy,
        },
        port: (number != 0).then_some(number),
    })
}

fn workload_type(value: i32) -> WorkloadType {
    match pb::WorkloadType::try_from(value) {
        Ok(pb::WorkloadType::Cronjob) => WorkloadType::CronJob,
        Ok(pb::WorkloadType::Pod) => WorkloadType::Pod,
        Ok(pb::WorkloadType::Job) => WorkloadType::Job,
        Ok(pb::WorkloadType::Deployment) | Err(_) => WorkloadType::Deployment,
    }
}

fn or<'a>(given: &'a str, default: &'a str) -> &'a str {
    if given.is_empty() { default } else { given }
}
