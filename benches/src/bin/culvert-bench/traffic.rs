//! Loads on both ways in turn, round by round: rates, and what they cost the proxy in processor time.

use std::{fmt, time::Duration};

use anyhow::Context as _;
use tokio::time::sleep;

use crate::{
    lab::{Lab, Path},
    options::{Options, Part},
    report::{Report, Row, Unit},
    tool::{self, Carried, Connections, Direction},
};

/// One kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Load {
    Bulk { streams: u32, direction: Direction },
    Http { connections: u32, kind: Connections },
}

/// A load, and what we want of it on one node.
#[derive(Debug)]
struct Target {
    load: Load,
    ratio: &'static str,
    cpu: &'static str,
}

/// Figures of one load, one value per round.
#[derive(Debug, Default)]
struct Rounds {
    direct: Vec<f64>,
    culvert: Vec<f64>,
    cpu: Vec<f64>,
}

const TARGETS: [Target; 7] = [
    bulk(1, Direction::Upload, "≥ 0.35"),
    bulk(8, Direction::Upload, "≥ 0.33"),
    bulk(1, Direction::Download, "≥ 0.40"),
    http(1, Connections::Kept, "≥ 0.60", ""),
    http(64, Connections::Kept, "≥ 0.25", "≤ 20 µs"),
    http(1, Connections::New, "≥ 0.25", "≤ 220 µs"),
    http(32, Connections::New, "≥ 0.30", "≤ 120 µs"),
];

const fn bulk(streams: u32, direction: Direction, ratio: &'static str) -> Target {
    Target {
        load: Load::Bulk { streams, direction },
        ratio,
        cpu: "≤ 1.40 s/GB",
    }
}

const fn http(
    connections: u32,
    kind: Connections,
    ratio: &'static str,
    cpu: &'static str,
) -> Target {
    Target {
        load: Load::Http { connections, kind },
        ratio,
        cpu,
    }
}

/// Measures all loads of one part into the report.
///
/// # Errors
/// When the lab cannot be built. A load that fails is named in the report, and the next one goes on.
pub(crate) async fn measure(
    options: &Options,
    part: Part,
    report: &mut Report,
) -> anyhow::Result<()> {
    let chosen: Vec<&Target> = TARGETS
        .iter()
        .filter(|target| target.load.to_string().contains(&options.only))
        .collect();
    if chosen.is_empty() {
        return Ok(());
    }
    let mut lab = Lab::new(options, part).await?;
    let mut figures: Vec<Rounds> = chosen.iter().map(|_| Rounds::default()).collect();
    for round in 1..=options.rounds() {
        for (target, figures) in chosen.iter().zip(&mut figures) {
            let what = format!("{part}, round {round}: {}", target.load);
            if let Err(error) = figures
                .round(&mut lab, target.load, options.seconds())
                .await
            {
                report.failed(format!("{what}: {error:#}"));
            } else {
                eprintln!("{what}: {}", figures.last(target.load));
            }
        }
    }
    for (target, figures) in chosen.into_iter().zip(figures) {
        // The targets are about one node.
        let (ratio, cpu) = match part {
            Part::OneNode => (target.ratio, target.cpu),
            Part::TwoNodes | Part::Held | Part::Pods | Part::Mesh | Part::Dns | Part::Scrapes => {
                ("", "")
            }
        };
        let load = target.load;
        let name = format!("{part}: {load}");
        report.push(
            Row::compared(&name, load.rate_unit(), figures.direct, figures.culvert).target(ratio),
        );
        let name = format!("{name}: proxy CPU per {}", load.noun());
        report.push(Row::of(&name, load.cpu_unit(), figures.cpu).target(cpu));
    }
    Ok(())
}

impl Rounds {
    async fn round(&mut self, lab: &mut Lab, load: Load, seconds: u64) -> anyhow::Result<()> {
        let direct = load.run(lab, Path::Direct, seconds).await;
        let direct = direct.context("direct")?;
        let before = cpu(lab)?;
        let culvert = load.run(lab, Path::Culvert, seconds).await;
        let used = cpu(lab)?.saturating_sub(before);
        // The process must still be the one that was measured, also when the load itself says nothing.
        for proxy in lab.proxies() {
            proxy.check_alive()?;
        }
        let culvert = culvert.context("culvert")?;
        for proxy in lab.proxies() {
            proxy.empty_log()?;
        }
        self.direct.push(direct.rate);
        self.culvert.push(culvert.rate);
        self.cpu.push(used.as_secs_f64() / culvert.amount);
        Ok(())
    }

    fn last(&self, load: Load) -> String {
        let of = |unit: Unit, values: &[f64]| {
            values
                .last()
                .map_or_else(String::new, |value| unit.show(*value))
        };
        format!(
            "direct {}, culvert {}, CPU {}",
            of(load.rate_unit(), &self.direct),
            of(load.rate_unit(), &self.culvert),
            of(load.cpu_unit(), &self.cpu)
        )
    }
}

/// Processor time of all proxies.
fn cpu(lab: &mut Lab) -> anyhow::Result<Duration> {
    lab.proxies().iter().map(|proxy| proxy.cpu()).sum()
}

impl Load {
    async fn run(self, lab: &Lab, path: Path, seconds: u64) -> anyhow::Result<Carried> {
        // What the load before has left behind shall not be counted here.
        sleep(Duration::from_millis(300)).await;
        let (client, server) = (lab.client(path).netns(), lab.server(path).ip4());
        match self {
            Self::Bulk { streams, direction } => {
                tool::iperf3(client, server, streams, direction, seconds).await
            }
            Self::Http { connections, kind } => {
                tool::wrk(client, server, connections, kind, seconds).await
            }
        }
    }

    fn rate_unit(self) -> Unit {
        match self {
            Self::Bulk { .. } => Unit::BytesPerSecond,
            Self::Http { .. } => Unit::PerSecond,
        }
    }

    fn cpu_unit(self) -> Unit {
        match self {
            Self::Bulk { .. } => Unit::SecondsPerByte,
            Self::Http { .. } => Unit::Seconds,
        }
    }

    /// What is counted.
    fn noun(self) -> &'static str {
        match self {
            Self::Bulk { .. } => "GB",
            Self::Http {
                kind: Connections::Kept,
                ..
            } => "request",
            Self::Http {
                kind: Connections::New,
                ..
            } => "connection",
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bulk { streams, direction } => {
                let reverse = match direction {
                    Direction::Upload => "",
                    Direction::Download => ", reverse",
                };
                let plural = if *streams == 1 { "" } else { "s" };
                write!(f, "iperf3, {streams} stream{plural}{reverse}")
            }
            Self::Http {
                connections,
                kind: Connections::Kept,
            } => write!(f, "keep-alive requests at {connections}"),
            Self::Http {
                connections,
                kind: Connections::New,
            } => write!(f, "new connections at {connections}"),
        }
    }
}
