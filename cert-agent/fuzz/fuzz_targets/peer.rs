//! A peer's certificate, an identity as text, a file of revocation lists.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cert_agent::fuzzing::peer(bytes));
