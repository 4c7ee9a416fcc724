//! Typed settings, one section per room that is configured.
//!
//! A section is plain data: it knows neither where its values come from nor who reads it. `cli`
//! fills the sections from the environment and the mesh configuration; `node` hands each room
//! its own section and no other.

mod build_info;
mod control;
mod data;
mod limits;
mod metrics;
mod openbao;
mod runtime;
mod show;
mod traces;

pub use build_info::BuildInfo;
pub use control::{
    Address, AuthToken, CertificateSource, ControlPlane, Header, Identity, LastKnown, MeshSource,
    RootSource, SelfIdentity,
};
pub use data::{
    Capture, DnsCapture, Inbound, Keepalive, MaxAge, NodePath, OriginalSource, PqcPolicy,
    ProxyMode, SameNode, Sockets, Tls, Tunnel, WorkloadRef,
};
pub use limits::Limits;
pub use metrics::{AccessLog, LabelProfile, Metrics};
pub use openbao::{OpenBao, OpenBaoJwt, OpenBaoLogin};
pub use runtime::{Drain, LogFormat, Logging, Ports, Runtime};
pub use traces::{Sampler, Traces};

use serde::Serialize;

/// Everything the proxy can be told, in sections. Only `cli` builds it and only `node` takes it apart.
///
/// Its serialized form is what the start-up log shows: no secret is in it.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Config {
    /// Who this proxy is: node, pod, cluster, network.
    pub identity: Identity,
    /// Where mesh state and certificates come from.
    pub control: ControlPlane,
    /// What is captured, and how pods are found.
    pub capture: Capture,
    /// How much of anything one pod or peer gets.
    pub limits: Limits,
    /// Options of every socket the proxy opens.
    pub sockets: Sockets,
    /// HTTP/2 and pool parameters of HBONE.
    pub tunnel: Tunnel,
    /// TLS parameters of HBONE.
    pub tls: Tls,
    /// Inbound behaviour that is not routing.
    pub inbound: Inbound,
    /// How flows within the node are carried.
    pub same_node: SameNode,
    /// Ports of the proxy's own HTTP servers.
    pub ports: Ports,
    /// Threads and process limits.
    pub runtime: Runtime,
    /// How long open connections may go on after a stop was asked for.
    pub drain: Drain,
    /// Log format and levels.
    pub logging: Logging,
    /// Labels and bounds of the traffic metrics.
    pub metrics: Metrics,
    /// What the access log tells.
    pub access_log: AccessLog,
    /// Spans of flows, if anybody takes them.
    pub traces: Option<Traces>,
}
