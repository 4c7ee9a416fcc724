//! What the command line says.

use std::{fmt, path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};

/// Load through culvert, compared with direct traffic, in namespaces of its own.
#[derive(Debug, Parser)]
#[command(name = "culvert-bench", version)]
pub(crate) struct Options {
    /// Rounds; each measures direct and culvert in turn, and the table shows medians.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds per measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// One round of one second, a smaller mesh, shorter waits: shows that all works, not how fast.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Only this part; may be repeated.
    #[arg(long = "part", value_enum)]
    parts: Vec<Part>,
    /// Only loads whose name contains this text, for example "new connections" or "iperf3".
    #[arg(long, default_value = "")]
    pub(crate) only: String,
    /// Where the figures of all rounds go.
    #[arg(long, default_value = "target/bench.json")]
    pub(crate) json: PathBuf,
    /// The proxy; without it `CULVERT_BIN`, else the binary beside this one.
    #[arg(long)]
    culvert: Option<PathBuf>,
    /// KEY=VALUE for the environment of the proxy; may be repeated.
    #[arg(long = "env", value_parser = assignment)]
    pub(crate) env: Vec<(String, String)>,
}

/// What can be measured by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Both pods on one node: one proxy is both ends.
    OneNode,
    /// A pod on each of two nodes: two proxies.
    TwoNodes,
    /// Memory with connections held open, and after they closed.
    Held,
    /// What a node full of pods costs that do nothing.
    Pods,
    /// What the mesh costs: memory, processor time, and latency while it changes.
    Mesh,
    /// Names: services of a large mesh, and those of others.
    Dns,
    /// Latency while 50,000 series are scraped.
    Scrapes,
}

impl Options {
    pub(crate) fn rounds(&self) -> u32 {
        if self.quick { 1 } else { self.rounds }
    }

    /// Length of one measurement.
    pub(crate) fn seconds(&self) -> u64 {
        if self.quick { 1 } else { self.seconds }
    }

    pub(crate) fn parts(&self) -> Vec<Part> {
        if self.parts.is_empty() {
            Part::value_variants().to_vec()
        } else {
            self.parts.clone()
        }
    }

    /// How long memory may take to come back after all connections closed.
    pub(crate) fn after_close(&self) -> Duration {
        Duration::from_secs(if self.quick { 5 } else { 30 })
    }

    /// How long memory must stay the same to count as settled: allocators give pages back some ten seconds late.
    pub(crate) fn settled_for(&self) -> Duration {
        Duration::from_secs(if self.quick { 3 } else { 15 })
    }

    /// Numbers of workloads in the mesh.
    pub(crate) fn mesh_sizes(&self) -> &'static [u32] {
        if self.quick {
            &[10_000]
        } else {
            &[10_000, 100_000]
        }
    }

    /// Number of services where names are asked for.
    pub(crate) fn services(&self) -> u32 {
        if self.quick { 10_000 } else { 100_000 }
    }

    /// The proxy binary.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn binary(&self) -> anyhow::Result<PathBuf> {
        match &self.culvert {
            Some(path) => Ok(path.canonicalize()?),
            None => Ok(testkit::proxy::binary()?.canonicalize()?),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OneNode => "one node",
            Self::TwoNodes => "two nodes",
            Self::Held => "held connections",
            Self::Pods => "pods",
            Self::Mesh => "mesh",
            Self::Dns => "names",
            Self::Scrapes => "scrapes",
        })
    }
}

fn assignment(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| "KEY=VALUE expected".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_is_one_short_round_of_all_parts() {
        let options = Options::parse_from(["culvert-bench", "--rounds", "7", "--quick"]);
        assert_eq!((options.rounds(), options.seconds()), (1, 1));
        assert_eq!(options.parts().len(), 7);
    }

    #[test]
    fn parts_and_variables_accumulate() {
        let line = "culvert-bench --part held --part mesh --env A=b=c --rounds 2";
        let options = Options::parse_from(line.split(' '));
        assert_eq!(options.parts(), [Part::Held, Part::Mesh]);
        assert_eq!(options.env, [("A".to_owned(), "b=c".to_owned())]);
        assert!(Options::try_parse_from(["culvert-bench", "--env", "A"]).is_err());
        assert!(Options::try_parse_from(["culvert-bench", "--rounds", "0"]).is_err());
    }
}
