//! helm, kubectl and the schemas of Kubernetes, which `.ci/kubetools` sees to, on what `deploy` holds.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, ensure};
use serde::Deserialize as _;
use serde_json::Value;

use crate::program;

/// A path below `deploy`.
#[must_use]
pub fn deployed(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(path)
}

/// What `helm template` makes of the chart, with the name and in the namespace that the documents use.
///
/// # Errors
/// What helm says if it does not like the values.
pub fn helm(arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new(program::fetched("kubetools")?.join("helm"));
    command.args(["template", "culvert"]).arg(deployed("chart"));
    command
        .args(["--namespace", "istio-system"])
        .args(arguments);
    run(&mut command, "")
}

/// What `kubectl kustomize` makes of a directory.
///
/// # Errors
/// What it says if it fails.
pub fn kustomize(directory: &Path) -> anyhow::Result<String> {
    let mut command = Command::new(program::fetched("kubetools")?.join("kubectl"));
    run(command.arg("kustomize").arg(directory), "")
}

/// Holds manifests against the schemas of Kubernetes, or for resources of others those in `tests/schemas`; how many there were.
///
/// # Errors
/// All faults.
pub fn validate(manifests: &str) -> anyhow::Result<usize> {
    let mut command = Command::new("python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/validate.py"));
    command.env("PYTHONPATH", program::fetched("kubetools")?.join("python"));
    let said = run(&mut command, manifests)?;
    let count = said.trim().strip_suffix(" documents").context("no count")?;
    Ok(count.parse()?)
}

/// The documents of a YAML stream, without empty ones.
///
/// # Errors
/// When it is not YAML.
pub fn documents(text: &str) -> anyhow::Result<Vec<Value>> {
    let documents = serde_yaml_ng::Deserializer::from_str(text).map(Value::deserialize);
    let documents = documents.filter(|it| !matches!(it, Ok(Value::Null)));
    Ok(documents.collect::<Result<_, _>>()?)
}

/// The standard output; the other output if it fails.
fn run(command: &mut Command, input: &str) -> anyhow::Result<String> {
    let name = command.get_program().to_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{}", name.display()))?;
    let mut stdin = child.stdin.take().context("no input")?;
    let output = thread::scope(|scope| {
        // It ends early if the program does; what that says is in the output.
        scope.spawn(move || stdin.write_all(input.as_bytes()).is_ok());
        child.wait_with_output()
    })?;
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    ensure!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    Ok(text(&output.stdout))
}
