//! `/logging`: the level filter while the process runs.

use http::{Method, Response, StatusCode};

use super::{
    http1::{Body, text},
    query::Query,
};
use crate::telemetry::logging::Levels;

/// Answers in the words that istioctl's users know.
pub(super) fn answer(method: &Method, query: &Query<'_>, levels: &Levels) -> Response<Body> {
    if method != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, USAGE.to_owned());
    }
    let clauses = query.value("level").unwrap_or_default();
    let changed = if query.has("reset") {
        levels.reset(&clauses)
    } else {
        levels.append(&clauses)
    };
    match changed {
        Ok(()) => text(
            StatusCode::OK,
            format!("current log level is {}\n", levels.current()),
        ),
        Err(error) => text(
            StatusCode::BAD_REQUEST,
            format!("invalid level {clauses:?}: {error}\n{USAGE}"),
        ),
    }
}

const USAGE: &str = "\
usage: POST /logging\t\t\t\t\t\t(to list the current level)
usage: POST /logging?level=<level>\t\t\t\t(to change the level of everything)
usage: POST /logging?level=<target>=<level>,<target>:<level>\t(to change the level of parts)
usage: POST /logging?reset\t\t\t\t\t(to go back to the levels of the start)

levels: off, error, warn, info, debug, trace
";
