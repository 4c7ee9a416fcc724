//! Envoy as an east-west gateway: it ends the outer tunnel, and passes the inner one on as it is.

use std::{collections::BTreeMap, net::SocketAddr};

use serde_json::{Value, json};

use super::{
    Envoy,
    parts::{self, AUTHORITY, INNER, kind},
};
use crate::world::{Pod, World};

/// Which pods each service of the gateway's network has. It logs `tunnel …` for each CONNECT that it is asked for, at its beginning
/// and at its end, and drops what it has no service for.
#[derive(Debug, Clone, Default)]
pub struct Gateway {
    services: BTreeMap<String, Vec<SocketAddr>>,
}

impl Gateway {
    /// Sends the bytes of tunnels to `authority`, `host name:port`, to port 15008 of these pods in turn.
    #[must_use]
    pub fn service(mut self, authority: &str, pods: &[&Pod]) -> Self {
        let pods = pods.iter().map(|pod| pod.at(15008)).collect();
        self.services.insert(authority.to_owned(), pods);
        self
    }

    /// Starts it in a pod that no proxy serves.
    ///
    /// # Errors
    /// When it cannot be fetched, or does not start.
    pub async fn start(&self, world: &World, home: &Pod) -> anyhow::Result<Envoy> {
        let listeners = [
            parts::outer(world, home)?,
            parts::inner(INNER, &self.by_authority()),
        ];
        let mut clusters = vec![parts::inward(INNER, INNER, None)];
        clusters.extend(self.services.iter().map(|(name, pods)| cluster(name, pods)));
        Envoy::start(world, home, &parts::bootstrap(&listeners, &clusters)).await
    }

    /// One chain of filters per service, found by the tunnel's authority.
    fn by_authority(&self) -> Value {
        let chain = |name: &String| {
            json!({
                "name": name,
                "filters": [{
                    "name": "pass",
                    "typed_config": {
                        "@type": kind("extensions.filters.network.tcp_proxy.v3.TcpProxy"),
                        "stat_prefix": "pass",
                        "idle_timeout": "0s",
                        "cluster": name,
                    },
                }],
            })
        };
        let action = |name: &String| {
            let value = json!({ "@type": "type.googleapis.com/google.protobuf.StringValue", "value": name });
            let action = json!({ "action": { "name": name, "typed_config": value } });
            (name.clone(), action)
        };
        let map: serde_json::Map<_, _> = self.services.keys().map(action).collect();
        json!({
            "filter_chains": self.services.keys().map(chain).collect::<Vec<_>>(),
            "filter_chain_matcher": { "matcher_tree": {
                "input": {
                    "name": "authority",
                    "typed_config": {
                        "@type": kind("extensions.matching.common_inputs.network.v3.FilterStateInput"),
                        "key": AUTHORITY,
                    },
                },
                "exact_match_map": { "map": map },
            } },
        })
    }
}

fn cluster(name: &str, pods: &[SocketAddr]) -> Value {
    let endpoint = |pod: &SocketAddr| json!({ "endpoint": { "address": parts::address(*pod) } });
    json!({
        "name": name,
        "connect_timeout": "2s",
        "circuit_breakers": parts::unlimited(),
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": pods.iter().map(endpoint).collect::<Vec<_>>() }],
        },
    })
}
