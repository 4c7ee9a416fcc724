//! What can be configured already but is not there yet.

use super::StartError;
use crate::config::{CertificateSource, ControlPlane};

/// Holds the configured sources of mesh state and certificates against those that exist.
///
/// # Errors
/// [`StartError::NotAvailable`] names each missing part and the variables that do without it.
pub fn check_available(control: &ControlPlane) -> Result<(), StartError> {
    let mut missing = Vec::new();
    if let CertificateSource::Istio(_) = control.certificates {
        missing.push(NO_CA);
    }
    if missing.is_empty() {
        Ok(())
    } else {
        Err(StartError::NotAvailable(missing))
    }
}

const NO_CA: &str = "certificates from istiod are not available in this version; \
     set FAKE_CA=true to sign them in this process (for tests and demonstrations: give several \
     nodes the same FAKE_CA_ROOT_CERT and FAKE_CA_ROOT_KEY)";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{Address, RootSource};

    fn control(xds: Option<Address>, certificates: CertificateSource) -> ControlPlane {
        ControlPlane {
            xds,
            local: None,
            on_demand: false,
            certificates,
            secret_ttl: Duration::from_secs(1),
            token: None,
            preferred_service_namespace: None,
            crl_path: None,
        }
    }

    fn address() -> Address {
        Address {
            uri: http::Uri::from_static("https://istiod:15012"),
            roots: RootSource::System,
            alternative_host: None,
            headers: Vec::new(),
        }
    }

    const IN_PROCESS: CertificateSource = CertificateSource::InProcess { root: None };

    #[test]
    fn names_what_is_missing_and_the_way_around() {
        let both = control(Some(address()), CertificateSource::Istio(address()));
        let text = check_available(&both).unwrap_err().to_string();
        for part in ["istiod", "FAKE_CA=true"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn is_content_with_the_own_ca() {
        check_available(&control(None, IN_PROCESS)).unwrap();
        check_available(&control(Some(address()), IN_PROCESS)).unwrap();
    }
}
