//! The query of a request to the admin server.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::admin::fuzzing::query(bytes));
