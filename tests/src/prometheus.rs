//! A real Prometheus server in a pod, from the Debian package.

use std::{
    fs,
    net::SocketAddr,
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::{
    http,
    logs::Log,
    sys::{self, Netns, Running},
    wait,
    world::{Pod, World},
};

/// A running server. Dropping it kills it.
#[derive(Debug)]
pub struct Prometheus {
    from: Netns,
    at: SocketAddr,
    log: Log,
    _running: Running,
    _readers: JoinSet<()>,
}

/// What is scraped: an address and the labels of the target.
#[derive(Debug, Clone)]
pub struct Target {
    /// Where its metrics are.
    pub address: SocketAddr,
    /// Labels by name.
    pub labels: Vec<(String, String)>,
}

impl Prometheus {
    /// Scrapes these targets every second, with the rules of `rule_file`.
    ///
    /// # Errors
    /// When it is not installed or does not start.
    pub async fn start(
        world: &World,
        home: &Pod,
        targets: &[Target],
        rule_file: &str,
    ) -> anyhow::Result<Self> {
        let at = home.at(PORT);
        let configs: Vec<_> = targets.iter().map(Target::config).collect();
        let config = serde_json::json!({
            "global": { "scrape_interval": "1s", "evaluation_interval": "1s" },
            "rule_files": [rule_file],
            "scrape_configs": [{
                "job_name": "ztunnel",
                "honor_labels": true,
                "metrics_path": "/stats/prometheus",
                "static_configs": configs,
            }],
        });
        // JSON is YAML.
        let file = world.file("prometheus.yaml");
        fs::write(&file, config.to_string())?;
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                world.file("prometheus").display()
            ))
            .arg(format!("--web.listen-address={at}"))
            .env("PATH", sys::tools())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut running = home.netns().spawn(command).context("prometheus")?;
        let (log, readers) = Log::of(&mut running.child)?;
        let server = Self {
            from: home.netns().duplicate()?,
            at,
            log,
            _running: running,
            _readers: readers,
        };
        let ready = async || {
            let answer = http::request(&server.from, at, "GET /-/ready", &[]).await;
            answer.ok().filter(|answer| answer.status == 200)
        };
        wait::until(wait::SOON, "Prometheus is ready", ready).await;
        Ok(server)
    }

    /// The result of an expression, now: series with labels and values.
    ///
    /// # Errors
    /// When the expression is not understood.
    pub async fn query(&self, expression: &str) -> anyhow::Result<Vec<Value>> {
        let path = format!("GET /api/v1/query?query={}", percent_encoded(expression));
        let answer = http::request(&self.from, self.at, &path, &[]).await?;
        ensure!(answer.status == 200, "{expression}: {}", answer.body);
        let answer: Value = serde_json::from_str(&answer.body)?;
        let result = answer["data"]["result"].as_array();
        Ok(result.context("no result")?.clone())
    }

    /// The end of its log.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.tail(20)
    }
}

impl Target {
    fn config(&self) -> Value {
        let labels = self.labels.iter().cloned();
        let labels: serde_json::Map<_, _> = labels
            .map(|(name, value)| (name, Value::String(value)))
            .collect();
        serde_json::json!({ "targets": [self.address.to_string()], "labels": labels })
    }
}

fn percent_encoded(text: &str) -> String {
    let byte = |byte: u8| {
        if byte.is_ascii_alphanumeric() {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
    };
    text.bytes().map(byte).collect()
}

const PORT: u16 = 9090;
