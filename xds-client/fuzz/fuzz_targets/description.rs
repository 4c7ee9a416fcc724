//! A description of a mesh as a file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| xds_client::fuzzing::description(bytes));
