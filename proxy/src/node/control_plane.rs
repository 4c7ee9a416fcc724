//! Mesh state from istiod: who asks, where, and what is done with the answers.

use std::sync::Arc;

use cert_agent::Agent;
use xds_client::{
    Batch, Client, Demand, Kind, Metrics, NodeFacts, Rejected, Sink, Versions, journal::Journal,
};

use super::{source, target::target};
use crate::{
    admin::Rejections,
    config::{Address, Config, Identity},
    mesh::{Mesh, Rejection},
};

/// The client that keeps the mesh as istiod at `address` tells it.
pub(super) fn client(
    config: &Config,
    address: &Address,
    follower: Follower,
    demand: Option<&Demand>,
    metrics: Metrics,
) -> Client {
    let sink = Arc::new(follower);
    let node = facts(&config.identity).to_node();
    let target = Arc::new(target(config, address));
    let client = Client::new(node, target, sink, metrics);
    let Some(demand) = demand else {
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
pub(super) struct Follower {
    pub(super) mesh: Mesh,
    pub(super) agent: Agent,
    pub(super) rejections: Rejections,
    /// Where it is kept for the next start, if it is.
    pub(super) journal: Option<Journal>,
}

impl Sink for Follower {
    fn held(&self, kind: Kind, versions: &mut Versions) {
        if self.journal.as_ref().is_some_and(Journal::needs_everything) {
            return;
        }
        self.mesh.versions(kind, versions);
    }

    fn apply(&self, batch: Batch) -> Vec<Rejected> {
        let report = self.mesh.apply(&batch);
        source::follow_identities(&self.agent, &report);
        self.tell(&batch, &report.rejected);
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
        let rejected: Vec<_> = rejected.collect();
        // On disk before it is answered: what istiod knows us to have been told is what a start without it begins with.
        if let Some(journal) = &self.journal {
            journal.keep(batch, &rejected);
        }
        rejected
    }
}

impl Follower {
    /// Keeps what is refused for people to see.
    fn tell(&self, batch: &Batch, rejected: &[Rejection]) {
        if rejected.is_empty() && self.rejections.is_empty() {
            return; // nearly always
        }
        let told: Vec<_> = batch.resources().filter_map(Result::ok).collect();
        let names = told.iter().map(|resource| resource.name.as_str());
        let names = names.chain(batch.removed().iter().map(String::as_str));
        self.rejections.told(batch.kind(), names, rejected);
    }
}
