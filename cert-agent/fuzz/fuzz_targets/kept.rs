//! A file of a kept certificate.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cert_agent::fuzzing::kept(bytes));
