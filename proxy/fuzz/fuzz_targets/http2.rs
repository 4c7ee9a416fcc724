//! HTTP/2 of a peer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::tunnel::fuzzing::http2(bytes));
