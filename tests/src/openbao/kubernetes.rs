//! The login by service account, with an API server that only reviews tokens.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::KeyPair;
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
pub struct TokenReviews {
    _serving: JoinSet<()>,
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
    ) -> anyhow::Result<(Vec<(String, String)>, TokenReviews)> {
        let token = pki::account_token(&KeyPair::generate()?)?;
        let at = home.at(API_PORT);
        let listener = traffic::listen(home.netns(), at)?;
        let identity = world.authority().issue_server(&[at.ip().to_string()])?;
        let tls = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(identity.chain, identity.key)?;
        let mut serving = JoinSet::new();
        serving.spawn(serve(listener, Arc::new(tls).into(), token.clone()));

        let method = json!({ "type": "kubernetes" });
        self.call("POST", "sys/auth/kubernetes", method).await?;
        let config = json!({
            "kubernetes_host": format!("https://{at}"),
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
            ("OPENBAO_JWT_PATH", self.file("account", &token)?),
        ]);
        let reviews = TokenReviews { _serving: serving };
        Ok((variables, reviews))
    }
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, token: String) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, token) = (tls.clone(), token.clone());
        connections.spawn(async move {
            let stream = tls.accept(stream).await?;
            let service = service_fn(|request| review(request, &token));
            let served = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            anyhow::Ok(served.await?)
        });
        while connections.try_join_next().is_some() {}
    }
}

/// The one token that is good is that of the node's account.
async fn review(
    request: Request<Incoming>,
    token: &str,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let asked = request.uri().path() == "/apis/authentication.k8s.io/v1/tokenreviews";
    let body = request.into_body().collect().await;
    let body: Value = body
        .ok()
        .and_then(|body| serde_json::from_slice(&body.to_bytes()).ok())
        .unwrap_or_default();
    let good = asked && body["spec"]["token"] == json!(token);
    let status = if good {
        let user = json!({ "username": pki::ACCOUNT, "uid": "uid-1" });
        json!({ "authenticated": true, "audiences": ["openbao"], "user": user })
    } else {
        json!({ "authenticated": false })
    };
    let answer = json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "status": status,
    });
    let mut response = Response::new(Full::new(answer.to_string().into()));
    *response.status_mut() = StatusCode::CREATED;
    let json = http::HeaderValue::from_static("application/json");
    response.headers_mut().insert("content-type", json);
    Ok(response)
}

const API_PORT: u16 = 6443;
