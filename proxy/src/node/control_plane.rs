//! Mesh state from istiod: who asks, where, and what is done with the answers.

use std::sync::Arc;

use prometheus_client::registry::Registry;
use xds_client::{
    Batch, Client, Kind, Metrics, NodeFacts, Rejected, Sink, Versions,
    transport::{Roots, Target, TlsVersions, Token},
};

use super::{parts, source};
use crate::{
    config::{Address, AuthToken, Config, Identity, RootSource},
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
    Client::new(node, target, sink, Metrics::register(registry))
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

fn target(config: &Config, address: &Address) -> Target {
    let roots = match &address.roots {
        RootSource::File(path) => Roots::File(path.clone()),
        RootSource::System => Roots::System,
        RootSource::Pem(text) => Roots::Pem(text.clone()),
    };
    let cluster = config.identity.cluster_id.as_ref();
    let mut target = Target::new(address.uri.clone(), roots, cluster);
    target
        .alternative_host
        .clone_from(&address.alternative_host);
    target.token = config.control.token.as_ref().map(|token| match token {
        AuthToken::File(path) => Token::File(path.clone()),
        AuthToken::Literal(text) => Token::Literal(text.clone()),
    });
    for header in &address.headers {
        target
            .headers
            .append(header.name.clone(), header.value.clone());
    }
    let tls = parts::tls_options(config);
    target.crypto = tls.provider();
    if tls.tls12_enabled() {
        target.versions = TlsVersions::From12;
    }
    target
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
