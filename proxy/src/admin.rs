//! HTTP for people and scrapers: readiness and stats.
//!
//! Plaintext HTTP/1.1 only. Every connection has a slot, a short time to send each request head and
//! a longer one to take the answer, so that neither silence nor a flood holds more than a slot.

mod http1;
mod readiness;
mod stats;

pub use http1::bind;
pub use readiness::serve_readiness;
pub use stats::serve_stats;
