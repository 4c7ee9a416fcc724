//! Generates the protobuf types; no `protoc` is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(
        ["workload.proto", "authorization.proto", "discovery.proto"],
        ["proto"],
    )?;
    tonic_prost_build::configure()
        .build_transport(false)
        // Slices of the message that was received, not copies of it.
        .bytes(".envoy.service.discovery.v3")
        .compile_fds(files)?;
    Ok(())
}
