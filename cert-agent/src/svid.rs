//! A certificate in use: the identity document of a workload and its TLS configurations.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    compress::CompressionCache,
    crypto::CryptoProvider,
    pki_types::CertificateDer,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::{
    KeyedChain, SpiffeId, TlsOptions,
    check::{Accepted, Rejection, SanRule, check_chain},
    verify::{ClientVerifier, ServerVerifier},
};

/// An identity with its certificate, key and trust anchors. Immutable; a renewal makes a new one.
///
/// Both TLS configurations are made once. Neither side resumes sessions, so that every connection
/// is verified against the certificates and roots of its own time, and no ticket is stored.
pub struct Svid {
    id: SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
    /// The chain on the wire.
    certified: Arc<CertifiedKey>,
    /// The trust anchors as the authority gave them.
    roots: Vec<CertificateDer<'static>>,
    anchors: Arc<RootCertStore>,
    server: Arc<ServerConfig>,
    /// A client configuration that trusts nobody: the pattern for those that expect someone.
    client: ClientConfig,
    /// Most recently used first.
    clients: Mutex<Vec<CachedClient>>,
}

/// A client configuration and whom it expects.
type CachedClient = (Arc<[SpiffeId]>, Arc<ClientConfig>);

/// What all certificates of one agent have in common.
#[derive(Debug, Clone)]
pub(crate) struct TlsContext {
    pub(crate) options: TlsOptions,
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) san_rule: SanRule,
}

impl TlsContext {
    pub(crate) fn new(options: TlsOptions, san_rule: SanRule) -> Self {
        Self {
            provider: options.provider(),
            options,
            san_rule,
        }
    }
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
        let KeyedChain { key, chain, roots } = obtained;
        let provider = &context.provider;
        let accepted = check_chain(requested, context.san_rule, chain, &roots, (provider, now))?;
        let Accepted {
            id,
            not_before,
            not_after,
            presented,
            anchors,
        } = accepted;
        let signing = provider
            .key_provider
            .load_private_key(key.to_rustls())
            .map_err(Rejection::Key)?;
        let certified = Arc::new(CertifiedKey::new(presented, signing));
        certified.keys_match().map_err(Rejection::Key)?;
        let anchors = Arc::new(anchors);
        Ok(Self {
            server: Arc::new(server_config(&id, &certified, &anchors, context)?),
            client: client_config(&certified, &anchors, context)?,
            clients: Mutex::default(),
            id,
            not_before,
            not_after,
            certified,
            roots,
            anchors,
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

    /// The trust anchors for peers.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// For accepting peers: a client certificate of an accepted trust domain is required, ALPN
    /// `h2` is agreed on if the client offers protocols, any server name is ignored.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For dialling a peer that must be one of `expected`; an empty set refuses everybody. Offers
    /// ALPN `h2` and sends no server name, whatever name the connection is given.
    ///
    /// The last few configurations are kept; passing the same `Arc` again finds them fastest.
    #[must_use]
    pub fn client_config(&self, expected: &Arc<[SpiffeId]>) -> Arc<ClientConfig> {
        let mut cached = self.clients.lock();
        let hit = cached
            .iter()
            .position(|(set, _)| Arc::ptr_eq(set, expected) || set == expected);
        if let Some(position) = hit {
            if let Some(upto) = cached.get_mut(..=position) {
                upto.rotate_right(1);
            }
        } else {
            cached.truncate(CACHED_CLIENT_CONFIGS - 1);
            let config = Arc::new(self.expecting(expected));
            cached.insert(0, (Arc::clone(expected), config));
        }
        cached.first().map_or_else(
            || Arc::new(self.expecting(expected)),
            |(_, config)| Arc::clone(config),
        )
    }

    fn expecting(&self, expected: &Arc<[SpiffeId]>) -> ClientConfig {
        let mut config = self.client.clone();
        let verifier = ServerVerifier {
            roots: Arc::clone(&self.anchors),
            algorithms: config.crypto_provider().signature_verification_algorithms,
            expected: Arc::clone(expected),
        };
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(verifier));
        config
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

fn server_config(
    id: &SpiffeId,
    certified: &Arc<CertifiedKey>,
    anchors: &Arc<RootCertStore>,
    context: &TlsContext,
) -> Result<ServerConfig, Rejection> {
    let own = std::iter::once(Arc::from(id.trust_domain()));
    let verifier = ClientVerifier {
        chain: WebPkiClientVerifier::builder_with_provider(
            Arc::clone(anchors),
            Arc::clone(&context.provider),
        )
        .build()
        .map_err(|error| Rejection::Tls(rustls::Error::General(error.to_string())))?,
        algorithms: context.provider.signature_verification_algorithms,
        trust_domains: own
            .chain(context.options.trust_domains.iter().cloned())
            .collect(),
    };
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&context.provider))
        .with_protocol_versions(context.options.versions())
        .map_err(Rejection::Tls)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    // Lets the caller protect records by itself after the handshake.
    config.enable_secret_extraction = true;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.cert_compression_cache = Arc::new(CompressionCache::Disabled);
    Ok(config)
}

fn client_config(
    certified: &Arc<CertifiedKey>,
    anchors: &Arc<RootCertStore>,
    context: &TlsContext,
) -> Result<ClientConfig, Rejection> {
    let nobody = ServerVerifier {
        roots: Arc::clone(anchors),
        algorithms: context.provider.signature_verification_algorithms,
        expected: Arc::default(),
    };
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&context.provider))
        .with_protocol_versions(context.options.versions())
        .map_err(Rejection::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(nobody))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    // As for servers.
    config.enable_secret_extraction = true;
    config.cert_compression_cache = Arc::new(CompressionCache::Disabled);
    Ok(config)
}

/// HBONE is HTTP/2.
const ALPN: &[u8] = b"h2";
/// Enough for the destinations that one workload talks to at a time; making one more costs a
/// microsecond.
const CACHED_CLIENT_CONFIGS: usize = 32;

#[cfg(test)]
mod tests;
