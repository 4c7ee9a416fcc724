//! What the admin server has at hand.

use std::{fmt, sync::Arc};

use tokio_util::sync::CancellationToken;

use super::{ControlPlane, Pods, Settings};
use crate::{
    config::BuildInfo,
    flow::Shared,
    telemetry::{DnsMetrics, Readiness, logging::Levels},
};

/// What the admin server shows, and what it may change.
#[expect(clippy::exhaustive_structs, reason = "put together by `node`")]
pub struct Console {
    /// The mesh, the certificates, the counters.
    pub shared: Arc<Shared>,
    /// The pods of this process.
    pub pods: Arc<dyn Pods>,
    /// How the control plane is followed.
    pub control_plane: ControlPlane,
    /// What is counted of names; `None` if they are not served.
    pub names: Option<DnsMetrics>,
    /// What is still to be done before the proxy may serve.
    pub readiness: Readiness,
    /// The effective configuration.
    pub settings: Settings,
    /// What this binary was built from.
    pub build: BuildInfo,
    /// The log levels.
    pub levels: Levels,
    /// Fired to stop the process as a signal would.
    pub quit: CancellationToken,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}
