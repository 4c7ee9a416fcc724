//! Generates the protobuf types of the CNI agent's protocol and of exported spans; no `protoc` is needed.

use std::error::Error;

/// Compiles the files of `proto` into `OUT_DIR`.
pub(crate) fn generate() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["zds.proto", "otlp.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .build_server(false)
        .compile_fds(files)?;
    Ok(())
}
