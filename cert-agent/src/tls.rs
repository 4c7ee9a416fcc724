//! The TLS parameters of the mesh.

use std::sync::Arc;

use rustls::{
    SupportedCipherSuite, SupportedProtocolVersion,
    crypto::{
        CryptoProvider, SupportedKxGroup,
        aws_lc_rs::{self, cipher_suite, kx_group},
    },
    version::{TLS12, TLS13},
};

/// What an operator may vary in the TLS of the mesh.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct TlsOptions {
    /// Accept and offer TLS 1.2 besides 1.3. Without effect while `pqc_only` is set, since no
    /// post-quantum group exists for TLS 1.2.
    pub tls12: bool,
    /// Offer and accept X25519MLKEM768 alone.
    pub pqc_only: bool,
    /// Trust domains that a client may come from besides the server's own.
    pub trust_domains: Arc<[Arc<str>]>,
}

impl TlsOptions {
    /// The cryptography for these options: AES-256-GCM before AES-128-GCM, never `ChaCha20`; groups
    /// X25519MLKEM768, X25519, P-256, P-384. Connections to the control plane use it as well.
    #[must_use]
    pub fn provider(&self) -> Arc<CryptoProvider> {
        let mut suites = TLS13_SUITES.to_vec();
        if self.tls12_enabled() {
            suites.extend_from_slice(TLS12_SUITES);
        }
        let groups = if self.pqc_only { PQC_GROUPS } else { GROUPS };
        Arc::new(CryptoProvider {
            cipher_suites: suites,
            kx_groups: groups.to_vec(),
            ..aws_lc_rs::default_provider()
        })
    }

    /// The protocol versions for these options.
    #[must_use]
    pub fn versions(&self) -> &'static [&'static SupportedProtocolVersion] {
        if self.tls12_enabled() {
            BOTH_VERSIONS
        } else {
            TLS13_ONLY
        }
    }

    /// Whether TLS 1.2 is spoken, too: never beside a demand for post-quantum groups, which it does not have.
    #[must_use]
    pub fn tls12_enabled(&self) -> bool {
        self.tls12 && !self.pqc_only
    }
}

static TLS13_ONLY: &[&SupportedProtocolVersion] = &[&TLS13];
static BOTH_VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];
static TLS13_SUITES: &[SupportedCipherSuite] = &[
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_AES_128_GCM_SHA256,
];
static TLS12_SUITES: &[SupportedCipherSuite] = &[
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
];
/// The hybrid goes first: what is recorded today stays secret from a quantum computer. Its key share comes with one for
/// X25519, so that a peer without it needs no second round trip.
static GROUPS: &[&dyn SupportedKxGroup] = &[
    kx_group::X25519MLKEM768,
    kx_group::X25519,
    kx_group::SECP256R1,
    kx_group::SECP384R1,
];
static PQC_GROUPS: &[&dyn SupportedKxGroup] = &[kx_group::X25519MLKEM768];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pqc_only_leaves_no_way_around_its_group() {
        let options = TlsOptions {
            tls12: true,
            pqc_only: true,
            ..TlsOptions::default()
        };
        let provider = options.provider();
        assert_eq!(provider.kx_groups.len(), 1);
        assert_eq!(provider.cipher_suites, TLS13_SUITES);
        assert_eq!(options.versions(), [&TLS13]);
    }
}
