//! An OpenBao server as the certificate authority.

use std::{path::PathBuf, time::Duration};

use serde::Serialize;

use super::{RootSource, show};

/// Where the PKI engine is, and how this proxy logs in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct OpenBao {
    /// `OPENBAO_ADDRESS`: `https://host:port`.
    #[serde(serialize_with = "show::text")]
    pub address: http::Uri,
    /// `OPENBAO_ROOT_CA`: trust roots of the server.
    pub roots: RootSource,
    /// `OPENBAO_NAMESPACE`.
    pub namespace: Option<String>,
    /// `OPENBAO_MOUNT`: path of the engine that signs, default `pki`.
    pub mount: String,
    /// `OPENBAO_ROLE`: its role.
    pub role: String,
    /// `OPENBAO_ROOT_MOUNTS`: further engines whose roots are trusted.
    pub root_mounts: Vec<String>,
    /// `OPENBAO_AUTH_METHOD` and what belongs to it.
    pub login: OpenBaoLogin,
    /// `OPENBAO_POLL_INTERVAL`, default 5 min: how often roots and revocation lists are read.
    #[serde(serialize_with = "show::duration")]
    pub poll_interval: Duration,
}

/// How a token is got. Secrets are in files, which are read when they are needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum OpenBaoLogin {
    /// `kubernetes`, the default.
    Kubernetes {
        /// `OPENBAO_AUTH_MOUNT`, default `kubernetes`.
        mount: String,
        /// `OPENBAO_AUTH_ROLE`.
        role: String,
        /// `OPENBAO_JWT_SOURCE` and what belongs to it.
        jwt: OpenBaoJwt,
    },
    /// `jwt`.
    Jwt {
        /// `OPENBAO_AUTH_MOUNT`, default `jwt`.
        mount: String,
        /// `OPENBAO_AUTH_ROLE`; `None` leaves it to the server.
        role: Option<String>,
        /// As above.
        jwt: OpenBaoJwt,
    },
    /// `approle`.
    AppRole {
        /// `OPENBAO_AUTH_MOUNT`, default `approle`.
        mount: String,
        /// `OPENBAO_ROLE_ID_PATH`.
        role_id: PathBuf,
        /// `OPENBAO_SECRET_ID_PATH`; `None` if the role does without.
        secret_id: Option<PathBuf>,
    },
    /// `token`: `OPENBAO_TOKEN_PATH`.
    TokenFile(PathBuf),
}

/// Whose service-account token is shown at a login.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum OpenBaoJwt {
    /// `file`, the default: the proxy's own, at `OPENBAO_JWT_PATH`, default `/var/run/secrets/tokens/openbao-token`.
    File(PathBuf),
    /// `directory`: the workload's, below `OPENBAO_JWT_PATH`, default `/var/run/secrets/openbao/workloads`.
    Directory(PathBuf),
    /// `kubernetes`: the workload's, made by the API server.
    Kubernetes {
        /// `KUBERNETES_SERVICE_HOST` and `KUBERNETES_SERVICE_PORT`.
        #[serde(serialize_with = "show::text")]
        address: http::Uri,
        /// `KUBERNETES_ACCOUNT_PATH`: where `token` and `ca.crt` of the proxy's account are; default
        /// `/var/run/secrets/kubernetes.io/serviceaccount`.
        account: PathBuf,
        /// `OPENBAO_JWT_AUDIENCE`, default `openbao`.
        audience: String,
    },
}
