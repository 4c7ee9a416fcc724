//! Facts of the build for `culvert version`, and the types of the CNI agent's protocol.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a build script is configured by variables and talks to cargo on stdout"
)]

#[path = "build/proto.rs"]
mod proto;
#[path = "build/version.rs"]
mod version;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    version::emit();
    proto::generate()
}
