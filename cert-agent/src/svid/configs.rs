//! The TLS configurations of one certificate, for the trust anchors of this moment.

use std::sync::Arc;

use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    compress::CompressionCache,
    crypto::CryptoProvider,
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::{
    Revocations, SanRule, SpiffeId, TlsOptions, Tracker, TrustBundle,
    anchors::Anchors,
    chain::Side,
    verify::{PeerVerifier, Whom},
};

/// What all certificates of one agent have in common.
#[derive(Debug, Clone)]
pub(crate) struct TlsContext {
    pub(crate) options: TlsOptions,
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) san_rule: SanRule,
    pub(crate) trust: TrustBundle,
    pub(crate) revocations: Revocations,
}

impl TlsContext {
    pub(crate) fn new(options: TlsOptions, san_rule: SanRule) -> Self {
        Self {
            provider: options.provider(),
            options,
            san_rule,
            trust: TrustBundle::default(),
            revocations: Revocations::off(),
        }
    }

    pub(crate) fn trusting(self, trust: TrustBundle) -> Self {
        Self { trust, ..self }
    }

    pub(crate) fn checking(self, revocations: Revocations) -> Self {
        Self {
            revocations,
            ..self
        }
    }

    fn verifier(&self, anchors: &Arc<Anchors>, whom: Whom) -> Arc<PeerVerifier> {
        Arc::new(PeerVerifier {
            anchors: Arc::clone(anchors),
            algorithms: self.provider.signature_verification_algorithms,
            revocations: self.revocations.clone(),
            whom,
        })
    }
}

/// Configurations that were made for one set of trust anchors, and are used until there is another.
pub(super) struct Configs {
    context: TlsContext,
    certified: Arc<CertifiedKey>,
    /// Whence clients may come.
    domains: Arc<[Arc<str>]>,
    anchors: Arc<Anchors>,
    server: Arc<ServerConfig>,
    /// A client configuration that trusts nobody: the pattern for those that expect someone.
    client: ClientConfig,
    /// Most recently used first.
    clients: Vec<CachedClient>,
}

/// A client configuration and whom it expects.
type CachedClient = (Arc<[SpiffeId]>, Arc<ClientConfig>);

impl Configs {
    pub(super) fn new(
        id: &SpiffeId,
        certified: &Arc<CertifiedKey>,
        anchors: Arc<Anchors>,
        context: &TlsContext,
    ) -> Result<Self, rustls::Error> {
        let own = std::iter::once(Arc::from(id.trust_domain()));
        let domains: Arc<[_]> = own
            .chain(context.options.trust_domains.iter().cloned())
            .collect();
        Ok(Self {
            server: Arc::new(server(certified, &domains, &anchors, context)?),
            client: client(certified, &anchors, context)?,
            clients: Vec::new(),
            context: context.clone(),
            certified: Arc::clone(certified),
            domains,
            anchors,
        })
    }

    /// Makes what is handed out from now on verify against `anchors`; free of charge if it does.
    pub(super) fn trust(&mut self, anchors: Arc<Anchors>) {
        if Arc::ptr_eq(&self.anchors, &anchors) {
            return;
        }
        match server(&self.certified, &self.domains, &anchors, &self.context) {
            Ok(server) => {
                self.server = Arc::new(server);
                self.anchors = anchors;
                self.clients.clear();
            }
            // Cannot be: the same parameters have made one before. The old roots go on then.
            Err(error) => tracing::error!(%error, "no TLS configuration for new trust anchors"),
        }
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    pub(super) fn client(&mut self, expected: &Arc<[SpiffeId]>) -> Arc<ClientConfig> {
        let cached = &mut self.clients;
        let hit = cached
            .iter()
            .position(|(set, _)| Arc::ptr_eq(set, expected) || set == expected);
        if let Some(position) = hit
            && let Some(upto) = cached.get_mut(..=position)
        {
            upto.rotate_right(1);
        } else {
            let config = Arc::new(self.expecting(expected));
            self.clients.truncate(CACHED_CLIENT_CONFIGS - 1);
            self.clients.insert(0, (Arc::clone(expected), config));
        }
        self.clients.first().map_or_else(
            || Arc::new(self.expecting(expected)),
            |(_, config)| Arc::clone(config),
        )
    }

    fn expecting(&self, expected: &Arc<[SpiffeId]>) -> ClientConfig {
        let mut config = self.client.clone();
        config
            .dangerous()
            .set_certificate_verifier(self.server_verifier(expected));
        config
    }

    /// Who judges servers that must be one of `expected`.
    pub(super) fn server_verifier(&self, expected: &Arc<[SpiffeId]>) -> Arc<PeerVerifier> {
        let whom = Whom::Servers(Arc::clone(expected));
        self.context.verifier(&self.anchors, whom)
    }

    /// Who judges clients.
    pub(super) fn client_verifier(&self) -> Arc<PeerVerifier> {
        let whom = Whom::Clients(Arc::clone(&self.domains));
        self.context.verifier(&self.anchors, whom)
    }

    pub(super) fn tracker(&self, side: Side) -> Option<Tracker> {
        let revocations = &self.context.revocations;
        revocations.is_armed().then(|| Tracker {
            revocations: revocations.clone(),
            anchors: Arc::clone(&self.anchors),
            algorithms: self.context.provider.signature_verification_algorithms,
            side,
        })
    }

    #[cfg(test)]
    pub(super) fn cached_clients(&self) -> usize {
        self.clients.len()
    }
}

fn server(
    certified: &Arc<CertifiedKey>,
    domains: &Arc<[Arc<str>]>,
    anchors: &Arc<Anchors>,
    context: &TlsContext,
) -> Result<ServerConfig, rustls::Error> {
    let verifier = context.verifier(anchors, Whom::Clients(Arc::clone(domains)));
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&context.provider))
        .with_protocol_versions(context.options.versions())?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    // Lets the caller protect records by itself after the handshake.
    config.enable_secret_extraction = true;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.cert_compression_cache = Arc::new(CompressionCache::Disabled);
    Ok(config)
}

fn client(
    certified: &Arc<CertifiedKey>,
    anchors: &Arc<Anchors>,
    context: &TlsContext,
) -> Result<ClientConfig, rustls::Error> {
    let nobody = context.verifier(anchors, Whom::Servers(Arc::default()));
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&context.provider))
        .with_protocol_versions(context.options.versions())?
        .dangerous()
        .with_custom_certificate_verifier(nobody)
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
/// Enough for the destinations that one workload talks to at a time; making one more costs a microsecond.
pub(super) const CACHED_CLIENT_CONFIGS: usize = 32;
