//! What comes of the connection in the end, as far as this proxy knows.

use cert_agent::{CertificateState, IdentityStatus};
use serde::Serialize;

use super::verdict::Verdict;
use crate::{
    mesh::Workload,
    route::{Outbound, Via},
    telemetry::Reason,
};

/// How it ends before a byte moves.
#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    pub(super) allowed: bool,
    /// As in the access log, if it is not allowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<Reason>,
    pub(super) because: String,
}

impl Outcome {
    pub(super) fn refused(reason: Reason, because: &impl ToString) -> Self {
        Self {
            allowed: false,
            reason: Some(reason),
            because: because.to_string(),
        }
    }

    /// How a tunnel ends whose source has nothing to prove its identity with.
    pub(super) fn unproven(
        outbound: &Outbound,
        source: &Workload,
        held: Option<&IdentityStatus>,
    ) -> Option<Self> {
        if !matches!(outbound, Outbound::Hbone(_) | Outbound::Nested { .. }) {
            return None;
        }
        if source.identity().is_none() {
            let because = "the source has no identity that a certificate could carry";
            return Some(Self::refused(Reason::NoIdentity, &because));
        }
        let CertificateState::Unavailable(why) = &held?.state else {
            return None;
        };
        let because = format!("the source has no certificate: {why}");
        Some(Self::refused(Reason::NoCertificate, &because))
    }

    /// What route and policies say.
    pub(super) fn of(outbound: &Outbound, policy: Option<&Verdict>) -> Self {
        if let Outbound::Refuse(refusal) = outbound {
            return Self::refused(refusal.reason(), refusal);
        }
        match policy {
            Some(verdict) if !verdict.allowed => {
                Self::refused(verdict.reason(outbound), &verdict.because)
            }
            Some(verdict) => Self {
                allowed: true,
                reason: None,
                because: verdict.because.clone(),
            },
            None => Self {
                allowed: true,
                reason: None,
                because: match outbound {
                    Outbound::Nested { .. } => {
                        "policies are those of the other network, which are not known here"
                    }
                    Outbound::Hbone(hop) if hop.via == Via::Waypoint => {
                        "the waypoint decides, and then who is behind it"
                    }
                    Outbound::Passthrough { .. }
                    | Outbound::Direct { .. }
                    | Outbound::Hbone(_)
                    | Outbound::Resolve(_)
                    | Outbound::Refuse(_) => "no policy of the mesh is asked on this hop",
                }
                .to_owned(),
            },
        }
    }
}
