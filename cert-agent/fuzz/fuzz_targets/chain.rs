//! The certificates of an authority or of a peer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cert_agent::fuzzing::chain(bytes));
