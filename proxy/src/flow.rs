//! One accepted connection from accept to report.
//!
//! This is the thin shell around the pure rooms: it accepts on a pod's listeners, asks `route`
//! and `policy`, dials, lets `relay` move the bytes, and tells `telemetry` what happened. It is
//! the only room that opens connections to workloads.
//!
//! Every flow is one task, owned by the listener that accepted it and listed in its pod's
//! [`FlowTable`]. Ending a listener's tasks ends its flows; nothing is detached.

mod accept;
mod failure;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod handshakes;
mod inbound;
mod inquiry;
mod judge;
mod neighbours;
mod outbound;
mod parties;
mod plaintext;
mod pod;
mod proxy_header;
mod report;
mod silent;
mod socks5;
mod stop;
mod table;
#[cfg(test)]
mod tests;
mod verdict;

pub use neighbours::Neighbours;
pub use pod::{Pod, Settings, Shared};
pub use socks5::{Names, Resolve};
pub use stop::Stop;
pub use table::{Carried, Direction, Facts, FlowTable};
pub(crate) use verdict::PATIENCE;
