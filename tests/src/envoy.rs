//! A real Envoy in a pod, set up in the way in which a mesh sets up its waypoints and east-west gateways.
//!
//! Its program comes from PyPI, once for all working copies: see `.ci/envoy`.

mod gateway;
mod parts;
mod waypoint;

pub use gateway::Gateway;
pub use waypoint::Waypoint;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    process::{Command, Stdio},
};

use anyhow::ensure;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::{
    http,
    logs::{Line, Log},
    program,
    sys::{Netns, Running},
    traffic, wait,
    world::{Pod, World},
};

/// A running Envoy. Dropping it kills it, without a word to its peers.
#[derive(Debug)]
pub struct Envoy {
    netns: Netns,
    address: SocketAddr,
    log: Log,
    running: Running,
    _readers: JoinSet<()>,
}

impl Envoy {
    /// Starts it in a pod that no proxy serves, and waits until it takes connections.
    ///
    /// # Errors
    /// When it cannot be fetched, or does not accept `bootstrap`.
    pub async fn start(world: &World, home: &Pod, bootstrap: &Value) -> anyhow::Result<Self> {
        let file = world.file(&format!("envoy-{}.json", home.name()));
        fs::write(&file, bootstrap.to_string())?;
        let mut command = Command::new(program::fetched("envoy")?);
        command.arg("-c").arg(&file);
        command.args(["--concurrency", "2", "--disable-hot-restart"]);
        command.args(["-l", "warning", "--drain-time-s", "1"]);
        command.current_dir("/");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut running = home.netns().spawn(command)?;
        let (log, readers) = Log::of(&mut running.child)?;
        let mut envoy = Self {
            netns: home.netns().duplicate()?,
            address: home.at(15008),
            log,
            running,
            _readers: readers,
        };
        envoy.listening().await?;
        Ok(envoy)
    }

    async fn listening(&mut self) -> anyhow::Result<()> {
        let live = wait::until(wait::SOON, "Envoy takes connections", async || {
            if let Ok(Some(status)) = self.running.child.try_wait() {
                return Some(Err(status));
            }
            let answer = self.ask("GET /ready").await.ok()?;
            (answer.status == 200).then_some(Ok(()))
        });
        live.await
            .map_err(|status| anyhow::anyhow!("Envoy ended, {status}:\n{}", self.log.tail(20)))
    }

    /// Asks its administration server, `METHOD path`.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn ask(&self, method_and_path: &str) -> anyhow::Result<http::Answer> {
        let server = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), parts::ADMIN_PORT);
        http::request(&self.netns, server, method_and_path, &[]).await
    }

    /// The sum of its counters and gauges whose name matches this regular expression as a whole.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn stat(&self, name: &str) -> anyhow::Result<u64> {
        let answer = self.ask(&format!("GET /stats?filter=^{name}$")).await?;
        ensure!(answer.status == 200, "{answer:?}");
        let value = |line: &str| line.rsplit_once(": ")?.1.parse::<u64>().ok();
        Ok(answer.body.lines().filter_map(value).sum())
    }

    /// Has it tell its peers, one by one, that they shall go elsewhere, and then close its listeners. Waits until it takes no
    /// connections and has none.
    ///
    /// # Errors
    /// When it refuses.
    ///
    /// # Panics
    /// When peers stay.
    pub async fn drain(&self) -> anyhow::Result<()> {
        let answer = self.ask("POST /drain_listeners?graceful").await?;
        ensure!(answer.status == 200, "{answer:?}");
        wait::until(wait::SOON, "Envoy's peers leave", async || {
            let closed = traffic::connect(&self.netns, self.address).await.is_err();
            let peers = self.stat("http.outer.downstream_cx_active").await;
            (closed && peers.is_ok_and(|peers| peers == 0)).then_some(())
        })
        .await;
        Ok(())
    }

    /// The beginnings of all tunnels that it logged so far, at least `count`.
    ///
    /// # Panics
    /// When there are not as many after ten seconds: they are written some time after they began.
    pub async fn tunnels(&self, count: usize) -> Vec<Line> {
        wait::until(wait::SOON, "Envoy logs its tunnels", async || {
            let tunnels = self.log.since(0, |line| line.message == parts::TUNNEL);
            (tunnels.len() >= count).then_some(tunnels)
        })
        .await
    }

    /// Kills it, without a word to its peers.
    ///
    /// # Errors
    /// When it is gone already.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        Ok(self.running.child.kill().await?)
    }

    /// What it wrote: see [`Waypoint`] and [`Gateway`].
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.log
    }
}

impl Drop for Envoy {
    #[expect(
        clippy::print_stderr,
        reason = "what Envoy wrote is what one wants to see of a failed test"
    )]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- Envoy, log\n{}", self.log.tail(40));
        }
    }
}
