//! The demonstration judges what it shows, so running it is a test of everything at once.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a panic is a failed test"
)]

use std::{
    process::{Command, Output},
    time::{Duration, SystemTime},
};

fn demo(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_culvert-demo"));
    command.args(arguments);
    command.env("CULVERT_BIN", testkit::proxy::binary().unwrap());
    command.output().unwrap()
}

#[test]
fn the_demonstration_finds_all_as_it_should_be() {
    let began = SystemTime::now();
    let output = demo(&["--bulk", "4"]);
    let lasted = began.elapsed().unwrap();
    let (text, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(lasted < Duration::from_secs(30), "{lasted:?}");
    for line in text.lines() {
        assert!(line.chars().count() <= 100, "too wide: {line:?}");
    }
    for part in ["payload not readable", "payload READABLE", "denied"] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn the_demonstration_fails_loudly_without_a_working_proxy() {
    let output = Command::new(env!("CARGO_BIN_EXE_culvert-demo"))
        .args(["--bulk", "1"])
        .env("CULVERT_BIN", "/bin/false")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("the proxy does not connect"), "{errors}");
}
