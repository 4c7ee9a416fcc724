//! What the running proxy knows: its pods, its peers, and whom it has refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures_util::future::join_all;
use serde::Deserialize;
use tokio::{net::TcpStream, time::timeout};

use super::finding::Finding;

/// The parts of the configuration dump that matter here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Dump {
    workload_state: BTreeMap<String, Pod>,
    workloads: Vec<Workload>,
}

#[derive(Debug, Deserialize)]
struct Pod {
    info: Info,
    state: String,
    redirection: Option<Rules>,
}

#[derive(Debug, Deserialize)]
struct Info {
    name: String,
    namespace: String,
}

#[derive(Debug, Deserialize)]
struct Rules {
    ipv4: String,
    ipv6: String,
    mtu: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Workload {
    network: String,
    network_mode: String,
    node: String,
    protocol: String,
    status: String,
    workload_ips: Vec<IpAddr>,
}

/// The answer about refusals.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Refused {
    refusals: Vec<Refusal>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    direction: String,
    reason: String,
    source: SocketAddr,
    destination: Option<SocketAddr>,
}

impl Dump {
    /// Judges the pods of this node. `own_mtu` is that of the proxy's own link, if it is known.
    pub(super) fn pods(&self, own_mtu: Option<u32>) -> Vec<Finding> {
        let pods = self.workload_state.values();
        let mut findings: Vec<_> = pods.clone().flat_map(|pod| pod.judge(own_mtu)).collect();
        let young = pods.clone().filter(|pod| pod.is_unprobed()).count();
        if young > 0 {
            findings.push(Finding::skipped(format!(
                "rules of {young} pods: the proxy has not looked yet, which it does every 30 s"
            )));
        }
        if findings.is_empty() {
            let count = pods.len();
            findings.push(Finding::ok(format!("pods served and captured: {count}")));
        }
        findings
    }

    /// One HBONE address for each other node of our network, eight at most.
    fn peers(&self, node: Option<&str>, network: &str) -> Vec<SocketAddr> {
        let is_peer = |one: &&Workload| {
            one.protocol == "HBONE"
                && one.status == "Healthy"
                && one.network_mode == "Standard"
                && one.network == network
                && Some(one.node.as_str()) != node
        };
        let by_node: BTreeMap<&str, IpAddr> = self
            .workloads
            .iter()
            .filter(is_peer)
            .filter_map(|one| Some((one.node.as_str(), *one.workload_ips.first()?)))
            .collect();
        let peers = by_node.into_values().take(MOST_PEERS);
        peers.map(|ip| SocketAddr::new(ip, HBONE)).collect()
    }

    /// Whether packets reach the HBONE port of pods on other nodes.
    pub(super) async fn reach(&self, node: Option<&str>, network: &str) -> Vec<Finding> {
        let peers = self.peers(node, network);
        if peers.is_empty() {
            return vec![Finding::skipped(
                "there are no pods of the mesh on other nodes",
            )];
        }
        let calls = peers.iter().map(async |peer| {
            let error = match timeout(PEER_LIMIT, TcpStream::connect(*peer)).await {
                Ok(Ok(_)) => return None,
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer in {} s", PEER_LIMIT.as_secs()),
            };
            Some(Finding::warning(
                format!("{peer}, a pod on another node, cannot be reached: {error}"),
                "network policies must admit TCP 15008 between pods; a proxy must run on that node",
            ))
        });
        let mut findings: Vec<_> = join_all(calls).await.into_iter().flatten().collect();
        let reached = peers.len() - findings.len();
        if reached > 0 {
            let what = format!(
                "port {HBONE} answers on other nodes: {reached} of {}",
                peers.len()
            );
            findings.insert(0, Finding::ok(what));
        }
        findings
    }

    /// Probes of a kubelet come from an address of their own, and are not captured. What a policy refuses to somebody who is no
    /// workload is mostly a probe whose address was changed on the way.
    pub(super) fn probes(&self, refused: &Refused) -> Vec<Finding> {
        let known: BTreeSet<IpAddr> = self
            .workloads
            .iter()
            .flat_map(|one| one.workload_ips.iter().copied())
            .collect();
        let mut suspects: BTreeMap<IpAddr, BTreeSet<SocketAddr>> = BTreeMap::new();
        for one in &refused.refusals {
            let plain = one.direction == "inbound" && one.reason == "policy-denied";
            if plain && !known.contains(&one.source.ip()) {
                let targets = suspects.entry(one.source.ip()).or_default();
                targets.extend(one.destination);
            }
        }
        let finding = |(source, targets): (IpAddr, BTreeSet<SocketAddr>)| {
            let targets: Vec<_> = targets.iter().take(3).map(ToString::to_string).collect();
            Finding::warning(
                format!(
                    "policies refuse {source}, which is no workload, at {}: these may be probes of the kubelet",
                    targets.join(", ")
                ),
                "probes must come from 169.254.7.127 (fd16:9254:7127:1337:ffff:ffff:ffff:ffff): the CNI agent's rules on the \
                 node see to that, unless masquerading by BPF goes before them (Cilium: bpf.masquerade=false) or a network \
                 policy drops that address",
            )
        };
        let findings: Vec<_> = suspects.into_iter().map(finding).collect();
        if findings.is_empty() {
            return vec![Finding::ok(
                "no policy refused anybody from outside of the mesh",
            )];
        }
        findings
    }

    /// Whether any pod waits to be served.
    pub(super) fn has_pending(&self) -> bool {
        self.workload_state.values().any(Pod::is_pending)
    }
}

impl Pod {
    fn is_pending(&self) -> bool {
        self.state == "Pending"
    }

    fn is_unprobed(&self) -> bool {
        !self.is_pending() && self.redirection.is_none()
    }

    fn judge(&self, own_mtu: Option<u32>) -> Vec<Finding> {
        let name = format!("{}/{}", self.info.namespace, self.info.name);
        if self.is_pending() {
            return vec![Finding::error(
                format!("{name} is not served: its listeners cannot be opened"),
                "the log of the proxy says why; mostly the pod itself, or a proxy of another user, has one of the ports 15001, \
                 15006 and 15008",
            )];
        }
        let Some(rules) = &self.redirection else {
            return Vec::new();
        };
        let mut findings = Vec::new();
        if rules.ipv4 == "missing" || (rules.ipv6 == "missing" && rules.ipv4 != "works") {
            findings.push(Finding::error(
                format!("{name} is not captured: the redirection rules in its network namespace are missing"),
                "restart istio-cni on this node (ambient.reconcileIptablesOnStartup), or the pod; its traffic is neither \
                 encrypted nor judged until then",
            ));
        } else if rules.ipv6 == "missing" {
            findings.push(Finding::warning(
                format!("{name} is captured for IPv4 only; IPv6 passes the mesh by"),
                "set ambient.ipv6=true on istio-cni, or give pods no IPv6",
            ));
        }
        findings.extend(rules.mtu.and_then(|mtu| judge_mtu(&name, mtu, own_mtu)));
        findings
    }
}

fn judge_mtu(name: &str, mtu: u32, own: Option<u32>) -> Option<Finding> {
    if mtu < SMALLEST_MTU {
        return Some(Finding::warning(
            format!("packets of {name} may have {mtu} bytes only; IPv6 takes {SMALLEST_MTU}"),
            "see to the MTU that the cluster's CNI sets",
        ));
    }
    let own = own.filter(|own| *own != mtu)?;
    Some(Finding::warning(
        format!("packets of {name} may have {mtu} bytes, those of the proxy {own}"),
        "all pods of a node should have one MTU, that of the node's link less what the CNI's tunnel takes; restart pods that \
         are older than the present setting",
    ))
}

const HBONE: u16 = 15008;
const MOST_PEERS: usize = 8;
const PEER_LIMIT: Duration = Duration::from_secs(3);
const SMALLEST_MTU: u32 = 1280;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::doctor::Severity;

    fn dump(state: &str, redirection: &serde_json::Value) -> Dump {
        serde_json::from_value(json!({
            "workloadState": {"u": {
                "info": {"name": "web-1", "namespace": "shop", "serviceAccount": "web"},
                "state": state, "redirection": redirection,
            }},
            "config": {"ignored": true},
        }))
        .unwrap()
    }

    #[test]
    fn pods_are_judged_by_their_state_and_rules() {
        let rules = |ipv4: &str, ipv6: &str, mtu| json!({"ipv4": ipv4, "ipv6": ipv6, "mtu": mtu});
        for (state, redirection, severity, part) in [
            (
                "Up",
                rules("works", "works", 1500),
                Severity::Ok,
                "captured: 1",
            ),
            ("Up", json!(null), Severity::Skipped, "not looked yet"),
            (
                "Pending",
                json!(null),
                Severity::Error,
                "shop/web-1 is not served",
            ),
            (
                "Up",
                rules("missing", "missing", 1500),
                Severity::Error,
                "not captured",
            ),
            (
                "Up",
                rules("unknown", "missing", 1500),
                Severity::Error,
                "not captured",
            ),
            (
                "Up",
                rules("works", "missing", 1500),
                Severity::Warning,
                "IPv4 only",
            ),
            (
                "Up",
                rules("works", "works", 1200),
                Severity::Warning,
                "1280",
            ),
            (
                "Up",
                rules("works", "works", 9000),
                Severity::Warning,
                "those of the proxy 1500",
            ),
        ] {
            let findings = dump(state, &redirection).pods(Some(1500));
            assert_eq!(findings.len(), 1, "{findings:?}");
            assert_eq!(findings[0].severity, severity, "{findings:?}");
            assert!(findings[0].what.contains(part), "{findings:?}");
        }
        assert!(dump("Pending", &json!(null)).has_pending());
    }

    fn mesh() -> Dump {
        let workload = |node: &str, protocol: &str, ip: &str| json!({"node": node, "protocol": protocol, "status": "Healthy", "networkMode": "Standard", "workloadIps": [ip]});
        serde_json::from_value(json!({"workloads": [
            workload("n0", "HBONE", "10.0.0.1"),
            workload("n1", "HBONE", "10.0.1.1"),
            workload("n1", "HBONE", "10.0.1.2"),
            workload("n2", "TCP", "10.0.2.1"),
        ]}))
        .unwrap()
    }

    #[test]
    fn one_peer_of_each_other_node_is_called() {
        let peers = mesh().peers(Some("n0"), "");
        assert_eq!(peers, ["10.0.1.2:15008".parse().unwrap()]);
        assert!(mesh().peers(Some("n0"), "elsewhere").is_empty());
    }

    #[test]
    fn refused_strangers_are_taken_for_probes() {
        let refused = |source: &str, reason: &str| -> Refused {
            let one = json!({"direction": "inbound", "reason": reason, "source": source, "destination": "10.0.0.1:8080"});
            serde_json::from_value(json!({"refusals": [one]})).unwrap()
        };
        for (source, reason, severity) in [
            ("192.168.1.1:4000", "policy-denied", Severity::Warning),
            ("10.0.1.1:4000", "policy-denied", Severity::Ok),
            ("192.168.1.1:4000", "connect-refused", Severity::Ok),
        ] {
            let findings = mesh().probes(&refused(source, reason));
            assert_eq!(findings[0].severity, severity, "{findings:?}");
        }
    }
}
