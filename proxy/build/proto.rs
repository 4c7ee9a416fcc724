//! Generates the protobuf types of the CNI agent's protocol; no `protoc` is needed.

use std::error::Error;

/// Compiles `proto/zds.proto` into `OUT_DIR`.
pub(crate) fn generate() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["zds.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(files)?;
    Ok(())
}
