//! What the proxy tells about itself: metrics, access log, log records, spans and readiness.
//!
//! Every room above reports through the handles of this one; it knows none of them. Metric
//! families live in the [`prometheus_client`] registry that the caller hands in, so that a scrape
//! ([`Exposition`]) sees whatever was registered; those of traffic, which may be large, are written
//! from their own table. A flow costs one look-up when it is opened ([`Traffic::open`]); after that,
//! everything is an atomic addition.

mod access;
mod authorization;
mod causes;
mod dns;
mod exposition;
mod labels;
mod latency;
mod limits;
pub mod logging;
mod names;
mod on_demand;
mod process;
mod readiness;
mod reason;
mod refusals;
mod route;
mod series;
mod tallies;
mod traces;
mod traffic;

pub use access::{Access, Attempt};
pub use authorization::{AuthorizationEvent, AuthorizationLog};
pub use causes::with_causes;
pub use dns::{DnsLabels, DnsMetrics, DnsProtocol};
pub use exposition::Exposition;
pub use labels::{
    Kept, Label, LabelValue, Labels, Party, Reporter, ResponseFlag, Security, ServiceName,
};
pub use latency::{Latencies, Step};
pub use limits::{Limit, Limits};
pub use names::Names;
pub use on_demand::OnDemandDns;
pub use process::{PodMetrics, open_descriptors, register_process, resident_bytes};
pub use readiness::{Readiness, ReadinessTask};
pub use reason::Reason;
pub use refusals::{Phase, Refusal, Refusals};
pub use route::{HboneTarget, Route};
pub use traces::{ConnectError, Exporter, TcpFacts, Trace, TraceContext, TracePhase, Traces};
pub use traffic::{Meter, Series, SocketGuard, Traffic, Watch};
