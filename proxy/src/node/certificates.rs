//! Where certificates come from, as configured, and the agent that keeps them.

use std::{fs, path::Path, sync::Arc};

use cert_agent::{
    Agent, AgentOptions, BoxFuture, CsrSource, InProcessCa, Revocations, SanRule, Source,
    TrustBundle,
    istio::{Caller, Connect, ConnectError, IstioCa, IstioOptions},
};
use tonic::{metadata::MetadataMap, transport::Channel};
use xds_client::transport::Target;

use super::{StartError, kept_keys, openbao, target, tls::tls_options};
use crate::config::{Address, CertificateSource, Config, ProxyMode};

/// What keeps the certificates of this process.
pub(super) struct Certificates {
    pub(super) agent: Agent,
    /// To be run beside the agent, if certificates come from there.
    pub(super) openbao: Option<cert_agent::openbao::Authority>,
}

/// The agent that gets certificates from the configured source; nothing is fetched before it runs.
pub(super) fn build(config: &Config) -> Result<Certificates, StartError> {
    if let Some(policy) = &config.tls.ignored_policy {
        tracing::warn!(
            policy,
            tls12 = config.tls.tls12,
            "this COMPLIANCE_POLICY has no effect; peers held to FIPS 140-2 speak TLS 1.2 only, which takes TLS12_ENABLED=true"
        );
    }
    let mut options = AgentOptions::default();
    options.tls = tls_options(config);
    options.revocations = revocations(config);
    options.trust = TrustBundle::new(config.tls.trust_grace);
    let mut authority = None;
    let source: Arc<dyn Source> = match &config.control.certificates {
        CertificateSource::InProcess { root } => {
            Arc::new(CsrSource::new(in_process(config, root.as_ref())?))
        }
        CertificateSource::Istio(address) => {
            if let ProxyMode::Dedicated(_) = config.capture.mode {
                options.san_rule = SanRule::Any;
            }
            Arc::new(CsrSource::new(istio(config, address)))
        }
        CertificateSource::OpenBao(server) => {
            let openbao = openbao::authority(config, server)?;
            authority = Some(openbao.clone());
            Arc::new(CsrSource::new(openbao))
        }
    };
    let source = kept_keys::outlasting(config, source, &options.trust)?;
    Ok(Certificates {
        agent: Agent::new(source, options),
        openbao: authority,
    })
}

/// Armed if there is any source of revocation lists.
fn revocations(config: &Config) -> Revocations {
    let from_openbao = matches!(config.control.certificates, CertificateSource::OpenBao(_));
    if from_openbao || config.control.crl_path.is_some() {
        Revocations::armed()
    } else {
        Revocations::off()
    }
}

fn in_process<P: AsRef<Path>>(
    config: &Config,
    root: Option<&(P, P)>,
) -> Result<InProcessCa, StartError> {
    let ca = match root {
        None => InProcessCa::random(),
        Some((certificate, key)) => {
            InProcessCa::from_pem(&read(certificate.as_ref())?, &read(key.as_ref())?)
        }
    };
    let ca = ca.map_err(StartError::Ca)?;
    tracing::warn!(
        "FAKE_CA is on: certificates are signed inside this process, and whoever can read the \
         root's key can become any workload; for tests and demonstrations only"
    );
    Ok(ca.with_lifetime(config.control.secret_ttl))
}

/// istiod or istio-csr. A proxy of one workload asks for whatever its own token stands for, a proxy of a node for the
/// workloads that run there.
fn istio(config: &Config, address: &Address) -> IstioCa<Server> {
    let mut options = IstioOptions::default();
    options.lifetime = config.control.secret_ttl;
    options.caller = match config.capture.mode {
        ProxyMode::Shared => Caller::Impersonates,
        ProxyMode::Dedicated(_) => Caller::Itself,
    };
    let mut target = target(config, address);
    // Within the deadline of a request, istio-csr allows none.
    target.ping_interval = None;
    let watches_roots = config.control.watches_ca_roots;
    let server = Server {
        target,
        watches_roots,
    };
    IstioCa::new(server, options)
}

/// The certificate authority, as a server of the control plane.
struct Server {
    target: Target,
    /// Without, roots that change count for the next connection.
    watches_roots: bool,
}

impl Connect for Server {
    fn connect(&self) -> BoxFuture<'_, Result<Channel, ConnectError>> {
        Box::pin(async { Ok(self.target.connect().await?) })
    }

    fn metadata(&self) -> BoxFuture<'_, Result<MetadataMap, ConnectError>> {
        Box::pin(async { Ok(self.target.metadata().await?) })
    }

    fn is_current(&self) -> BoxFuture<'_, bool> {
        Box::pin(async { !self.watches_roots || self.target.is_current().await })
    }
}

fn read(path: &Path) -> Result<String, StartError> {
    fs::read_to_string(path).map_err(|source| StartError::Read {
        path: path.to_owned(),
        source,
    })
}
