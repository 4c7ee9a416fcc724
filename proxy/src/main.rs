//! The `culvert` binary. Errors end here: on stderr, with all their causes, and exit code 1.

use std::{
    ffi::OsString,
    io::Write as _,
    os::unix::process::CommandExt as _,
    process::{self, ExitCode},
};

use anyhow::Context as _;
use culvert::{
    cli::{self, Command},
    node,
    telemetry::logging::{self, DOCUMENT_SCOPE, LogGuard},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::{info, warn};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            // Nobody is left to tell if stderr is gone.
            let _ = writeln!(std::io::stderr(), "culvert: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Privileges go first, since the log writer is a thread. Then comes logging, so that a bad `RUST_LOG` fails every command and
/// everything after it can be logged.
fn run() -> anyhow::Result<ExitCode> {
    let environment = cli::Environment::of_process();
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let shown = arguments.join(" ".as_ref());
    let command = cli::command(arguments.iter().cloned());
    if let Ok(Command::Proxy { .. }) = command
        && node::give_up_privileges().context("cannot give up privileges")?
    {
        return Err(start_again(&arguments)).context("cannot start again with fewer privileges");
    }
    // Held to the end: dropping it writes out what is queued.
    let logs = match logging::init(&cli::logging(&environment)) {
        Err(bad) if matches!(command, Ok(Command::Proxy { .. })) => {
            // One of the faults of the settings, if there are others.
            cli::configuration(&environment, &shown.to_string_lossy())?;
            return Err(bad.into());
        }
        logs => logs?,
    };
    match command? {
        Command::Proxy { .. } => proxy(&environment, &shown.to_string_lossy(), &logs),
        Command::Version { .. } => say(&cli::build_info(&environment).to_string()),
        Command::Help { .. } => say(cli::command_list().trim_end()),
        Command::Explain(question) => say(cli::explain(&question)?.trim_end()),
        Command::Doctor(examination) => {
            let report = cli::doctor(&environment, &examination)?;
            say(examination.print(&report).trim_end())?;
            return Ok(ExitCode::from(report.exit_code()));
        }
        Command::Demo { arguments } => Err(cli::demo(arguments).into()),
    }
    .map(|()| ExitCode::SUCCESS)
}

fn proxy(
    environment: &cli::Environment<'_>,
    arguments: &str,
    logs: &LogGuard,
) -> anyhow::Result<()> {
    let config = cli::configuration(environment, arguments)?;
    let build = cli::build_info(environment);
    info!("{build}");
    if let Err(error) = raise_open_files() {
        warn!("the limit of open files stays as it is: {error}");
    }
    if config.runtime.core_dumps {
        warn!("CORE_DUMPS is on: a core dump of this process holds private keys and tokens");
    } else {
        node::hide_memory().context("cannot hide the memory of this process")?;
    }
    let yaml = serde_yaml_ng::to_string(&config).context("cannot print the configuration")?;
    info!(target: DOCUMENT_SCOPE, "running with the configuration:\n{yaml}");
    node::run(&config, build, logs)?;
    Ok(())
}

/// Replaces the program by itself; returns only with the reason why it cannot.
fn start_again(arguments: &[OsString]) -> std::io::Error {
    match std::env::current_exe() {
        Ok(program) => process::Command::new(program).args(arguments).exec(),
        Err(error) => error,
    }
}

/// Each connection takes descriptors, so the process takes all that it may have.
fn raise_open_files() -> nix::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}

fn say(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}").context("cannot write to stdout")
}
