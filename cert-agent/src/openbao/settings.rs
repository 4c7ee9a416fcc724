//! What an operator tells about an OpenBao server.

use std::{path::PathBuf, time::Duration};

use http::{HeaderValue, Uri, uri::PathAndQuery};

use super::{account::KubernetesApi, dial::Roots};
use crate::TlsOptions;

/// Where certificates come from and how this process proves who it is.
///
/// [`Settings::new`] fills in what is usual; set the other fields before [`Authority::new`](super::Authority::new).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Settings {
    /// `https://host:port`; a path is ignored. The host is what TLS asks for and what the certificate must show.
    pub address: Uri,
    /// Who may have signed the certificate of the server.
    pub roots: Roots,
    /// The namespace, such as `platform/mesh`; default none.
    pub namespace: Option<String>,
    /// Path of the PKI engine; default `pki`.
    pub mount: String,
    /// The role of the engine that signs.
    pub role: String,
    /// Further PKI engines whose self-signed issuers are trusted and whose revocation lists are read: the one with the
    /// root, if `mount` holds an intermediate. Default none.
    pub root_mounts: Vec<String>,
    /// How a token is got.
    pub login: Login,
    /// How long certificates are asked to live; default 24 h.
    pub ttl: Duration,
    /// How often issuers and revocation lists are read; default 5 min, at most a day.
    pub poll_interval: Duration,
    /// Versions, suites and groups of the connection.
    pub tls: TlsOptions,
}

impl Settings {
    /// The role `role` of the engine at `pki` of the server at `address`.
    #[must_use]
    pub fn new(address: Uri, roots: Roots, role: impl Into<String>, login: Login) -> Self {
        Self {
            address,
            roots,
            namespace: None,
            mount: "pki".to_owned(),
            role: role.into(),
            root_mounts: Vec::new(),
            login,
            ttl: Duration::from_secs(24 * 60 * 60),
            poll_interval: Duration::from_secs(5 * 60),
            tls: TlsOptions::default(),
        }
    }

    /// Holds everything that becomes part of a request against the rules for it.
    pub(super) fn check(&self) -> Result<(), SettingsError> {
        check_address(&self.address)?;
        if let Some(Jwt::Requested(api)) = self.login.jwt() {
            check_address(api.address())?;
        }
        let login = match &self.login {
            Login::Kubernetes { mount, .. }
            | Login::Jwt { mount, .. }
            | Login::AppRole { mount, .. } => Some(mount),
            Login::TokenFile(_) => None,
        };
        let paths = [&self.mount, &self.role];
        for path in paths.into_iter().chain(&self.root_mounts).chain(login) {
            if !is_path(path) {
                return Err(SettingsError::Path(path.clone()));
            }
        }
        match &self.namespace {
            Some(namespace) if !is_path(namespace) || HeaderValue::from_str(namespace).is_err() => {
                Err(SettingsError::Path(namespace.clone()))
            }
            _ => Ok(()),
        }
    }
}

/// Tokens go over TLS only.
fn check_address(address: &Uri) -> Result<(), SettingsError> {
    let https = address.scheme_str() == Some("https");
    if !https || address.host().is_none_or(str::is_empty) {
        return Err(SettingsError::Address(address.clone()));
    }
    Ok(())
}

/// Whether `text` may be put into a path as it is: segments of letters, digits, `.`, `-` and `_` with single slashes
/// between them, none of them `.` or `..`.
#[must_use]
pub fn is_path(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    let segment = |text: &str| {
        !matches!(text, "" | "." | "..") && text.len() <= 255 && text.bytes().all(allowed)
    };
    text.split('/').all(segment) && PathAndQuery::try_from(format!("/v1/{text}")).is_ok()
}

/// How a token is got. Files are read each time, and need not be there from the start.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Login {
    /// The `kubernetes` method: OpenBao has the API server review the token of a service account.
    Kubernetes {
        /// Path of the method below `auth/`, usually `kubernetes`.
        mount: String,
        /// Role of the method.
        role: String,
        /// The service-account token, whose audience the role names.
        jwt: Jwt,
    },
    /// The `jwt` method: OpenBao verifies the token by itself.
    Jwt {
        /// Path of the method below `auth/`, usually `jwt`.
        mount: String,
        /// Role of the method; `None` leaves it to the method's default.
        role: Option<String>,
        /// The token.
        jwt: Jwt,
    },
    /// The `approle` method.
    AppRole {
        /// Path of the method below `auth/`, usually `approle`.
        mount: String,
        /// The role id.
        role_id: PathBuf,
        /// The secret id, unless the role does without.
        secret_id: Option<PathBuf>,
    },
    /// A token that somebody else, such as an OpenBao agent, keeps alive in a file. Read again when it is refused.
    TokenFile(PathBuf),
}

impl Login {
    fn jwt(&self) -> Option<&Jwt> {
        match self {
            Self::Kubernetes { jwt, .. } | Self::Jwt { jwt, .. } => Some(jwt),
            Self::AppRole { .. } | Self::TokenFile(_) => None,
        }
    }

    /// Whether each identity logs in for itself.
    pub(super) fn is_per_workload(&self) -> bool {
        matches!(self.jwt(), Some(Jwt::Directory(_) | Jwt::Requested(_)))
    }
}

/// Whose service-account token is shown at a login.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Jwt {
    /// That of this process, in this file: one login serves all identities.
    Own(PathBuf),
    /// That of the workload, which others keep alive in `<directory>/<namespace>/<service account>`: one login for each
    /// certificate.
    Directory(PathBuf),
    /// That of the workload, which Kubernetes makes when it is needed: one login for each certificate.
    Requested(KubernetesApi),
}

/// Why settings cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// Tokens are sent over TLS only.
    #[error("{0} is not an https address")]
    Address(Uri),
    /// A mount, role or namespace cannot be part of a path.
    #[error(
        "{0:?} cannot be part of a path: letters, digits, '.', '-', '_' and single slashes can"
    )]
    Path(String),
}
