#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::flow::fuzzing::socks5(bytes));
