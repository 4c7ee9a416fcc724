//! Benchmarks of culvert: `benches/` times single steps, the program `culvert-bench` loads the real proxy.
//! The library holds what they share: worlds to measure, and the measuring of threads.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "a bench may stop at the first fault"
)]

pub mod cpu;
pub mod relays;
