//! The pieces that all roles of Envoy are made of.
//!
//! An outer listener ends TLS and CONNECT and hands each tunnel's bytes to an inner listener of the same process, together with
//! what was asked for: as the address that the inner connection seems to be made to, and as text.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::{
    ca::Identity,
    world::{Pod, World},
};

/// Where the administration server listens, on loopback.
pub(super) const ADMIN_PORT: u16 = 15000;

/// The tunnel's authority, as text, for the inner listener.
pub(super) const AUTHORITY: &str = "testkit.authority";

/// The identity of the tunnel's client, as text, for the inner listener.
pub(super) const CLIENT: &str = "testkit.client";

/// The message with which the beginning of a tunnel is logged.
pub(super) const TUNNEL: &str = "tunnel DownstreamStart";

/// `@type` of an extension.
pub(super) fn kind(name: &str) -> String {
    format!("type.googleapis.com/envoy.{name}")
}

/// A whole configuration.
pub(super) fn bootstrap(listeners: &[Value], clusters: &[Value]) -> Value {
    json!({
        "admin": { "address": address(SocketAddr::from(([127, 0, 0, 1], ADMIN_PORT))) },
        "bootstrap_extensions": [{
            "name": "envoy.bootstrap.internal_listener",
            "typed_config": {
                "@type": kind("extensions.bootstrap.internal_listener.v3.InternalListener"),
            },
        }],
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
}

/// Port 15008 of a pod: mutual TLS, HTTP/2, CONNECT, and on to the inner listener [`INNER`].
pub(super) fn outer(world: &World, home: &Pod) -> anyhow::Result<Value> {
    let connect_only = json!({
        "name": "outer",
        "virtual_hosts": [{
            "name": "any",
            "domains": ["*"],
            "routes": [{
                "match": { "connect_matcher": {} },
                "route": {
                    "cluster": INNER,
                    "timeout": "0s",
                    "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }],
                },
            }],
        }],
    });
    let manager = json!({
        "@type": kind("extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "outer",
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "http2_protocol_options": {
            "allow_connect": true,
            "max_concurrent_streams": 100,
            "connection_keepalive": { "interval": "10s", "timeout": "20s" },
        },
        "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
        "route_config": connect_only,
        "http_filters": [asked_for(), router()],
        "access_log_options": { "flush_access_log_on_new_request": true },
        "access_log": [log(&json!({
            "scope": "envoy",
            "message": "tunnel %ACCESS_LOG_TYPE%",
            "authority": "%REQ(:AUTHORITY)%",
            "baggage": "%REQ(BAGGAGE)%",
            "client": "%DOWNSTREAM_PEER_URI_SAN%",
            "from": "%DOWNSTREAM_REMOTE_ADDRESS%",
            "connection": "%CONNECTION_ID%",
            "status": "%RESPONSE_CODE%",
            "flags": "%RESPONSE_FLAGS%",
        }))],
    });
    Ok(json!({
        "name": "outer",
        "address": address(home.at(15008)),
        "filter_chains": [{
            "filters": [{ "name": "manager", "typed_config": manager }],
            "transport_socket": tls(
                "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                &identity(world, home)?,
                world,
            ),
        }],
    }))
}

/// Tells the inner listener what the tunnel is for and whose it is.
fn asked_for() -> Value {
    let state = |key: &str, factory: &str, format: &str| {
        json!({
            "object_key": key,
            "factory_key": factory,
            "format_string": { "text_format_source": { "inline_string": format } },
            "shared_with_upstream": "ONCE",
        })
    };
    let (to, from) = (
        "envoy.filters.listener.original_dst.local_ip",
        "envoy.filters.listener.original_dst.remote_ip",
    );
    json!({
        "name": "asked_for",
        "typed_config": {
            "@type": kind("extensions.filters.http.set_filter_state.v3.Config"),
            "on_request_headers": [
                state(to, to, "%REQ(:AUTHORITY)%"),
                state(from, from, "%DOWNSTREAM_REMOTE_ADDRESS%"),
                state(AUTHORITY, "envoy.string", "%REQ(:AUTHORITY)%"),
                state(CLIENT, "envoy.string", "%DOWNSTREAM_PEER_URI_SAN%"),
            ],
        },
    })
}

pub(super) fn router() -> Value {
    let typed = json!({ "@type": kind("extensions.filters.http.router.v3.Router") });
    json!({ "name": "envoy.filters.http.router", "typed_config": typed })
}

/// An access log on the standard output, one JSON object per line.
pub(super) fn log(fields: &Value) -> Value {
    json!({
        "name": "stdout",
        "typed_config": {
            "@type": kind("extensions.access_loggers.stream.v3.StdoutAccessLog"),
            "log_format": { "json_format": fields },
        },
    })
}

/// A listener for connections of this process, at the address that they say they are made to.
pub(super) fn inner(name: &str, rest: &Value) -> Value {
    let original =
        json!({ "@type": kind("extensions.filters.listener.original_dst.v3.OriginalDst") });
    let mut listener = json!({
        "name": name,
        "internal_listener": {},
        "listener_filters": [{ "name": "original_dst", "typed_config": original }],
    });
    let all = rest.as_object().into_iter().flatten();
    for (key, value) in all {
        listener[key] = value.clone();
    }
    listener
}

/// The inner listener `name` as a cluster with these endpoints. `metadata` of the endpoint that is to be passed on, if any.
pub(super) fn inward(cluster: &str, listener: &str, to: Option<SocketAddr>) -> Value {
    let mut endpoint = json!({ "endpoint": { "address": {
        "envoy_internal_address": {
            "server_listener_name": listener,
            "endpoint_id": to.map_or_else(String::new, |to| to.to_string()),
        },
    } } });
    let mut transport = json!({
        "@type": kind("extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport"),
        "transport_socket": {
            "name": "raw",
            "typed_config": { "@type": kind("extensions.transport_sockets.raw_buffer.v3.RawBuffer") },
        },
    });
    if let Some(to) = to {
        let original = "envoy.filters.listener.original_dst";
        endpoint["metadata"] =
            json!({ "filter_metadata": { original: { "local": to.to_string() } } });
        transport["passthrough_metadata"] = json!([{ "kind": { "host": {} }, "name": original }]);
    }
    json!({
        "name": cluster,
        "load_assignment": {
            "cluster_name": cluster,
            "endpoints": [{ "lb_endpoints": [endpoint] }],
        },
        "circuit_breakers": unlimited(),
        "transport_socket": { "name": "internal_upstream", "typed_config": transport },
    })
}

/// No limits of Envoy's own.
pub(super) fn unlimited() -> Value {
    let most = 100_000;
    json!({ "thresholds": [{
        "max_connections": most,
        "max_pending_requests": most,
        "max_requests": most,
        "max_retries": most,
    }] })
}

pub(super) fn identity(world: &World, home: &Pod) -> anyhow::Result<Identity> {
    world.authority().issue(&home.spiffe_id())
}

/// TLS 1.3 with the pod's certificate, for peers of the mesh.
pub(super) fn tls(context: &str, identity: &Identity, world: &World) -> Value {
    let pem = |tag: &str, der: &[u8]| pem::encode(&pem::Pem::new(tag, der));
    let mut typed = json!({
        "@type": kind(context),
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
            },
            "tls_certificates": [{
                "certificate_chain": { "inline_string": pem("CERTIFICATE", &identity.chain[0]) },
                "private_key": { "inline_string": pem("PRIVATE KEY", identity.key.secret_der()) },
            }],
            "validation_context": {
                "trusted_ca": { "inline_string": world.authority().root_pem() },
                "match_typed_subject_alt_names": [{
                    "san_type": "URI",
                    "matcher": { "prefix": "spiffe://cluster.local/" },
                }],
            },
        },
    });
    if context.ends_with("DownstreamTlsContext") {
        typed["require_client_certificate"] = true.into();
    }
    json!({ "name": "tls", "typed_config": typed })
}

pub(super) fn address(at: SocketAddr) -> Value {
    json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } })
}

/// The listener behind [`outer`], and the cluster that leads to it.
pub(super) const INNER: &str = "inner";
