//! A pod's query and a server's answer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::dns::fuzzing::both_directions(bytes));
