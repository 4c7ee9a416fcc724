//! Mesh state from istiod: who asks, where, and what is done with the answers.

use std::sync::Arc;

use prometheus_client::registry::Registry;
use xds_client::{Batch, Client, Kind, Metrics, NodeFacts, Rejected, Sink, Versions};

use super::{source, target::target};
use crate::{
    config::{Address, Config, Identity},
    flow::Shared,
};

/// The client that keeps the mesh as istiod at `address` tells it.
pub(super) fn client(
    config: &Config,
    address: &Address,
    shared: &Arc<Shared>,
    registry: &mut Registry,
) -> Client {
    let sink = Arc::new(Follower(Arc::clone(shared)));
    let node = facts(&config.identity).to_node();
    let target = Arc::new(target(config, address));
    let client = Client::new(node, target, sink, Metrics::register(registry));
    let Some(demand) = &shared.demand else {
        return client;
    };
    if config.identity.node_name.is_none() {
        tracing::warn!(
            "XDS_ON_DEMAND without NODE_NAME: the control plane cannot tell which pods are on this node, \
             and does not tell of them unasked; their connections will fail"
        );
    }
    client.on_demand(demand.clone())
}

fn facts(identity: &Identity) -> NodeFacts {
    NodeFacts {
        pod_name: identity.pod_name.as_ref().into(),
        pod_namespace: identity.pod_namespace.as_ref().into(),
        instance_ip: identity.instance_ip.as_ref().into(),
        node_name: identity.node_name.as_deref().map(Into::into),
        metadata: identity.metadata.clone(),
        json_metadata: identity.json_metadata.clone(),
    }
}

/// Puts what istiod tells into the mesh, and asks for the certificates that come with it.
struct Follower(Arc<Shared>);

impl Sink for Follower {
    fn held(&self, kind: Kind, versions: &mut Versions) {
        self.0.mesh.versions(kind, versions);
    }

    fn apply(&self, batch: Batch) -> Vec<Rejected> {
        let report = self.0.mesh.apply(&batch);
        source::follow_identities(&self.0, &report);
        tracing::debug!(
            kind = ?batch.kind(),
            resources = batch.len(),
            removed = batch.removed().len(),
            workloads = report.workloads,
            services = report.services,
            policies = report.policies,
            "the control plane told of resources: changed ones"
        );
        let rejected = report.rejected.into_iter();
        let rejected = rejected.map(|one| Rejected {
            name: one.name,
            reason: one.reason.to_string(),
        });
        rejected.collect()
    }
}
