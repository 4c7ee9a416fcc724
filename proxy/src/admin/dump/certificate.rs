//! Certificates of the workloads of this node; never their keys.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use cert_agent::{CertificateState, HeldCertificate, IdentityStatus};
use serde::Serialize;

use crate::admin::when;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Certificate<'a> {
    cert_chain: Vec<Element>,
    identity: &'a str,
    /// Why the last attempt failed, also while an earlier certificate is valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_failure: Option<&'a str>,
    root_certs: Vec<Element>,
    /// The life of the certificate in more detail than `state`.
    stage: &'static str,
    state: String,
}

impl<'a> Certificate<'a> {
    pub(super) fn of(status: &'a IdentityStatus) -> Self {
        let shown = |held: &[HeldCertificate]| match status.state {
            CertificateState::Available => held.iter().map(Element::of).collect(),
            CertificateState::Initializing | CertificateState::Unavailable(_) | _ => Vec::new(),
        };
        Self {
            cert_chain: shown(&status.chain),
            identity: status.identity.as_str(),
            last_failure: status.last_failure.as_deref(),
            root_certs: shown(&status.roots),
            stage: status.stage.as_str(),
            state: status.state.to_string(),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Element {
    expiration_time: String,
    /// Base64 of the PEM text, as istioctl reads it.
    pem: String,
    serial_number: String,
    valid_from: String,
}

impl Element {
    fn of(held: &HeldCertificate) -> Self {
        Self {
            expiration_time: when::rfc3339(held.not_after),
            pem: BASE64_STANDARD.encode(&held.pem),
            serial_number: held.serial.clone(),
            valid_from: when::rfc3339(held.not_before),
        }
    }
}
