//! The proxy under load: started on a node, read from the outside.

use std::{
    fs::{File, OpenOptions, read_to_string, write},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use benches::cpu::Threads;
use testkit::{
    Agent, Metrics, Node, Pod, ProxyOptions, Session, World, http,
    proxy::{READINESS_PORT, STATS_PORT},
    sys::Running,
};
use tokio::time::{Instant, sleep, timeout};

use crate::options::Options;

/// How long a proxy may take to start; large meshes take a while to read.
const START_LIMIT: Duration = Duration::from_secs(180);

/// A running proxy that serves some pods. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Proxy {
    pid: u32,
    log: File,
    log_path: PathBuf,
    _session: Session,
    _agent: Agent,
    running: Running,
}

/// Resident memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Resident {
    /// All of it: `VmRSS`.
    pub(crate) all: u64,
    /// Without the program's own pages: `RssAnon`.
    pub(crate) anonymous: u64,
}

impl Proxy {
    /// Starts the proxy of a node with the world's mesh file, hands it these pods, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not come up; the end of its log is in the text.
    pub(crate) async fn start(
        options: &Options,
        world: &World,
        node: &Node,
        pods: &[&Pod],
    ) -> anyhow::Result<Self> {
        let settings = ProxyOptions::new(world, node);
        Self::start_with(settings, options, world, node, pods).await
    }

    /// As [`Proxy::start`], with other settings: those of the command line go before them.
    ///
    /// # Errors
    /// As [`Proxy::start`].
    pub(crate) async fn start_with(
        settings: ProxyOptions,
        options: &Options,
        world: &World,
        node: &Node,
        pods: &[&Pod],
    ) -> anyhow::Result<Self> {
        // The log level is the product's default: access lines are written, as in production.
        let settings = options
            .env
            .iter()
            .fold(
                settings.env("RUST_LOG", "info"),
                |settings, (key, value)| settings.env(key, value),
            )
            .binary(options.binary()?);
        let log_path = world.file(&format!("{}.log", node.name()));
        let starting = Self::try_start(&settings, world, node, pods);
        starting.await.with_context(|| {
            let log = read_to_string(&log_path).unwrap_or_default();
            let from = log.lines().count().saturating_sub(20);
            let tail: Vec<&str> = log.lines().skip(from).collect();
            format!(
                "the proxy on {} does not start; its log ends:\n{}\n",
                node.name(),
                tail.join("\n")
            )
        })
    }

    async fn try_start(
        settings: &ProxyOptions,
        world: &World,
        node: &Node,
        pods: &[&Pod],
    ) -> anyhow::Result<Self> {
        let mut agent = Agent::bind(&ProxyOptions::agent_socket(world, node))?;
        let log_path = world.file(&format!("{}.log", node.name()));
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)?;
        log.set_len(0)?;
        let mut command = settings.command()?;
        command
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log.try_clone()?));
        let mut running = node.proxy_netns().spawn(command)?;
        let pid = running.child.id().context("it ended at once")?;
        let session = tokio::select! {
            connected = timeout(START_LIMIT, agent.accept()) => connected.context("it does not connect to the agent")??,
            status = running.child.wait() => bail!("it ended: {}", status?),
        };
        session.snapshot(pods).await?;
        let proxy = Self {
            pid,
            log,
            log_path,
            _session: session,
            _agent: agent,
            running,
        };
        proxy.ready(node).await?;
        Ok(proxy)
    }

    async fn ready(&self, node: &Node) -> anyhow::Result<()> {
        let end = Instant::now() + START_LIMIT;
        loop {
            match get(node, READINESS_PORT, "/healthz/ready").await {
                Ok(answer) if answer.status == 200 => return Ok(()),
                Ok(answer) => ensure!(Instant::now() < end, "not ready: {}", answer.body),
                Err(error) => ensure!(Instant::now() < end, "not ready: {error:#}"),
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Connections that it carried or carries over mutual TLS.
    ///
    /// # Errors
    /// When its metrics cannot be read.
    pub(crate) async fn connections(&self, node: &Node) -> anyhow::Result<f64> {
        let answer = get(node, STATS_PORT, "/metrics").await?;
        let mutual = [("connection_security_policy", "mutual_tls")];
        Ok(Metrics::parse(&answer.body)?.sum("istio_tcp_connections_opened_total", &mutual))
    }

    /// Empties its log, which otherwise grows by a line for each connection.
    ///
    /// # Errors
    /// When the file cannot be cut.
    pub(crate) fn empty_log(&self) -> anyhow::Result<()> {
        Ok(self.log.set_len(0)?)
    }

    /// The last lines of its log.
    pub(crate) fn log_tail(&self) -> String {
        let log = read_to_string(&self.log_path).unwrap_or_default();
        let from = log.lines().count().saturating_sub(10);
        log.lines().skip(from).collect::<Vec<_>>().join("\n")
    }

    /// Whether the process is still there.
    ///
    /// # Errors
    /// When it ended; the end of its log is in the text.
    pub(crate) fn check_alive(&mut self) -> anyhow::Result<()> {
        match self.running.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the proxy ended ({status}):\n{}", self.log_tail()),
        }
    }

    /// Processor time used so far, user and system.
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        processor_time(&read_to_string(format!("/proc/{}/stat", self.pid))?)
    }

    /// Processor time that its threads used so far, to the nanosecond.
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) fn threads(&self) -> anyhow::Result<Threads> {
        Ok(Threads::of(self.pid)?)
    }

    /// Forgets how much memory was resident at most.
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) fn forget_peak(&self) -> anyhow::Result<()> {
        Ok(write(format!("/proc/{}/clear_refs", self.pid), "5")?)
    }

    /// The most that was resident since [`Proxy::forget_peak`], in bytes.
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) fn peak(&self) -> anyhow::Result<u64> {
        bytes_of(
            &read_to_string(format!("/proc/{}/status", self.pid))?,
            "VmHWM",
        )
    }

    /// Resident memory.
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) fn resident(&self) -> anyhow::Result<Resident> {
        resident(&read_to_string(format!("/proc/{}/status", self.pid))?)
    }

    /// Resident memory once it changes by less than a hundredth for as long as the options say, at the latest after a minute.
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) async fn settled(&self, options: &Options) -> anyhow::Result<Resident> {
        const STEP: Duration = Duration::from_secs(1);
        let end = Instant::now() + Duration::from_secs(60);
        let (mut before, mut since) = (self.resident()?, Instant::now());
        while since.elapsed() < options.settled_for() && Instant::now() < end {
            sleep(STEP).await;
            let now = self.resident()?;
            if now.all.abs_diff(before.all) * 100 > before.all {
                (before, since) = (now, Instant::now());
            }
        }
        self.resident()
    }
}

async fn get(node: &Node, port: u16, path: &str) -> anyhow::Result<http::Answer> {
    let server = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    http::request(node.proxy_netns(), server, &format!("GET {path}"), &[]).await
}

/// Fields 14 and 15 of `/proc/<pid>/stat`, in ticks of 10 ms. The second field may hold spaces and parentheses.
fn processor_time(stat: &str) -> anyhow::Result<Duration> {
    let (_, rest) = stat.rsplit_once(')').context("no command name")?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks = || -> anyhow::Result<u64> { Ok(fields.next().context("too short")?.parse()?) };
    Ok(Duration::from_millis(10) * u32::try_from(ticks()? + ticks()?)?)
}

fn resident(status: &str) -> anyhow::Result<Resident> {
    Ok(Resident {
        all: bytes_of(status, "VmRSS")?,
        anonymous: bytes_of(status, "RssAnon")?,
    })
}

/// A field of `/proc/<pid>/status` that is a size.
fn bytes_of(status: &str, key: &str) -> anyhow::Result<u64> {
    let field = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| *name == key);
    let (_, value) = field.with_context(|| format!("no {key}"))?;
    Ok(value.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_user_and_system_whatever_the_name() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 8 9 20 0 5";
        assert_eq!(processor_time(stat).unwrap(), Duration::from_secs(2));
        assert!(processor_time("7 (a) S 1").is_err());
    }

    #[test]
    fn resident_memory_is_read_in_bytes() {
        let status = "Name:\tculvert\nVmRSS:\t   10 kB\nRssAnon:\t    4 kB\n";
        let expected = Resident {
            all: 10_240,
            anonymous: 4_096,
        };
        assert_eq!(resident(status).unwrap(), expected);
        assert!(resident("VmRSS: 1 kB").is_err());
    }
}
