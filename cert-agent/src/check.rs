//! What an authority returned is checked here before anything uses it.

use std::time::{Duration, SystemTime};

use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, UnixTime},
};
use x509_parser::{
    certificate::X509Certificate,
    prelude::{FromDer, GeneralName, ParsedExtension, X509Extension},
};

use crate::{SpiffeId, chain::MAX_INTERMEDIATES};

/// Which name a returned certificate must carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SanRule {
    /// Exactly one URI name, equal to the requested identity.
    #[default]
    Requested,
    /// Any one identity: for a proxy that is given its own identity by the authority.
    Any,
}

/// What the checks found out about an acceptable chain.
#[derive(Debug)]
pub(crate) struct Accepted {
    /// The identity in the leaf.
    pub(crate) id: SpiffeId,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
    /// Leaf and intermediates, without self-signed certificates.
    pub(crate) presented: Vec<CertificateDer<'static>>,
}

/// Checks everything but the key: names, validity at `now`, and the chain for both roles.
pub(crate) fn check_chain(
    requested: &SpiffeId,
    rule: SanRule,
    chain: Vec<CertificateDer<'static>>,
    roots: &[CertificateDer<'static>],
    (provider, now): (&CryptoProvider, SystemTime),
) -> Result<Accepted, Rejection> {
    let Some(leaf) = chain.first() else {
        return Err(Rejection::EmptyChain(requested.clone()));
    };
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| Rejection::NotACertificate)?;
    let id = check_names(requested, rule, &parsed)?;
    let validity = parsed.validity();
    let not_before = to_system_time(validity.not_before.timestamp());
    let not_after = to_system_time(validity.not_after.timestamp());
    if not_after <= now {
        return Err(Rejection::Expired);
    }
    if not_before > now + CLOCK_SKEW {
        return Err(Rejection::NotYetValid);
    }
    let anchors = check_roots(roots)?;
    let mut presented = chain;
    let mut position = 0;
    presented.retain(|certificate| {
        position += 1;
        position == 1 || !is_self_signed(certificate)
    });
    // A clock that is slightly behind the authority's must not refuse a brand-new certificate.
    check_path(&presented, &anchors, provider, now.max(not_before))?;
    Ok(Accepted {
        id,
        not_before,
        not_after,
        presented,
    })
}

fn check_names(
    requested: &SpiffeId,
    rule: SanRule,
    leaf: &X509Certificate<'_>,
) -> Result<SpiffeId, Rejection> {
    let wrong = |presented: Vec<String>| Rejection::WrongIdentity {
        expected: requested.clone(),
        presented,
    };
    let uris: Vec<&str> = leaf
        .subject_alternative_name()
        .ok()
        .flatten()
        .into_iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| {
            if let GeneralName::URI(uri) = name {
                Some(*uri)
            } else {
                None
            }
        })
        .collect();
    let all = || uris.iter().map(ToString::to_string).collect();
    let [uri] = uris.as_slice() else {
        return Err(wrong(all()));
    };
    let id: SpiffeId = uri.parse().map_err(|_| wrong(all()))?;
    match rule {
        SanRule::Requested if id != *requested => Err(wrong(all())),
        SanRule::Requested | SanRule::Any => Ok(id),
    }
}

/// Unusable roots are skipped; at least one must remain.
fn check_roots(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, Rejection> {
    let mut anchors = RootCertStore::empty();
    let (_, ignored) = anchors.add_parsable_certificates(roots.iter().cloned());
    if ignored > 0 {
        tracing::warn!(ignored, "unusable root certificates were skipped");
    }
    if anchors.is_empty() {
        return Err(Rejection::NoRoots);
    }
    Ok(anchors)
}

fn check_path(
    chain: &[CertificateDer<'static>],
    anchors: &RootCertStore,
    provider: &CryptoProvider,
    now: SystemTime,
) -> Result<(), Rejection> {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(Rejection::NotACertificate);
    };
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(Rejection::ChainTooLong);
    }
    let leaf = webpki::EndEntityCert::try_from(leaf).map_err(Rejection::Untrusted)?;
    let since_epoch = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let now = UnixTime::since_unix_epoch(since_epoch);
    for usage in [
        webpki::KeyUsage::server_auth(),
        webpki::KeyUsage::client_auth(),
    ] {
        leaf.verify_for_usage(
            provider.signature_verification_algorithms.all,
            &anchors.roots,
            intermediates,
            now,
            usage,
            None,
            None,
        )
        .map_err(Rejection::Untrusted)?;
    }
    Ok(())
}

/// Such a certificate tells a peer nothing, and Envoy has refused chains with one. What does not
/// parse is left for the peer to judge.
///
/// Issuer equals subject, and no key identifiers tell that the issuer's key is another one: an old
/// root may certify the key of a new one of the same name, which peers that trust the old one need.
pub(crate) fn is_self_signed(certificate: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| {
        parsed.issuer().as_raw() == parsed.subject().as_raw() && !names_another_key(&parsed)
    })
}

fn names_another_key(certificate: &X509Certificate<'_>) -> bool {
    let parsed = || {
        certificate
            .iter_extensions()
            .map(X509Extension::parsed_extension)
    };
    let own = parsed().find_map(|extension| {
        if let ParsedExtension::SubjectKeyIdentifier(key) = extension {
            Some(key)
        } else {
            None
        }
    });
    let issuers = parsed().find_map(|extension| {
        if let ParsedExtension::AuthorityKeyIdentifier(issuer) = extension {
            issuer.key_identifier.as_ref()
        } else {
            None
        }
    });
    own.zip(issuers)
        .is_some_and(|(own, issuers)| own != issuers)
}

pub(crate) fn to_system_time(unix_seconds: i64) -> SystemTime {
    u64::try_from(unix_seconds).map_or(SystemTime::UNIX_EPOCH, |seconds| {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    })
}

/// Why an authority's answer is not used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// There is no certificate in the answer.
    #[error("chain returned from CA is empty for: {0}")]
    EmptyChain(SpiffeId),
    /// The leaf does not parse.
    #[error("the CA returned something that is not a certificate")]
    NotACertificate,
    /// The answer names no usable trust anchor.
    #[error("no root certificate present")]
    NoRoots,
    /// The leaf does not carry exactly the requested identity.
    #[error("did not find expected SAN: {expected} (got {presented:?})")]
    WrongIdentity {
        /// What was requested.
        expected: SpiffeId,
        /// The URI names in the leaf.
        presented: Vec<String>,
    },
    /// The leaf certifies another key, or the key is unusable.
    #[error("the certificate does not fit the private key")]
    Key(#[source] rustls::Error),
    /// The leaf has expired.
    #[error("the CA returned an expired certificate")]
    Expired,
    /// The leaf becomes valid in the future only.
    #[error("the CA returned a certificate that is not valid yet")]
    NotYetValid,
    /// The leaf chains to none of the returned roots, or may not serve both roles.
    #[error("the certificate does not chain to a returned root")]
    Untrusted(#[source] webpki::Error),
    /// There are more certificates than peers take.
    #[error("the certificate chain is too long")]
    ChainTooLong,
    /// No TLS configuration can be made of it.
    #[error("no TLS configuration can be made of the certificate")]
    Tls(#[source] rustls::Error),
}

/// How far the authority's clock may be ahead of ours.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
