//! Names for captured pods.
//!
//! The CNI's rules redirect what a pod asks of its resolver to this proxy, inside the pod's namespace. Services of the mesh
//! are answered from the mesh, as the pod's namespace sees them; everything else is relayed to the node's resolvers as it came,
//! and their answer likewise. Names that the proxy does not know, types it has never heard of, and options of either side are
//! none of its business.

mod local;
mod names;
mod serve;
mod upstream;
mod wire;

pub use serve::{Names, Shared};
pub use upstream::Upstreams;
