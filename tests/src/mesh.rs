//! The mesh as a file: workloads, services and policies in the local configuration format of the proxy.

use std::{collections::BTreeMap, fs, net::IpAddr, path::Path};

use anyhow::Context;
use serde::Serialize;
use serde_yaml_ng::Value;
use xds_client::local::Document;

use crate::world::Pod;

/// The whole document. Fields are plain: tests change what they like and write again.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Mesh {
    /// Pods and the like.
    pub workloads: Vec<Workload>,
    /// Services.
    pub services: Vec<Service>,
    /// Authorization policies.
    pub policies: Vec<Policy>,
}

/// Service port → target port.
pub type Ports = BTreeMap<u16, u16>;

/// One workload.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Primary key.
    pub uid: String,
    /// Pod name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Trust domain.
    pub trust_domain: String,
    /// Addresses.
    pub workload_ips: Vec<IpAddr>,
    /// `TCP` or `HBONE`.
    pub protocol: String,
    /// Node name.
    pub node: String,
    /// Cluster.
    pub cluster_id: String,
    /// For telemetry.
    pub canonical_name: String,
    /// For telemetry.
    pub canonical_revision: String,
    /// Controller name, for telemetry.
    pub workload_name: String,
    /// `deployment`, `pod`, …
    pub workload_type: String,
    /// `Healthy` or `Unhealthy`.
    pub status: String,
    /// Load-balancing weight.
    pub capacity: u32,
    /// `namespace/hostname` → ports of this endpoint.
    pub services: BTreeMap<String, Ports>,
    /// `namespace/name` of policies that select it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub authorization_policies: Vec<String>,
    /// Any further key, such as `waypoint` or `locality`.
    #[serde(flatten)]
    pub more: BTreeMap<String, Value>,
}

/// One service.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Short name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// `name.namespace.svc.cluster.local`.
    pub hostname: String,
    /// `network/ip`.
    pub vips: Vec<String>,
    /// Service port → target port.
    pub ports: Ports,
    /// Wins ties.
    pub canonical: bool,
    /// Any further key, such as `loadBalancer` or `waypoint`.
    #[serde(flatten)]
    pub more: BTreeMap<String, Value>,
}

/// One authorization policy.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: String,
    /// `Allow` or `Deny`.
    pub action: String,
    /// Only logged.
    pub dry_run: bool,
    /// Rules (or) of clauses (and) of matches (or).
    pub rules: Vec<Vec<Vec<Match>>>,
}

/// The innermost level of a policy; empty lists are left out.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Match {
    /// On the identity without its scheme.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<StringMatch>,
    /// Negated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<StringMatch>,
    /// On the identity's namespace.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<StringMatch>,
    /// Negated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_namespaces: Vec<StringMatch>,
    /// CIDRs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_ips: Vec<String>,
    /// Ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ports: Vec<u16>,
    /// Negated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ports: Vec<u16>,
}

/// A string test, written as a YAML tag.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub enum StringMatch {
    /// Equal.
    Exact(String),
    /// Starts with.
    Prefix(String),
    /// Ends with.
    Suffix(String),
    /// Not empty.
    Presence(Vec<()>),
}

impl Mesh {
    /// A mesh of these pods: captured ones speak HBONE, others TCP.
    #[must_use]
    pub fn of(pods: &[&Pod]) -> Self {
        Self {
            workloads: pods.iter().map(|pod| Workload::of(pod)).collect(),
            ..Self::default()
        }
    }

    /// Adds a pod.
    ///
    /// # Panics
    /// Never: what was pushed is there.
    pub fn pod(&mut self, pod: &Pod) -> &mut Workload {
        self.workloads.push(Workload::of(pod));
        self.workloads.last_mut().expect("pushed just now")
    }

    /// The record of a pod.
    ///
    /// # Panics
    /// When there is none.
    pub fn workload(&mut self, pod: &Pod) -> &mut Workload {
        let uid = workload_uid(pod);
        self.workloads
            .iter_mut()
            .find(|workload| workload.uid == uid)
            .expect("a workload of the mesh")
    }

    /// Adds service `name` of namespace `shop` at `vip`, backed by these pods on the same target ports.
    ///
    /// # Panics
    /// When a pod is not in the mesh.
    pub fn service(
        &mut self,
        name: &str,
        vip: IpAddr,
        ports: &[(u16, u16)],
        backends: &[&Pod],
    ) -> &mut Service {
        let namespace = "shop";
        let hostname = format!("{name}.{namespace}.svc.cluster.local");
        let ports: Ports = ports.iter().copied().collect();
        for pod in backends {
            self.workload(pod)
                .services
                .insert(format!("{namespace}/{hostname}"), ports.clone());
        }
        self.services.push(Service {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            hostname,
            vips: vec![format!("/{vip}")],
            ports,
            canonical: true,
            more: BTreeMap::new(),
        });
        self.services.last_mut().expect("pushed just now")
    }

    /// Adds a policy.
    pub fn policy(&mut self, policy: Policy) {
        self.policies.push(policy);
    }

    /// Writes the document in one step: a reader sees the old or the new one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_yaml_ng::to_string(self)?;
        let aside = path.with_extension("new");
        fs::write(&aside, text).with_context(|| aside.display().to_string())?;
        fs::rename(&aside, path).with_context(|| path.display().to_string())
    }
}

/// The mesh as a control plane has it.
///
/// # Panics
/// When it cannot be written as YAML.
impl From<&Mesh> for Document {
    fn from(mesh: &Mesh) -> Self {
        let text = serde_yaml_ng::to_string(mesh).expect("plain records");
        xds_client::local::parse(&text).expect("what was written just now")
    }
}

/// The mesh's key of a pod.
#[must_use]
pub fn workload_uid(pod: &Pod) -> String {
    format!("Kubernetes//Pod/{}/{}", pod.spec().namespace, pod.name())
}

impl Workload {
    /// The record that a control plane would send for the pod.
    #[must_use]
    pub fn of(pod: &Pod) -> Self {
        let spec = pod.spec();
        let protocol = if spec.redirect.is_some() {
            "HBONE"
        } else {
            "TCP"
        };
        Self {
            uid: workload_uid(pod),
            name: spec.name.clone(),
            namespace: spec.namespace.clone(),
            service_account: spec.service_account.clone(),
            trust_domain: "cluster.local".to_owned(),
            workload_ips: vec![pod.ip4(), pod.ip6()],
            protocol: protocol.to_owned(),
            node: pod.node().to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            canonical_name: format!("{}-app", spec.name),
            canonical_revision: "v1".to_owned(),
            workload_name: format!("{}-deploy", spec.name),
            workload_type: "deployment".to_owned(),
            status: "Healthy".to_owned(),
            capacity: 1,
            ..Self::default()
        }
    }

    /// Sets any further key from YAML text.
    ///
    /// # Panics
    /// When `yaml` is none.
    pub fn set(&mut self, key: &str, yaml: &str) {
        self.more
            .insert(key.to_owned(), serde_yaml_ng::from_str(yaml).expect("YAML"));
    }
}

impl Service {
    /// Sets any further key from YAML text.
    ///
    /// # Panics
    /// When `yaml` is none.
    pub fn set(&mut self, key: &str, yaml: &str) {
        self.more
            .insert(key.to_owned(), serde_yaml_ng::from_str(yaml).expect("YAML"));
    }
}

impl Policy {
    /// A policy of namespace `shop`, for all its pods.
    #[must_use]
    pub fn new(name: &str, action: &str, rules: Vec<Vec<Vec<Match>>>) -> Self {
        Self {
            name: name.to_owned(),
            namespace: "shop".to_owned(),
            scope: "Namespace".to_owned(),
            action: action.to_owned(),
            dry_run: false,
            rules,
        }
    }

    /// `ALLOW` if any of the matches holds.
    #[must_use]
    pub fn allow(name: &str, matches: Vec<Match>) -> Self {
        Self::new(name, "Allow", vec![vec![matches]])
    }

    /// `DENY` if any of the matches holds.
    #[must_use]
    pub fn deny(name: &str, matches: Vec<Match>) -> Self {
        Self::new(name, "Deny", vec![vec![matches]])
    }

    /// Only for workloads that name it.
    #[must_use]
    pub fn selected(self) -> Self {
        Self {
            scope: "WorkloadSelector".to_owned(),
            ..self
        }
    }
}

impl Match {
    /// The peer is this pod.
    #[must_use]
    pub fn pod(pod: &Pod) -> Self {
        let principal = pod.spiffe_id().trim_start_matches("spiffe://").to_owned();
        Self {
            principals: vec![StringMatch::Exact(principal)],
            ..Self::default()
        }
    }

    /// The connection goes to this port.
    #[must_use]
    pub fn port(port: u16) -> Self {
        Self {
            destination_ports: vec![port],
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn string_matches_are_tags_and_empty_fields_are_left_out() {
        let rule = Match {
            principals: vec![
                StringMatch::Suffix("/sa/web".into()),
                StringMatch::Presence(vec![]),
            ],
            ..Match::default()
        };
        let mesh = Mesh {
            policies: vec![Policy::allow("p", vec![rule])],
            ..Mesh::default()
        };
        let text = serde_yaml_ng::to_string(&mesh).unwrap();
        assert!(text.contains("!Suffix /sa/web"), "{text}");
        assert!(text.contains("!Presence []"), "{text}");
        assert!(text.contains("dryRun: false"), "{text}");
        assert!(!text.contains("destinationPorts"), "{text}");
    }
}
