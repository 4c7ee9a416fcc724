//! HTTP for people, scrapers and tools: readiness, stats, and the admin server.
//!
//! Plaintext HTTP/1.1 only. Every connection has a slot, a short time to send each request head and
//! a longer one to take the answer, so that neither silence nor a flood holds more than a slot.

mod console;
mod control_plane;
mod dump;
mod explain;
mod flows;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod http1;
mod logging;
mod page;
mod paths;
mod profile;
mod query;
mod readiness;
mod stats;
mod stream;
mod view;
mod when;

pub use console::Console;
pub use control_plane::{ControlPlane, RejectedResource, Rejections};
pub use dump::Settings;
pub use http1::{bind, bind_loopback};
pub use paths::serve_admin;
pub use readiness::serve_readiness;
pub use stats::serve_stats;
pub use view::{PodPhase, Pods, ShownPod};
