//! Resources for tests.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
};

use bytes::Bytes;
use prost::Message;
use xds_client::{
    Batch, Extent, Kind,
    local::NamedPolicy,
    proto::{discovery::Resource, security, workload as pb},
};

use crate::mesh::{Mesh, Report, View};

/// Resources and removals of both kinds, as a control plane tells them in two responses.
#[derive(Debug, Clone, Default)]
pub(super) struct Update {
    pub(super) addresses: Vec<pb::Address>,
    pub(super) policies: Vec<NamedPolicy>,
    pub(super) removed_addresses: Vec<String>,
    pub(super) removed_policies: Vec<String>,
}

/// Applies an update; all counts of the report are sums.
pub(super) fn apply(mesh: &Mesh, extent: Extent, update: Update) -> Report {
    let [addresses, policies] = batches(extent, update);
    let mut report = mesh.apply(&addresses);
    let more = mesh.apply(&policies);
    report.rejected.extend(more.rejected);
    report.policies = more.policies;
    report
}

/// The two responses of an update.
pub(super) fn batches(extent: Extent, update: Update) -> [Batch; 2] {
    let told = update.addresses.iter().map(|address| {
        let name = match address.r#type.as_ref() {
            Some(pb::address::Type::Workload(workload)) => workload.uid.clone(),
            Some(pb::address::Type::Service(one)) => format!("{}/{}", one.namespace, one.hostname),
            None => String::new(),
        };
        let mut hasher = DefaultHasher::new();
        format!("{address:?}").hash(&mut hasher);
        encoded(&name, &format!("{:016x}", hasher.finish()), address)
    });
    let addresses = Batch::new(
        Kind::Address,
        extent,
        told.collect(),
        update.removed_addresses,
    );
    let told = update.policies.iter();
    let told = told.map(|one| encoded(&one.name, "", &one.policy));
    let policies = Batch::new(
        Kind::Authorization,
        extent,
        told.collect(),
        update.removed_policies,
    );
    [addresses, policies]
}

fn encoded(name: &str, version: &str, content: &impl Message) -> Bytes {
    Resource::new(name, version, content).encode_to_vec().into()
}

pub(super) fn mesh() -> Mesh {
    Mesh::new(View {
        node_name: Some("n1".into()),
        network: "".into(),
        cluster_id: "Kubernetes".into(),
    })
}

/// A workload of namespace `shop`, named as its uid ends, on another node.
pub(super) fn workload(uid: &str, ip: &str, edit: impl FnOnce(&mut pb::Workload)) -> pb::Workload {
    let mut workload = pb::Workload {
        uid: uid.into(),
        name: uid.rsplit('/').next().unwrap_or_default().into(),
        namespace: "shop".into(),
        node: "n2".into(),
        addresses: ip.parse().ok().map(octets).into_iter().collect(),
        ..pb::Workload::default()
    };
    edit(&mut workload);
    workload
}

pub(super) fn pod(uid: &str, ip: &str) -> pb::Workload {
    workload(uid, ip, |workload| workload.tunnel_protocol = 1)
}

pub(super) fn link(workload: &mut pb::Workload, service: &str, ports: &[(u32, u32)]) {
    let ports = pb::PortList {
        ports: port_list(ports),
    };
    workload.services.insert(service.into(), ports);
}

/// A service with port 80 on 8080.
pub(super) fn service(namespace: &str, hostname: &str, vips: &[&str]) -> pb::Service {
    pb::Service {
        name: hostname.split('.').next().unwrap_or_default().into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        addresses: vips.iter().map(|vip| network_address("", vip)).collect(),
        ports: port_list(&[(80, 8080)]),
        ..pb::Service::default()
    }
}

/// `ip` or `ip/length`.
pub(super) fn network_address(network: &str, text: &str) -> pb::NetworkAddress {
    let (ip, length) = match text.split_once('/') {
        Some((ip, length)) => (ip, Some(length.parse().unwrap())),
        None => (text, None),
    };
    pb::NetworkAddress {
        network: network.into(),
        address: octets(ip.parse().unwrap()),
        length,
    }
}

pub(super) fn policy(key: &str, scope: security::Scope) -> NamedPolicy {
    let (namespace, name) = key.split_once('/').unwrap();
    NamedPolicy {
        name: key.into(),
        policy: security::Authorization {
            name: name.into(),
            namespace: namespace.into(),
            scope: scope.into(),
            ..security::Authorization::default()
        },
    }
}

pub(super) fn put(mesh: &Mesh, addresses: impl IntoIterator<Item = pb::Address>) -> Report {
    let update = Update {
        addresses: addresses.into_iter().collect(),
        ..Update::default()
    };
    apply(mesh, Extent::Changes, update)
}

pub(super) fn remove(mesh: &Mesh, name: &str) -> Report {
    let update = Update {
        removed_addresses: vec![name.into()],
        ..Update::default()
    };
    apply(mesh, Extent::Changes, update)
}

pub(super) fn port_list(ports: &[(u32, u32)]) -> Vec<pb::Port> {
    let port = |(service_port, target_port): &(u32, u32)| pb::Port {
        service_port: *service_port,
        target_port: *target_port,
        app_protocol: 0,
    };
    ports.iter().map(port).collect()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().into(),
        IpAddr::V6(v6) => v6.octets().into(),
    }
}
