//! Names for captured pods.
//!
//! The CNI's rules redirect what a pod asks of its resolver to this proxy, inside the pod's namespace. Services of the mesh
//! are answered from the mesh, as the pod's namespace sees them; everything else is relayed to the node's resolvers as it came,
//! and their answer likewise. Names that the proxy does not know, types it has never heard of, and options of either side are
//! none of its business.

#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod local;
mod names;
mod origin;
mod serve;
mod upstream;
mod wire;

pub use serve::{End, Names, Shared};
pub use upstream::Upstreams;
