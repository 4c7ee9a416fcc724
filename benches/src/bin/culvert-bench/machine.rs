//! What the figures depend on: processor, kernel, and the proxy itself.

use std::{collections::BTreeMap, fmt, fs::read_to_string, process::Command};

use anyhow::Context as _;
use serde::Serialize;

use crate::options::Options;

/// Where and what was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    processor: String,
    cores: usize,
    memory_bytes: u64,
    kernel: String,
    proxy: String,
    binary: String,
    /// Load average of the last minute before the bench: others at work spoil the figures.
    load: String,
}

/// Looks around.
///
/// # Errors
/// When the proxy cannot be run.
pub(crate) fn describe(options: &Options) -> anyhow::Result<Machine> {
    let binary = options.binary().context("no culvert binary")?;
    let version = Command::new(&binary).arg("version").output();
    let version = version.with_context(|| binary.display().to_string())?;
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    let (cpuinfo, meminfo) = (fields("/proc/cpuinfo"), fields("/proc/meminfo"));
    let memory_kb = meminfo
        .get("MemTotal")
        .and_then(|size| size.trim_end_matches(" kB").parse::<u64>().ok());
    Ok(Machine {
        processor: cpuinfo
            .get("model name")
            .cloned()
            .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        cores: std::thread::available_parallelism()?.get(),
        memory_bytes: memory_kb.unwrap_or_default() * 1024,
        kernel: read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        proxy: version,
        binary: binary.display().to_string(),
        load: read_to_string("/proc/loadavg")?
            .split(' ')
            .next()
            .unwrap_or_default()
            .to_owned(),
    })
}

fn fields(path: &str) -> BTreeMap<String, String> {
    let text = read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
        .collect()
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {} cores, {} MB, Linux {}, load before {}; {}",
            self.processor,
            self.cores,
            self.memory_bytes / 1_000_000,
            self.kernel,
            self.load,
            self.proxy.lines().next().unwrap_or_default()
        )
    }
}
