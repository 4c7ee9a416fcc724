//! The JSON that goes to OpenBao, and to Kubernetes, and comes back.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use http::HeaderValue;
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};
use serde_json::json;
use zeroize::Zeroizing;

use super::failure::{Failure, Step};

/// `sign/<role>`.
#[derive(Debug, Serialize)]
pub(super) struct SignRequest<'a> {
    pub(super) csr: &'a str,
    pub(super) ttl: String,
    pub(super) format: &'static str,
}

/// `auth/<kubernetes or jwt>/login`.
#[derive(Serialize)]
pub(super) struct JwtLogin<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'a str>,
    pub(super) jwt: &'a str,
}

/// `auth/approle/login`.
#[derive(Serialize)]
pub(super) struct AppRoleLogin<'a> {
    pub(super) role_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) secret_id: Option<&'a str>,
}

/// The JSON of `value`, wiped once it is sent. `secrets` is how many bytes of text are in it.
pub(super) fn body(value: &impl Serialize, secrets: usize) -> Result<Bytes, serde_json::Error> {
    // Twice the secrets, for escapes; growing would leave copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(2 * secrets + 1024));
    serde_json::to_writer(&mut *text, value)?;
    Ok(Bytes::from_owner(text))
}

/// A certificate as OpenBao signs it.
#[derive(Debug)]
pub(super) struct Signed {
    pub(super) leaf: Vec<CertificateDer<'static>>,
    /// Issuer first.
    pub(super) above: Vec<CertificateDer<'static>>,
    pub(super) warnings: Vec<String>,
}

impl Signed {
    pub(super) fn parse(body: &[u8]) -> Result<Self, Failure> {
        let envelope: Envelope<SignedData> = envelope(Step::Sign, body)?;
        let data = envelope.data;
        let mut above = data.ca_chain.unwrap_or_default();
        if above.is_empty() {
            above.extend(data.issuing_ca);
        }
        let mut certificates = Vec::new();
        for pem in above {
            certificates.append(&mut pem_certificates(Step::Sign, &pem)?);
        }
        Ok(Self {
            leaf: pem_certificates(Step::Sign, &data.certificate)?,
            above: certificates,
            warnings: envelope.warnings.unwrap_or_default(),
        })
    }
}

/// A token and how long it lives; zero is for ever.
pub(super) struct LoggedIn {
    pub(super) token: HeaderValue,
    pub(super) life: Duration,
}

impl LoggedIn {
    pub(super) fn parse(body: &[u8]) -> Result<Self, Failure> {
        let answer: LoginAnswer = serde_json::from_slice(body)
            .map_err(|error| unusable(Step::Login, &category(&error)))?;
        let text = Zeroizing::new(answer.auth.client_token);
        let token = token_value(&text)
            .ok_or_else(|| unusable(Step::Login, "the token cannot be a header"))?;
        let life = Duration::from_secs(answer.auth.lease_duration).min(MAX_LIFE);
        Ok(Self { token, life })
    }
}

/// The JSON that asks Kubernetes for a token of a service account.
pub(super) fn token_request(audience: &str, life: Duration) -> Bytes {
    let spec = json!({ "audiences": [audience], "expirationSeconds": life.as_secs() });
    let request = json!({ "apiVersion": AUTHENTICATION, "kind": "TokenRequest", "spec": spec });
    request.to_string().into()
}

/// The token that Kubernetes has made.
pub(super) fn requested_token(body: &[u8]) -> Result<Zeroizing<String>, Failure> {
    let answer: TokenRequested =
        serde_json::from_slice(body).map_err(|error| unusable(Step::Account, &category(&error)))?;
    let token = Zeroizing::new(answer.status.token);
    if token.trim().is_empty() {
        return Err(unusable(Step::Account, "the token is empty"));
    }
    Ok(token)
}

/// Kubernetes' words on a failure: one short line without `secret`, or nothing.
pub(super) fn kubernetes_text(body: &[u8], secret: &str) -> String {
    let said: KubernetesStatus = serde_json::from_slice(body).unwrap_or_default();
    one_line(&said.message, [secret])
}

/// A token as a header that hides and wipes it; nothing if it is empty or cannot be one.
pub(super) fn token_value(text: &str) -> Option<HeaderValue> {
    let text = text.trim();
    if text.is_empty() {
        return None;
    }
    let owned = Bytes::from_owner(Zeroizing::new(text.as_bytes().to_vec()));
    let mut value = HeaderValue::from_maybe_shared(owned).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// One issuer of an engine.
#[derive(Debug)]
pub(super) struct IssuerRef {
    pub(super) name: String,
    /// Whether the engine has its key, without which it makes no revocation list.
    pub(super) has_key: bool,
}

/// All issuers of an engine.
pub(super) fn issuers(body: &[u8]) -> Result<Vec<IssuerRef>, Failure> {
    let envelope: Envelope<Keys> = envelope(Step::Read, body)?;
    let Keys { keys, key_info } = envelope.data;
    let key_info = key_info.unwrap_or_default();
    let has_key = |name: &str| {
        let key = key_info.get(name).and_then(|info| info.key_id.as_deref());
        key != Some("")
    };
    let issuers = keys.into_iter().map(|name| IssuerRef {
        has_key: has_key(&name),
        name,
    });
    Ok(issuers.collect())
}

/// The certificates of one issuer, its own first.
pub(super) fn issuer(body: &[u8]) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let envelope: Envelope<Issuer> = envelope(Step::Read, body)?;
    let mut found = pem_certificates(Step::Read, &envelope.data.certificate)?;
    if found.is_empty() {
        return Err(unusable(Step::Read, "an issuer without a certificate"));
    }
    for pem in envelope.data.ca_chain.unwrap_or_default() {
        found.append(&mut pem_certificates(Step::Read, &pem)?);
    }
    Ok(found)
}

/// OpenBao's words on a failure: one short line without `secrets`, or nothing.
pub(super) fn error_texts(body: &[u8], secrets: [&str; 2]) -> String {
    let errors: Errors = serde_json::from_slice(body).unwrap_or_default();
    one_line(&errors.errors.join("; "), secrets)
}

/// Whatever the server says, it does not say what was shown to it.
fn one_line<const N: usize>(text: &str, secrets: [&str; N]) -> String {
    let mut line = printable(text);
    for secret in secrets.map(|secret| Zeroizing::new(printable(secret))) {
        if !secret.is_empty() {
            line = line.replace(secret.as_str(), "<redacted>");
        }
    }
    // Only now: what is cut is recognised no longer.
    line.chars().take(MAX_ERROR_TEXT).collect()
}

fn printable(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().filter(|it| !it.is_control()).collect()
}

fn pem_certificates(step: Step, pem: &str) -> Result<Vec<CertificateDer<'static>>, Failure> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|_| unusable(step, "a certificate in it is not PEM"))
}

fn envelope<T: for<'de> Deserialize<'de>>(step: Step, body: &[u8]) -> Result<Envelope<T>, Failure> {
    serde_json::from_slice(body).map_err(|error| unusable(step, &category(&error)))
}

/// What is wrong with a document, without repeating any of it.
fn category(error: &serde_json::Error) -> String {
    format!("not what was expected at line {}", error.line())
}

fn unusable(step: Step, why: &str) -> Failure {
    Failure::without_answer(step, format!("the answer is unusable: {why}"))
}

#[derive(Deserialize)]
struct Envelope<T> {
    data: T,
    warnings: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct SignedData {
    certificate: String,
    issuing_ca: Option<String>,
    ca_chain: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct LoginAnswer {
    auth: Auth,
}

#[derive(Deserialize)]
struct Auth {
    client_token: String,
    lease_duration: u64,
}

#[derive(Deserialize)]
struct TokenRequested {
    status: TokenStatus,
}

#[derive(Deserialize)]
struct TokenStatus {
    token: String,
}

#[derive(Default, Deserialize)]
struct KubernetesStatus {
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct Keys {
    keys: Vec<String>,
    key_info: Option<HashMap<String, KeyInfo>>,
}

#[derive(Deserialize)]
struct KeyInfo {
    key_id: Option<String>,
}

#[derive(Deserialize)]
struct Issuer {
    certificate: String,
    ca_chain: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<String>,
}

const AUTHENTICATION: &str = "authentication.k8s.io/v1";
/// A token that claims to live longer is replaced as if it did not.
const MAX_LIFE: Duration = Duration::from_hours(365 * 24);
const MAX_ERROR_TEXT: usize = 300;
