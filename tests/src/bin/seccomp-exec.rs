//! `seccomp-exec PROFILE PROGRAM ARGUMENT…` runs a program under a seccomp profile in the format of container runtimes, as such a
//! runtime would, but for one thing: a system call that the profile does not list kills the process, so that none goes unnoticed.

use std::{collections::BTreeMap, fs, os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, bail, ensure};
use seccompiler::{TargetArch, apply_filter, compile_from_json};
use serde::Deserialize;
use serde_json::json;

/// The part of a profile that says what is allowed.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: String,
    syscalls: Vec<Rule>,
}

#[derive(Deserialize)]
struct Rule {
    names: Vec<String>,
    action: String,
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let profile = arguments.next().context("which profile?")?;
    let program = arguments.next().context("which program?")?;
    let profile: Profile = serde_json::from_str(&fs::read_to_string(&profile)?)?;
    ensure!(profile.default_action == "SCMP_ACT_ERRNO");
    let mut allowed = Vec::new();
    for rule in profile.syscalls {
        if rule.action != "SCMP_ACT_ALLOW" {
            bail!("action {}", rule.action);
        }
        // Names of other architectures are passed over, as runtimes do.
        let known = rule.names.into_iter().filter(|name| is_known(name));
        allowed.extend(known.map(|name| json!({ "syscall": name })));
    }
    let filters = filters(&allowed)?;
    let filter = filters.get("main").context("no filter")?;
    apply_filter(filter)?;
    Err(Command::new(program).args(arguments).exec().into())
}

fn filters(
    allowed: &[serde_json::Value],
) -> anyhow::Result<BTreeMap<String, Vec<seccompiler::sock_filter>>> {
    let text = json!({"main": {
        "mismatch_action": "kill_process",
        "match_action": "allow",
        "filter": allowed,
    }});
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let compiled = compile_from_json(text.to_string().as_bytes(), arch)?;
    Ok(compiled.into_iter().collect())
}

fn is_known(name: &str) -> bool {
    filters(&[json!({ "syscall": name })]).is_ok()
}
