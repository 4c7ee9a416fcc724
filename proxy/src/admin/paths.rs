//! 15000: the admin server, on loopback only: which path gives which answer.

use std::{net::IpAddr, sync::Arc};

use futures_util::future::{BoxFuture, join_all};
use http::{
    HeaderMap, Method, Request, Response, StatusCode,
    header::{HOST, ORIGIN},
    uri::Authority,
};
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    Console, dump, explain, flows,
    http1::{self, Body, JSON, empty, json, text},
    logging, page, profile,
    query::Query,
    stream::streamed,
};

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
    if !is_named_locally(request.headers()) {
        return now(text(StatusCode::FORBIDDEN, FOREIGN_NAME.to_owned()));
    }
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

/// Whether the request asks an address or `localhost`. A name of somebody else's may lead here all the same, and with it a page of
/// theirs, which the browser would take for ours.
fn is_named_locally(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST) else {
        return true;
    };
    let authority = host.to_str().ok().and_then(|host| host.parse().ok());
    authority.is_some_and(|authority: Authority| {
        let host = authority.host();
        let bare = host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        host.eq_ignore_ascii_case("localhost") || bare.unwrap_or(host).parse::<IpAddr>().is_ok()
    })
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

const FOREIGN_NAME: &str =
    "ask by an address or as localhost; other names may be somebody else's\n";
const CROSS_SITE: &str = "a page of another site may not do this\n";
/// Flows that are told of at most, unless the request says otherwise.
const MAX_FLOWS: usize = 10_000;

#[cfg(test)]
mod tests;
