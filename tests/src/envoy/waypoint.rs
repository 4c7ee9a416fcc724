//! Envoy as a waypoint: what a client's proxy sends for a service is looked into and sent on to a pod of the service.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::{
    Envoy,
    parts::{self, CLIENT, INNER, kind},
};
use crate::world::{Pod, World};

/// What a waypoint does with each service. It logs `tunnel …` for each CONNECT that it is asked for, at its beginning and at its
/// end, and `request` for each HTTP request.
#[derive(Debug, Clone, Default)]
pub struct Waypoint {
    services: Vec<Service>,
    /// Identities whose HTTP requests are refused.
    shut_out: Vec<String>,
}

#[derive(Debug, Clone)]
struct Service {
    at: SocketAddr,
    speaks: Speaks,
    /// Weight and application of each endpoint.
    endpoints: Vec<(u32, SocketAddr)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speaks {
    Http,
    Anything,
}

impl Waypoint {
    /// Splits HTTP requests to a service between applications of captured pods, by weight.
    #[must_use]
    pub fn http(self, at: SocketAddr, endpoints: &[(u32, SocketAddr)]) -> Self {
        self.service(at, Speaks::Http, endpoints)
    }

    /// Splits connections to a service between applications of captured pods, by weight.
    #[must_use]
    pub fn tcp(self, at: SocketAddr, endpoints: &[(u32, SocketAddr)]) -> Self {
        self.service(at, Speaks::Anything, endpoints)
    }

    /// Answers HTTP requests of this pod with 403.
    #[must_use]
    pub fn shut_out(mut self, client: &Pod) -> Self {
        self.shut_out.push(client.spiffe_id());
        self
    }

    fn service(mut self, at: SocketAddr, speaks: Speaks, endpoints: &[(u32, SocketAddr)]) -> Self {
        let endpoints = endpoints.to_vec();
        self.services.push(Service {
            at,
            speaks,
            endpoints,
        });
        self
    }

    /// Starts it in a pod that no proxy serves.
    ///
    /// # Errors
    /// When it cannot be fetched, or does not start.
    pub async fn start(&self, world: &World, home: &Pod) -> anyhow::Result<Envoy> {
        let chain = |service: &Service| service.filter_chain(&self.shut_out);
        let chains: Vec<Value> = self.services.iter().map(chain).collect();
        let listeners = [
            parts::outer(world, home)?,
            parts::inner(INNER, &json!({ "filter_chains": chains })),
            parts::inner(ORIGINATE, &originating_chain()),
        ];
        let mut clusters = vec![
            parts::inward(INNER, INNER, None),
            originating_cluster(world, home)?,
        ];
        let endpoints = self.services.iter().flat_map(|service| &service.endpoints);
        let mut to: Vec<SocketAddr> = endpoints.map(|(_, to)| *to).collect();
        to.sort_unstable();
        to.dedup();
        clusters.extend(
            to.into_iter()
                .map(|to| parts::inward(&to.to_string(), ORIGINATE, Some(to))),
        );
        Envoy::start(world, home, &parts::bootstrap(&listeners, &clusters)).await
    }
}

impl Service {
    /// For tunnels whose authority is the service's address and port; others are dropped.
    fn filter_chain(&self, shut_out: &[String]) -> Value {
        let split: Vec<Value> = self.endpoints.iter().map(weighted).collect();
        let filter = match self.speaks {
            Speaks::Http => http_manager(&split, shut_out),
            Speaks::Anything => json!({
                "@type": kind("extensions.filters.network.tcp_proxy.v3.TcpProxy"),
                "stat_prefix": "tcp",
                "idle_timeout": "0s",
                "weighted_clusters": { "clusters": split },
            }),
        };
        let ip = self.at.ip();
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        json!({
            "name": self.at.to_string(),
            "filter_chain_match": {
                "destination_port": self.at.port(),
                "prefix_ranges": [{ "address_prefix": ip.to_string(), "prefix_len": bits }],
            },
            "filters": [{ "name": "service", "typed_config": filter }],
        })
    }
}

fn weighted((weight, to): &(u32, SocketAddr)) -> Value {
    json!({ "name": to.to_string(), "weight": weight })
}

fn http_manager(split: &[Value], shut_out: &[String]) -> Value {
    json!({
        "@type": kind("extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "http",
        "codec_type": "AUTO",
        "stream_idle_timeout": "0s",
        "route_config": {
            "name": "split",
            "virtual_hosts": [{
                "name": "any",
                "domains": ["*"],
                "routes": [{
                    "match": { "prefix": "/" },
                    "route": { "weighted_clusters": { "clusters": split }, "timeout": "0s" },
                }],
            }],
        },
        "http_filters": [refusal(shut_out), parts::router()],
        "access_log": [parts::log(&json!({
            "scope": "envoy",
            "message": "request",
            "path": "%REQ(:PATH)%",
            "to": "%UPSTREAM_CLUSTER%",
            "status": "%RESPONSE_CODE%",
            "flags": "%RESPONSE_FLAGS%",
        }))],
    })
}

/// The waypoint's own authorization, by what the client of the tunnel proved to be.
fn refusal(of: &[String]) -> Value {
    let client =
        |id: &String| json!({ "filter_state": { "key": CLIENT, "string_match": { "exact": id } } });
    let mut rules = json!({ "action": "DENY" });
    if !of.is_empty() {
        let principals: Vec<Value> = of.iter().map(client).collect();
        rules["policies"] = json!({ "shut-out": {
            "permissions": [{ "any": true }],
            "principals": principals,
        } });
    }
    let rbac = json!({ "@type": kind("extensions.filters.http.rbac.v3.RBAC"), "rules": rules });
    json!({ "name": "rbac", "typed_config": rbac })
}

/// Every connection becomes a tunnel to the address that it is made to.
fn originating_chain() -> Value {
    json!({ "filter_chains": [{ "filters": [{
        "name": "tunnel",
        "typed_config": {
            "@type": kind("extensions.filters.network.tcp_proxy.v3.TcpProxy"),
            "stat_prefix": ORIGINATE,
            "cluster": ORIGINATE,
            "idle_timeout": "0s",
            "tunneling_config": { "hostname": "%DOWNSTREAM_LOCAL_ADDRESS%" },
        },
    }] }] })
}

/// Port 15008 at that address, with the waypoint's own certificate.
fn originating_cluster(world: &World, home: &Pod) -> anyhow::Result<Value> {
    let http2 = json!({
        "@type": kind("extensions.upstreams.http.v3.HttpProtocolOptions"),
        "explicit_http_config": { "http2_protocol_options": { "allow_connect": true } },
    });
    Ok(json!({
        "name": ORIGINATE,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": { "upstream_port_override": 15008 },
        "connect_timeout": "2s",
        "circuit_breakers": parts::unlimited(),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2,
        },
        "transport_socket": parts::tls(
            "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            &parts::identity(world, home)?,
            world,
        ),
    }))
}

/// The listener that makes tunnels, and the cluster that it uses.
const ORIGINATE: &str = "originate";
