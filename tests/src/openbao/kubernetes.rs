//! Logins by service account, with an API server that reviews the token of a node and makes those of workloads.

use std::{convert::Infallible, fs, path::PathBuf, sync::Arc};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::{ServerConfig, crypto::aws_lc_rs};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;

use super::{OpenBao, pki};
use crate::{
    traffic,
    world::{Pod, World},
};

/// A running API server; stops when dropped.
#[derive(Debug)]
pub struct ApiServer {
    _serving: JoinSet<()>,
}

impl ApiServer {
    /// Its address, if it serves in `home`.
    #[must_use]
    pub fn address(home: &Pod) -> String {
        format!("https://{}", home.at(API_PORT))
    }

    /// Serves in `home` what `api` answers.
    fn start(world: &World, home: &Pod, api: Api) -> anyhow::Result<Self> {
        let at = home.at(API_PORT);
        let listener = traffic::listen(home.netns(), at)?;
        let identity = world.authority().issue_server(&[at.ip().to_string()])?;
        let tls = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(identity.chain, identity.key)?;
        let mut serving = JoinSet::new();
        serving.spawn(serve(listener, Arc::new(tls).into(), Arc::new(api)));
        Ok(Self { _serving: serving })
    }
}

/// What the API server knows.
struct Api {
    /// The token of the node's account, which alone may call it.
    node: String,
    /// What tokens of workloads are signed with.
    key: KeyPair,
    /// The one namespace whose accounts the node may have tokens of.
    namespace: String,
}

/// Accounts of workloads, each of which logs in for itself.
#[derive(Debug)]
pub struct WorkloadAccounts {
    key: KeyPair,
    directory: PathBuf,
    /// With these variables a proxy reads the tokens in a directory.
    pub from_directory: Vec<(String, String)>,
    /// With these it has the API server make them.
    pub from_kubernetes: Vec<(String, String)>,
    _api: ApiServer,
}

impl WorkloadAccounts {
    /// An API server in `home` that makes tokens of accounts in `namespace`. Nobody trusts them yet.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn start(world: &World, home: &Pod, namespace: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let account = world.file("account");
        fs::create_dir_all(&account)?;
        let node = pki::account_token(&key, pki::NODE)?;
        fs::write(account.join("token"), &node)?;
        fs::write(account.join("ca.crt"), world.authority().root_pem())?;
        let api = Api {
            node,
            key: KeyPair::try_from(key.serialize_der())?,
            namespace: namespace.to_owned(),
        };
        let directory = world.file("workload-tokens");
        let at = home.at(API_PORT);
        let variables = |source: &str, more: Vec<(String, String)>| {
            let login = [
                ("OPENBAO_AUTH_METHOD", "jwt".to_owned()),
                ("OPENBAO_AUTH_ROLE", "workload".to_owned()),
                ("OPENBAO_JWT_SOURCE", source.to_owned()),
            ];
            [pki::variables(login), more].concat()
        };
        let path = ("OPENBAO_JWT_PATH", directory.display().to_string());
        let cluster = [
            ("KUBERNETES_SERVICE_HOST", at.ip().to_string()),
            ("KUBERNETES_SERVICE_PORT", at.port().to_string()),
            ("KUBERNETES_ACCOUNT_PATH", account.display().to_string()),
        ];
        Ok(Self {
            from_directory: variables("directory", pki::variables([path])),
            from_kubernetes: variables("kubernetes", pki::variables(cluster)),
            key,
            directory,
            _api: ApiServer::start(world, home, api)?,
        })
    }

    /// What their tokens are signed with, as the issuer publishes it.
    #[must_use]
    pub fn public_key_pem(&self) -> String {
        self.key.public_key_pem()
    }

    /// Puts a token of the pod's account where [`WorkloadAccounts::from_directory`] looks for it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn admit(&self, pod: &Pod) -> anyhow::Result<()> {
        let spec = pod.spec();
        let directory = self.directory.join(&spec.namespace);
        fs::create_dir_all(&directory)?;
        Ok(fs::write(
            directory.join(&spec.service_account),
            self.token(pod)?,
        )?)
    }

    /// Whether the server signs for `id` whoever shows the token of the pod's account.
    ///
    /// # Errors
    /// When it does not answer, or refuses for another reason than the name.
    pub async fn may_sign(&self, bao: &OpenBao, pod: &Pod, id: &str) -> anyhow::Result<bool> {
        let login = json!({ "role": "workload", "jwt": self.token(pod)? });
        let made = bao.call("POST", "auth/jwt/login", login).await?;
        let token = made["auth"]["client_token"].as_str().context("no token")?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        let csr = params.serialize_request(&KeyPair::generate()?)?.pem()?;
        let body = json!({ "csr": csr });
        let path = format!("{}/sign/{}", pki::MESH, pki::ROLE);
        let call = bao.endpoint.call(("POST", &path), token, &body);
        match call.await? {
            (StatusCode::OK, _) => Ok(true),
            (StatusCode::BAD_REQUEST, _) => Ok(false),
            (status, answer) => bail!("{status} {answer}"),
        }
    }

    fn token(&self, pod: &Pod) -> anyhow::Result<String> {
        let spec = pod.spec();
        pki::account_token(&self.key, (&spec.namespace, &spec.service_account))
    }
}

impl OpenBao {
    /// Sets up `kubernetes` with an API server in `home`; the variables with which a proxy logs in.
    ///
    /// # Errors
    /// When the server refuses, or the port is taken.
    pub async fn kubernetes(
        &self,
        world: &World,
        home: &Pod,
    ) -> anyhow::Result<(Vec<(String, String)>, ApiServer)> {
        let (token, server) = self.reviewed_account(world, home)?;
        let token_file = self.file("account", &token)?;
        let method = json!({ "type": "kubernetes" });
        self.call("POST", "sys/auth/kubernetes", method).await?;
        let config = json!({
            "kubernetes_host": ApiServer::address(home),
            "kubernetes_ca_cert": world.authority().root_pem(),
            "token_reviewer_jwt": token,
        });
        self.call("POST", "auth/kubernetes/config", config).await?;
        let role = json!({
            "bound_service_account_names": "ztunnel",
            "bound_service_account_namespaces": "istio-system",
            "audience": "openbao",
            "token_policies": "culvert",
            "token_ttl": "1h",
            "token_type": "batch",
        });
        self.call("POST", "auth/kubernetes/role/node", role).await?;
        let variables = pki::variables([
            ("OPENBAO_AUTH_ROLE", "node".to_owned()),
            ("OPENBAO_JWT_PATH", token_file),
        ]);
        Ok((variables, server))
    }

    /// The token of a node's account, and an API server in `home` that knows it.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn reviewed_account(
        &self,
        world: &World,
        home: &Pod,
    ) -> anyhow::Result<(String, ApiServer)> {
        let key = KeyPair::generate()?;
        let token = pki::account_token(&key, pki::NODE)?;
        let api = Api {
            node: token.clone(),
            key,
            namespace: String::new(),
        };
        Ok((token, ApiServer::start(world, home, api)?))
    }

    /// Sets up `jwt` for the accounts of workloads, each of which may have its own identity signed and no other, and an
    /// API server in `home` that makes tokens of accounts in `namespace`.
    ///
    /// # Errors
    /// When the server refuses, or the port is taken.
    pub async fn workload_accounts(
        &self,
        world: &World,
        home: &Pod,
        namespace: &str,
    ) -> anyhow::Result<WorkloadAccounts> {
        let accounts = WorkloadAccounts::start(world, home, namespace)?;
        self.trust_workloads(&accounts.key).await?;
        Ok(accounts)
    }
    /// Logins with tokens signed by `key`, and a role whose only URI is that of who logged in.
    async fn trust_workloads(&self, key: &KeyPair) -> anyhow::Result<()> {
        self.call("POST", "sys/auth/jwt", json!({ "type": "jwt" }))
            .await?;
        let config = json!({ "jwt_validation_pubkeys": [key.public_key_pem()] });
        self.call("POST", "auth/jwt/config", config).await?;
        let role = json!({
            "role_type": "jwt",
            "user_claim": "sub",
            "bound_audiences": "openbao",
            "claim_mappings": {
                "/kubernetes.io/namespace": "service_account_namespace",
                "/kubernetes.io/serviceaccount/name": "service_account_name",
            },
            "token_policies": "culvert",
            "token_type": "batch",
            "token_ttl": "5m",
        });
        self.call("POST", "auth/jwt/role/workload", role).await?;
        let methods = self.call("GET", "sys/auth", Value::Null).await?;
        let accessor = methods["data"]["jwt/"]["accessor"].as_str();
        let accessor = accessor.context("no accessor")?;
        let claim =
            |name: &str| format!("{{{{identity.entity.aliases.{accessor}.metadata.{name}}}}}");
        let uri = format!(
            "spiffe://cluster.local/ns/{}/sa/{}",
            claim("service_account_namespace"),
            claim("service_account_name")
        );
        let role = json!({ "allowed_uri_sans": uri, "allowed_uri_sans_template": true });
        self.set_role(role).await
    }
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, api: Arc<Api>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, api) = (tls.clone(), Arc::clone(&api));
        connections.spawn(async move {
            let stream = tls.accept(stream).await?;
            let service = service_fn(|request| answer(request, &api));
            let served = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            anyhow::Ok(served.await?)
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(
    request: Request<Incoming>,
    api: &Api,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body: Value = body
        .collect()
        .await
        .ok()
        .and_then(|body| serde_json::from_slice(&body.to_bytes()).ok())
        .unwrap_or_default();
    let bearer = head.headers.get("authorization");
    let known = bearer.is_some_and(|it| *it == *format!("Bearer {}", api.node));
    let path: Vec<_> = head.uri.path().split('/').skip(1).collect();
    let (status, answer) = match *path {
        ["apis", "authentication.k8s.io", "v1", "tokenreviews"] => (201, api.review(&body)),
        [
            "api",
            "v1",
            "namespaces",
            namespace,
            "serviceaccounts",
            account,
            "token",
        ] => api.make((namespace, account), known, &body),
        _ => (404, json!({ "kind": "Status", "message": "not found" })),
    };
    let mut response = Response::new(Full::new(answer.to_string().into()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or_default();
    let json = http::HeaderValue::from_static("application/json");
    response.headers_mut().insert("content-type", json);
    Ok(response)
}

impl Api {
    /// The one token that is good is that of the node's account.
    fn review(&self, body: &Value) -> Value {
        let status = if body["spec"]["token"] == json!(self.node) {
            let user = json!({ "username": pki::ACCOUNT, "uid": "uid-1" });
            json!({ "authenticated": true, "audiences": ["openbao"], "user": user })
        } else {
            json!({ "authenticated": false })
        };
        json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status })
    }

    /// A token of an account, if the caller may have it.
    fn make(&self, account: (&str, &str), known: bool, body: &Value) -> (u16, Value) {
        let refused = |status, text: &str| (status, json!({ "kind": "Status", "message": text }));
        if !known {
            return refused(401, "Unauthorized");
        }
        if account.0 != self.namespace {
            return refused(403, "cannot create resource \"serviceaccounts/token\"");
        }
        if body["kind"] != "TokenRequest" || body["spec"]["audiences"] != json!(["openbao"]) {
            return refused(400, "no token request");
        }
        match pki::account_token(&self.key, account) {
            Ok(token) => (
                201,
                json!({ "kind": "TokenRequest", "status": { "token": token } }),
            ),
            Err(error) => refused(500, &error.to_string()),
        }
    }
}

const API_PORT: u16 = 6443;
