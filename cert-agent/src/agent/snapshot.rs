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
    /// What is happening to it.
    pub stage: Stage,
    /// When the certificate was obtained.
    pub obtained_at: Option<SystemTime>,
    /// Why the last attempt failed, also while an earlier certificate is still valid.
    pub last_failure: Option<Arc<str>>,
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

/// Where an identity is in its life. `Display` gives the label of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// The first fetch waits for its turn.
    Queued,
    /// The first fetch is running.
    Fetching,
    /// A valid certificate is held and not due for renewal.
    Held,
    /// A valid certificate is held, and its successor is queued, being fetched or tried again.
    Renewing,
    /// There has been no certificate yet, and the last attempt failed.
    Failing,
    /// The certificate has expired, and no successor was obtained.
    Expired,
    /// The last workload has left; the entry goes when the grace is over.
    Forgotten,
}

impl Stage {
    /// The label of the metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Fetching => "fetching",
            Self::Held => "held",
            Self::Renewing => "renewing",
            Self::Failing => "failing",
            Self::Expired => "expired",
            Self::Forgotten => "forgotten",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One identity before its certificates are taken apart.
#[derive(Debug)]
pub(crate) struct Overview {
    pub(crate) state: CertificateState,
    pub(crate) stage: Stage,
    pub(crate) svid: Option<Arc<Svid>>,
    pub(crate) obtained_at: Option<SystemTime>,
    pub(crate) last_failure: Option<Arc<str>>,
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

/// Takes everything apart, leaf first, sorted by identity.
pub(super) fn describe(overviews: Vec<(SpiffeId, Overview)>) -> Vec<IdentityStatus> {
    overviews
        .into_iter()
        .map(|(identity, overview)| {
            let list = |ders: Option<&[CertificateDer<'_>]>| {
                let ders = ders.into_iter().flatten();
                ders.filter_map(HeldCertificate::new).collect()
            };
            let svid = overview.svid.as_ref();
            IdentityStatus {
                identity,
                chain: list(svid.map(|svid| svid.chain())),
                roots: list(svid.map(|svid| svid.roots())),
                state: overview.state,
                stage: overview.stage,
                obtained_at: overview.obtained_at,
                last_failure: overview.last_failure,
            }
        })
        .collect()
}
