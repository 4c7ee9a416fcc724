//! A file of kept state.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| xds_client::journal::fuzz(bytes));
