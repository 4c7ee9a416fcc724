//! `/`: where people begin.

use std::fmt::Write as _;

use http::{HeaderValue, Response, StatusCode, header::CONTENT_TYPE};

use super::http1::{Body, text};

/// Everything that this server answers, with a word about each.
const LINKS: [(&str, &str); 6] = [
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
    ("logging", "POST: show or change log levels"),
    ("quitquitquit", "POST: stop, as SIGTERM does"),
];

pub(super) fn page() -> Response<Body> {
    let mut html = String::from(
        "<!doctype html>\n<html lang=\"en\">\n<title>Culvert admin</title>\n<h1>Culvert admin</h1>\n<table>\n",
    );
    for (path, what) in LINKS {
        // Writing to a string does not fail.
        let _ = writeln!(html, "<tr><td><a href=\"{path}\">{path}</a><td>{what}");
    }
    html += "</table>\n";
    let mut response = text(StatusCode::OK, html);
    let content_type = HeaderValue::from_static("text/html; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}
