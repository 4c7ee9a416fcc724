//! The shape of the file.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error},
};
use serde_yaml_ng::Value;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Root {
    pub(super) workloads: Vec<Value>,
    pub(super) services: Vec<Value>,
    pub(super) policies: Vec<Value>,
}

/// The name of a resource, as far as it can be told before the record is read.
pub(super) fn name(list: &str, value: &Value) -> Option<String> {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
    let (first, second) = match list {
        "workloads" if !text("uid").is_empty() => return Some(text("uid").to_owned()),
        "workloads" => {
            return default_uid(text("clusterId"), text("namespace"), text("name"));
        }
        "services" => (text("namespace"), text("hostname")),
        _ => (text("namespace"), text("name")),
    };
    (!second.is_empty()).then(|| format!("{first}/{second}"))
}

/// The uid that a pod of this name would have.
pub(super) fn default_uid(cluster: &str, namespace: &str, name: &str) -> Option<String> {
    let cluster = if cluster.is_empty() {
        "Kubernetes"
    } else {
        cluster
    };
    (!name.is_empty()).then(|| format!("{cluster}//Pod/{namespace}/{name}"))
}

/// Service port to target port; keys may be quoted, as JSON asks for it.
pub(super) type Ports = BTreeMap<Port, u32>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Port(pub(super) u32);

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a port number")]
        enum Form {
            Number(u32),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number) => Ok(Self(number)),
            Form::Text(text) => text.parse().map(Self).map_err(Error::custom),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Workload {
    pub(super) workload_ips: Vec<IpAddr>,
    pub(super) namespace: String,
    pub(super) services: BTreeMap<String, Ports>,
    #[serde(default)]
    pub(super) uid: String,
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) trust_domain: String,
    #[serde(default)]
    pub(super) service_account: String,
    #[serde(default)]
    pub(super) network: String,
    #[serde(default)]
    pub(super) workload_name: String,
    #[serde(default)]
    pub(super) workload_type: String,
    #[serde(default)]
    pub(super) canonical_name: String,
    #[serde(default)]
    pub(super) canonical_revision: String,
    #[serde(default)]
    pub(super) hostname: String,
    #[serde(default)]
    pub(super) node: String,
    #[serde(default)]
    pub(super) cluster_id: String,
    #[serde(default)]
    pub(super) protocol: Protocol,
    #[serde(default)]
    pub(super) network_mode: NetworkMode,
    #[serde(default)]
    pub(super) status: Status,
    #[serde(default)]
    pub(super) native_tunnel: bool,
    pub(super) capacity: Option<u32>,
    #[serde(default)]
    pub(super) authorization_policies: Vec<String>,
    pub(super) locality: Option<Locality>,
    pub(super) waypoint: Option<Gateway>,
    pub(super) network_gateway: Option<Gateway>,
    pub(super) application_tunnel: Option<ApplicationTunnel>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) enum Protocol {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "HBONE")]
    Hbone,
}

#[derive(Debug, Default, Deserialize)]
pub(super) enum NetworkMode {
    #[default]
    Standard,
    HostNetwork,
}

#[derive(Debug, Default, Deserialize)]
pub(super) enum Status {
    #[default]
    Healthy,
    Unhealthy,
}

#[derive(Debug, Deserialize)]
pub(super) struct Locality {
    pub(super) region: String,
    pub(super) zone: String,
    pub(super) subzone: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Gateway {
    /// `network/ip` or `namespace/hostname`.
    pub(super) destination: String,
    pub(super) hbone_mtls_port: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ApplicationTunnel {
    pub(super) protocol: TunnelProtocol,
    pub(super) port: Option<u32>,
}

#[derive(Debug, Deserialize)]
pub(super) enum TunnelProtocol {
    #[serde(rename = "NONE")]
    None,
    #[serde(rename = "PROXY")]
    Proxy,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) hostname: String,
    pub(super) vips: Vec<String>,
    pub(super) ports: Ports,
    #[serde(default)]
    pub(super) cidr_vips: Vec<CidrVip>,
    #[serde(default)]
    pub(super) endpoints: BTreeMap<String, Endpoint>,
    #[serde(default)]
    pub(super) subject_alt_names: Vec<String>,
    pub(super) waypoint: Option<Gateway>,
    #[serde(default)]
    pub(super) weighted_waypoints: Vec<WeightedWaypoint>,
    pub(super) load_balancer: Option<LoadBalancer>,
    pub(super) ip_families: Option<IpFamilies>,
    #[serde(default)]
    pub(super) canonical: bool,
    #[serde(default)]
    pub(super) visibility: Visibility,
}

#[derive(Debug, Deserialize)]
pub(super) struct CidrVip {
    #[serde(default)]
    pub(super) network: String,
    pub(super) cidr: Range,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Endpoint {
    #[serde(default)]
    pub(super) workload_uid: String,
    #[serde(default)]
    pub(super) port: Ports,
    #[serde(default, rename = "status")]
    pub(super) _status: Status,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WeightedWaypoint {
    pub(super) destination: Gateway,
    pub(super) weight: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct LoadBalancer {
    pub(super) routing_preferences: Vec<Scope>,
    pub(super) mode: Mode,
    pub(super) health_policy: HealthPolicy,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) enum Scope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) enum Mode {
    Standard,
    Strict,
    Failover,
    Passthrough,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) enum HealthPolicy {
    OnlyHealthy,
    AllowAll,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) enum IpFamilies {
    Dual,
    #[serde(rename = "IPv4")]
    Ipv4,
    #[serde(rename = "IPv6")]
    Ipv6,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(super) enum Visibility {
    #[default]
    Public,
    Namespace,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Policy {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) scope: PolicyScope,
    pub(super) action: Action,
    pub(super) dry_run: bool,
    /// Rules of clauses of matches.
    pub(super) rules: Vec<Vec<Vec<Match>>>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) enum PolicyScope {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) enum Action {
    Allow,
    Deny,
}

/// A misspelt key would leave a condition out and let more through than was meant, so unknown keys are refused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub(super) struct Match {
    pub(super) namespaces: Vec<StringMatch>,
    pub(super) not_namespaces: Vec<StringMatch>,
    pub(super) principals: Vec<StringMatch>,
    pub(super) not_principals: Vec<StringMatch>,
    pub(super) service_accounts: Vec<ServiceAccount>,
    pub(super) not_service_accounts: Vec<ServiceAccount>,
    pub(super) source_ips: Vec<Range>,
    pub(super) not_source_ips: Vec<Range>,
    pub(super) destination_ips: Vec<Range>,
    pub(super) not_destination_ips: Vec<Range>,
    pub(super) destination_ports: Vec<u32>,
    pub(super) not_destination_ports: Vec<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct ServiceAccount {
    pub(super) namespace: String,
    pub(super) service_account: String,
}

/// A range, or one address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range(pub(super) IpNet);

impl<'de> Deserialize<'de> for Range {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let host = text.parse::<IpAddr>().map(IpNet::from);
        let range = host.or_else(|_| text.parse::<IpNet>());
        range
            .map(Self)
            .map_err(|error| Error::custom(format!("`{text}`: {error}")))
    }
}

/// `!Exact x` or `{Exact: x}`, and so on.
#[derive(Debug)]
pub(super) enum StringMatch {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Presence,
}

impl<'de> Deserialize<'de> for StringMatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected =
            || Error::custom("a string match is one of !Exact, !Prefix, !Suffix, !Presence");
        let (kind, value) = match Value::deserialize(deserializer)? {
            Value::Tagged(tagged) => (tagged.tag.to_string(), tagged.value),
            Value::Mapping(map) if map.len() == 1 => {
                let (kind, value) = map.into_iter().next().ok_or_else(expected)?;
                (kind.as_str().ok_or_else(expected)?.to_owned(), value)
            }
            Value::Mapping(_)
            | Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Sequence(_) => return Err(expected()),
        };
        match kind.trim_start_matches('!') {
            "Exact" => inner(value).map(Self::Exact),
            "Prefix" => inner(value).map(Self::Prefix),
            "Suffix" => inner(value).map(Self::Suffix),
            "Presence" if value.is_null() => Ok(Self::Presence),
            "Presence" => inner::<[(); 0], _>(value).map(|_| Self::Presence),
            _ => Err(expected()),
        }
    }
}

fn inner<T: DeserializeOwned, E: Error>(value: Value) -> Result<T, E> {
    serde_yaml_ng::from_value(value).map_err(Error::custom)
}
