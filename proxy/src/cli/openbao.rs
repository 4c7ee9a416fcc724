//! The part [`OpenBao`] of the section on control: the variables `OPENBAO_*`.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use cert_agent::openbao::is_path;
use http::Uri;

use super::{
    fault::Given,
    reader::Reader,
    server,
    value::{self, Reject},
};
use crate::config::{OpenBao, OpenBaoJwt, OpenBaoLogin};

/// What is given is checked in any case; what is missing is a fault only if OpenBao is `wanted`.
pub(super) fn parse(reader: &mut Reader<'_>, wanted: bool) -> Option<OpenBao> {
    let address = address(reader);
    let address = require(reader, wanted, address, "OPENBAO_ADDRESS", ADDRESS);
    let roots = server::roots(reader, "OPENBAO_ROOT_CA", DEFAULT_ROOTS);
    let namespace = path(reader, "OPENBAO_NAMESPACE");
    let mount = path(reader, "OPENBAO_MOUNT");
    let role = path(reader, "OPENBAO_ROLE");
    let role = require(reader, wanted, role, "OPENBAO_ROLE", "a role of the engine");
    let root_mounts = root_mounts(reader);
    let login = login(reader, wanted);
    let poll_interval = reader
        .typed("OPENBAO_POLL_INTERVAL", value::seconds)
        .unwrap_or(DEFAULT_POLL);
    if !wanted {
        return None;
    }
    Some(OpenBao {
        address: address?,
        roots,
        namespace,
        mount: mount.unwrap_or_else(|| "pki".to_owned()),
        role: role?,
        root_mounts,
        login: login?,
        poll_interval,
    })
}

/// `value`, or a fault if it is needed and nothing was given. What was given and refused is a fault already.
fn require<T>(
    reader: &mut Reader<'_>,
    wanted: bool,
    value: Option<T>,
    key: &str,
    accepted: &str,
) -> Option<T> {
    if wanted && value.is_none() && reader.text(key).is_none() {
        let reject = Reject::new("needed for CA_PROVIDER=openbao", accepted);
        reader.fault(key, Given::Nothing, reject);
    }
    value
}

fn address(reader: &mut Reader<'_>) -> Option<Uri> {
    let key = "OPENBAO_ADDRESS";
    let text = reader.text(key)?;
    let given = if text.contains('@') {
        Given::Secret
    } else {
        Given::Value(text.to_owned())
    };
    let outcome = server::uri(text)
        .map_err(|reject| Reject::new(reject.reason, ADDRESS))
        .and_then(|uri| match uri.scheme_str() {
            Some("https") => Ok(uri),
            _ => Err(Reject::new("tokens are sent over TLS only", ADDRESS)),
        });
    reader.keep(key, given, outcome)
}

/// A value that becomes part of a path of the server.
fn path(reader: &mut Reader<'_>, key: &str) -> Option<String> {
    let text = reader.text(key)?;
    let outcome = api_path(text);
    reader.keep(key, Given::Value(text.to_owned()), outcome)
}

fn api_path(text: &str) -> Result<String, Reject> {
    let text = text.trim_matches('/');
    if is_path(text) {
        return Ok(text.to_owned());
    }
    Err(Reject::new(
        "not a path of OpenBao",
        "letters, digits, dots, dashes, underscores, and single slashes between them",
    ))
}

fn root_mounts(reader: &mut Reader<'_>) -> Vec<String> {
    let key = "OPENBAO_ROOT_MOUNTS";
    let mut mounts = Vec::new();
    for mount in reader.text(key).unwrap_or_default().split(',') {
        let mount = mount.trim();
        if !mount.is_empty() {
            mounts.extend(reader.keep(key, Given::Value(mount.to_owned()), api_path(mount)));
        }
    }
    mounts
}

fn login(reader: &mut Reader<'_>, wanted: bool) -> Option<OpenBaoLogin> {
    let mount = path(reader, "OPENBAO_AUTH_MOUNT");
    let role = path(reader, "OPENBAO_AUTH_ROLE");
    let shown = jwt(reader, wanted);
    let role_id = file(reader, "OPENBAO_ROLE_ID_PATH");
    let secret_id = file(reader, "OPENBAO_SECRET_ID_PATH");
    let token = file(reader, "OPENBAO_TOKEN_PATH");
    let method = match reader.text("OPENBAO_AUTH_METHOD") {
        None => Method::Kubernetes,
        Some(_) => reader.typed("OPENBAO_AUTH_METHOD", method)?,
    };
    let mount = |default: &str| mount.unwrap_or_else(|| default.to_owned());
    let jwt = shown?;
    Some(match method {
        Method::Kubernetes => OpenBaoLogin::Kubernetes {
            mount: mount("kubernetes"),
            role: require(
                reader,
                wanted,
                role,
                "OPENBAO_AUTH_ROLE",
                "a role of the method",
            )?,
            jwt,
        },
        Method::Jwt => OpenBaoLogin::Jwt {
            mount: mount("jwt"),
            role,
            jwt,
        },
        Method::AppRole => OpenBaoLogin::AppRole {
            mount: mount("approle"),
            role_id: require(reader, wanted, role_id, "OPENBAO_ROLE_ID_PATH", FILE)?,
            secret_id,
        },
        Method::Token => {
            OpenBaoLogin::TokenFile(require(reader, wanted, token, "OPENBAO_TOKEN_PATH", FILE)?)
        }
    })
}

/// Whose token is shown.
fn jwt(reader: &mut Reader<'_>, wanted: bool) -> Option<OpenBaoJwt> {
    let path = file(reader, "OPENBAO_JWT_PATH");
    let account = file(reader, "KUBERNETES_ACCOUNT_PATH");
    let audience = reader.text("OPENBAO_JWT_AUDIENCE").unwrap_or("openbao");
    let at = |default: &str| path.unwrap_or_else(|| default.into());
    let key = "OPENBAO_JWT_SOURCE";
    match reader.text(key) {
        None | Some("file") => Some(OpenBaoJwt::File(at(DEFAULT_JWT))),
        Some("directory") => Some(OpenBaoJwt::Directory(at(DEFAULT_JWTS))),
        Some("kubernetes") => Some(OpenBaoJwt::Kubernetes {
            address: kubernetes(reader, wanted)?,
            account: account.unwrap_or_else(|| DEFAULT_ACCOUNT.into()),
            audience: audience.to_owned(),
        }),
        Some(other) => {
            let reject = Reject::new("not a source of tokens", "file, directory or kubernetes");
            reader.fault(key, Given::Value(other.to_owned()), reject);
            None
        }
    }
}

/// The API server, as Kubernetes tells each pod.
fn kubernetes(reader: &mut Reader<'_>, wanted: bool) -> Option<Uri> {
    let key = "KUBERNETES_SERVICE_HOST";
    let host = reader.text(key);
    let host = require(reader, wanted, host, key, API_SERVER)?;
    let port = reader.text("KUBERNETES_SERVICE_PORT").unwrap_or("443");
    let authority = match host.parse() {
        Ok(IpAddr::V6(address)) => format!("[{address}]:{port}"),
        Ok(IpAddr::V4(_)) | Err(_) => format!("{host}:{port}"),
    };
    let outcome = format!("https://{authority}/")
        .parse()
        .map_err(|_| Reject::new("not an address with that port", API_SERVER));
    reader.keep(key, Given::Value(authority), outcome)
}

#[derive(Clone, Copy)]
enum Method {
    Kubernetes,
    Jwt,
    AppRole,
    Token,
}

fn method(text: &str) -> Result<Method, Reject> {
    match text {
        "kubernetes" => Ok(Method::Kubernetes),
        "jwt" => Ok(Method::Jwt),
        "approle" => Ok(Method::AppRole),
        "token" => Ok(Method::Token),
        _ => Err(Reject::new(
            "not a method",
            "kubernetes, jwt, approle or token",
        )),
    }
}

/// The path of a file with a secret. The secret itself does not look like one, and is not repeated.
fn file(reader: &mut Reader<'_>, key: &str) -> Option<PathBuf> {
    let text = reader.text(key)?;
    let path_like = ["/", "./", "../"].iter().any(|it| text.starts_with(it));
    let outcome = if path_like {
        Ok(PathBuf::from(text))
    } else {
        Err(Reject::new("not the path of a file", FILE))
    };
    reader.keep(key, Given::Secret, outcome)
}

const ADDRESS: &str = "host:port or https://host:port";
const API_SERVER: &str = "the API server's address and port, which Kubernetes sets in each pod";
const FILE: &str = "a path that begins with /, ./ or ../";
const DEFAULT_ROOTS: &str = "/var/run/secrets/openbao/ca.crt";
const DEFAULT_JWT: &str = "/var/run/secrets/tokens/openbao-token";
const DEFAULT_JWTS: &str = "/var/run/secrets/openbao/workloads";
const DEFAULT_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const DEFAULT_POLL: Duration = Duration::from_mins(5);
