//! Builds what all flows share.

use std::sync::Arc;

use prometheus_client::registry::Registry;

use super::{StartError, certificates};
use crate::{
    config::Config,
    flow::{Settings, Shared},
    mesh::{Mesh, View},
    relay::Buffers,
    route::LoopGuard,
    telemetry::{AuthorizationLog, Traffic},
};

/// Everything that flows share, with its metrics registered.
pub(super) fn shared(config: &Config, registry: &mut Registry) -> Result<Shared, StartError> {
    let agent = certificates::agent(config)?;
    agent.register_metrics(registry);
    Ok(Shared {
        mesh: Mesh::new(View {
            node_name: config.identity.node_name.clone(),
            network: Arc::clone(&config.identity.network),
            cluster_id: Arc::clone(&config.identity.cluster_id),
        }),
        agent,
        traffic: Traffic::register(registry),
        verdicts: AuthorizationLog::new(config.logging.policy_at_info),
        buffers: Buffers::new(),
        settings: Settings {
            sockets: config.sockets.clone(),
            tunnel: Arc::new(config.tunnel.clone()),
            inbound: config.inbound,
            guard: LoopGuard::new(&config.ports, config.capture.socks5),
            network: Arc::clone(&config.identity.network),
            workload_wait: config.capture.workload_wait,
        },
    })
}
