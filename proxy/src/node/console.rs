//! What the admin server is shown.

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use xds_client::Metrics;

use super::served::Served;
use crate::{
    admin::{Console, ControlPlane, Rejections, Settings, serve_admin},
    config::{BuildInfo, Config},
    flow::Shared,
    telemetry::{DnsMetrics, Readiness, logging::Levels},
};

/// What of the running process people may look at, and touch. The parts fill it while they start.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) served: Served,
    pub(super) rejections: Rejections,
    /// Of the control plane's client, if there is one.
    pub(super) client: Option<Metrics>,
    /// Of names, if they are served.
    pub(super) names: Option<DnsMetrics>,
    pub(super) readiness: Readiness,
    pub(super) levels: Levels,
    pub(super) build: BuildInfo,
    /// Fired by whoever asks the process to stop.
    pub(super) quit: CancellationToken,
}

impl Shown {
    /// Nothing yet.
    pub(super) fn new(readiness: Readiness, levels: Levels, build: BuildInfo) -> Self {
        Self {
            served: Served::default(),
            rejections: Rejections::default(),
            client: None,
            names: None,
            readiness,
            levels,
            build,
            quit: CancellationToken::new(),
        }
    }

    /// The admin server.
    pub(super) fn serve(
        &self,
        config: &Config,
        shared: &Arc<Shared>,
        listeners: Vec<TcpListener>,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send + use<> {
        let xds = config.control.xds.as_ref();
        let console = Console {
            shared: Arc::clone(shared),
            pods: Arc::new(self.served.clone()),
            control_plane: ControlPlane {
                address: xds.map(|address| address.uri.to_string()),
                client: self.client.clone(),
                rejections: self.rejections.clone(),
            },
            names: self.names.clone(),
            readiness: self.readiness.clone(),
            settings: Settings::of(config),
            build: self.build.clone(),
            levels: self.levels.clone(),
            quit: self.quit.clone(),
        };
        serve_admin(listeners, console, stop)
    }
}
