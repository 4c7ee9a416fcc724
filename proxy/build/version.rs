//! Facts of the build, handed to the compiler as environment variables.

use std::process::Command;

/// Sets `CULVERT_GIT_REVISION`, `CULVERT_BUILD_STATUS`, `CULVERT_RUST_VERSION` and
/// `CULVERT_BUILD_PROFILE`. A build without the repository (an image, say) may set the first two
/// itself.
pub(crate) fn emit() {
    let revision = given("CULVERT_GIT_REVISION")
        .or_else(|| output("git", &["rev-parse", "HEAD"]))
        .unwrap_or_else(|| "unknown".to_owned());
    let status = given("CULVERT_BUILD_STATUS")
        .or_else(|| {
            output("git", &["status", "--porcelain", "--untracked-files=no"]).map(|it| state(&it))
        })
        .unwrap_or_else(|| "unknown".to_owned());
    let compiler = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let version = output(&compiler, &["--version"]).unwrap_or_else(|| "unknown".to_owned());
    let version = version.trim_start_matches("rustc ").to_owned();
    let profile = std::env::var("PROFILE").unwrap_or_else(|_| "unknown".to_owned());
    println!("cargo::rustc-env=CULVERT_GIT_REVISION={revision}");
    println!("cargo::rustc-env=CULVERT_BUILD_STATUS={status}");
    println!("cargo::rustc-env=CULVERT_RUST_VERSION={version}");
    println!("cargo::rustc-env=CULVERT_BUILD_PROFILE={profile}");
    watch();
}

/// Runs again after a commit and after a change of the proxy; what changes elsewhere in between
/// is noticed at the next of these.
fn watch() {
    println!("cargo::rerun-if-env-changed=CULVERT_GIT_REVISION");
    println!("cargo::rerun-if-env-changed=CULVERT_BUILD_STATUS");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=src");
    if let Some(log) = output("git", &["rev-parse", "--git-path", "logs/HEAD"])
        && std::path::Path::new(&log).exists()
    {
        println!("cargo::rerun-if-changed={log}");
    }
}

fn state(changes: &str) -> String {
    let state = if changes.is_empty() {
        "Clean"
    } else {
        "Modified"
    };
    state.to_owned()
}

fn given(key: &str) -> Option<String> {
    std::env::var(key).ok().filter(|value| !value.is_empty())
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
