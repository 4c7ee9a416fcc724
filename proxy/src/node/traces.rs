//! Spans of flows, as configured.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use xds_client::transport::{Roots, Target};

use super::tls::tls_options;
use crate::{
    config::{self, Config},
    telemetry::{ConnectError, Traces},
};

/// Where flows put their spans, and the future that sends them until `stop` fires; `None` if nobody takes them.
pub(super) fn build(
    config: &Config,
    registry: &mut Registry,
    stop: &CancellationToken,
) -> Option<(Traces, impl Future<Output = ()> + Send + use<>)> {
    let settings = config.traces.as_ref()?;
    let (traces, exporter) = Traces::new(settings, registry);
    let node = config.identity.node_name.as_deref().unwrap_or_default();
    let exporter = exporter.located(&[
        ("k8s.cluster.name", config.identity.cluster_id.as_ref()),
        ("k8s.namespace.name", config.identity.pod_namespace.as_ref()),
        ("k8s.node.name", node),
        ("k8s.pod.name", config.identity.pod_name.as_ref()),
    ]);
    let exporting = exporter.run(connect(config, settings), stop.clone());
    Some((traces, exporting))
}

fn connect(
    config: &Config,
    settings: &config::Traces,
) -> impl Fn() -> BoxFuture<'static, Result<Channel, ConnectError>> + Send + use<> {
    let uri = settings.endpoint.clone();
    let roots = settings.roots.clone().map_or(Roots::System, Roots::File);
    let mut target = Target::new(uri.clone(), roots, "");
    target.crypto = tls_options(config).provider();
    let target = Arc::new(target);
    move || {
        let (target, uri) = (Arc::clone(&target), uri.clone());
        Box::pin(async move {
            if uri.scheme_str() == Some("https") {
                return Ok(target.connect().await?);
            }
            Ok(Endpoint::from(uri).connect().await?)
        })
    }
}
