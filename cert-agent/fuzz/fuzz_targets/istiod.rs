//! An answer of istiod.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cert_agent::fuzzing::istiod(bytes));
