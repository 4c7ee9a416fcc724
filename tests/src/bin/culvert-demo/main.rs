//! `culvert-demo`: two nodes and four pods on this machine, real traffic through real proxies, and what was seen of it.
//!
//! It is also a smoke test: whatever is not as it should be is told, and makes the exit code 1.

mod bank;
mod keep;
mod needs;
mod report;
mod rows;
mod run;
mod stage;
mod wire;

use std::{
    fmt::Display,
    io::Write as _,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use tokio::signal::unix::{SignalKind, signal};

const USAGE: &str = "\
usage: culvert demo [--keep] [--bulk MIB]

Two nodes and four pods as network namespaces, real traffic between them through the proxy, and a
report of what was seen. Runs as root, or without root where user namespaces are allowed.

  --keep      leave everything up afterwards, until Ctrl-C, and show how to enter the pods
  --bulk MIB  size of the bulk transfer in MiB (default 256)
  --help      show this text
";

/// What the command line asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Options {
    keep: bool,
    bulk_bytes: u64,
}

fn main() -> ExitCode {
    let options = match options(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            say(USAGE.trim_end());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            complain(format_args!("{error:#}\n\n{}", USAGE.trim_end()));
            return ExitCode::from(2);
        }
    };
    std::panic::set_hook(Box::new(|panic| {
        complain(panic.payload_as_str().unwrap_or("internal error"));
    }));
    match catch_unwind(AssertUnwindSafe(|| perform(options))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            complain(format_args!("{error:#}"));
            ExitCode::FAILURE
        }
        Err(_told_by_the_hook) => ExitCode::FAILURE,
    }
}

fn perform(options: Options) -> anyhow::Result<()> {
    needs::check()?;
    testkit::sys::ensure_privileges();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("runtime")?;
    runtime.block_on(async {
        let mut interrupted = signal(SignalKind::interrupt())?;
        let mut terminated = signal(SignalKind::terminate())?;
        let stopped = async {
            tokio::select! {
                _ = interrupted.recv() => {}
                _ = terminated.recv() => {}
            }
        };
        run::run(options, stopped).await
    })
}

fn options(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Option<Options>> {
    let mut options = Options {
        keep: false,
        bulk_bytes: 256 << 20,
    };
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--keep" => options.keep = true,
            "--bulk" => {
                let mebibytes = arguments
                    .next()
                    .and_then(|value| value.parse::<u32>().ok())
                    .filter(|mebibytes| (1..=65_536).contains(mebibytes))
                    .context("--bulk takes a number of MiB, 1 to 65536")?;
                options.bulk_bytes = u64::from(mebibytes) << 20;
            }
            "--help" | "-h" => return Ok(None),
            other => bail!("unknown argument {other:?}"),
        }
    }
    Ok(Some(options))
}

/// Prints a line. A reader who has gone does not stop the clean-up.
fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn complain(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "culvert-demo: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Option<Options>> {
        options(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn reads_its_arguments() {
        let options = parse("--bulk 1 --keep").unwrap().unwrap();
        assert!(options.keep);
        assert_eq!(options.bulk_bytes, 1 << 20);
        assert_eq!(parse("").unwrap().unwrap().bulk_bytes, 256 << 20);
        assert_eq!(parse("--keep --help").unwrap(), None);
        for line in ["--bulk", "--bulk 0", "--bulk x", "--quick"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
