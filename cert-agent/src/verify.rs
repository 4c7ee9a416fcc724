//! Who the peer is: SPIFFE verification on both sides of a handshake.

use std::{fmt, sync::Arc, time::SystemTime};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use crate::{
    Revocations, SpiffeId,
    anchors::Anchors,
    chain::{self, Chain, Side, Terms},
    check::to_system_time,
};

/// The identity of a peer: the one SPIFFE name of its leaf, if it has the Istio form.
///
/// Meant for a chain that a handshake has verified; nothing is verified here.
#[must_use]
pub fn peer_id(chain: &[CertificateDer<'_>]) -> Option<SpiffeId> {
    identity(chain.first()?).ok()?
}

/// When the leaf of a peer ends; `None` if it does not parse.
#[must_use]
pub fn peer_not_after(chain: &[CertificateDer<'_>]) -> Option<SystemTime> {
    let (_, leaf) = x509_parser::parse_x509_certificate(chain.first()?).ok()?;
    Some(to_system_time(leaf.validity().not_after.timestamp()))
}

/// The identity of a certificate; none if it has no name of the Istio form.
///
/// # Errors
/// If it has several SPIFFE names, which the standard forbids: a route might expect one of them, and policies judge another.
pub(crate) fn identity(leaf: &CertificateDer<'_>) -> Result<Option<SpiffeId>, IdentityError> {
    let names = uri_names(leaf);
    let mut spiffe = names.into_iter().filter(|uri| is_spiffe(uri));
    let (Some(name), more) = (spiffe.next(), spiffe.next()) else {
        return Ok(None);
    };
    if let Some(second) = more {
        let all = [name, second].into_iter().chain(spiffe);
        return Err(IdentityError::Several {
            presented: all.map(str::to_owned).collect(),
        });
    }
    Ok(name
        .parse()
        .inspect_err(
            |error| tracing::debug!(uri = name, %error, "a certificate of no identity of the mesh"),
        )
        .ok())
}

/// All URI names of a certificate, in its order; none if it does not parse.
fn uri_names<'a>(leaf: &'a CertificateDer<'a>) -> Vec<&'a str> {
    webpki::EndEntityCert::try_from(leaf)
        .map(|cert| cert.valid_uri_names().collect())
        .unwrap_or_default()
}

/// Schemes are written in any case, even if ours is only taken in one.
fn is_spiffe(uri: &str) -> bool {
    uri.split_once(':')
        .is_some_and(|(scheme, _)| scheme.eq_ignore_ascii_case("spiffe"))
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
        presented: Option<SpiffeId>,
    },
    /// A client comes from a foreign trust domain.
    TrustDomain {
        /// The trust domains that are accepted.
        accepted: Arc<[Arc<str>]>,
        /// What the client presented.
        presented: Option<SpiffeId>,
    },
    /// A peer presented more than one SPIFFE name.
    Several {
        /// All of them.
        presented: Vec<String>,
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
                List(presented.as_slice())
            ),
            Self::TrustDomain {
                accepted,
                presented,
            } => write!(
                f,
                "peer is of none of the trust domains ({}), got {}",
                List(accepted),
                List(presented.as_slice())
            ),
            Self::Several { presented } => write!(
                f,
                "a certificate is for one identity, this one is for {}",
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

/// Verifies the peers of one identity: a chain to its trust anchors with nothing revoked, then who the peer is. No host name.
#[derive(Debug)]
pub(crate) struct PeerVerifier {
    pub(crate) anchors: Arc<Anchors>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
    pub(crate) revocations: Revocations,
    pub(crate) whom: Whom,
}

/// Who a peer may be.
#[derive(Debug, Clone)]
pub(crate) enum Whom {
    /// A client of one of these trust domains.
    Clients(Arc<[Arc<str>]>),
    /// A server that is one of these.
    Servers(Arc<[SpiffeId]>),
}

impl PeerVerifier {
    /// Judges a chain, leaf first, at this moment.
    pub(crate) fn verify_now(&self, chain: &[CertificateDer<'_>]) -> Result<(), Error> {
        let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
        self.verify(leaf, intermediates, UnixTime::now())
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let chain = Chain {
            leaf,
            intermediates,
        };
        if chain.is_too_long() {
            return Err(CertificateError::Other(OtherError(Arc::new(ChainTooLong))).into());
        }
        let terms = Terms {
            anchors: &self.anchors.store.roots,
            algorithms: self.algorithms,
            side: self.whom.side(),
            now,
        };
        self.revocations
            .verify(chain, &terms)
            .map_err(chain::to_tls)?;
        identity(leaf)
            .and_then(|presented| self.whom.admits(presented))
            .map_err(|error| Error::Other(OtherError(Arc::new(error))))
    }
}

impl Whom {
    pub(crate) fn side(&self) -> Side {
        match self {
            Self::Clients(_) => Side::Server,
            Self::Servers(_) => Side::Client,
        }
    }

    fn admits(&self, presented: Option<SpiffeId>) -> Result<(), IdentityError> {
        match self {
            Self::Clients(accepted) => {
                let ours = |id: &SpiffeId| accepted.iter().any(|td| **td == *id.trust_domain());
                if presented.as_ref().is_some_and(ours) {
                    return Ok(());
                }
                let accepted = Arc::clone(accepted);
                Err(IdentityError::TrustDomain {
                    accepted,
                    presented,
                })
            }
            Self::Servers(expected) => {
                if presented.as_ref().is_some_and(|id| expected.contains(id)) {
                    return Ok(());
                }
                let expected = Arc::clone(expected);
                Err(IdentityError::Unexpected {
                    expected,
                    presented,
                })
            }
        }
    }
}

/// A peer presents more certificates than can be of use.
#[derive(Debug, thiserror::Error)]
#[error("the certificate chain is too long")]
struct ChainTooLong;

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

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.anchors.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, now)
            .map(|()| ClientCertVerified::assertion())
    }

    verifies_signatures!();
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, now)
            .map(|()| ServerCertVerified::assertion())
    }

    verifies_signatures!();
}
