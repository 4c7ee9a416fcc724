//! Arguments and environment become a [`Command`] and a [`Config`]; nothing else in the program
//! reads either.
//!
//! `main` calls this room, in the order of its functions: [`logging`] first (so that everything
//! after it can be logged), then [`command`], then [`configuration`]. All faults of the
//! configuration are found in one pass and told together, so that an operator repairs a
//! deployment once and not once per variable.

mod admin;
mod command;
mod control;
mod data;
mod demo;
mod doctor;
mod environment;
mod explain;
mod fault;
mod files;
mod identity;
mod limits;
mod metrics;
mod openbao;
mod proxy_config;
mod reader;
mod runtime;
mod server;
#[cfg(test)]
mod tests;
mod traces;
mod trust;
mod value;

pub use command::{Command, UsageError, command, command_list};
pub use demo::{DemoError, demo};
pub use doctor::{Examination, Finding, Report, Severity, doctor};
pub use environment::{Disk, Environment, Files};
pub use explain::{ExplainError, Output, Question, explain};
pub use fault::{Fault, Faults, Given};

use crate::config::{BuildInfo, Config, Logging};
use reader::Reader;

/// What this binary was built from, and for.
#[must_use]
pub fn build_info(environment: &Environment<'_>) -> BuildInfo {
    let istio_version = environment.variable("ISTIO_META_ISTIO_VERSION");
    BuildInfo::new(istio_version.unwrap_or("unknown"))
}

/// How logs are written. Never fails: whether the filter makes sense is for the log writer to say.
#[must_use]
pub fn logging(environment: &Environment<'_>) -> Logging {
    runtime::logging(&Reader::new(environment))
}

/// The effective configuration: defaults, then the mesh configuration file, then `PROXY_CONFIG`,
/// then the variables. `arguments` are those after the program name, joined by spaces; they
/// appear in the dumps only.
///
/// # Errors
/// All [`Faults`] of all settings.
pub fn configuration(environment: &Environment<'_>, arguments: &str) -> Result<Config, Faults> {
    let mut reader = Reader::new(environment);
    let proxy = proxy_config::load(&mut reader);
    let identity = identity::parse(&mut reader, &proxy);
    let control = control::parse(&mut reader, &proxy);
    let capture = data::capture(&mut reader, &identity.metadata);
    data::check_features(&mut reader, &capture, control.on_demand);
    let config = Config {
        limits: limits::parse(&mut reader),
        sockets: data::sockets(&mut reader, &capture.mode),
        tunnel: data::tunnel(&mut reader),
        tls: trust::tls(&mut reader, &control.certificates),
        inbound: data::inbound(&mut reader),
        same_node: data::same_node(&mut reader),
        ports: runtime::ports(&mut reader, &proxy),
        runtime: runtime::threads(&mut reader, &proxy, arguments),
        drain: runtime::drain(&mut reader),
        logging: runtime::logging(&reader),
        metrics: metrics::parse(&mut reader),
        access_log: metrics::access_log(&mut reader),
        traces: traces::parse(&mut reader),
        identity,
        control,
        capture,
    };
    runtime::check_filter(&mut reader);
    files::check(&mut reader, &config.control);
    reader.finish(config)
}
