//! `culvert-bench`: load through the proxy, compared with direct traffic in the same run.
//!
//! Everything happens inside namespaces that the bench makes: pods on one node and on two, direct pods beside captured ones, the real
//! `culvert` binary, and iperf3, nginx and wrk as the applications. It prints a Markdown table and writes JSON; no figure decides
//! whether it succeeds. On success, on failure and on Ctrl-C all that it made is gone when it ends.
#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people: the table goes to standard output, progress to standard error"
)]

mod control_plane;
mod dns;
mod lab;
mod latency;
mod machine;
mod memory;
mod mesh;
mod options;
mod pair;
mod pods;
mod proxy;
mod report;
mod scrapes;
mod tool;
mod traffic;

use std::{future::Future, process::ExitCode};

use anyhow::{Context as _, bail};
use clap::Parser as _;
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

use crate::{
    options::{Options, Part},
    report::Report,
};

fn main() -> ExitCode {
    let options = Options::parse();
    testkit::sys::ensure_privileges();
    let run = || Runtime::new()?.block_on(until_signal(bench(&options)));
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("culvert-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs `work` until it ends or a signal comes. Dropping it ends its processes and removes its namespaces and files.
async fn until_signal<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        done = work => done,
        _ = interrupt.recv() => bail!("interrupted"),
        _ = terminate.recv() => bail!("terminated"),
    }
}

/// Whether all parts could be measured; what could not is named in the report.
async fn bench(options: &Options) -> anyhow::Result<bool> {
    let mut report = Report::new(machine::describe(options)?, options);
    for part in options.parts() {
        eprintln!("== {part}");
        let measured = match part {
            Part::OneNode | Part::TwoNodes => traffic::measure(options, part, &mut report).await,
            Part::Held => memory::held(options, &mut report).await,
            Part::Pods => pods::measure(options, &mut report).await,
            Part::Mesh => mesh::measure(options, &mut report).await,
            Part::Dns => dns::measure(options, &mut report).await,
            Part::Scrapes => scrapes::measure(options, &mut report).await,
        };
        if let Err(error) = measured {
            report.failed(format!("{part}: {error:#}"));
        }
    }
    println!("{report}");
    report
        .write_json(&options.json)
        .with_context(|| format!("write {}", options.json.display()))?;
    eprintln!("written: {}", options.json.display());
    Ok(report.is_complete())
}
