//! The real `culvert` binary, as a process in a node's proxy namespace.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::OnceLock,
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::Pid,
};
use tokio::task::JoinSet;

use crate::{
    ca::Authority,
    dns, http,
    istiod::Istiod,
    logs::Log,
    metrics::Metrics,
    sys::{Netns, Running},
    wait,
    world::{Node, World},
};

/// Port of `/healthz/ready`.
pub const READINESS_PORT: u16 = 15021;
/// Port of `/metrics`.
pub const STATS_PORT: u16 = 15020;
/// Port of the administration server, on loopback.
pub const ADMIN_PORT: u16 = 15000;

/// How to start one proxy: environment and descriptor limit.
#[derive(Debug, Clone)]
pub struct ProxyOptions {
    env: BTreeMap<String, String>,
    wrapper: Vec<String>,
    resolv_conf: Option<PathBuf>,
    arguments: Vec<String>,
    binary: Option<PathBuf>,
}

impl ProxyOptions {
    /// What a proxy of this node needs: mesh file, shared root, agent socket, and no control plane.
    #[must_use]
    pub fn new(world: &World, node: &Node) -> Self {
        let (root_cert, root_key) = Authority::files(world.directory());
        let path = |path: &Path| path.display().to_string();
        let env = [
            ("FAKE_CA", "true".to_owned()),
            ("FAKE_CA_ROOT_CERT", path(&root_cert)),
            ("FAKE_CA_ROOT_KEY", path(&root_key)),
            ("INPOD_UDS", path(&Self::agent_socket(world, node))),
            ("ISTIO_META_DNS_CAPTURE", "false".to_owned()),
            ("LOCAL_XDS_PATH", path(&Self::mesh_file(world))),
            ("NODE_NAME", node.name().to_owned()),
            ("RUST_BACKTRACE", "1".to_owned()),
            ("RUST_LOG", "info,access=debug".to_owned()),
            ("XDS_ADDRESS", String::new()),
            ("ZTUNNEL_WORKER_THREADS", "2".to_owned()),
        ];
        Self {
            env: env
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
            wrapper: Vec::new(),
            resolv_conf: None,
            arguments: vec!["proxy".to_owned(), "ztunnel".to_owned()],
            binary: None,
        }
    }

    /// Where the node's agent is to listen.
    #[must_use]
    pub fn agent_socket(world: &World, node: &Node) -> PathBuf {
        world.file(&format!("{}.sock", node.name()))
    }

    /// Where the mesh is to be written.
    #[must_use]
    pub fn mesh_file(world: &World) -> PathBuf {
        world.file("mesh.yaml")
    }

    /// Follows a control plane instead of a file, as a pod of the system namespace.
    #[must_use]
    pub fn follow(self, istiod: &Istiod) -> Self {
        let token = istiod.token().map(str::to_owned);
        let options = self
            .without("LOCAL_XDS_PATH")
            .env("XDS_ADDRESS", &format!("https://{}", istiod.address()))
            .env("XDS_ROOT_CA", &istiod.root_file().display().to_string())
            .env("POD_NAME", "culvert-test")
            .env("POD_NAMESPACE", "istio-system");
        match token {
            Some(token) => options.env("AUTH_TOKEN", &token),
            None => options,
        }
    }

    /// Gets certificates from this stand-in, which may be another one than that of the mesh.
    #[must_use]
    pub fn certified_by(self, istiod: &Istiod) -> Self {
        let token = istiod.token().map(str::to_owned);
        let options = self
            .without("FAKE_CA")
            .without("FAKE_CA_ROOT_CERT")
            .without("FAKE_CA_ROOT_KEY")
            .env("CA_ADDRESS", &format!("https://{}", istiod.address()))
            .env("CA_ROOT_CA", &istiod.root_file().display().to_string());
        match token {
            Some(token) => options.env("AUTH_TOKEN", &token),
            None => options,
        }
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Leaves a variable out.
    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        self.env.remove(key);
        self
    }

    /// Sets soft and hard limit of descriptors.
    #[must_use]
    pub fn nofile(self, soft: u64, hard: u64) -> Self {
        self.wrapped(&["prlimit", &format!("--nofile={soft}:{hard}")])
    }

    /// Starts it by another program, which is given the command line as its last arguments and executes it.
    #[must_use]
    pub fn wrapped(self, program: &[&str]) -> Self {
        let wrapper = program.iter().map(|word| (*word).to_owned()).collect();
        Self { wrapper, ..self }
    }

    /// Shows it another file as its `/etc/resolv.conf`.
    #[must_use]
    pub fn resolv_conf(self, file: PathBuf) -> Self {
        Self {
            resolv_conf: Some(file),
            ..self
        }
    }

    /// Runs another binary, such as a release build.
    #[must_use]
    pub fn binary(self, path: PathBuf) -> Self {
        Self {
            binary: Some(path),
            ..self
        }
    }

    /// Replaces the arguments `proxy ztunnel`.
    #[must_use]
    pub fn arguments(self, arguments: &[&str]) -> Self {
        Self {
            arguments: arguments
                .iter()
                .map(|argument| (*argument).to_owned())
                .collect(),
            ..self
        }
    }

    /// The command line, ready to be started.
    ///
    /// # Errors
    /// When there is no binary and none can be built.
    pub fn command(&self) -> anyhow::Result<Command> {
        let binary = self.binary.clone().map_or_else(binary, Ok)?;
        let shown = self.resolv_conf.as_deref().map(dns::with_resolv_conf);
        let before = [&*self.wrapper, &*shown.unwrap_or_default()].concat();
        let mut command = match before.as_slice() {
            [] => Command::new(binary),
            [program, words @ ..] => {
                let mut wrapped = Command::new(program);
                wrapped.args(words).arg(binary);
                wrapped
            }
        };
        command.args(&self.arguments).env_clear().envs(&self.env);
        command
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir("/");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command)
    }

    /// Starts the proxy in the node's proxy namespace and waits for nothing.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start<'a>(&self, node: &'a Node) -> anyhow::Result<Proxy<'a>> {
        self.start_in(node.proxy_netns(), node.name())
    }

    /// Starts the proxy in any namespace; `label` names it in the output of a failed test.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_in<'a>(&self, netns: &'a Netns, label: &str) -> anyhow::Result<Proxy<'a>> {
        let mut running = netns.spawn(self.command()?)?;
        let (log, readers) = Log::of(&mut running.child)?;
        let pid = running.child.id().context("it ended at once")?;
        let label = label.to_owned();
        Ok(Proxy {
            netns,
            label,
            running,
            pid,
            log,
            readers,
        })
    }
}

/// A running proxy. Dropping it kills it; a panicking test prints the end of its log.
#[derive(Debug)]
pub struct Proxy<'a> {
    netns: &'a Netns,
    label: String,
    running: Running,
    pid: u32,
    log: Log,
    readers: JoinSet<()>,
}

impl Proxy<'_> {
    /// Everything that it wrote.
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks one of its own servers, from inside its namespace.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn get(&self, port: u16, path: &str) -> anyhow::Result<http::Answer> {
        let server = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        http::request(self.netns, server, &format!("GET {path}"), &[]).await
    }

    /// Posts to its admin server, from inside its namespace.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn post(&self, path: &str) -> anyhow::Result<http::Answer> {
        let server = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), ADMIN_PORT);
        http::request(self.netns, server, &format!("POST {path}"), &[]).await
    }

    /// A document of its admin server.
    ///
    /// # Errors
    /// When there is none.
    pub async fn document(&self, path: &str) -> anyhow::Result<serde_json::Value> {
        let answer = self.get(ADMIN_PORT, path).await?;
        ensure!(
            answer.status == 200,
            "status {}: {}",
            answer.status,
            answer.body
        );
        Ok(serde_json::from_str(&answer.body)?)
    }

    /// Whether it says that it is ready; a server that does not answer is not.
    pub async fn is_ready(&self) -> bool {
        self.get(READINESS_PORT, "/healthz/ready")
            .await
            .is_ok_and(|answer| answer.status == 200)
    }

    /// Waits until it is ready.
    ///
    /// # Panics
    /// When it is not after ten seconds.
    pub async fn ready(&self) {
        wait::until(wait::SOON, "the proxy is ready", async || {
            self.is_ready().await.then_some(())
        })
        .await;
    }

    /// Waits until it is not ready.
    ///
    /// # Panics
    /// When it still is after ten seconds.
    pub async fn unready(&self) {
        wait::until(wait::SOON, "the proxy is not ready", async || {
            (!self.is_ready().await).then_some(())
        })
        .await;
    }

    /// Scrapes it.
    ///
    /// # Errors
    /// When the answer is not a well-formed exposition.
    pub async fn metrics(&self) -> anyhow::Result<Metrics> {
        let answer = self.get(STATS_PORT, "/metrics").await?;
        ensure!(answer.status == 200, "status {}", answer.status);
        Metrics::parse(&answer.body)
    }

    /// Waits until a sum of series has a value that `fits`.
    ///
    /// # Panics
    /// When it has not after ten seconds.
    pub async fn metric(
        &self,
        name: &str,
        labels: &[(&str, &str)],
        fits: impl Fn(f64) -> bool,
    ) -> f64 {
        let what = format!("metric {name} {labels:?}");
        wait::until(wait::SOON, &what, async || {
            let value = self.metrics().await.ok()?.sum(name, labels);
            fits(value).then_some(value)
        })
        .await
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.pid)?);
        Ok(kill(pid, signal)?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub async fn exit(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let status = tokio::time::timeout(limit, self.running.child.wait())
            .await
            .context("still running")??;
        while self.readers.join_next().await.is_some() {}
        Ok(status)
    }

    /// Open descriptors.
    ///
    /// # Errors
    /// When it is gone.
    pub fn open_files(&self) -> anyhow::Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid))?.count())
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// When it is gone.
    pub fn resident_bytes(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    }

    /// How often each of its threads, by id, has gone to sleep so far, which is how often it was woken up.
    ///
    /// # Errors
    /// When it is gone.
    pub fn sleeps(&self) -> anyhow::Result<HashMap<OsString, u64>> {
        let mut sleeps = HashMap::new();
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid))? {
            let task = task?;
            // A thread may end meanwhile.
            let Ok(status) = std::fs::read_to_string(task.path().join("status")) else {
                continue;
            };
            let switches = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
                .context("no voluntary_ctxt_switches")?;
            sleeps.insert(task.file_name(), switches.trim().parse()?);
        }
        Ok(sleeps)
    }

    /// Processor time used so far, user and system.
    ///
    /// # Errors
    /// When it is gone.
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        // The second field may hold spaces; behind its closing parenthesis come fields 3, 4, …; 14 and 15 are ticks of 10 ms.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid))?;
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .context("no name")?
            .1
            .split_whitespace()
            .collect();
        let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(Duration::from_millis(ticks * 10))
    }
}

impl Drop for Proxy<'_> {
    #[expect(
        clippy::print_stderr,
        reason = "the log of the proxy is what one wants to see of a failed test"
    )]
    fn drop(&mut self) {
        if thread::panicking() {
            let end = self.running.child.try_wait();
            let (label, tail) = (&self.label, self.log.tail(60));
            eprintln!("--- proxy {label}, exit {end:?}, log\n{tail}");
        }
        // The next one may need the same ports. It stays to be reaped.
        if self.running.child.start_kill().is_ok() {
            let pid = Id::Pid(Pid::from_raw(self.pid.cast_signed()));
            let _gone = waitid(pid, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        }
    }
}

/// `CULVERT_BIN`, or the binary beside the test program, built on demand.
///
/// # Errors
/// When there is none and it cannot be built.
#[expect(
    clippy::disallowed_methods,
    reason = "test runs are steered by the environment"
)]
pub fn binary() -> anyhow::Result<PathBuf> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    if let Some(path) = std::env::var_os("CULVERT_BIN") {
        return Ok(PathBuf::from(path));
    }
    FOUND
        .get_or_init(|| find_or_build().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(anyhow::Error::msg)
}

/// Test programs are at `target/<profile>/deps/`, examples and binaries one level higher.
fn find_or_build() -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe()?;
    let mut profile = this.parent().context("no directory")?;
    if profile.ends_with("deps") || profile.ends_with("examples") {
        profile = profile.parent().context("no directory")?;
    }
    let found = profile.join("culvert");
    if !found.exists() {
        let release = profile.ends_with("release").then_some("--release");
        let target = profile.parent().context("no target directory")?;
        let status = Command::new("cargo")
            .args([
                "build",
                "--package",
                "culvert",
                "--bin",
                "culvert",
                "--target-dir",
            ])
            .arg(target)
            .args(release)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .context("cargo")?;
        if !status.success() || !found.exists() {
            bail!("cargo build gave no {}", found.display());
        }
    }
    Ok(found)
}
