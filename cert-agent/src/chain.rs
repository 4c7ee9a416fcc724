//! Whether a peer's chain leads to a trust anchor, for one side of a handshake.

use std::sync::Arc;

use rustls::{
    CertificateError, Error, OtherError,
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, TrustAnchor, UnixTime},
};
use webpki::{EndEntityCert, KeyUsage, RevocationOptions, VerifiedPath};

/// Which side of a handshake we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// We dialled: the peer is a server.
    Client,
    /// We accepted: the peer is a client.
    Server,
}

impl Side {
    /// What the peer's certificates must allow, where they say anything about it.
    fn peer_usage(self) -> KeyUsage {
        match self {
            Self::Client => KeyUsage::server_auth(),
            Self::Server => KeyUsage::client_auth(),
        }
    }
}

/// A chain to be judged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chain<'a> {
    pub(crate) leaf: &'a CertificateDer<'a>,
    pub(crate) intermediates: &'a [CertificateDer<'a>],
}

/// What is asked about each path from a chain to an anchor, until it says yes.
pub(crate) type Accept<'a> = &'a dyn Fn(&VerifiedPath<'_>) -> Result<(), webpki::Error>;

/// By what a chain is judged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms<'a> {
    pub(crate) anchors: &'a [TrustAnchor<'a>],
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
    pub(crate) side: Side,
    pub(crate) now: UnixTime,
}

impl Chain<'_> {
    /// Builds a path to one of the anchors.
    pub(crate) fn verify(
        &self,
        terms: &Terms<'_>,
        revocation: Option<RevocationOptions<'_>>,
    ) -> Result<(), webpki::Error> {
        self.build(terms, revocation, None)
    }

    /// Builds a path to one of the anchors that `accept` says yes to; those that it refuses are left for others.
    pub(crate) fn verify_where(
        &self,
        terms: &Terms<'_>,
        accept: Accept<'_>,
    ) -> Result<(), webpki::Error> {
        self.build(terms, None, Some(accept))
    }

    fn build(
        &self,
        terms: &Terms<'_>,
        revocation: Option<RevocationOptions<'_>>,
        accept: Option<Accept<'_>>,
    ) -> Result<(), webpki::Error> {
        EndEntityCert::try_from(self.leaf)?
            .verify_for_usage(
                terms.algorithms.all,
                terms.anchors,
                self.intermediates,
                terms.now,
                terms.side.peer_usage(),
                revocation,
                accept,
            )
            .map(drop)
    }

    /// More than any sane peer presents: the rest would only keep us searching for paths.
    pub(crate) fn is_too_long(&self) -> bool {
        self.intermediates.len() > MAX_INTERMEDIATES
    }
}

/// What the peer is told, by an alert, and the log.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the alert is the same for all others, and the log names them"
)]
pub(crate) fn to_tls(error: webpki::Error) -> Error {
    use webpki::Error as E;
    let certificate = match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::CertRevoked => CertificateError::Revoked,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        E::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    };
    Error::InvalidCertificate(certificate)
}

/// Beyond the leaf. A path may have six.
pub(crate) const MAX_INTERMEDIATES: usize = 12;

#[cfg(test)]
mod tests;
