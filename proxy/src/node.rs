//! The composition root: builds the parts of the proxy, owns its tasks, starts and stops them.
//!
//! Two runtimes keep bytes and control apart: flows, listeners in pods and readiness run on the
//! data workers; mesh state, certificates, the CNI agent and metrics on one control thread.

mod available;
mod error;
mod launch;
mod parts;
mod source;
mod tasks;

use std::{future::Future, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    signal::unix::{Signal, SignalKind, signal},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin,
    config::{Config, ProxyMode},
    flow::{Shared, Stop},
    listen,
    pods::{self, Pods},
    telemetry::{PodMetrics, Readiness, logging::LogGuard, register_process},
};
pub use available::check_available;
pub use error::StartError;
use launch::Launcher;
use source::MeshFile;
use tasks::Tasks;

/// Runs the proxy until SIGTERM or SIGINT asks it to stop and what was open has ended.
///
/// # Errors
/// [`StartError`] if it cannot start, or if a part that everything depends on ended by itself.
pub fn run(config: &Config, log: &LogGuard) -> Result<(), StartError> {
    check_available(&config.control)?;
    if config.capture.enabled && config.capture.mode == ProxyMode::Shared {
        listen::check_privileges(config.sockets.mark)?;
    }
    let control = runtime(Builder::new_current_thread().thread_name("control"))?;
    let data =
        runtime(Builder::new_multi_thread().thread_name("data").worker_threads(config.runtime.worker_threads))?;
    let ended = control.block_on(serve(config, log, data.handle()));
    data.shutdown_timeout(LAST_WORK);
    ended
}

/// Starts everything in the order in which things need each other, then waits for a signal.
async fn serve(config: &Config, log: &LogGuard, data: &Handle) -> Result<(), StartError> {
    let mut signals = Signals::new().map_err(StartError::Signals)?;
    let (stop, background) = (Stop::new(), CancellationToken::new());
    let mut tasks = Tasks::default();
    let readiness = Readiness::new();
    let state_known = readiness.task("state manager");
    let wired = readiness.task("proxy");
    let captured = matches!(config.capture.mode, ProxyMode::Shared).then(|| readiness.task(pods::READINESS_TASK));
    let listener = bind(data, config.ports.readiness, config.sockets.ipv6)?;
    tasks.start("readiness", data, admin::serve_readiness(listener, readiness, stop.accept.clone()));

    let mut registry = Registry::default();
    register_process(&mut registry, &config.identity.istio_version);
    log.register(&mut registry);
    let shared = Arc::new(parts::shared(config, &mut registry)?);
    let here = Handle::current();
    let agent = shared.agent.clone();
    let renewing = background.clone();
    tasks.start("certificates", &here, async move { agent.run(renewing).await });
    if let Some(local) = &config.control.local {
        let file = MeshFile::load(local, &shared).await?;
        tasks.start("mesh file", &here, file.follow(background.clone()));
    }
    state_known.ready();

    match (&config.capture.mode, captured) {
        (ProxyMode::Shared, Some(captured)) => {
            let metrics = PodMetrics::register(&mut registry);
            let launcher = Arc::new(Launcher::new(Arc::clone(&shared)));
            let pods = Pods::new(pod_settings(config, data), launcher, metrics, captured);
            tasks.start("pods", &here, pods.run(stop.clone()));
        }
        (ProxyMode::Dedicated(who), _) => {
            let serving = launch::dedicated(config, &shared, who, data, stop.clone())?;
            tasks.start("dedicated workload", data, serving);
        }
        (ProxyMode::Shared, None) => {}
    }
    if let Some(serving) = own_listener(config, &shared, data, &stop)? {
        tasks.start("own HBONE listener", data, serving);
    }
    let listener = bind(&here, config.ports.stats, config.sockets.ipv6)?;
    tasks.start("stats", &here, admin::serve_stats(listener, Arc::new(registry), stop.accept.clone()));
    wired.ready();

    wait_and_stop(&mut tasks, &mut signals, &stop, &background, config.drain.deadline).await
}

/// Waits for a signal, or for a task that must not end; then stops everything in order.
async fn wait_and_stop(
    tasks: &mut Tasks,
    signals: &mut Signals,
    stop: &Stop,
    background: &CancellationToken,
    deadline: Duration,
) -> Result<(), StartError> {
    let ended = tokio::select! {
        () = signals.asked() => Ok(()),
        name = tasks.next_ended() => Err(StartError::Ended(name)),
    };
    tracing::info!(?deadline, "stopping: nothing new is accepted, open connections may finish");
    stop.accept.cancel();
    let serving = tasks.finished_but(&["certificates", "mesh file"]);
    tokio::select! {
        _ = timeout(deadline + LAST_WORK, serving) => {}
        () = signals.interrupted_again() => {}
    }
    stop.now();
    background.cancel();
    let _ = timeout(LAST_WORK, tasks.finished_but(&[])).await;
    tasks.abort().await;
    ended
}

fn pod_settings(config: &Config, data: &Handle) -> pods::Settings {
    pods::Settings {
        agent_socket: config.capture.agent_socket.clone(),
        sockets: config.sockets.clone(),
        ports: config.ports,
        drain: config.drain,
        data: data.clone(),
    }
}

/// HBONE for the proxy's own pod, so that its metrics can be scraped through the mesh.
fn own_listener(
    config: &Config,
    shared: &Arc<Shared>,
    data: &Handle,
    stop: &Stop,
) -> Result<Option<impl Future<Output = ()> + Send + use<>>, StartError> {
    if config.identity.own.is_none() || config.capture.mode != ProxyMode::Shared {
        return Ok(None);
    }
    let listener = bind(data, config.ports.hbone, config.sockets.ipv6)?;
    let serving = launch::own(&config.identity, shared, listener, stop.clone())?;
    Ok(Some(serving))
}

fn bind(on: &Handle, port: u16, ipv6: bool) -> Result<tokio::net::TcpListener, StartError> {
    let _registered_there = on.enter();
    admin::bind(port, ipv6).map_err(|source| StartError::Bind { port, source })
}

fn runtime(builder: &mut Builder) -> Result<Runtime, StartError> {
    builder.enable_all().build().map_err(StartError::Runtime)
}

/// The signals that end the process.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    interrupted: bool,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            interrupted: false,
        })
    }

    /// The first SIGTERM or SIGINT.
    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
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

/// What may still run when everything was told to end.
const LAST_WORK: Duration = Duration::from_secs(1);
