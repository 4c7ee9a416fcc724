#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::tunnel::fuzzing::headers(bytes));
