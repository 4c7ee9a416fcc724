//! Small meshes for the tests of this room, built from what a control plane sends, and decisions
//! as one line of text.

use std::{net::IpAddr, sync::Arc};

use prost::Message;
use rand::{SeedableRng, rngs::SmallRng};
use xds_client::{
    Batch, Extent, Kind,
    proto::{discovery::Resource, workload as wire},
};

use super::{LoopGuard, Outbound, OutboundQuery, Via, outbound};
use crate::mesh::{Mesh, View, Workload};

/// A mesh, seen from the pod `client` (10.0.0.1, namespace `default`) on network `net`.
pub(super) struct World {
    pub(super) mesh: Mesh,
    rng: SmallRng,
}

impl World {
    pub(super) fn new(
        services: impl IntoIterator<Item = wire::Service>,
        workloads: impl IntoIterator<Item = wire::Workload>,
    ) -> Self {
        let mesh = Mesh::new(View {
            node_name: Some("node1".into()),
            network: "net".into(),
            cluster_id: "Kubernetes".into(),
        });
        let world = Self {
            mesh,
            rng: SmallRng::seed_from_u64(42),
        };
        world.add(services, [pod("client", "10.0.0.1")]);
        world.add([], workloads);
        world
    }

    pub(super) fn add(
        &self,
        services: impl IntoIterator<Item = wire::Service>,
        workloads: impl IntoIterator<Item = wire::Workload>,
    ) {
        use wire::address::Type;
        let services = services.into_iter().map(Type::Service);
        let workloads = workloads.into_iter().map(Type::Workload);
        let addresses = services
            .chain(workloads)
            .map(|kind| wire::Address { r#type: Some(kind) });
        let encoded = addresses.map(|one| Resource::new("", "", &one).encode_to_vec().into());
        let batch = Batch::new(
            Kind::Address,
            Extent::Changes,
            encoded.collect(),
            Vec::new(),
        );
        let report = self.mesh.apply(&batch);
        assert!(report.rejected.is_empty(), "{report:?}");
    }

    pub(super) fn workload(&self, name: &str) -> Arc<Workload> {
        Arc::clone(self.mesh.read().workload(&uid(name)).unwrap())
    }

    pub(super) fn decide_from(&mut self, source: &str, ip: &str, destination: &str) -> Outbound {
        self.decide_without(&[], (source, ip), destination)
    }

    fn decide_without(
        &mut self,
        avoid: &[Arc<Workload>],
        (source, ip): (&str, &str),
        destination: &str,
    ) -> Outbound {
        let source = self.workload(source);
        let ask = OutboundQuery {
            source: &source,
            source_ip: ip.parse().unwrap(),
            destination: destination.parse().unwrap(),
            avoid,
        };
        outbound(
            &self.mesh.read(),
            &LoopGuard::default(),
            &ask,
            &mut self.rng,
        )
    }

    pub(super) fn decide(&mut self, destination: &str) -> Outbound {
        self.decide_from("client", "10.0.0.1", destination)
    }

    /// The decision for a connection of `client`, as text.
    pub(super) fn ask(&mut self, destination: &str) -> String {
        show(&self.decide(destination))
    }

    /// As [`ask`](Self::ask), after these endpoints were tried in vain.
    pub(super) fn ask_without(&mut self, tried: &[Arc<Workload>], destination: &str) -> String {
        show(&self.decide_without(tried, ("client", "10.0.0.1"), destination))
    }

    /// How often each answer comes in `rounds` connections.
    pub(super) fn tally(&mut self, destination: &str, rounds: usize) -> Vec<(String, usize)> {
        let mut tally = std::collections::BTreeMap::new();
        for _ in 0..rounds {
            *tally.entry(self.ask(destination)).or_default() += 1;
        }
        tally.into_iter().collect()
    }
}

pub(super) fn show(outbound: &Outbound) -> String {
    let names = |expected: &[cert_agent::SpiffeId]| {
        let names: Vec<_> = expected.iter().map(|id| id.service_account()).collect();
        names.join(",")
    };
    let hop = |hop: &super::Hop| {
        let via = match hop.via {
            Via::Workload => "hbone",
            Via::Waypoint => "waypoint",
            Via::Gateway => "gateway",
        };
        format!(
            "{via} {} for {} expects {}",
            hop.to,
            hop.authority,
            names(&hop.expected)
        )
    };
    match outbound {
        Outbound::Passthrough { to, .. } => format!("passthrough {to}"),
        Outbound::Direct { to, .. } => format!("direct {to}"),
        Outbound::Hbone(only) => hop(only),
        Outbound::Nested { outer, inner } => {
            format!(
                "{}; inner for {} expects {}",
                hop(outer),
                inner.authority,
                names(&inner.expected)
            )
        }
        Outbound::Resolve(lookup) => format!("resolve {}", lookup.hostname()),
        Outbound::Refuse(refusal) => format!("refused: {refusal}"),
    }
}

pub(super) fn uid(name: &str) -> String {
    format!("Kubernetes//Pod/default/{name}")
}

pub(super) fn bytes(ip: &str) -> Vec<u8> {
    match ip.parse::<IpAddr>().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A healthy HBONE pod of namespace `default` with a service account of its own name.
pub(super) fn pod(name: &str, ip: &str) -> wire::Workload {
    wire::Workload {
        uid: uid(name),
        name: name.into(),
        namespace: "default".into(),
        addresses: vec![bytes(ip)],
        network: "net".into(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        trust_domain: "cluster.local".into(),
        service_account: name.into(),
        node: "node1".into(),
        cluster_id: "Kubernetes".into(),
        workload_type: wire::WorkloadType::Pod.into(),
        ..Default::default()
    }
}

/// A service of namespace `default` with the host name `<name>.default.svc.cluster.local`.
pub(super) fn service(name: &str, vip: &str, ports: &[(u32, u32)]) -> wire::Service {
    wire::Service {
        name: name.into(),
        namespace: "default".into(),
        hostname: host(name),
        addresses: vec![at("net", vip)],
        ports: port_list(ports),
        ..Default::default()
    }
}

pub(super) fn host(name: &str) -> String {
    format!("{name}.default.svc.cluster.local")
}

pub(super) fn at(network: &str, ip: &str) -> wire::NetworkAddress {
    wire::NetworkAddress {
        network: network.into(),
        address: bytes(ip),
        length: None,
    }
}

pub(super) fn port_list(ports: &[(u32, u32)]) -> Vec<wire::Port> {
    let port = |(service_port, target_port): &(u32, u32)| wire::Port {
        service_port: *service_port,
        target_port: *target_port,
        ..Default::default()
    };
    ports.iter().map(port).collect()
}

/// A reference to a waypoint or gateway by the host name of its service.
pub(super) fn by_name(name: &str) -> wire::GatewayAddress {
    let hostname = wire::NamespacedHostname {
        namespace: "default".into(),
        hostname: host(name),
    };
    wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Hostname(hostname)),
        hbone_mtls_port: 15008,
    }
}

/// A reference to a waypoint or gateway by address.
pub(super) fn by_ip(network: &str, ip: &str) -> wire::GatewayAddress {
    wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Address(at(network, ip))),
        hbone_mtls_port: 15008,
    }
}

/// `value` after `change`.
pub(super) fn with<T>(mut value: T, change: impl FnOnce(&mut T)) -> T {
    change(&mut value);
    value
}

/// `workload` as an endpoint of the service `name`, with these port mappings of its own.
pub(super) fn of(workload: wire::Workload, name: &str, ports: &[(u32, u32)]) -> wire::Workload {
    with(workload, |workload| {
        let list = wire::PortList {
            ports: port_list(ports),
        };
        let key = format!("default/{}", host(name));
        workload.services.insert(key, list);
    })
}
