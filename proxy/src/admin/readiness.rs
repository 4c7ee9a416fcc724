//! 15021: whether the kubelet may count this proxy as ready.

use http::{Method, Response, StatusCode};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::http1::{Body, empty, serve, text};
use crate::telemetry::Readiness;

/// Serves `GET /healthz/ready` until `stop` fires.
pub async fn serve_readiness(listener: TcpListener, readiness: Readiness, stop: CancellationToken) {
    let handler = move |request: &http::Request<_>| {
        std::future::ready(answer(request.method(), request.uri().path(), &readiness))
    };
    serve(listener, handler, stop).await;
}

fn answer(method: &Method, path: &str, readiness: &Readiness) -> Response<Body> {
    if path != "/healthz/ready" {
        return empty(StatusCode::NOT_FOUND);
    }
    if method != Method::GET {
        return empty(StatusCode::METHOD_NOT_ALLOWED);
    }
    let pending = readiness.pending();
    if pending.is_empty() {
        return text(StatusCode::OK, "ready\n".to_owned());
    }
    let pending = pending.join(", ");
    text(
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("not ready, pending: {pending}\n"),
    )
}
