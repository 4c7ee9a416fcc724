//! The process: ports, threads, drain, logs.

use std::time::Duration;

use serde::Serialize;

use super::show;

/// Ports of the proxy's own HTTP servers and of the in-pod listeners.
#[derive(Debug, Clone, Copy, Serialize)]
#[non_exhaustive]
pub struct Ports {
    /// `proxyAdminPort`; 15000, loopback only.
    pub admin: u16,
    /// `statsPort`; 15020.
    pub stats: u16,
    /// 15021, fixed.
    pub readiness: u16,
    /// 15001, fixed.
    pub outbound: u16,
    /// 15006, fixed.
    pub inbound_plaintext: u16,
    /// 15008, fixed.
    pub hbone: u16,
    /// 15080, fixed; bound only with `UNSTABLE_ENABLE_SOCKS5`.
    pub socks5: u16,
}

/// Threads and what the process tells about itself.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Runtime {
    /// Data-plane worker threads, at least 1.
    pub worker_threads: usize,
    /// All arguments after the program name, joined by spaces.
    pub arguments: String,
    /// `CORE_DUMPS`: whether the memory of the process, with its secrets, may be dumped and traced; false.
    pub core_dumps: bool,
}

/// How long open connections may go on after a stop was asked for.
#[derive(Debug, Clone, Copy, Serialize)]
#[non_exhaustive]
pub struct Drain {
    /// `CONNECTION_TERMINATION_DEADLINE`, else from `TERMINATION_GRACE_PERIOD_SECONDS`, else 5 s.
    #[serde(serialize_with = "show::duration")]
    pub deadline: Duration,
}

/// Log format and levels.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Logging {
    /// `RUST_LOG`, default `info`.
    pub filter: String,
    /// `LOG_FORMAT`.
    pub format: LogFormat,
    /// `AUTHZ_POLICY_INFO_LOGGING=true`: authorization verdicts at info instead of debug.
    pub policy_at_info: bool,
}

/// Shape of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum LogFormat {
    /// Tab-separated text.
    Text,
    /// One JSON object per line.
    Json,
}
