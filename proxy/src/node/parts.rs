//! Builds what all flows share.

use std::{fs, path::Path, sync::Arc};

use cert_agent::{Agent, AgentOptions, CsrSource, InProcessCa, TlsOptions};
use prometheus_client::registry::Registry;

use super::StartError;
use crate::{
    config::{CertificateSource, Config, PqcPolicy},
    flow::{Settings, Shared},
    mesh::{Mesh, View},
    relay::Buffers,
    route::LoopGuard,
    telemetry::{AuthorizationLog, Traffic},
};

/// Everything that flows share, with its metrics registered.
pub(super) fn shared(config: &Config, registry: &mut Registry) -> Result<Shared, StartError> {
    Ok(Shared {
        mesh: Mesh::new(View {
            node_name: config.identity.node_name.clone(),
            network: Arc::clone(&config.identity.network),
            cluster_id: Arc::clone(&config.identity.cluster_id),
        }),
        agent: agent(config)?,
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

fn agent(config: &Config) -> Result<Agent, StartError> {
    let ca = match &config.control.certificates {
        CertificateSource::InProcess { root: None } => {
            InProcessCa::random().map_err(StartError::Ca)?
        }
        CertificateSource::InProcess {
            root: Some((certificate, key)),
        } => InProcessCa::from_pem(&read(certificate)?, &read(key)?).map_err(StartError::Ca)?,
        CertificateSource::Istio(_) => return Err(StartError::NotAvailable(Vec::new())),
    };
    tracing::warn!(
        "FAKE_CA is on: certificates are signed inside this process, and whoever can read the \
         root's key can become any workload; for tests and demonstrations only"
    );
    let mut options = AgentOptions::default();
    options.tls = tls_options(config);
    let ca = ca.with_lifetime(config.control.secret_ttl);
    Ok(Agent::new(Arc::new(CsrSource::new(ca)), options))
}

/// How TLS is spoken, with peers and with the control plane.
pub(super) fn tls_options(config: &Config) -> TlsOptions {
    let mut tls = TlsOptions::default();
    tls.tls12 = config.tls.tls12;
    tls.pqc_only = config.tls.pqc == PqcPolicy::Required;
    tls.trust_domains = Arc::clone(&config.tls.trust_domains);
    tls
}

fn read(path: &Path) -> Result<String, StartError> {
    fs::read_to_string(path).map_err(|source| StartError::Read {
        path: path.to_owned(),
        source,
    })
}
