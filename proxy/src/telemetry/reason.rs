//! Why a flow was refused or failed: the one vocabulary of logs, metrics, the admin server and `culvert explain`.

use std::fmt;

use serde::{Serialize, Serializer};

use super::ResponseFlag;

/// Why a connection did not come to be, or did not end in order.
///
/// Fine where `response_flags`, which tools of the mesh read, is coarse: [`Self::flag`] maps one to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// A policy forbids it.
    PolicyDenied,
    /// A change of policies forbids what was allowed at first.
    PolicyChanged,
    /// The proxy at the other end said that a policy forbids it (status 401).
    DeniedByPeer,
    /// The proxy at the other end answered with another status than 200.
    HttpStatus,
    /// A certificate of the peer is revoked.
    Revoked,
    /// The local workload has no identity that a certificate could carry.
    NoIdentity,
    /// There is no certificate for the local workload.
    NoCertificate,
    /// The local workload is no longer who it was when the connection began.
    IdentityChanged,
    /// The peer proved to be somebody else than was expected, or nobody of the mesh.
    PeerIdentityMismatch,
    /// The TLS handshake failed.
    TlsHandshake,
    /// The TLS handshake took too long.
    TlsTimeout,
    /// HTTP/2 could not be set up, or its connection broke.
    Http2,
    /// The peer did not answer the CONNECT in time.
    AnswerTimeout,
    /// The peer's HBONE port did not answer: packets are dropped on the way.
    HboneTimeout,
    /// The destination, or the way to it, said no.
    ConnectRefused,
    /// The destination did not answer.
    ConnectTimeout,
    /// No socket, or no source port, was left on this side.
    NoSocket,
    /// The application took no PROXY header.
    ProxyHeader,
    /// The client gave up before the connection was established.
    ClientGone,
    /// A side broke while bytes moved.
    Broken,
    /// The connection would lead back to this proxy.
    Recursion,
    /// Nobody told of the local workload.
    UnknownLocal,
    /// No endpoint of the service may be used.
    NoHealthyUpstream,
    /// The waypoint is not known or has no usable endpoint.
    UnknownWaypoint,
    /// The network gateway is not known or has no usable endpoint.
    UnknownGateway,
    /// The chosen workload has no address.
    NoRoute,
    /// The host name of the chosen workload yields no address.
    Unresolved,
    /// The request to this proxy cannot be read.
    BadRequest,
    /// The request names an address that is not served here.
    IpMismatch,
    /// The request names a host that no service here has.
    UnknownHost,
    /// The service has no such port here.
    NoTargetPort,
    /// A PROXY header must name a virtual address, and there is none.
    NoVirtualAddress,
    /// Too many handshakes are under way.
    Overloaded,
    /// The proxy is stopping, or the pod has gone.
    Drained,
    /// A defect of this program.
    Internal,
}

impl Reason {
    /// All of them, in the order of [`Self::index`].
    pub(super) const ALL: [Self; 35] = [
        Self::PolicyDenied,
        Self::PolicyChanged,
        Self::DeniedByPeer,
        Self::HttpStatus,
        Self::Revoked,
        Self::NoIdentity,
        Self::NoCertificate,
        Self::IdentityChanged,
        Self::PeerIdentityMismatch,
        Self::TlsHandshake,
        Self::TlsTimeout,
        Self::Http2,
        Self::AnswerTimeout,
        Self::HboneTimeout,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::NoSocket,
        Self::ProxyHeader,
        Self::ClientGone,
        Self::Broken,
        Self::Recursion,
        Self::UnknownLocal,
        Self::NoHealthyUpstream,
        Self::UnknownWaypoint,
        Self::UnknownGateway,
        Self::NoRoute,
        Self::Unresolved,
        Self::BadRequest,
        Self::IpMismatch,
        Self::UnknownHost,
        Self::NoTargetPort,
        Self::NoVirtualAddress,
        Self::Overloaded,
        Self::Drained,
        Self::Internal,
    ];

    /// The value of the `reason` label and log field.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PolicyDenied => "policy-denied",
            Self::PolicyChanged => "policy-changed",
            Self::DeniedByPeer => "denied-by-peer",
            Self::HttpStatus => "http-status",
            Self::Revoked => "revoked",
            Self::NoIdentity => "no-identity",
            Self::NoCertificate => "no-certificate",
            Self::IdentityChanged => "identity-changed",
            Self::PeerIdentityMismatch => "peer-identity-mismatch",
            Self::TlsHandshake => "tls-handshake",
            Self::TlsTimeout => "tls-timeout",
            Self::Http2 => "http2",
            Self::AnswerTimeout => "answer-timeout",
            Self::HboneTimeout => "hbone-timeout",
            Self::ConnectRefused => "connect-refused",
            Self::ConnectTimeout => "connect-timeout",
            Self::NoSocket => "no-socket",
            Self::ProxyHeader => "proxy-header",
            Self::ClientGone => "client-gone",
            Self::Broken => "broken",
            Self::Recursion => "recursion",
            Self::UnknownLocal => "unknown-local",
            Self::NoHealthyUpstream => "no-healthy-upstream",
            Self::UnknownWaypoint => "unknown-waypoint",
            Self::UnknownGateway => "unknown-gateway",
            Self::NoRoute => "no-route",
            Self::Unresolved => "unresolved",
            Self::BadRequest => "bad-request",
            Self::IpMismatch => "ip-mismatch",
            Self::UnknownHost => "unknown-host",
            Self::NoTargetPort => "no-target-port",
            Self::NoVirtualAddress => "no-virtual-address",
            Self::Overloaded => "overloaded",
            Self::Drained => "drained",
            Self::Internal => "internal",
        }
    }

    /// Whether a policy said no, here or at the other end.
    #[must_use]
    pub const fn is_denial(self) -> bool {
        matches!(
            self,
            Self::PolicyDenied | Self::PolicyChanged | Self::DeniedByPeer
        )
    }

    /// The coarse form, which metrics of the mesh carry.
    #[must_use]
    pub const fn flag(self) -> ResponseFlag {
        match self {
            Self::PolicyDenied | Self::PolicyChanged => ResponseFlag::Deny,
            Self::Revoked => ResponseFlag::CertRevoked,
            Self::NoIdentity | Self::NoCertificate | Self::IdentityChanged => {
                ResponseFlag::IdentityError
            }
            Self::Http2 | Self::AnswerTimeout => ResponseFlag::H2HandshakeFailure,
            Self::HboneTimeout => ResponseFlag::NetworkPolicy,
            Self::Drained => ResponseFlag::None,
            Self::DeniedByPeer
            | Self::HttpStatus
            | Self::PeerIdentityMismatch
            | Self::TlsHandshake
            | Self::TlsTimeout
            | Self::ConnectRefused
            | Self::ConnectTimeout
            | Self::NoSocket
            | Self::ProxyHeader
            | Self::ClientGone
            | Self::Broken
            | Self::Recursion
            | Self::UnknownLocal
            | Self::NoHealthyUpstream
            | Self::UnknownWaypoint
            | Self::UnknownGateway
            | Self::NoRoute
            | Self::Unresolved
            | Self::BadRequest
            | Self::IpMismatch
            | Self::UnknownHost
            | Self::NoTargetPort
            | Self::NoVirtualAddress
            | Self::Overloaded
            | Self::Internal => ResponseFlag::Connect,
        }
    }

    /// Position in [`Self::ALL`].
    pub(super) const fn index(self) -> usize {
        #[expect(
            clippy::as_conversions,
            reason = "a variant without fields is its position"
        )]
        {
            self as usize
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_has_its_place_and_a_name_of_its_own() {
        let names: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for (index, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), index, "{reason}");
            // A log reader splits fields at spaces.
            assert!(!reason.as_str().contains(' '));
        }
    }

    #[test]
    fn operators_are_told_what_to_do_about_each_reason() {
        let guide = include_str!("../../../deploy/README.md");
        let guide = guide.split("## Troubleshooting").nth(1).unwrap();
        let list = include_str!("../../../README.md");
        for reason in Reason::ALL {
            let rows = guide.lines().filter(|line| line.starts_with("| `"));
            let in_first_cell = |row: &str| {
                row.split(" | ")
                    .next()
                    .unwrap()
                    .contains(&format!("`{reason}`"))
            };
            assert_eq!(
                rows.filter(|row| in_first_cell(row)).count(),
                1,
                "deploy/README.md: {reason}"
            );
            assert!(list.contains(&format!("`{reason}`")), "README.md: {reason}");
        }
    }
}
