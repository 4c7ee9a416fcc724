//! Anything in place of a TLS handshake.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::tunnel::fuzzing::handshake(bytes));
