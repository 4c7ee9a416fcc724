//! The composition root: builds the parts of the proxy, owns its tasks, starts and stops them.
//!
//! Two runtimes keep bytes and control apart: flows, listeners in pods and readiness run on the
//! data workers; mesh state, certificates, the CNI agent and metrics on one control thread.

mod allocator;
mod certificates;
mod confine;
mod console;
mod control_plane;
mod error;
mod kept_keys;
mod last_known;
mod launch;
mod memory;
mod memory_metrics;
mod mesh_metrics;
mod openbao;
mod parts;
mod revocation;
mod served;
#[cfg(test)]
mod simulation;
mod source;
mod target;
mod tasks;
mod tls;
mod traces;
mod trust;

use std::{sync::Arc, time::Duration};

use cert_agent::openbao::Authority;
use futures_util::future::OptionFuture;
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Handle, Runtime},
    signal::unix::{Signal, SignalKind, signal},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use xds_client::Metrics;

use crate::{
    admin,
    config::{BuildInfo, Config, DnsCapture, ProxyMode, Sockets},
    flow::{Shared, Stop},
    listen::{self, Shortage},
    pods::{self, Pods},
    telemetry::{
        Exposition, PodMetrics, Readiness, ReadinessTask, Traces, logging::LogGuard,
        register_process,
    },
};
use certificates::Certificates;
pub use confine::{give_up_privileges, hide_memory};
use console::Shown;
use control_plane::Follower;
pub use error::StartError;
use launch::{Launcher, Names};
use served::Served;
use source::MeshFile;
pub use target::target;
use tasks::Tasks;

/// Runs the proxy until SIGTERM, SIGINT or the admin server asks it to stop and what was open has ended.
///
/// # Errors
/// [`StartError`] if it cannot start, or if a part that everything depends on ended by itself.
pub fn run(config: &Config, build: BuildInfo, log: &LogGuard) -> Result<(), StartError> {
    if config.capture.enabled && config.capture.mode == ProxyMode::Shared {
        check_surroundings(&config.sockets)?;
    }
    if !config.capture.enabled {
        tracing::warn!(
            "ENABLE_PROXY=false leaves out the check of privileges and nothing else: what is redirected here is carried"
        );
    }
    // This thread and those beside it that may block.
    allocator::keep_little();
    let control = runtime(
        Builder::new_current_thread()
            .thread_name("control")
            .on_thread_start(allocator::keep_little),
    )?;
    let data = runtime(
        Builder::new_multi_thread()
            .thread_name("data")
            .worker_threads(config.runtime.worker_threads)
            .on_thread_park(allocator::give_back),
    )?;
    let ended = control.block_on(serve(config, build, log, data.handle()));
    data.shutdown_timeout(LAST_WORK);
    ended
}

/// Refuses to start where no pod could be served, and tells what else will not work.
fn check_surroundings(sockets: &Sockets) -> Result<(), StartError> {
    let mut vital = None;
    for shortage in listen::shortages(sockets) {
        let is_vital = shortage.need.is_vital(sockets);
        // All are told: the last of those that forbid to start by the end of the process.
        let told = if is_vital {
            vital.replace(shortage)
        } else {
            Some(shortage)
        };
        if let Some(Shortage { need, source }) = told {
            let error = &source as &dyn std::error::Error;
            if is_vital {
                tracing::error!(error, "{need}");
            } else {
                tracing::warn!(error, "{need}");
            }
        }
    }
    vital.map_or(Ok(()), |shortage| Err(StartError::Shortage(shortage)))
}

/// Starts everything in the order in which things need each other, then waits for a signal.
async fn serve(
    config: &Config,
    build: BuildInfo,
    log: &LogGuard,
    data: &Handle,
) -> Result<(), StartError> {
    let readiness = Readiness::new();
    let mut shown = Shown::new(readiness.clone(), log.levels(), build);
    let mut signals = Signals::new(shown.quit.clone()).map_err(StartError::Signals)?;
    let mut start = Start::new(config, data);
    let state_known = readiness.task("state manager");
    let wired = readiness.task("proxy");
    let naming = (config.capture.dns != DnsCapture::Off).then(|| readiness.task("dns proxy"));
    let captured =
        (config.capture.mode == ProxyMode::Shared).then(|| readiness.task(pods::READINESS_TASK));
    start.readiness(readiness)?;
    let admin = start.bind_admin()?;

    let mut registry = Registry::default();
    register_process(&mut registry, &config.identity.istio_version);
    log.register(&mut registry);
    let Certificates { agent, openbao } = certificates::build(config)?;
    let traces = start.traces(&mut registry);
    let shared = Arc::new(parts::shared(config, agent, traces, &mut registry));
    let budget = config.limits.memory_budget;
    memory_metrics::register(&shared, log.backlog(), budget, &mut registry);
    start.budget(&shared, budget);
    start.certificates(&shared, openbao);
    start.trust(&shared, &mut registry);
    start.revocations(&shared, &mut registry);
    start.trimming(&shared);
    let known = start.mesh(&shared, &mut registry, &mut shown).await?;
    let names = parts::names(config, &shared.mesh, &mut registry);
    shown.names = names.as_ref().map(|names| names.shared.metrics.clone());
    start.eviction(&shared, names.as_ref());
    let pods = captured.map(|task| (task, PodMetrics::register(&mut registry)));
    start.admin(admin, &shared, &shown);
    start.stats(Exposition::new(registry, shared.traffic.clone()))?;
    wired.ready();
    naming.iter().for_each(ReadinessTask::ready);

    // Nothing is captured before the node knows the mesh: traffic would be taken for what it is not.
    let ended = async {
        if start.reaches(known, &mut signals).await? {
            state_known.ready();
            start.capture(&shared, &shown.served, names, pods)?;
            start.runs(&mut signals).await?;
        }
        Ok(())
    };
    let ended = ended.await;
    start.stop(&mut signals).await;
    ended
}

/// The proxy as it starts, runs and stops.
struct Start<'a> {
    config: &'a Config,
    /// Where flows run; the control thread is the one that this runs on.
    data: &'a Handle,
    /// Ends what accepts.
    stop: Stop,
    /// Ends what the flows that still run need.
    background: CancellationToken,
    tasks: Tasks,
}

impl<'a> Start<'a> {
    fn new(config: &'a Config, data: &'a Handle) -> Self {
        Self {
            config,
            data,
            stop: Stop::new(),
            background: CancellationToken::new(),
            tasks: Tasks::default(),
        }
    }

    fn here(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.start(name, &Handle::current(), task);
    }

    /// Served first and with the data workers, so that it answers whatever else is slow.
    fn readiness(&mut self, readiness: Readiness) -> Result<(), StartError> {
        let listener = self.bind(self.data, self.config.ports.readiness)?;
        let serving = admin::serve_readiness(listener, readiness, self.stop.accept.clone());
        self.tasks.start("readiness", self.data, serving);
        Ok(())
    }

    /// Sends spans of flows, if anybody takes them.
    fn traces(&mut self, registry: &mut Registry) -> Traces {
        let Some((traces, exporting)) = traces::build(self.config, registry, &self.background)
        else {
            return Traces::default();
        };
        self.here(TRACES, exporting);
        traces
    }

    /// Watches over the memory, if it has a budget.
    fn budget(&mut self, shared: &Arc<Shared>, budget: Option<u64>) {
        if let Some(bytes) = budget {
            let (shared, stop) = (Arc::clone(shared), self.background.clone());
            self.here(BUDGET, async move {
                let watching = memory::watch(bytes, shared);
                stop.run_until_cancelled(watching).await;
            });
        }
    }

    /// Gives buffers that a burst left behind back to the allocator, and so to the system. On the data runtime: while a timer is
    /// due there before those of a new connection, none of these wakes the worker that waits for the next one.
    fn trimming(&mut self, shared: &Shared) {
        let (buffers, stop) = (shared.buffers.clone(), self.background.clone());
        let trimming = async move {
            let tending = buffers.tend(TRIM_INTERVAL);
            stop.run_until_cancelled(tending).await;
        };
        self.tasks.start(TRIMMING, self.data, trimming);
    }

    /// Forgets label sets under which nothing happens, and tells of flows that last.
    fn eviction(&mut self, shared: &Arc<Shared>, names: Option<&Names>) {
        let (shared, stop) = (Arc::clone(shared), self.background.clone());
        let queries = names.map(|names| names.shared.metrics.clone());
        self.here(EVICTION, async move {
            let tending = async {
                tokio::join!(
                    shared.traffic.evict_idle(),
                    shared.traffic.log_progress(),
                    shared.resolutions.evict_idle(),
                    async {
                        if let Some(queries) = queries {
                            queries.evict_idle().await;
                        }
                    }
                )
            };
            stop.run_until_cancelled(tending).await;
        });
    }

    fn certificates(&mut self, shared: &Shared, openbao: Option<Authority>) {
        let (agent, stop) = (shared.agent.clone(), self.background.clone());
        self.here(CERTIFICATES, async move { agent.run(stop).await });
        if let Some(authority) = openbao {
            let (trust, stop) = (shared.agent.trust().clone(), self.background.clone());
            let revocations = shared.agent.revocations().clone();
            self.here(OPENBAO, async move {
                let following = async {
                    tokio::join!(
                        trust.follow(trust::OPENBAO, authority.roots()),
                        revocations.follow(revocation::OPENBAO, authority.crls()),
                    )
                };
                tokio::join!(
                    authority.run(stop.clone()),
                    stop.run_until_cancelled(following)
                );
            });
        }
    }

    /// Follows the roots that peers may have besides those that come with certificates.
    fn trust(&mut self, shared: &Shared, registry: &mut Registry) {
        let trust = shared.agent.trust().clone();
        trust::register(&trust, registry);
        if let Some(path) = self.config.tls.trust_file.clone() {
            let stop = self.background.clone();
            self.here(TRUST, async move {
                let following = trust.follow_file(trust::ROOT_FILE, path);
                stop.run_until_cancelled(following).await;
            });
        }
    }

    /// Follows the revocation lists, if any are wanted.
    fn revocations(&mut self, shared: &Shared, registry: &mut Registry) {
        let revocations = shared.agent.revocations().clone();
        revocation::register(&revocations, registry);
        if let Some(path) = self.config.control.crl_path.clone() {
            let stop = self.background.clone();
            self.here(REVOCATION, async move {
                let following = revocations.follow_file(revocation::CRL_FILE, path);
                stop.run_until_cancelled(following).await;
            });
        }
    }

    /// Starts the sources of mesh state. What it returns ends once there is enough of it to begin with.
    async fn mesh(
        &mut self,
        shared: &Arc<Shared>,
        registry: &mut Registry,
        shown: &mut Shown,
    ) -> Result<OptionFuture<impl Future<Output = ()> + use<>>, StartError> {
        mesh_metrics::register(&shared.mesh, registry);
        let control = &self.config.control;
        if let Some(local) = &control.local {
            let file = MeshFile::load(local, shared, shown.rejections.clone()).await?;
            let following = file.follow(self.background.clone());
            self.here(MESH_FILE, following);
        }
        let Some(address) = &control.xds else {
            return Ok(OptionFuture::from(None));
        };
        let kept = last_known::open(self.config, shared, registry).await;
        let (journal, keeper) = kept.unzip();
        let metrics = Metrics::register(registry);
        shown.client = Some(metrics.clone());
        let follower = Follower {
            mesh: shared.mesh.clone(),
            agent: shared.agent.clone(),
            rejections: shown.rejections.clone(),
            journal,
        };
        let client = control_plane::client(
            self.config,
            address,
            follower,
            shared.demand.as_ref(),
            metrics,
        );
        let known = last_known::enough(&client, &shared.mesh);
        let confirming = last_known::confirm(client.synced(), shared.mesh.clone());
        let stop = self.background.clone();
        self.here(LAST_KNOWN, async move {
            let keeping = OptionFuture::from(keeper.map(|keeper| keeper.run(stop.clone())));
            tokio::join!(keeping, stop.run_until_cancelled(confirming));
            stop.cancelled().await;
        });
        self.here(CONTROL_PLANE, client.run(self.background.clone()));
        Ok(OptionFuture::from(Some(known)))
    }

    /// Serves the pods of this node, or the one workload of dedicated mode, and the proxy's own pod.
    fn capture(
        &mut self,
        shared: &Arc<Shared>,
        served: &Served,
        names: Option<Names>,
        pods: Option<(ReadinessTask, PodMetrics)>,
    ) -> Result<(), StartError> {
        let config = self.config;
        let launcher = Launcher::new(config, Arc::clone(shared), names, served.clone());
        match (&config.capture.mode, pods) {
            (ProxyMode::Shared, Some((captured, metrics))) => {
                let launcher = Arc::new(launcher);
                let pods = Pods::new(self.pod_settings(), launcher, metrics, captured);
                served.follow(pods.view());
                let following = pods.run(self.stop.clone());
                self.here("pods", following);
                if config.identity.own.is_some() {
                    let listener = self.bind(self.data, config.ports.hbone)?;
                    let own = launch::own(
                        &config.identity,
                        (shared, served),
                        listener,
                        self.stop.clone(),
                    )?;
                    self.tasks.start("own HBONE listener", self.data, own);
                }
            }
            (ProxyMode::Dedicated(who), _) => {
                let serving =
                    launch::dedicated(config, &launcher, who, self.data, self.stop.clone())?;
                self.tasks.start("dedicated workload", self.data, serving);
            }
            (ProxyMode::Shared, None) => {}
        }
        Ok(())
    }

    fn pod_settings(&self) -> pods::Settings {
        pods::Settings {
            agent_socket: self.config.capture.agent_socket.clone(),
            sockets: self.config.sockets.clone(),
            ports: self.config.ports,
            drain: self.config.drain,
            data: self.data.clone(),
        }
    }

    /// On the control thread, beside what it shows.
    fn bind_admin(&self) -> Result<Vec<TcpListener>, StartError> {
        let port = self.config.ports.admin;
        admin::bind_loopback(port, self.config.sockets.ipv6)
            .map_err(|source| StartError::Bind { port, source })
    }

    fn admin(&mut self, listeners: Vec<TcpListener>, shared: &Arc<Shared>, shown: &Shown) {
        let stop = self.stop.accept.clone();
        let serving = shown.serve(self.config, shared, listeners, stop);
        self.here("admin", serving);
    }

    fn stats(&mut self, exposition: Exposition) -> Result<(), StartError> {
        let listener = self.bind(&Handle::current(), self.config.ports.stats)?;
        let stop = self.stop.accept.clone();
        self.here("stats", admin::serve_stats(listener, exposition, stop));
        Ok(())
    }

    fn bind(&self, on: &Handle, port: u16) -> Result<TcpListener, StartError> {
        let _registered_there = on.enter();
        admin::bind(port, self.config.sockets.ipv6)
            .map_err(|source| StartError::Bind { port, source })
    }

    /// Waits until `known` ends. `false` if a signal came first.
    async fn reaches(
        &mut self,
        known: impl Future<Output = Option<()>>,
        signals: &mut Signals,
    ) -> Result<bool, StartError> {
        tokio::select! {
            _ = known => Ok(true),
            ended = self.runs(signals) => ended.map(|()| false),
        }
    }

    /// Waits for a signal, or for a task that must not end.
    async fn runs(&mut self, signals: &mut Signals) -> Result<(), StartError> {
        tokio::select! {
            () = signals.asked() => Ok(()),
            name = self.tasks.next_ended() => Err(StartError::Ended(name)),
        }
    }

    /// Stops everything in order.
    async fn stop(mut self, signals: &mut Signals) {
        let deadline = self.config.drain.deadline;
        tracing::info!(
            ?deadline,
            "stopping: nothing new is accepted, open connections may finish"
        );
        self.stop.accept.cancel();
        let serving = self.tasks.finished_but(&BACKGROUND);
        tokio::select! {
            _ = timeout(deadline + LAST_WORK, serving) => {}
            () = signals.interrupted_again() => {}
        }
        self.stop.now();
        self.background.cancel();
        let _ = timeout(LAST_WORK, self.tasks.finished_but(&[])).await;
        self.tasks.abort().await;
    }
}

fn runtime(builder: &mut Builder) -> Result<Runtime, StartError> {
    builder.enable_all().build().map_err(StartError::Runtime)
}

/// The signals that end the process.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    interrupted: bool,
    /// Asks for the same as SIGTERM.
    quit: CancellationToken,
}

impl Signals {
    fn new(quit: CancellationToken) -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            interrupted: false,
            quit,
        })
    }

    /// The first SIGTERM or SIGINT, or a request of the admin server.
    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            () = self.quit.cancelled() => {}
            _ = self.interrupt.recv() => self.interrupted = true,
        }
    }

    /// The second SIGINT: somebody at a terminal will not wait.
    async fn interrupted_again(&mut self) {
        self.interrupt.recv().await;
        if !self.interrupted {
            self.interrupt.recv().await;
        }
    }
}

const BUDGET: &str = "memory budget";
const CERTIFICATES: &str = "certificates";
const CONTROL_PLANE: &str = "control plane";
const EVICTION: &str = "idle series";
const LAST_KNOWN: &str = "last known state";
const MESH_FILE: &str = "mesh file";
const OPENBAO: &str = "OpenBao";
const REVOCATION: &str = "revocation lists";
const TRACES: &str = "spans";
const TRIMMING: &str = "buffers";
const TRUST: &str = "trust anchors";
/// What flows need until the last of them has ended.
const BACKGROUND: [&str; 11] = [
    BUDGET,
    CERTIFICATES,
    CONTROL_PLANE,
    EVICTION,
    LAST_KNOWN,
    MESH_FILE,
    OPENBAO,
    REVOCATION,
    TRACES,
    TRIMMING,
    TRUST,
];
/// How often unused buffers are let go while any are in use.
const TRIM_INTERVAL: Duration = Duration::from_secs(4);
/// What may still run when everything was told to end.
const LAST_WORK: Duration = Duration::from_secs(1);
