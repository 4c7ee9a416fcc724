//! `/`: one page that shows what the proxy does now, and `/live`, the part of it that changes.
//!
//! Both are rendered here, where everything that is shown is escaped. The script in the page only fetches `/live` and puts
//! it in place, so the page tells the same without it. The policy of the page allows nothing but its own style and script.

mod map;
mod sections;

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{
    HeaderValue, Response, StatusCode,
    header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS},
};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    Console,
    http1::{Body, text},
};

/// Everything that this server answers besides, with a word about each.
const LINKS: [(&str, &str); 8] = [
    (
        "config_dump",
        "everything the proxy knows, as istioctl and Kiali read it",
    ),
    ("debug/flows", "open connections"),
    (
        "debug/refusals",
        "connections that were refused or failed of late",
    ),
    (
        "debug/explain",
        "?from=POD&to=HOST:PORT: what would become of a connection, and why",
    ),
    (
        "debug/pprof/profile",
        "?seconds=10&frequency=100: where processor time goes, for pprof",
    ),
    (
        "debug/pprof/heap",
        "where memory came from, for pprof, if that is built in",
    ),
    ("logging", "POST: show or change log levels"),
    ("quitquitquit", "POST: stop, as SIGTERM does"),
];

const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/script.js");

/// The whole page.
pub(super) fn page(console: &Console) -> Response<Body> {
    let node = console.settings.node().unwrap_or("this node");
    respond(html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                link rel="icon" href="data:,";
                title { "Culvert admin: " (node) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { "Culvert" }
                    span { (node) }
                    span.dim { "version " (console.build.version) " · " span id="state" { "live" } }
                    input id="filter" type="search" placeholder="filter flows" aria-label="filter flows";
                    nav {
                        @for (path, what) in LINKS { a href=(path) title=(what) { (path.trim_start_matches("debug/")) } }
                    }
                }
                main { (sections::all(console)) }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    })
}

/// What of the page changes.
pub(super) fn live(console: &Console) -> Response<Body> {
    respond(sections::all(console))
}

fn respond(markup: Markup) -> Response<Body> {
    let mut response = text(StatusCode::OK, markup.into_string());
    let headers = response.headers_mut();
    let content_type = HeaderValue::from_static("text/html; charset=utf-8");
    headers.insert(CONTENT_TYPE, content_type);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let policy = format!(
        "default-src 'none'; style-src '{}'; script-src '{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        source_of(STYLE),
        source_of(SCRIPT),
    );
    if let Ok(policy) = HeaderValue::try_from(policy) {
        headers.insert(CONTENT_SECURITY_POLICY, policy);
    }
    response
}

/// How a content security policy names exactly this text.
fn source_of(text: &str) -> String {
    let hash = digest(&SHA256, text.as_bytes());
    format!("sha256-{}", BASE64_STANDARD.encode(hash))
}
