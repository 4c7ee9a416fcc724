//! What an agent holds, for people to look at.

use std::{fmt, sync::Arc, time::SystemTime};

use rustls::pki_types::CertificateDer;

use crate::{SpiffeId, Svid, check::to_system_time};

/// One identity of an [`Agent`](crate::Agent).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct IdentityStatus {
    /// The identity.
    pub identity: SpiffeId,
    /// Whether a certificate can be presented.
    pub state: CertificateState,
    /// Leaf first, then intermediates; kept even when expired.
    pub chain: Vec<HeldCertificate>,
    /// The trust anchors.
    pub roots: Vec<HeldCertificate>,
}

/// Whether a certificate can be presented. `Display` gives the words of the admin dump.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CertificateState {
    /// The first fetch is queued or running.
    Initializing,
    /// A valid certificate is held.
    Available,
    /// No valid certificate is held, for this reason.
    Unavailable(Arc<str>),
}

impl fmt::Display for CertificateState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Initializing => f.write_str("Initializing"),
            Self::Available => f.write_str("Available"),
            Self::Unavailable(reason) => write!(f, "Unavailable: {reason}"),
        }
    }
}

/// One certificate, taken apart.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct HeldCertificate {
    /// The certificate as PEM text.
    pub pem: String,
    /// The serial number in decimal.
    pub serial: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
}

impl HeldCertificate {
    /// Takes a certificate apart; `None` if it does not parse.
    fn new(der: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(der).ok()?;
        let validity = parsed.validity();
        Some(Self {
            pem: pem::encode_config(
                &pem::Pem::new("CERTIFICATE", der.to_vec()),
                pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF),
            ),
            serial: parsed.tbs_certificate.serial.to_string(),
            not_before: to_system_time(validity.not_before.timestamp()),
            not_after: to_system_time(validity.not_after.timestamp()),
        })
    }
}

pub(super) fn describe(
    mut held: Vec<(SpiffeId, CertificateState, Option<Arc<Svid>>)>,
) -> Vec<IdentityStatus> {
    held.sort_unstable_by(|(one, ..), (other, ..)| one.cmp(other));
    held.into_iter()
        .map(|(identity, state, svid)| {
            let list = |ders: &[CertificateDer<'_>]| {
                ders.iter().filter_map(HeldCertificate::new).collect()
            };
            IdentityStatus {
                identity,
                state,
                chain: svid
                    .as_ref()
                    .map_or_else(Vec::new, |svid| list(svid.chain())),
                roots: svid
                    .as_ref()
                    .map_or_else(Vec::new, |svid| list(svid.roots())),
            }
        })
        .collect()
}
