//! The section [`Tls`]: how the proxy speaks to peers, and whom it trusts.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::{fault::Given, identity::trust_domain, reader::Reader};
use crate::config::{CertificateSource, PqcPolicy, RootSource, Tls};

pub(super) fn tls(reader: &mut Reader<'_>, certificates: &CertificateSource) -> Tls {
    let (pqc, ignored_policy) = match reader.text("COMPLIANCE_POLICY") {
        Some("pqc") => (PqcPolicy::Required, None),
        other => (PqcPolicy::Default, other.map(str::to_owned)),
    };
    Tls {
        tls12: reader.literal("TLS12_ENABLED", "true"),
        pqc,
        ignored_policy,
        trust_domains: trust_domains(reader),
        trust_file: trust_file(reader, certificates),
        trust_grace: reader.duration("TRUST_BUNDLE_GRACE").unwrap_or(GRACE),
    }
}

/// The roots of the mesh are those that the certificate authority has, so the file that tells how to reach it serves here
/// as well. A CA inside this process is reached without, and OpenBao has roots of its own and says which ones are those
/// of the mesh.
fn trust_file(reader: &Reader<'_>, certificates: &CertificateSource) -> Option<PathBuf> {
    match (reader.text("TRUST_BUNDLE_PATH"), certificates) {
        (Some("NONE"), _)
        | (None, CertificateSource::InProcess { .. } | CertificateSource::OpenBao(_)) => None,
        (Some(path), _) => Some(path.into()),
        (None, CertificateSource::Istio(address)) => match &address.roots {
            RootSource::File(path) => Some(path.clone()),
            RootSource::System | RootSource::Pem(_) => None,
        },
    }
}

fn trust_domains(reader: &mut Reader<'_>) -> Arc<[Arc<str>]> {
    let key = "TRUST_DOMAINS";
    let mut domains = Vec::new();
    for domain in reader.text(key).unwrap_or_default().split(',') {
        let domain = domain.trim();
        if !domain.is_empty() {
            let given = Given::Value(domain.to_owned());
            domains.extend(reader.keep(key, given, trust_domain(domain)));
        }
    }
    domains.sort();
    domains.dedup();
    domains.into()
}

/// Time for files and certificates to follow each other through a mesh.
const GRACE: Duration = Duration::from_hours(1);
