//! What istiod tells a node proxy, and how it is obtained.
//!
//! The crate owns the protobuf types of istiod's workload, authorization and delta discovery APIs and a source
//! that reads the same resources from a YAML file. It does not judge what a resource means: that is for the proxy
//! that receives it. It is usable alone and knows no other crate of the workspace.
#![forbid(unsafe_code)]

pub mod local;
pub mod proto;
