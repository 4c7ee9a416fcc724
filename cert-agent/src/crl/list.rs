//! Revocation lists and what they say about a chain.

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use webpki::{
    BorrowedCertRevocationList, CertRevocationList, EndEntityCert, Error, ExpirationPolicy,
    RevocationCheckDepth, RevocationOptionsBuilder, UnknownStatusPolicy,
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

    /// Whether it names this certificate of an issuer of this name. Who signed the list is not looked at.
    fn names(&self, certificate: &EndEntityCert<'_>) -> bool {
        self.list.issuer() == certificate.issuer()
            && matches!(self.list.find_serial(certificate.serial()), Ok(Some(_)))
    }
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
                .any(|certificate| list.names(certificate))
        })
        .map(|list| &list.list)
        .collect()
}

/// Whether the issuers of `chain` have signed any of `lists`, which name something of it.
pub(super) fn revokes(
    lists: &[&CertRevocationList<'static>],
    chain: Chain<'_>,
    terms: &Terms<'_>,
) -> bool {
    match judge(lists, chain, terms) {
        Ok(()) => false,
        Err(Error::CertRevoked) => true,
        // A list of another issuer with the same name, such as a predecessor with another key, would hide the others.
        Err(_) => lists
            .iter()
            .any(|list| matches!(judge(&[list], chain, terms), Err(Error::CertRevoked))),
    }
}

fn judge(
    lists: &[&CertRevocationList<'static>],
    chain: Chain<'_>,
    terms: &Terms<'_>,
) -> Result<(), Error> {
    let options = RevocationOptionsBuilder::new(lists).ok().map(|builder| {
        builder
            .with_depth(RevocationCheckDepth::Chain)
            .with_status_policy(UnknownStatusPolicy::Allow)
            .with_expiration_policy(ExpirationPolicy::Ignore)
            .build()
    });
    chain.verify(terms, options)
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
        std::iter::once(self.leaf).chain(self.intermediates)
    }
}
