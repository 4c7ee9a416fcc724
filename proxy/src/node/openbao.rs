//! OpenBao as the certificate authority, as configured.

use cert_agent::{
    TlsOptions,
    openbao::{Authority, Jwt, KubernetesApi, Login, Roots, Settings},
};

use super::{StartError, tls::tls_options};
use crate::config::{Config, OpenBao, OpenBaoJwt, OpenBaoLogin, ProxyMode, RootSource};

/// The authority that `server` describes; nothing is sent before it runs or signs.
pub(super) fn authority(config: &Config, server: &OpenBao) -> Result<Authority, StartError> {
    if config.capture.mode == ProxyMode::Shared && !is_per_workload(&server.login) {
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
    let tls = tls_options(config);
    let mut settings = Settings::new(address, roots, &server.role, login(&server.login, &tls));
    settings.namespace.clone_from(&server.namespace);
    settings.mount.clone_from(&server.mount);
    settings.root_mounts.clone_from(&server.root_mounts);
    settings.ttl = config.control.secret_ttl;
    settings.poll_interval = server.poll_interval;
    settings.tls = tls;
    Authority::new(settings).map_err(StartError::OpenBao)
}

fn is_per_workload(login: &OpenBaoLogin) -> bool {
    match login {
        OpenBaoLogin::Kubernetes { jwt, .. } | OpenBaoLogin::Jwt { jwt, .. } => {
            !matches!(jwt, OpenBaoJwt::File(_))
        }
        OpenBaoLogin::AppRole { .. } | OpenBaoLogin::TokenFile(_) => false,
    }
}

fn login(login: &OpenBaoLogin, tls: &TlsOptions) -> Login {
    match login {
        OpenBaoLogin::Kubernetes { mount, role, jwt } => Login::Kubernetes {
            mount: mount.clone(),
            role: role.clone(),
            jwt: shown(jwt, tls),
        },
        OpenBaoLogin::Jwt { mount, role, jwt } => Login::Jwt {
            mount: mount.clone(),
            role: role.clone(),
            jwt: shown(jwt, tls),
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

fn shown(jwt: &OpenBaoJwt, tls: &TlsOptions) -> Jwt {
    match jwt {
        OpenBaoJwt::File(path) => Jwt::Own(path.clone()),
        OpenBaoJwt::Directory(path) => Jwt::Directory(path.clone()),
        OpenBaoJwt::Kubernetes {
            address,
            account,
            audience,
        } => Jwt::Requested(KubernetesApi::new(
            address.clone(),
            Roots::File(account.join("ca.crt")),
            account.join("token"),
            audience.clone(),
            tls.clone(),
        )),
    }
}
