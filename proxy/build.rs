//! Facts of the build for `culvert version`.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a build script is configured by variables and talks to cargo on stdout"
)]

#[path = "build/version.rs"]
mod version;

fn main() {
    version::emit();
}
