//! The messages of the certificate service, generated from `proto/ca.proto`.
#![allow(
    clippy::all,
    clippy::restriction,
    clippy::pedantic,
    missing_docs,
    unused_qualifications,
    reason = "generated code"
)]

include!(concat!(env!("OUT_DIR"), "/istio.v1.auth.rs"));
