//! What reads the config dump: the types into which istioctl and Kiali decode it.
//!
//! Both are Go programs. There, an unknown key is ignored, a missing key or `null` leaves the zero value, and a value of
//! another type fails the whole document. So every field here is optional and of exactly one type.

use std::collections::BTreeMap;

use serde::Deserialize;

type Map<T> = BTreeMap<String, T>;

/// Decodes a dump as istioctl does.
///
/// # Errors
/// When istioctl would show nothing but an error.
pub fn istioctl(dump: &str) -> serde_json::Result<istioctl::Dump> {
    serde_json::from_str(dump)
}

/// Decodes a dump as Kiali does.
///
/// # Errors
/// When Kiali would go blank.
pub fn kiali(dump: &str) -> serde_json::Result<kiali::Dump> {
    serde_json::from_str(dump)
}

/// A waypoint or gateway.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the keys of the dump")]
pub struct Gateway {
    pub destination: Option<String>,
    pub hbone_mtls_port: Option<u32>,
}

/// One certificate of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the keys of the dump")]
pub struct CertificateElement {
    pub pem: Option<String>,
    pub serial_number: Option<String>,
    pub valid_from: Option<String>,
    pub expiration_time: Option<String>,
}

/// The certificates of one identity.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the keys of the dump")]
pub struct Certificate {
    pub identity: Option<String>,
    pub state: Option<String>,
    pub cert_chain: Option<Vec<CertificateElement>>,
    pub root_certs: Option<Vec<CertificateElement>>,
}

/// An endpoint of a service.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the keys of the dump")]
pub struct Endpoint {
    pub workload_uid: Option<String>,
    pub port: Option<Map<u16>>,
    pub status: Option<String>,
}

/// The types of istioctl.
#[allow(missing_docs, reason = "the keys of the dump")]
pub mod istioctl {
    use super::{Certificate, Deserialize, Endpoint, Gateway, Map};

    #[derive(Debug, Clone, PartialEq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Dump {
        pub workloads: Option<Vec<Workload>>,
        pub services: Option<Vec<Service>>,
        pub policies: Option<Vec<Policy>>,
        pub certificates: Option<Vec<Certificate>>,
        pub workload_state: Option<Map<WorkloadState>>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Workload {
        pub workload_ips: Option<Vec<String>>,
        pub waypoint: Option<Gateway>,
        pub network_gateway: Option<Gateway>,
        pub protocol: Option<String>,
        pub network_mode: Option<String>,
        pub name: Option<String>,
        pub namespace: Option<String>,
        pub service_account: Option<String>,
        pub workload_name: Option<String>,
        pub workload_type: Option<String>,
        pub canonical_name: Option<String>,
        pub canonical_revision: Option<String>,
        pub cluster_id: Option<String>,
        pub trust_domain: Option<String>,
        pub locality: Option<Locality>,
        pub node: Option<String>,
        pub network: Option<String>,
        pub hostname: Option<String>,
        pub uid: Option<String>,
        pub status: Option<String>,
        pub capacity: Option<u32>,
        pub native_tunnel: Option<bool>,
        pub application_tunnel: Option<ApplicationTunnel>,
        pub authorization_policies: Option<Vec<String>>,
        pub services: Option<Vec<String>>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    pub struct Locality {
        pub region: Option<String>,
        pub zone: Option<String>,
        pub subzone: Option<String>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    pub struct ApplicationTunnel {
        pub protocol: Option<String>,
        pub port: Option<u16>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Service {
        pub name: Option<String>,
        pub namespace: Option<String>,
        pub hostname: Option<String>,
        pub vips: Option<Vec<String>>,
        pub cidr_vips: Option<Vec<CidrVip>>,
        pub ports: Option<Map<u16>>,
        pub load_balancer: Option<LoadBalancer>,
        pub waypoint: Option<Gateway>,
        pub weighted_waypoints: Option<Vec<WeightedWaypoint>>,
        pub endpoints: Option<Map<Endpoint>>,
        pub subject_alt_names: Option<Vec<String>>,
        pub ip_families: Option<String>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    pub struct CidrVip {
        pub network: Option<String>,
        pub cidr: Option<String>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    pub struct WeightedWaypoint {
        pub destination: Option<Gateway>,
        pub weight: Option<u32>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct LoadBalancer {
        pub mode: Option<String>,
        pub routing_preferences: Option<Vec<String>>,
        pub health_policy: Option<String>,
    }

    #[derive(Debug, Clone, PartialEq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Policy {
        pub name: Option<String>,
        pub namespace: Option<String>,
        pub scope: Option<String>,
        pub action: Option<String>,
        pub dry_run: Option<bool>,
        pub rules: Option<Vec<Vec<Vec<Match>>>>,
    }

    #[derive(Debug, Clone, PartialEq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Match {
        pub namespaces: Option<Vec<StringMatch>>,
        pub not_namespaces: Option<Vec<StringMatch>>,
        pub principals: Option<Vec<StringMatch>>,
        pub not_principals: Option<Vec<StringMatch>>,
        pub service_accounts: Option<Vec<ServiceAccount>>,
        pub not_service_accounts: Option<Vec<ServiceAccount>>,
        pub source_ips: Option<Vec<String>>,
        pub not_source_ips: Option<Vec<String>>,
        pub destination_ips: Option<Vec<String>>,
        pub not_destination_ips: Option<Vec<String>>,
        pub destination_ports: Option<Vec<u16>>,
        pub not_destination_ports: Option<Vec<u16>>,
    }

    /// Exactly one of these.
    #[derive(Debug, Clone, PartialEq, Deserialize)]
    #[non_exhaustive]
    pub enum StringMatch {
        Exact(String),
        Prefix(String),
        Suffix(String),
        Presence([(); 0]),
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct ServiceAccount {
        pub namespace: Option<String>,
        pub service_account: Option<String>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    pub struct WorkloadState {
        pub state: Option<String>,
        pub info: Option<Info>,
        pub connections: Option<Connections>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Info {
        pub name: Option<String>,
        pub namespace: Option<String>,
        pub trust_domain: Option<String>,
        pub service_account: Option<String>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    pub struct Connections {
        pub inbound: Option<Vec<Connection>>,
        pub outbound: Option<Vec<Connection>>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Connection {
        pub src: Option<String>,
        pub original_dst: Option<String>,
        pub actual_dst: Option<String>,
        pub protocol: Option<String>,
    }
}

/// The types of Kiali.
#[allow(missing_docs, reason = "the keys of the dump")]
pub mod kiali {
    use super::{Certificate, Deserialize, Endpoint, Gateway, Map};

    #[derive(Debug, Clone, PartialEq, Deserialize)]
    pub struct Dump {
        pub workloads: Option<Vec<Workload>>,
        pub services: Option<Vec<Service>>,
        pub policies: Option<Vec<serde_json::Value>>,
        pub certificates: Option<Vec<Certificate>>,
        pub config: Option<Config>,
        pub version: Option<Map<String>>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Workload {
        pub name: Option<String>,
        pub namespace: Option<String>,
        pub uid: Option<String>,
        pub node: Option<String>,
        pub protocol: Option<String>,
        pub status: Option<String>,
        pub cluster_id: Option<String>,
        pub network_mode: Option<String>,
        pub service_account: Option<String>,
        pub trust_domain: Option<String>,
        pub canonical_name: Option<String>,
        pub canonical_revision: Option<String>,
        pub workload_name: Option<String>,
        pub workload_type: Option<String>,
        pub workload_ips: Option<Vec<String>>,
        pub services: Option<Vec<String>>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Service {
        pub name: Option<String>,
        pub namespace: Option<String>,
        pub hostname: Option<String>,
        /// Mapped over: never null.
        pub vips: Vec<String>,
        pub ports: Option<Map<i64>>,
        /// Iterated: never null.
        pub endpoints: Map<Endpoint>,
        pub subject_alt_names: Option<Vec<String>>,
        pub ip_families: Option<String>,
        pub waypoint: Option<Gateway>,
    }

    /// A number of seconds, or its parts.
    #[derive(Debug, Clone, PartialEq, Deserialize)]
    #[serde(untagged)]
    #[non_exhaustive]
    pub enum Span {
        Parts { secs: i64, nanos: i64 },
        Seconds(f64),
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub struct Localhost {
        pub localhost: Option<(bool, u16)>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub struct Address {
        pub socket_addr: Option<String>,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub struct RootCert {
        pub file: Option<String>,
    }

    #[derive(Debug, Clone, PartialEq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Config {
        pub ca_address: Option<String>,
        pub cluster_domain: Option<String>,
        pub cluster_id: Option<String>,
        pub inbound_addr: Option<String>,
        pub inbound_plaintext_addr: Option<String>,
        pub inpod_uds: Option<String>,
        pub local_node: Option<String>,
        pub network: Option<String>,
        pub outbound_addr: Option<String>,
        pub proxy_args: Option<String>,
        pub proxy_mode: Option<String>,
        pub xds_address: Option<String>,
        pub alt_ca_hostname: Option<String>,
        pub alt_xds_hostname: Option<String>,
        pub proxy_workload_information: Option<String>,
        pub require_original_source: Option<String>,
        pub socks5_addr: Option<String>,
        pub connection_window_size: Option<i64>,
        pub frame_size: Option<i64>,
        pub window_size: Option<i64>,
        pub num_worker_threads: Option<i64>,
        pub packet_mark: Option<i64>,
        pub pool_max_streams_per_conn: Option<i64>,
        pub dns_proxy: Option<bool>,
        pub fake_ca: Option<bool>,
        pub fake_self_inbound: Option<bool>,
        pub inpod_port_reuse: Option<bool>,
        pub proxy: Option<bool>,
        pub xds_on_demand: Option<bool>,
        pub illegal_ports: Option<Vec<i64>>,
        pub proxy_metadata: Option<Map<String>>,
        pub pool_unused_release_timeout: Option<Span>,
        pub secret_ttl: Option<Span>,
        pub self_termination_deadline: Option<Span>,
        pub admin_addr: Option<Localhost>,
        pub dns_proxy_addr: Option<Localhost>,
        pub readiness_addr: Option<Address>,
        pub stats_addr: Option<Address>,
        pub ca_root_cert: Option<RootCert>,
        pub xds_root_cert: Option<RootCert>,
        pub dns_resolver_cfg: Option<ResolverCfg>,
        pub dns_resolver_opts: Option<Map<serde_json::Value>>,
    }

    #[derive(Debug, Clone, PartialEq, Deserialize)]
    pub struct ResolverCfg {
        pub domain: Option<String>,
        pub search: Option<Vec<String>>,
        pub name_servers: Option<Vec<Map<serde_json::Value>>>,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What broke these readers before: other types, and null where an array is walked.
    #[test]
    fn what_breaks_the_readers_is_refused() {
        for broken in [
            r#"{"config": {"caRootCert": "Default"}}"#,
            r#"{"config": {"requireOriginalSource": true}}"#,
            r#"{"config": {"proxyWorkloadInformation": {"name": "a"}}}"#,
            r#"{"config": {"adminAddr": "127.0.0.1:15000"}}"#,
            r#"{"config": {"windowSize": "4194304"}}"#,
            r#"{"config": {"secretTtl": "24h"}}"#,
            r#"{"services": [{"vips": null, "endpoints": {}}]}"#,
            r#"{"services": [{"vips": [], "endpoints": null}]}"#,
            r#"{"workloads": [{"services": {"a/b": {}}}]}"#,
        ] {
            assert!(kiali(broken).is_err(), "{broken}");
        }
        assert!(istioctl(r#"{"workloads": [{"capacity": "1"}]}"#).is_err());
        assert!(
            istioctl(r#"{"policies": [{"rules": [[[{"principals": [{"exact": "a"}]}]]]}]}"#)
                .is_err()
        );
        let unknown =
            r#"{"new": 1, "config": {"new": [], "adminAddr": {"SocketAddr": "[::1]:15000"}}}"#;
        assert!(kiali(unknown).is_ok() && istioctl(unknown).is_ok());
    }
}
