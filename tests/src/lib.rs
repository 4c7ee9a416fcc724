//! `testkit`: a mesh in a box.
//!
//! Pods are network namespaces, joined by veth pairs to a bridge per node; nodes are joined by a link that can be captured. A stand-in
//! CNI agent hands pods to the real `culvert` binary, a local file describes the mesh, and a raw HBONE peer plays the foreign and the
//! hostile client and server. The end-to-end tests, the demonstration and the load bench are built on it.
//!
//! Everything is held by descriptors of this process: dropping a [`World`] (also by a panic) removes its namespaces, processes and
//! files, and a killed test leaves at most a directory below the system's temporary one.
//!
//! Works as root, and without root where user namespaces are allowed: [`World::new`] then starts the program again inside one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::todo,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "test code: a panic is a failed test, with its place and its cause"
)]

pub mod agent;
pub mod ca;
pub mod capture;
pub mod cluster;
pub mod collector;
pub mod consumers;
pub mod dns;
pub mod envoy;
pub mod http;
pub mod istiod;
pub mod kubetools;
pub mod logs;
pub mod mesh;
pub mod metrics;
pub mod openbao;
pub mod population;
pub mod program;
pub mod prometheus;
pub mod proxy;
pub mod raw;
pub mod redirect;
pub mod seeds;
pub mod stage;
pub mod sys;
pub mod traffic;
pub mod wait;
pub mod web;
pub mod world;
pub mod zds;

pub use agent::{Agent, Session};
pub use ca::{Authority, Identity};
pub use capture::Capture;
pub use cluster::{Cluster, NodeRun};
pub use collector::Collector;
pub use envoy::Envoy;
pub use istiod::{Istiod, IstiodOptions};
pub use logs::{Line, Log};
pub use mesh::Mesh;
pub use metrics::Metrics;
pub use openbao::OpenBao;
pub use population::Population;
pub use prometheus::Prometheus;
pub use proxy::{Proxy, ProxyOptions};
pub use redirect::Redirect;
pub use sys::Netns;
pub use world::{Node, Pod, PodSpec, World};
