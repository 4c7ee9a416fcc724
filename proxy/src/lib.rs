//! Culvert: the data plane of an Istio ambient mesh, one process per node.
//!
//! The rooms stand on floors; a room imports rooms of lower floors only. `ARCHITECTURE.md` in
//! the repository draws the house, and a test holds every `crate::` import against it.

pub mod admin;
pub mod budget;
pub mod cli;
pub mod config;
pub mod dns;
pub mod flow;
pub mod listen;
pub mod mesh;
pub mod node;
pub mod pods;
pub mod policy;
pub mod relay;
pub mod resolve;
pub mod route;
pub mod telemetry;
pub mod tunnel;
