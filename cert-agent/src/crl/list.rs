//! Revocation lists and what they say about a chain.

use std::{cell::Cell, iter, slice, sync::Arc};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use webpki::{
    BorrowedCertRevocationList, Cert, CertRevocationList, EndEntityCert, Error, ExpirationPolicy,
    RevocationCheckDepth, RevocationOptionsBuilder, UnknownStatusPolicy, VerifiedPath,
};

use super::Lists;
use crate::chain::{Chain, Terms};

/// One list, in its own order for lookups.
#[derive(Debug)]
pub(super) struct List {
    list: CertRevocationList<'static>,
    len: usize,
}

impl List {
    fn from_der(der: &[u8]) -> Result<Self, Error> {
        let list = BorrowedCertRevocationList::from_der(der)?;
        Ok(Self {
            len: list.into_iter().count(),
            list: list.to_owned()?.into(),
        })
    }

    /// How many certificates it names.
    pub(super) fn len(&self) -> usize {
        self.len
    }
}

/// Whether `list` names this certificate of an issuer of this name. Who signed the list is not looked at.
fn names(list: &CertRevocationList<'static>, certificate: &Cert<'_>) -> bool {
    list.issuer() == certificate.issuer()
        && matches!(list.find_serial(certificate.serial()), Ok(Some(_)))
}

/// Reads all lists of a content: PEM if there is any block, else one list in DER.
pub(super) fn parse(content: &[u8]) -> Result<Lists, CrlError> {
    if content.trim_ascii().is_empty() {
        return Ok(Arc::default());
    }
    if !content.windows(PEM.len()).any(|window| window == PEM) {
        return Ok(Arc::from([List::from_der(content)?]));
    }
    CertificateRevocationListDer::pem_slice_iter(content)
        .map(|block| Ok(List::from_der(&block.map_err(CrlError::Pem)?)?))
        .collect()
}

/// Reads lists in DER.
pub(super) fn parse_each(lists: &[Vec<u8>]) -> Result<Lists, CrlError> {
    lists.iter().map(|der| Ok(List::from_der(der)?)).collect()
}

/// The lists that may revoke something of `chain`.
pub(super) fn listed<'a>(
    lists: impl Iterator<Item = &'a List>,
    chain: Chain<'_>,
) -> Vec<&'a CertRevocationList<'static>> {
    let certificates: Vec<_> = chain
        .certificates()
        .filter_map(|certificate| EndEntityCert::try_from(certificate).ok())
        .collect();
    lists
        .filter(|list| {
            certificates
                .iter()
                .any(|certificate| names(&list.list, certificate))
        })
        .map(|list| &list.list)
        .collect()
}

/// Whether each path from `chain` to an anchor has a certificate that one of `lists` revokes, signed by its issuer.
///
/// A path and a list at a time, since what a peer presents besides its path may be anything. The verifier asks no more than the
/// first list of an issuer's name, which may be an older one, or that of a predecessor with another key; and of several paths it
/// tells one error, which need not be that one is revoked.
pub(super) fn revokes(
    lists: &[&CertRevocationList<'static>],
    chain: Chain<'_>,
    terms: &Terms<'_>,
) -> bool {
    let found = Cell::new(false);
    let is_good = |path: &VerifiedPath<'_>| {
        if !lists
            .iter()
            .any(|list| is_revoked(path, list, chain, terms))
        {
            return Ok(());
        }
        found.set(true);
        Err(Error::CertRevoked)
    };
    chain.verify_where(terms, &is_good).is_err() && found.get()
}

/// Whether `list` revokes a certificate on this path of `chain`.
fn is_revoked(
    path: &VerifiedPath<'_>,
    list: &CertRevocationList<'static>,
    chain: Chain<'_>,
    terms: &Terms<'_>,
) -> bool {
    let mut certificates = iter::once(&**path.end_entity()).chain(path.intermediate_certificates());
    if !certificates.any(|certificate| names(list, certificate)) {
        return false; // it names something else that the peer presents
    }
    let intermediates: Vec<_> = path
        .intermediate_certificates()
        .map(|it| it.der())
        .collect();
    let (chain, terms) = (
        Chain {
            intermediates: &intermediates,
            ..chain
        },
        Terms {
            anchors: slice::from_ref(path.anchor()),
            ..*terms
        },
    );
    let lists = [list];
    let options = RevocationOptionsBuilder::new(&lists).ok().map(|builder| {
        builder
            .with_depth(RevocationCheckDepth::Chain)
            .with_status_policy(UnknownStatusPolicy::Allow)
            .with_expiration_policy(ExpirationPolicy::Ignore)
            .build()
    });
    chain.verify(&terms, options) == Err(Error::CertRevoked)
}

/// Why the lists of a source stay what they were.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CrlError {
    /// The file cannot be read.
    #[error("the file of revocation lists cannot be read")]
    Read(#[source] std::io::Error),
    /// The file is not PEM.
    #[error("the file of revocation lists is not PEM")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// A list is not one, or of a kind that is not supported: delta and indirect ones are not.
    #[error("unusable certificate revocation list")]
    List(#[from] Error),
}

const PEM: &[u8] = b"-----BEGIN";

impl<'a> Chain<'a> {
    fn certificates(self) -> impl Iterator<Item = &'a CertificateDer<'a>> {
        iter::once(self.leaf).chain(self.intermediates)
    }
}
