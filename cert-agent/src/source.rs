//! Where certificates come from: the traits that each kind of certificate authority implements.

use std::{pin::Pin, time::Duration};

use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};

use crate::{CsrError, PrivateKey, SpiffeId, check::Rejection, key::key_and_request};

/// A future behind a pointer, as the object-safe traits of this crate return it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Gives certificates together with their private keys.
///
/// Authorities that sign requests implement the smaller [`Signer`] and are adapted by
/// [`CsrSource`]; those that hand out keys implement this trait. A source that is *pushed* new
/// certificates keeps the latest of each identity, answers [`obtain`](Self::obtain) from it, and
/// calls [`Agent::refresh`](crate::Agent::refresh) when one changes.
pub trait Source: Send + Sync {
    /// Obtains a certificate for `id`. The agent limits the time, never asks twice at once for one
    /// identity, spaces retries, and checks the answer.
    ///
    /// # Cancel safety
    /// The agent drops the future when the time is up or the identity is no longer needed.
    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<KeyedChain, ObtainError>>;

    /// Tells that nobody needs `id` any longer, so that a subscription can end.
    fn release(&self, _id: &SpiffeId) {}
}

/// What a [`Source`] gives: a key, the certificates that go on the wire, and whom to trust.
#[derive(Debug)]
#[non_exhaustive]
pub struct KeyedChain {
    /// The private key of the leaf.
    pub key: PrivateKey,
    /// Leaf first, then intermediates. Self-signed ones are left out when the chain is presented.
    pub chain: Vec<CertificateDer<'static>>,
    /// Trust anchors for the peers of this identity.
    pub roots: Vec<CertificateDer<'static>>,
    /// Since when it exists.
    pub origin: Origin,
}

/// Since when a certificate exists, which decides what is done about one that is revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// The authority has just given it: another one would be no better.
    Issued,
    /// An earlier process had it already: another one is asked for.
    Kept,
}

impl KeyedChain {
    /// Puts together the parts of what the authority has just given.
    #[must_use]
    pub fn new(
        key: PrivateKey,
        chain: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Self {
        Self {
            key,
            chain,
            roots,
            origin: Origin::Issued,
        }
    }
}

/// Signs certificate requests: a certificate authority.
pub trait Signer: Send + Sync {
    /// Signs one request. The same promises hold as for [`Source::obtain`].
    fn sign<'a>(
        &'a self,
        request: SigningRequest<'a>,
    ) -> BoxFuture<'a, Result<SignedChain, ObtainError>>;
}

/// One request to a [`Signer`].
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct SigningRequest<'a> {
    /// The identity to certify; the request names the same one.
    pub id: &'a SpiffeId,
    /// The PKCS#10 request.
    pub csr: &'a CertificateSigningRequestDer<'a>,
}

impl SigningRequest<'_> {
    /// The request as PEM text.
    #[must_use]
    pub fn csr_pem(&self) -> String {
        pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", self.csr.to_vec()))
    }
}

/// What a [`Signer`] gives.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SignedChain {
    /// Leaf first, then intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Trust anchors.
    pub roots: Vec<CertificateDer<'static>>,
}

impl SignedChain {
    /// Puts the parts together.
    #[must_use]
    pub fn new(chain: Vec<CertificateDer<'static>>, roots: Vec<CertificateDer<'static>>) -> Self {
        Self { chain, roots }
    }
}

/// Makes a [`Source`] of a [`Signer`]: a fresh key and request for each certificate.
#[derive(Debug)]
pub struct CsrSource<S>(S);

impl<S: Signer> CsrSource<S> {
    /// Has every certificate signed by `signer`.
    #[must_use]
    pub fn new(signer: S) -> Self {
        Self(signer)
    }
}

impl<S: Signer> Source for CsrSource<S> {
    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<KeyedChain, ObtainError>> {
        Box::pin(async move {
            let (key, csr) = key_and_request(id)?;
            let signed = self.0.sign(SigningRequest { id, csr: &csr }).await?;
            Ok(KeyedChain::new(key, signed.chain, signed.roots))
        })
    }
}

/// Why no certificate was obtained. Every failure is tried again; the error says how soon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObtainError {
    /// No key or request could be made.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The authority refused.
    #[error("{message}")]
    Refused {
        /// The authority's words, without tokens or keys.
        message: String,
        /// Whether asking again soon may help.
        retry: Retry,
    },
    /// The authority was not reached, or not fit to work: asking again costs it next to nothing.
    #[error("{0}")]
    Unreachable(String),
    /// The authority's answer is unusable.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The authority did not answer in time.
    #[error("no answer from the certificate authority within {0:?}")]
    Deadline(Duration),
}

impl ObtainError {
    /// A refusal.
    #[must_use]
    pub fn refused(message: impl Into<String>, retry: Retry) -> Self {
        Self::Refused {
            message: message.into(),
            retry,
        }
    }

    /// When asking again makes sense.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Self::Refused { retry, .. } => *retry,
            Self::Csr(_) | Self::Unreachable(_) | Self::Rejected(_) | Self::Deadline(_) => {
                Retry::Soon
            }
        }
    }
}

/// When a failed request may be made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Retry {
    /// With the usual back-off, or at once when a connection waits.
    Soon,
    /// As the authority said: not before this time has passed.
    After(Duration),
    /// Probably useless until someone changes something: waiting connections fail at once.
    Slowly,
}
