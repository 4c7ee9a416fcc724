//! Answers of OpenBao and Kubernetes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cert_agent::fuzzing::openbao(bytes));
