//! Builds what all flows share.

use std::sync::Arc;

use cert_agent::Agent;
use prometheus_client::registry::Registry;
use xds_client::Demand;

use super::launch::Names;
use crate::{
    budget::Shares,
    config::{Config, DnsCapture, ProxyMode},
    dns::{self, Upstreams},
    flow::{Neighbours, Settings, Shared},
    listen::Descriptors,
    mesh::{Mesh, View},
    relay::Buffers,
    resolve::Resolver,
    route::LoopGuard,
    telemetry::{AuthorizationLog, DnsMetrics, Limits, OnDemandDns, Traces, Traffic},
    tunnel::PoolMetrics,
};

/// Everything that flows share, with its metrics registered.
pub(super) fn shared(
    config: &Config,
    agent: Agent,
    traces: Traces,
    registry: &mut Registry,
) -> Shared {
    agent.register_metrics(registry);
    let traffic = Traffic::register(registry, config.metrics, config.access_log.clone());
    let limits = Limits::register(registry);
    let pools = PoolMetrics::register(registry, traffic.latencies().clone(), limits.clone());
    Shared {
        mesh: Mesh::new(View {
            node_name: config.identity.node_name.clone(),
            network: Arc::clone(&config.identity.network),
            cluster_id: Arc::clone(&config.identity.cluster_id),
        }),
        agent,
        traces,
        traffic,
        pools,
        verdicts: AuthorizationLog::new(config.logging.policy_at_info),
        buffers: Buffers::new(),
        demand: (config.control.on_demand && config.control.xds.is_some()).then(Demand::default),
        resolver: Resolver::new(RESOLV_CONF, config.sockets.ipv6),
        neighbours: Neighbours::default(),
        resolutions: OnDemandDns::register(registry, config.metrics),
        limits,
        shares: Shares::default(),
        descriptors: Descriptors::new(config.limits.descriptor_reserve),
        settings: Settings {
            limits: config.limits.clone(),
            sockets: config.sockets.clone(),
            tunnel: Arc::new(config.tunnel.clone()),
            inbound: config.inbound,
            same_node: config.same_node.clone(),
            guard: LoopGuard::new(&config.ports, config.capture.socks5),
            network: Arc::clone(&config.identity.network),
            workload_wait: config.capture.workload_wait,
        },
    }
}

/// Names for captured pods, if they are served, with their metrics registered.
pub(super) fn names(config: &Config, mesh: &Mesh, registry: &mut Registry) -> Option<Names> {
    let capture = config.capture.dns.clone();
    if capture == DnsCapture::Off {
        return None;
    }
    let shared = dns::Shared {
        mesh: mesh.clone(),
        upstreams: Upstreams::new(RESOLV_CONF),
        metrics: DnsMetrics::register(registry, config.metrics),
        sockets: config.sockets.clone(),
        cluster_domain: config.identity.cluster_domain.to_ascii_lowercase().into(),
        preferred_namespace: config.control.preferred_service_namespace.clone(),
        listed_search: config.capture.mode != ProxyMode::Shared,
        workload_wait: config.capture.workload_wait,
    };
    Some(Names {
        capture,
        shared: Arc::new(shared),
    })
}

/// The resolvers of the node.
const RESOLV_CONF: &str = "/etc/resolv.conf";
