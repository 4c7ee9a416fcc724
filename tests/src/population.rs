//! The workloads and services of a large cluster, as istiod describes them: for benchmarks, and tests of what a workload costs.

use std::{collections::HashMap, net::Ipv4Addr};

use xds_client::{local::Document, proto::workload as pb};

/// Pods of typical size: uid of 63 bytes, name of 25, one address, one service of two ports, locality. Ten make a deployment
/// with a service, two hundred a namespace, thirty a node.
#[derive(Debug, Clone)]
pub struct Population {
    pods: u32,
    revision: String,
}

impl Population {
    /// So many pods, and a service for each ten of them.
    #[must_use]
    pub fn new(pods: u32) -> Self {
        Self {
            pods,
            revision: "v1".to_owned(),
        }
    }

    /// The same pods with another canonical revision; `v1` unless set.
    #[must_use]
    pub fn revision(self, revision: &str) -> Self {
        Self {
            revision: revision.to_owned(),
            ..self
        }
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = pb::Workload> {
        (0..self.pods).map(|number| self.pod(number))
    }

    /// All services.
    pub fn services(&self) -> impl Iterator<Item = pb::Service> {
        (0..self.pods.div_ceil(REPLICAS)).map(|number| self.service(number))
    }

    /// Everything, pods first.
    #[must_use]
    pub fn document(&self) -> Document {
        let pods = self.pods().map(pb::Address::from);
        let services = self.services().map(pb::Address::from);
        Document {
            addresses: pods.chain(services).collect(),
            ..Document::default()
        }
    }

    /// One pod.
    #[must_use]
    pub fn pod(&self, number: u32) -> pb::Workload {
        let deployment = number / REPLICAS;
        let owner = format!("checkout-{deployment:05}");
        let name = format!("{owner}-{:05x}{number:05x}", deployment * 31);
        let namespace = format!("team-payments-{:03}", deployment / 20);
        let ip = Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 0).to_bits() + number);
        let ports = pb::PortList {
            ports: vec![port(80, 8080), port(9090, 9090)],
        };
        let nodes = (self.pods / PODS_PER_NODE).max(1);
        pb::Workload {
            uid: format!("cluster-east-1//Pod/{namespace}/{name}"),
            name,
            namespace: namespace.clone(),
            addresses: vec![ip.octets().to_vec()],
            network: "network-1".into(),
            tunnel_protocol: pb::TunnelProtocol::Hbone.into(),
            service_account: owner.clone(),
            node: format!("ip-10-1-2-{:04}.compute.internal", number % nodes),
            canonical_name: owner.clone(),
            canonical_revision: self.revision.clone(),
            workload_type: pb::WorkloadType::Pod.into(),
            workload_name: owner.clone(),
            services: HashMap::from([(
                format!("{namespace}/{owner}.{namespace}.svc.cluster.local"),
                ports,
            )]),
            cluster_id: "cluster-east-1".into(),
            locality: Some(pb::Locality {
                region: "eu-central-1".into(),
                zone: format!("eu-central-1{}", number % 3),
                subzone: String::new(),
            }),
            ..pb::Workload::default()
        }
    }

    /// The service of a deployment.
    ///
    /// # Panics
    /// Never: every pod has a service.
    #[must_use]
    pub fn service(&self, number: u32) -> pb::Service {
        let pod = self.pod(number * REPLICAS);
        let key = pod.services.keys().next().expect("the pod's service");
        let (namespace, hostname) = key.split_once('/').expect("namespace/hostname");
        let ip = Ipv4Addr::from_bits(Ipv4Addr::new(11, 0, 0, 0).to_bits() + number);
        pb::Service {
            name: pod.workload_name.clone(),
            namespace: namespace.into(),
            hostname: hostname.into(),
            addresses: vec![pb::NetworkAddress {
                network: "network-1".into(),
                address: ip.octets().to_vec(),
                length: None,
            }],
            ports: vec![port(80, 8080), port(9090, 9090)],
            ..pb::Service::default()
        }
    }
}

fn port(service_port: u32, target_port: u32) -> pb::Port {
    pb::Port {
        service_port,
        target_port,
        app_protocol: 0,
    }
}

/// Pods per service and deployment.
const REPLICAS: u32 = 10;
/// Pods per node.
const PODS_PER_NODE: u32 = 30;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn pods_are_distinct_of_typical_size_and_their_services_exist() {
        let population = Population::new(1_234);
        let pods: Vec<_> = population.pods().collect();
        let services: HashSet<String> = population
            .services()
            .map(|service| format!("{}/{}", service.namespace, service.hostname))
            .collect();
        assert_eq!((pods.len(), services.len()), (1_234, 124));
        let distinct =
            |key: fn(&pb::Workload) -> Vec<u8>| pods.iter().map(key).collect::<HashSet<_>>().len();
        assert_eq!(distinct(|pod| pod.uid.clone().into()), pods.len());
        assert_eq!(distinct(|pod| pod.addresses[0].clone()), pods.len());
        for pod in &pods {
            assert!(pod.uid.len() >= 63 && pod.name.len() >= 25, "{pod:?}");
            assert!(pod.services.keys().all(|key| services.contains(key)));
        }
    }
}
