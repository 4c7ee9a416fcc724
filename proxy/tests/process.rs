//! The binary by its outside: arguments and variables in, output and exit code out.

#![expect(clippy::unwrap_used, reason = "test code: a failure must be loud")]

use std::process::{Command, Stdio};

/// Exit code, stdout and stderr of one run with only these variables.
fn run(arguments: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let output = command(arguments, variables).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn command(arguments: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_culvert"));
    command
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::null());
    command
}

#[test]
fn version_is_one_line() {
    let (code, out, err) = run(&["version"], &[("ISTIO_META_ISTIO_VERSION", "1.29")]);
    assert_eq!((code, err.as_str(), out.lines().count()), (Some(0), "", 1));
    assert!(out.starts_with("version.BuildInfo{Version:\""), "{out}");
    assert!(out.contains("IstioVersion:\"1.29\""), "{out}");
}

#[test]
fn help_lists_the_commands() {
    let (code, out, err) = run(&["help"], &[]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    for command in ["proxy", "version", "help", "demo"] {
        assert!(out.contains(command), "{out}");
    }
}

#[test]
fn an_unknown_command_fails_with_the_list() {
    for word in ["bogus", "--version", "-h", "--"] {
        let (code, out, err) = run(&[word], &[]);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{word}");
        assert!(err.contains("version") && err.contains("demo"), "{err}");
    }
}

#[test]
fn a_bad_log_filter_fails_every_command() {
    let (code, out, err) = run(&["version"], &[("RUST_LOG", "a=b=c")]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.contains("a=b=c"), "{err}");
}

#[test]
fn faults_are_told_together_and_nothing_starts() {
    let bad = [("KEEPALIVE_ENABLED", "1"), ("SECRET_TTL", "")];
    let (code, out, err) = run(&["proxy", "ztunnel", "extra"], &bad);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    for part in [
        "2 faults",
        "KEEPALIVE_ENABLED=\"1\": not a boolean",
        "SECRET_TTL=\"\"",
    ] {
        assert!(err.contains(part), "{err}");
    }
}

#[test]
fn the_configuration_is_logged_without_secrets() {
    let variables = [
        ("AUTH_TOKEN", "s3cret"),
        ("XDS_HEADER_KEY", "s3cret"),
        ("CA_HEADER_KEY", "s3cret"),
        ("LOG_FORMAT", "json"),
        // It ends once it has told its configuration.
        ("FAKE_CA", "true"),
        ("LOCAL_XDS", "nobody knows this key: 1"),
    ];
    let (code, out, err) = run(&["proxy", "ztunnel", "extra"], &variables);
    assert_eq!(code, Some(1));
    assert!(out.contains("arguments: proxy ztunnel extra"), "{out}");
    assert!(out.contains("key: <redacted>") && !(out + &err).contains("s3cret"));
}

#[test]
fn the_demonstration_says_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let alone = dir.path().join("culvert");
    std::fs::copy(env!("CARGO_BIN_EXE_culvert"), &alone).unwrap();
    let output = Command::new(&alone)
        .args(["demo", "--keep"])
        .output()
        .unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        err.contains("make demo") && err.contains("culvert-demo"),
        "{err}"
    );
}
