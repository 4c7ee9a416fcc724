//! How TLS is spoken, as configured.

use std::sync::Arc;

use cert_agent::TlsOptions;

use crate::config::{Config, PqcPolicy};

/// With peers and with the control plane.
pub(super) fn tls_options(config: &Config) -> TlsOptions {
    let mut tls = TlsOptions::default();
    tls.tls12 = config.tls.tls12;
    tls.pqc_only = config.tls.pqc == PqcPolicy::Required;
    tls.trust_domains = Arc::clone(&config.tls.trust_domains);
    tls
}
