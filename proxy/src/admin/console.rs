//! 15000: the admin server, on loopback only.

use std::{borrow::Cow, fmt, sync::Arc};

use futures_util::future::{BoxFuture, join_all};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{CONTENT_TYPE, HOST, ORIGIN},
};
use hyper::body::Incoming;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    ControlPlane, Pods, Settings, dump, explain, flows,
    http1::{self, Body, empty, text},
    logging, page, profile,
    stream::streamed,
};
use crate::{
    config::BuildInfo,
    flow::Shared,
    telemetry::{Readiness, logging::Levels},
};

/// What the admin server shows, and what it may change.
#[expect(clippy::exhaustive_structs, reason = "put together by `node`")]
pub struct Console {
    /// The mesh, the certificates, the counters.
    pub shared: Arc<Shared>,
    /// The pods of this process.
    pub pods: Arc<dyn Pods>,
    /// How the control plane is followed.
    pub control_plane: ControlPlane,
    /// What is still to be done before the proxy may serve.
    pub readiness: Readiness,
    /// The effective configuration.
    pub settings: Settings,
    /// What this binary was built from.
    pub build: BuildInfo,
    /// The log levels.
    pub levels: Levels,
    /// Fired to stop the process as a signal would.
    pub quit: CancellationToken,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

/// Serves `console` on all of `listeners` until `stop` fires.
pub async fn serve_admin(listeners: Vec<TcpListener>, console: Console, stop: CancellationToken) {
    let console = Arc::new(console);
    let serving = listeners.into_iter().map(|listener| {
        let console = Arc::clone(&console);
        let handler = move |request: &Request<Incoming>| answer(Arc::clone(&console), request);
        http1::serve(listener, handler, stop.clone())
    });
    join_all(serving).await;
}

/// Answers one request. What it takes from the request is taken at once.
fn answer(
    console: Arc<Console>,
    request: &Request<Incoming>,
) -> BoxFuture<'static, Response<Body>> {
    let (method, uri) = (request.method(), request.uri());
    let query = Query::new(uri.query().unwrap_or_default());
    if method == Method::POST && is_cross_site(request.headers()) {
        return now(text(StatusCode::FORBIDDEN, CROSS_SITE.to_owned()));
    }
    match uri.path() {
        "/" => now(page::page(&console)),
        "/live" => now(page::live(&console)),
        "/config_dump" => Box::pin(streamed(JSON, move |out| dump::write(&console, out))),
        "/logging" => now(logging::answer(method, &query, &console.levels)),
        "/quitquitquit" if method == Method::POST => {
            tracing::info!("the admin server was asked to stop the process");
            console.quit.cancel();
            now(text(StatusCode::OK, "shutdown now\n".to_owned()))
        }
        "/quitquitquit" => now(empty(StatusCode::METHOD_NOT_ALLOWED)),
        "/debug/explain" => now(explain::answer(&console, &query)),
        "/debug/flows" => {
            let most = query.number("limit").unwrap_or(MAX_FLOWS);
            let pods = Arc::clone(&console.pods);
            Box::pin(streamed(JSON, move |out| {
                flows::write_open(&*pods, most, out)
            }))
        }
        "/debug/pprof/profile" => Box::pin(profile::cpu(query)),
        "/debug/pprof/heap" => Box::pin(profile::heap()),
        "/debug/pprof/heap/profiling" => now(profile::heap_profiling(query)),
        "/debug/refusals" => now(json(&flows::Recent::of(console.shared.traffic.refusals()))),
        _ => now(empty(StatusCode::NOT_FOUND)),
    }
}

fn now(response: Response<Body>) -> BoxFuture<'static, Response<Body>> {
    Box::pin(std::future::ready(response))
}

/// A small document.
pub(super) fn json(document: &impl Serialize) -> Response<Body> {
    match serde_json::to_string_pretty(document) {
        Ok(body) => {
            let mut response = text(StatusCode::OK, body + "\n");
            let content_type = HeaderValue::from_static(JSON);
            response.headers_mut().insert(CONTENT_TYPE, content_type);
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// Whether a browser sends this on behalf of a page of somebody else, while a port-forward makes us its neighbour.
fn is_cross_site(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(ORIGIN) else {
        return false;
    };
    let origin = origin
        .to_str()
        .ok()
        .and_then(|origin| origin.strip_prefix("http://"));
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    origin.is_none() || origin != host
}

/// The query of a request: `name=value` pairs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Query<'a>(&'a str);

impl<'a> Query<'a> {
    pub(super) const fn new(text: &'a str) -> Self {
        Self(text)
    }

    pub(super) fn has(self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// The first value of that name, decoded.
    pub(super) fn value(self, name: &str) -> Option<Cow<'a, str>> {
        let mut pairs = form_urlencoded::parse(self.0.as_bytes());
        pairs.find(|(key, _)| key == name).map(|(_, value)| value)
    }

    pub(super) fn number<N: std::str::FromStr>(self, name: &str) -> Option<N> {
        self.value(name)?.parse().ok()
    }
}

const JSON: &str = "application/json";
const CROSS_SITE: &str = "a page of another site may not do this\n";
/// Flows that are told of at most, unless the request says otherwise.
const MAX_FLOWS: usize = 10_000;

#[cfg(test)]
mod tests;
