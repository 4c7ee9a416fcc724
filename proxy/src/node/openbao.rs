//! OpenBao as the certificate authority, as configured.

use cert_agent::openbao::{Authority, Login, Roots, Settings};

use super::{StartError, certificates};
use crate::config::{Config, OpenBao, OpenBaoLogin, ProxyMode, RootSource};

/// The authority that `server` describes; nothing is sent before it runs or signs.
pub(super) fn authority(config: &Config, server: &OpenBao) -> Result<Authority, StartError> {
    if config.capture.mode == ProxyMode::Shared {
        tracing::warn!(
            role = server.role,
            "OpenBao does not hold identities against the pods of a node: whoever has the token of \
             this node can become every workload that the role allows"
        );
    }
    let roots = match &server.roots {
        RootSource::File(path) => Roots::File(path.clone()),
        RootSource::System => Roots::System,
        RootSource::Pem(text) => Roots::Pem(text.clone()),
    };
    let address = server.address.clone();
    let mut settings = Settings::new(address, roots, &server.role, login(&server.login));
    settings.namespace.clone_from(&server.namespace);
    settings.mount.clone_from(&server.mount);
    settings.root_mounts.clone_from(&server.root_mounts);
    settings.ttl = config.control.secret_ttl;
    settings.poll_interval = server.poll_interval;
    settings.tls = certificates::tls_options(config);
    Authority::new(settings).map_err(StartError::OpenBao)
}

fn login(login: &OpenBaoLogin) -> Login {
    match login {
        OpenBaoLogin::Kubernetes { mount, role, jwt } => Login::Kubernetes {
            mount: mount.clone(),
            role: role.clone(),
            jwt: jwt.clone(),
        },
        OpenBaoLogin::Jwt { mount, role, jwt } => Login::Jwt {
            mount: mount.clone(),
            role: role.clone(),
            jwt: jwt.clone(),
        },
        OpenBaoLogin::AppRole {
            mount,
            role_id,
            secret_id,
        } => Login::AppRole {
            mount: mount.clone(),
            role_id: role_id.clone(),
            secret_id: secret_id.clone(),
        },
        OpenBaoLogin::TokenFile(path) => Login::TokenFile(path.clone()),
    }
}
