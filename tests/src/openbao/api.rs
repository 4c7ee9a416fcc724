//! HTTPS calls, one connection each.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, StatusCode};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName},
};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{sys::Netns, traffic};

/// The server, as reached from one namespace.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) from: Netns,
    pub(super) server: SocketAddr,
    pub(super) tls: Arc<ClientConfig>,
}

impl Endpoint {
    /// Makes a call, whatever the answer.
    pub(super) async fn call(
        &self,
        (method, path): (&str, &str),
        token: &str,
        body: &Value,
    ) -> anyhow::Result<(StatusCode, Value)> {
        let talk = async {
            let stream = traffic::connect(&self.from, self.server).await?;
            let request = request(self.server, method, path, token, body)?;
            exchange(&self.tls, stream, self.server, request).await
        };
        let answer = tokio::time::timeout(LIMIT, talk).await;
        answer.with_context(|| format!("{method} {path}"))?
    }
}

pub(super) fn trusting(root: &CertificateDer<'static>) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(root.clone())?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// `PATCH` is a merge patch; the body goes with methods that have one.
fn request(
    server: SocketAddr,
    method: &str,
    path: &str,
    token: &str,
    body: &Value,
) -> anyhow::Result<Request<Body>> {
    let kind = if method == "PATCH" {
        "application/merge-patch+json"
    } else {
        "application/json"
    };
    let text = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let request = Request::builder()
        .method(method)
        .uri(format!("/v1/{path}"))
        .header("host", server.to_string())
        .header("connection", "close")
        .header("content-type", kind)
        .header("x-vault-token", token);
    Ok(request.body(Body::new(text.into()))?)
}

type Body = http_body_util::Full<Bytes>;

async fn exchange(
    tls: &Arc<ClientConfig>,
    stream: TcpStream,
    server: SocketAddr,
    request: Request<Body>,
) -> anyhow::Result<(StatusCode, Value)> {
    use http_body_util::BodyExt as _;
    let name = ServerName::from(server.ip());
    let stream = TlsConnector::from(Arc::clone(tls))
        .connect(name, stream)
        .await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let talk = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        let body = serde_json::from_slice(&body).unwrap_or_default();
        anyhow::Ok((status, body))
    };
    let driving = async {
        let _ended = connection.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = talk => answer,
        () = driving => anyhow::bail!("unreachable: the other one ends"),
    }
}

/// For connecting, asking and the answer.
pub(super) const LIMIT: Duration = Duration::from_secs(20);
