//! The section [`ControlPlane`]: where mesh state and certificates come from.

use std::{ops::RangeInclusive, path::PathBuf, time::Duration};

use http::{HeaderName, HeaderValue};
use rustls::pki_types::DnsName;

use super::{
    fault::Given,
    openbao,
    proxy_config::{ProxyConfig, Setting},
    reader::Reader,
    server::{looks_like_pem, roots, uri},
    value::{self, Reject},
};
use crate::config::{
    Address, AuthToken, CertificateSource, ControlPlane, Header, LastKnown, MeshSource,
};

pub(super) fn parse(reader: &mut Reader<'_>, proxy: &ProxyConfig) -> ControlPlane {
    let last_known = last_known(reader);
    ControlPlane {
        xds: xds(reader, proxy),
        local: local(reader),
        on_demand: reader.boolean("XDS_ON_DEMAND", false),
        certificates: certificates(reader),
        watches_ca_roots: reader.boolean("CA_CERT_WATCHER", true),
        secret_ttl: reader
            .typed("SECRET_TTL", value::seconds)
            .unwrap_or(DEFAULT_TTL),
        token: token(reader),
        preferred_service_namespace: reader.name("PREFERED_SERVICE_NAMESPACE"),
        crl_path: reader.path("CRL_PATH"),
        kept_keys: kept_keys(reader, last_known.as_ref()),
        last_known,
    }
}

/// The variables of one kind of control-plane server.
struct Server {
    address: &'static str,
    roots: &'static str,
    alternative_host: &'static str,
    headers: &'static str,
}

const XDS: Server = Server {
    address: "XDS_ADDRESS",
    roots: "XDS_ROOT_CA",
    alternative_host: "ALT_XDS_HOSTNAME",
    headers: "XDS_HEADER_",
};

const CA: Server = Server {
    address: "CA_ADDRESS",
    roots: "CA_ROOT_CA",
    alternative_host: "ALT_CA_HOSTNAME",
    headers: "CA_HEADER_",
};

/// Everything is checked even where the address is empty and the server therefore unused.
fn xds(reader: &mut Reader<'_>, proxy: &ProxyConfig) -> Option<Address> {
    let configured = match (reader.raw(XDS.address), &proxy.discovery_address) {
        (Some(value), _) => (XDS.address, value),
        (None, Some(Setting { key, value })) => (key.as_str(), value.as_str()),
        (None, None) => (XDS.address, default_address(reader)),
    };
    server(reader, &XDS, configured)
}

/// What the other provider would need is checked, too, as far as it is given.
fn certificates(reader: &mut Reader<'_>) -> CertificateSource {
    let in_process = reader.boolean("FAKE_CA", false);
    let root = fake_root(reader);
    let configured = reader.raw(CA.address);
    let address = configured.unwrap_or_else(|| default_address(reader));
    let istiod = server(reader, &CA, (CA.address, address));
    let provider = match reader.text("CA_PROVIDER") {
        None => Provider::Istiod,
        Some(_) => reader
            .typed("CA_PROVIDER", provider)
            .unwrap_or(Provider::Istiod),
    };
    let openbao = openbao::parse(reader, provider == Provider::OpenBao);
    match (provider, istiod, openbao) {
        (Provider::OpenBao, ..) if in_process => {
            let reject = Reject::new("both sign certificates", "one of them");
            let keys = "CA_PROVIDER=openbao and FAKE_CA=true";
            reader.fault(keys, Given::Nothing, reject);
        }
        (Provider::OpenBao, _, Some(openbao)) => {
            return CertificateSource::OpenBao(Box::new(openbao));
        }
        (Provider::Istiod, Some(istiod), _) if !in_process => {
            return CertificateSource::Istio(istiod);
        }
        (Provider::Istiod, None, _) if !in_process && configured == Some("") => {
            let reject = Reject::new(
                "nobody would sign certificates",
                "the address of a certificate authority, or FAKE_CA=true beside it",
            );
            reader.fault(CA.address, Given::Value(String::new()), reject);
        }
        // FAKE_CA, or a fault that is told already.
        _ => {}
    }
    CertificateSource::InProcess { root }
}

/// Who signs, unless this process does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Provider {
    Istiod,
    OpenBao,
}

fn provider(text: &str) -> Result<Provider, Reject> {
    match text {
        "istiod" => Ok(Provider::Istiod),
        "openbao" => Ok(Provider::OpenBao),
        _ => Err(Reject::new("not a provider", "istiod or openbao")),
    }
}

/// Both files or neither.
fn fake_root(reader: &mut Reader<'_>) -> Option<(PathBuf, PathBuf)> {
    let mut file = |key| {
        let path = reader.path(key)?;
        if looks_like_pem(&path.to_string_lossy()) {
            let reject = Reject::new("this is a PEM text", "the path of a PEM file");
            reader.fault(key, Given::Secret, reject);
        }
        Some(path)
    };
    match (file("FAKE_CA_ROOT_CERT"), file("FAKE_CA_ROOT_KEY")) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => {
            let reject = Reject::new("only one of them is set", "both, or neither");
            let keys = "FAKE_CA_ROOT_CERT and FAKE_CA_ROOT_KEY";
            reader.fault(keys, Given::Nothing, reject);
            None
        }
    }
}

fn default_address(reader: &Reader<'_>) -> &'static str {
    match reader.raw("KUBERNETES_SERVICE_HOST") {
        Some(_) => "https://istiod.istio-system.svc:15012",
        None => "https://localhost:15012",
    }
}

/// One server; none if its address is empty or at fault. `configured` is the address and the
/// key it comes from.
fn server(reader: &mut Reader<'_>, keys: &Server, configured: (&str, &str)) -> Option<Address> {
    let roots = roots(reader, keys.roots, DEFAULT_ROOTS);
    let alternative_host = host(reader, keys.alternative_host);
    let headers = headers(reader, keys.headers);
    let (key, text) = configured;
    if text.is_empty() {
        return None;
    }
    let given = if text.contains('@') {
        Given::Secret
    } else {
        Given::Value(text.to_owned())
    };
    let outcome = uri(text);
    Some(Address {
        uri: reader.keep(key, given, outcome)?,
        roots,
        alternative_host,
        headers,
    })
}

fn host(reader: &mut Reader<'_>, key: &str) -> Option<String> {
    let text = reader.text(key)?;
    let outcome = DnsName::try_from(text)
        .map(|_| text.to_owned())
        .map_err(|_| Reject::new("not a DNS name", "a DNS name such as istiod.example.org"));
    reader.keep(key, Given::Value(text.to_owned()), outcome)
}

fn headers(reader: &mut Reader<'_>, prefix: &str) -> Vec<Header> {
    let mut headers = Vec::new();
    for (name, value) in reader.environment().with_prefix(prefix) {
        let outcome = header(name, value);
        headers.extend(reader.keep(&format!("{prefix}{name}"), Given::Secret, outcome));
    }
    headers
}

pub(super) fn header(name: &str, value: &str) -> Result<Header, Reject> {
    let accepted =
        "a metadata name without the suffix -bin after the prefix, visible ASCII as the value";
    let name = HeaderName::try_from(name.to_ascii_lowercase())
        .map_err(|_| Reject::new("not a metadata name", accepted))?;
    if name.as_str().ends_with("-bin") {
        return Err(Reject::new("gRPC takes this for a binary value", accepted));
    }
    Ok(Header {
        name,
        value: secret_value(value).ok_or_else(|| Reject::new("not a metadata value", accepted))?,
    })
}

fn secret_value(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.to_str().ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The default file counts only if it exists now; a file that was asked for may appear later.
fn token(reader: &mut Reader<'_>) -> Option<AuthToken> {
    let files = reader.environment().files();
    let Some(text) = reader.text("AUTH_TOKEN") else {
        let exists = files.exists(DEFAULT_TOKEN.as_ref());
        return exists.then(|| AuthToken::File(DEFAULT_TOKEN.into()));
    };
    let path_like = ["/", "./", "../"]
        .iter()
        .any(|start| text.starts_with(start));
    if path_like || files.exists(text.as_ref()) {
        return Some(AuthToken::File(text.into()));
    }
    let outcome = secret_value(text)
        .map(|_| AuthToken::Literal(text.to_owned()))
        .ok_or_else(|| Reject::new("not a token", "a path, or a token in visible ASCII"));
    reader.keep("AUTH_TOKEN", Given::Secret, outcome)
}

/// What is given besides is checked even where nothing is kept.
fn last_known(reader: &mut Reader<'_>) -> Option<LastKnown> {
    let max_bytes = reader.integer("STATE_MAX_BYTES", &STATE_BYTES, DEFAULT_STATE_BYTES);
    let directory = reader.path("STATE_DIR")?;
    if directory.is_absolute() {
        return Some(LastKnown {
            directory,
            max_bytes,
        });
    }
    let reject = Reject::new(
        "not an absolute path",
        "a directory such as /var/lib/culvert",
    );
    let given = Given::Value(directory.display().to_string());
    reader.fault("STATE_DIR", given, reject);
    None
}

fn kept_keys(reader: &mut Reader<'_>, last_known: Option<&LastKnown>) -> Option<PathBuf> {
    let text = reader.text("STATE_KEYS")?;
    let below = last_known.map(|kept| kept.directory.join("keys"));
    let outcome = match (text, below) {
        ("tmpfs", Some(below)) => Ok(below),
        ("tmpfs", None) => Err("STATE_DIR is not set"),
        (path, _) if path.starts_with('/') => Ok(path.into()),
        _ => Err("neither tmpfs nor an absolute path"),
    };
    let accepted = "tmpfs beside STATE_DIR, or a directory in memory such as /run/culvert";
    let outcome = outcome.map_err(|reason| Reject::new(reason, accepted));
    reader.keep("STATE_KEYS", Given::Value(text.to_owned()), outcome)
}

fn local(reader: &mut Reader<'_>) -> Option<MeshSource> {
    match (reader.path("LOCAL_XDS_PATH"), reader.text("LOCAL_XDS")) {
        (Some(path), None) => Some(MeshSource::File(path)),
        (None, Some(text)) => Some(MeshSource::Text(text.to_owned())),
        (None, None) => None,
        (Some(_), Some(_)) => {
            let reject = Reject::new("both are set", "at most one of them");
            reader.fault("LOCAL_XDS_PATH and LOCAL_XDS", Given::Nothing, reject);
            None
        }
    }
}

/// 24 h.
const DEFAULT_TTL: Duration = Duration::from_hours(24);
// Absolute: where the process was started must not matter.
const DEFAULT_ROOTS: &str = "/var/run/secrets/istio/root-cert.pem";
/// From what a few pods take to what fits into memory.
const STATE_BYTES: RangeInclusive<u64> = 1 << 16..=1 << 32;
const DEFAULT_STATE_BYTES: u64 = 256 << 20;
const DEFAULT_TOKEN: &str = "/var/run/secrets/tokens/istio-token";
