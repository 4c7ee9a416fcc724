//! The body of a stream of responses.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| xds_client::fuzzing::stream(bytes));
