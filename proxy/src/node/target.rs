//! The servers of the control plane, as configured.

use xds_client::transport::{Roots, Target, TlsVersions, Token};

use super::tls::tls_options;
use crate::config::{Address, AuthToken, Config, RootSource};

/// The server at `address`, and what it is shown.
#[must_use]
pub fn target(config: &Config, address: &Address) -> Target {
    let roots = match &address.roots {
        RootSource::File(path) => Roots::File(path.clone()),
        RootSource::System => Roots::System,
        RootSource::Pem(text) => Roots::Pem(text.clone()),
    };
    let cluster = config.identity.cluster_id.as_ref();
    let mut target = Target::new(address.uri.clone(), roots, cluster);
    target
        .alternative_host
        .clone_from(&address.alternative_host);
    target.token = config.control.token.as_ref().map(|token| match token {
        AuthToken::File(path) => Token::File(path.clone()),
        AuthToken::Literal(text) => Token::Literal(text.clone()),
    });
    for header in &address.headers {
        target
            .headers
            .append(header.name.clone(), header.value.clone());
    }
    let tls = tls_options(config);
    target.crypto = tls.provider();
    if tls.tls12_enabled() {
        target.versions = TlsVersions::From12;
    }
    target
}
