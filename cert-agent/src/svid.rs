//! A certificate in use: the identity document of a workload and its TLS configurations.

mod configs;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::{Mutex, MutexGuard};
use rustls::{ClientConfig, ServerConfig, pki_types::CertificateDer, sign::CertifiedKey};

use crate::{
    KeyedChain, Origin, SpiffeId, Standing, Tracker,
    anchors::Roots,
    bundle::IdentityTrust,
    chain::Side,
    check::{Accepted, Rejection, check_chain},
};
use configs::Configs;
pub(crate) use configs::TlsContext;

/// An identity with its certificate and key. Immutable; a renewal makes a new one. Whom it trusts follows the
/// [`TrustBundle`](crate::TrustBundle) of its agent.
///
/// TLS configurations are made once for each set of trust anchors. Neither side resumes sessions, so that every
/// connection is verified against the certificates and roots of its own time, and no ticket is stored.
pub struct Svid {
    id: SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
    origin: Origin,
    /// The chain on the wire.
    certified: Arc<CertifiedKey>,
    /// The trust anchors as the authority gave them.
    roots: Roots,
    trust: Arc<IdentityTrust>,
    tls: Mutex<Configs>,
}

impl Svid {
    /// Checks what an authority returned for `requested` and makes it usable.
    ///
    /// # Errors
    /// The first check that fails; see [`Rejection`].
    pub(crate) fn accept(
        requested: &SpiffeId,
        obtained: KeyedChain,
        context: &TlsContext,
        now: SystemTime,
    ) -> Result<Self, Rejection> {
        let KeyedChain {
            key,
            chain,
            roots,
            origin,
        } = obtained;
        let provider = &context.provider;
        let accepted = check_chain(requested, context.san_rule, chain, &roots, (provider, now))?;
        let Accepted {
            id,
            not_before,
            not_after,
            presented,
        } = accepted;
        let signing = provider
            .key_provider
            .load_private_key(key.to_rustls())
            .map_err(Rejection::Key)?;
        let certified = Arc::new(CertifiedKey::new(presented, signing));
        certified.keys_match().map_err(Rejection::Key)?;
        // Now that nothing can be wrong with it any more.
        let trust = context.trust.answered(requested, &roots);
        let configs = Configs::new(&id, &certified, trust.anchors(), context);
        Ok(Self {
            tls: Mutex::new(configs.map_err(Rejection::Tls)?),
            roots: context.trust.list(&roots),
            trust,
            id,
            not_before,
            not_after,
            origin,
            certified,
        })
    }

    /// The identity in the certificate.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Start of validity.
    #[must_use]
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// End of validity.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Whether the certificate may be presented at `now`. The start of validity was judged when
    /// the certificate came.
    #[must_use]
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        now < self.not_after
    }

    /// The certificates that go on the wire, leaf first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The trust anchors that came with the certificate. Peers may have others besides.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// For accepting peers: a client certificate of an accepted trust domain is required, ALPN
    /// `h2` is agreed on if the client offers protocols, any server name is ignored.
    ///
    /// Ask for each handshake: the trust anchors are those of this moment.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.tls().server()
    }

    /// For dialling a peer that must be one of `expected`; an empty set refuses everybody. Offers
    /// ALPN `h2` and sends no server name, whatever name the connection is given.
    ///
    /// Ask for each handshake: the trust anchors are those of this moment. The last few configurations are kept;
    /// passing the same `Arc` again finds them fastest.
    #[must_use]
    pub fn client_config(&self, expected: &Arc<[SpiffeId]>) -> Arc<ClientConfig> {
        self.tls().client(expected)
    }

    /// Has the client that a handshake with [`server_config`](Self::server_config) has verified checked again whenever
    /// revocation lists change; `None` if revocation is off.
    #[must_use]
    pub fn client_tracker(&self) -> Option<Tracker> {
        self.tls().tracker(Side::Server)
    }

    /// The same for the server that a handshake with [`client_config`](Self::client_config) has verified.
    #[must_use]
    pub fn server_tracker(&self) -> Option<Tracker> {
        self.tls().tracker(Side::Client)
    }

    /// Whether a handshake of this identity with `server`, held at this moment, would end well: each side accepts the
    /// other's chain, nothing on it is revoked, and the server is one of `expected`. For two identities of one process that
    /// have no connection to shake hands on.
    ///
    /// Takes two signatures to verify, some 100 µs: remember the answer for a while.
    ///
    /// # Errors
    /// What the handshake would fail with.
    pub fn would_meet(
        &self,
        server: &Self,
        expected: &Arc<[SpiffeId]>,
    ) -> Result<(), rustls::Error> {
        // One after the other: both may be the same.
        let ours = self.tls().server_verifier(expected);
        let theirs = server.tls().client_verifier();
        ours.verify_now(server.chain())?;
        theirs.verify_now(self.chain())
    }

    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }

    /// Whether revocation lists name this certificate or one above it, so that peers with the same lists refuse it.
    pub(crate) fn is_revoked(&self) -> bool {
        let as_peers_see_it = self.server_tracker();
        as_peers_see_it.is_some_and(|it| it.track(self.chain()).standing() == Standing::Revoked)
    }

    /// The configurations for the trust anchors of this moment.
    fn tls(&self) -> MutexGuard<'_, Configs> {
        let anchors = self.trust.anchors();
        let mut tls = self.tls.lock();
        tls.trust(anchors);
        tls
    }

    /// How long the certificate remains valid, from `now`.
    pub(crate) fn remaining(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
