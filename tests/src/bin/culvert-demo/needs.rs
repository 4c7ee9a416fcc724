//! What the machine must have: asked before anything is built up, so that all that is missing is told at once.

use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};

/// Command and Debian package.
const COMMANDS: [(&str, &str); 3] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("unshare", "util-linux"),
];

/// Checks for the commands, and for the proxy beside this program.
///
/// # Errors
/// When one is missing; the text says how to get it.
pub(crate) fn check() -> anyhow::Result<()> {
    let path = testkit::sys::tools();
    let missing: Vec<&str> = COMMANDS
        .iter()
        .filter(|(command, _)| !has(&path, command))
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        let missing = missing.join(" ");
        bail!("missing Debian packages; install them with: sudo apt-get install {missing}");
    }
    let proxy = proxy()?;
    ensure!(
        proxy.is_file(),
        "{} does not exist: run `make demo`",
        proxy.display()
    );
    Ok(())
}

/// Where the test kit will look for the proxy. It would build a missing one, for minutes and in silence: better to say so.
#[expect(
    clippy::disallowed_methods,
    reason = "the variable by which the test kit is told of another build"
)]
fn proxy() -> anyhow::Result<PathBuf> {
    match std::env::var_os("CULVERT_BIN") {
        Some(path) => Ok(PathBuf::from(path)),
        None => Ok(std::env::current_exe()?.with_file_name("culvert")),
    }
}

fn has(path: &str, command: &str) -> bool {
    path.split(':')
        .any(|directory| Path::new(directory).join(command).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_commands_on_the_path_only() {
        assert!(has("/nowhere:/bin:/usr/bin", "sh"));
        assert!(!has("/nowhere", "sh"));
    }
}
