//! What istiod tells a node proxy, and how it is obtained.
//!
//! The crate owns the protobuf types of istiod's workload, authorization and delta discovery APIs. Resources come
//! from istiod ([`Client`], on a [`Session`] per stream) or from a YAML file ([`local`]). The crate does not judge what
//! a resource means: that is for the [`Sink`] that receives it. It is usable alone and knows no other crate of the workspace:
//!
//! ```
//! use std::sync::Arc;
//! use xds_client::{Batch, Client, Kind, Metrics, NodeFacts, Rejected, Sink, Versions};
//! use xds_client::transport::Target;
//!
//! struct Printer;
//!
//! impl Sink for Printer {
//!     fn held(&self, _: Kind, _: &mut Versions) {}
//!     fn apply(&self, batch: Batch) -> Vec<Rejected> {
//!         for resource in batch.resources().flatten() {
//!             println!("{}", resource.name);
//!         }
//!         Vec::new()
//!     }
//! }
//!
//! async fn follow(istiod: Target) {
//!     let node = NodeFacts::default().to_node();
//!     let metrics = Metrics::register(&mut prometheus_client::registry::Registry::default());
//!     let client = Client::new(node, Arc::new(istiod), Arc::new(Printer), metrics);
//!     client.run(tokio_util::sync::CancellationToken::new()).await;
//! }
//! ```
#![forbid(unsafe_code)]

mod client;
mod demand;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod journal;
pub mod local;
mod node;
pub mod proto;
mod resource;
mod session;
pub mod transport;
mod watch;

pub use client::{Client, Connect, Metrics, OpenError, Responses, Sink};
pub use demand::{Answer, Demand};
pub use node::NodeFacts;
pub use resource::{Batch, Extent, Kind, Rejected, Versions};
pub use session::{Mode, Receipt, Session};
