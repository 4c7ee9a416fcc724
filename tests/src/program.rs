//! Programs of others that tests run.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};

/// The program that `.ci/<name>` sees to, fetched first if this machine does not have it.
///
/// # Errors
/// When it cannot be fetched.
pub fn fetched(name: &str) -> anyhow::Result<PathBuf> {
    let script = format!("{}/../.ci/{name}", env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(&script).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| script.clone())?;
    ensure!(
        output.status.success(),
        "{script} failed; it needs PyPI once"
    );
    let path = String::from_utf8(output.stdout)?;
    Ok(PathBuf::from(path.trim()))
}
