//! Who the peer is: SPIFFE verification on both sides of a handshake.

use std::{fmt, sync::Arc};

use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use crate::SpiffeId;

/// The identity of a peer: the first URI name of its leaf that has the Istio form.
///
/// Meant for a chain that a handshake has verified; nothing is verified here.
#[must_use]
pub fn peer_id(chain: &[CertificateDer<'_>]) -> Option<SpiffeId> {
    identities(chain.first()?).into_iter().next()
}

/// The identities of a certificate, in its order. Names of another form are left out.
pub(crate) fn identities(leaf: &CertificateDer<'_>) -> Vec<SpiffeId> {
    uri_names(leaf)
        .into_iter()
        .filter_map(|uri| match uri.parse() {
            Ok(id) => Some(id),
            Err(error) => {
                tracing::debug!(%uri, %error, "ignored a URI name of a certificate");
                None
            }
        })
        .collect()
}

/// All URI names of a certificate, in its order; none if it does not parse.
pub(crate) fn uri_names<'a>(leaf: &'a CertificateDer<'a>) -> Vec<&'a str> {
    webpki::EndEntityCert::try_from(leaf)
        .map(|cert| cert.valid_uri_names().collect())
        .unwrap_or_default()
}

/// A peer with a valid chain is not who it must be. Travels inside [`rustls::Error::Other`]; see
/// [`find`](Self::find).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum IdentityError {
    /// A server presented none of the expected identities.
    Unexpected {
        /// Any of these would have been right.
        expected: Arc<[SpiffeId]>,
        /// What the server presented.
        presented: Vec<SpiffeId>,
    },
    /// A client comes from a foreign trust domain.
    TrustDomain {
        /// The trust domains that are accepted.
        accepted: Arc<[Arc<str>]>,
        /// What the client presented.
        presented: Vec<SpiffeId>,
    },
}

impl IdentityError {
    /// Finds the reason in what a handshake failed with.
    #[must_use]
    pub fn find(error: &Error) -> Option<&Self> {
        if let Error::Other(OtherError(inner)) = error {
            inner.downcast_ref()
        } else {
            None
        }
    }

    fn into_tls(self) -> Error {
        Error::Other(OtherError(Arc::new(self)))
    }
}

impl fmt::Display for IdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("identity verification error: ")?;
        match self {
            Self::Unexpected {
                expected,
                presented,
            } => write!(
                f,
                "peer did not present the expected SAN ({}), got {}",
                List(expected),
                List(presented)
            ),
            Self::TrustDomain {
                accepted,
                presented,
            } => write!(
                f,
                "peer is of none of the trust domains ({}), got {}",
                List(accepted),
                List(presented)
            ),
        }
    }
}

impl std::error::Error for IdentityError {}

/// Items with commas between; `nothing` if there is none.
struct List<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, item) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{item}")?;
        }
        if self.0.is_empty() {
            f.write_str("nothing")?;
        }
        Ok(())
    }
}

/// What the two traits of rustls ask for alike: whether the peer holds the key of its certificate.
macro_rules! verifies_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls12_signature(message, cert, dss, &self.algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, cert, dss, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

/// Verifies clients: chain to our roots, then the trust-domain rule.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    pub(crate) chain: Arc<dyn ClientCertVerifier>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
    pub(crate) trust_domains: Arc<[Arc<str>]>,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)?;
        let presented = identities(end_entity);
        let ours = |id: &SpiffeId| {
            self.trust_domains
                .iter()
                .any(|td| **td == *id.trust_domain())
        };
        if presented.iter().any(ours) {
            return Ok(verified);
        }
        let accepted = Arc::clone(&self.trust_domains);
        Err(IdentityError::TrustDomain {
            accepted,
            presented,
        }
        .into_tls())
    }

    verifies_signatures!();
}

/// Verifies servers: chain to our roots, then one of the expected identities. No host name.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
    pub(crate) expected: Arc<[SpiffeId]>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        let presented = identities(end_entity);
        if presented.iter().any(|id| self.expected.contains(id)) {
            return Ok(ServerCertVerified::assertion());
        }
        let expected = Arc::clone(&self.expected);
        Err(IdentityError::Unexpected {
            expected,
            presented,
        }
        .into_tls())
    }

    verifies_signatures!();
}
