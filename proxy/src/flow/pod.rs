//! One captured pod as its flows see it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use cert_agent::Agent;
use futures_util::future::BoxFuture;
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, timeout_at},
};
use xds_client::Demand;

use super::{
    FlowTable, Names, Neighbours, Stop, accept, inbound, judge, outbound, parties::Introduction,
    plaintext, socks5, verdict::Awaited,
};
use crate::{
    budget::{Pressure, Relief, Share, Shares, pressure},
    config::{self, WorkloadRef},
    listen::{self, Descriptors, LocalAddress, Netns, PodListeners, SourcePorts},
    mesh::{Mesh, Workload},
    policy::Permit,
    relay::Buffers,
    resolve::Resolver,
    route::LoopGuard,
    telemetry::{AuthorizationLog, Limit, Limits, OnDemandDns, Reporter, Step, Traces, Traffic},
    tunnel,
};

/// What the flows of all pods share.
#[derive(Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "put together by `node` from its parts"
)]
pub struct Shared {
    /// The state of the mesh.
    pub mesh: Mesh,
    /// Certificates of the pods of this node.
    pub agent: Agent,
    /// Traffic counters.
    pub traffic: Traffic,
    /// Where spans go.
    pub traces: Traces,
    /// Where policy verdicts are logged.
    pub verdicts: AuthorizationLog,
    /// What the pools of all pods hold.
    pub pools: tunnel::PoolMetrics,
    /// Relay buffers.
    pub buffers: Buffers,
    /// Where to ask for what is not known; `None` if everything is told unasked.
    pub demand: Option<Demand>,
    /// Addresses of workloads that are known by a host name only.
    pub resolver: Resolver,
    /// Counts what is asked of the resolver.
    pub resolutions: OnDemandDns,
    /// The pods of this process, known to each other.
    pub neighbours: Neighbours,
    /// What was too much.
    pub limits: Limits,
    /// What pods hold of the memory.
    pub shares: Shares,
    /// Descriptors that are left for traffic.
    pub descriptors: Descriptors,
    /// Settings.
    pub settings: Settings,
}

impl Shared {
    /// Connects to `to` from inside `netns`, unless that would take one of the last descriptors.
    async fn connect(
        &self,
        netns: &Netns,
        to: SocketAddr,
        from: LocalAddress<'_>,
    ) -> Result<listen::Upstream, listen::ConnectError> {
        let Some(_connecting) = self.descriptors.connect() else {
            self.limits.hit(Limit::Descriptors, &to);
            return Err(listen::ConnectError::NoDescriptors { to });
        };
        let upstream = listen::connect(netns, &self.settings.sockets, to, from).await?;
        self.descriptors.note(&upstream.stream);
        Ok(upstream)
    }

    /// Tells how long `step` took, if it succeeds.
    pub(super) async fn timed<T, E>(
        &self,
        (step, reporter): (Step, Reporter),
        doing: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let began = Instant::now();
        let done = doing.await?;
        let latencies = self.traffic.latencies();
        latencies.observe(step, reporter, began.elapsed());
        Ok(done)
    }
}

/// What the flows of all pods are told.
#[derive(Debug, Clone)]
#[expect(
    clippy::exhaustive_structs,
    reason = "put together by `node` from configuration sections"
)]
pub struct Settings {
    /// Socket options.
    pub sockets: config::Sockets,
    /// How much one pod or peer gets.
    pub limits: config::Limits,
    /// HBONE parameters.
    pub tunnel: Arc<config::Tunnel>,
    /// Inbound behaviour.
    pub inbound: config::Inbound,
    /// How flows to other pods of this process are carried.
    pub same_node: config::SameNode,
    /// Our own ports, which no flow may lead to.
    pub guard: LoopGuard,
    /// The network of this node.
    pub network: Arc<str>,
    /// How long a flow waits for the record of its own pod; an HBONE connection no longer than for its handshake.
    pub workload_wait: Duration,
}

/// One captured pod: its namespace, its tunnels, its open flows.
#[derive(Debug)]
pub struct Pod {
    shared: Arc<Shared>,
    who: WorkloadRef,
    netns: Arc<Netns>,
    /// Whether upstream sockets may take the client's address.
    transparent: bool,
    source_ports: SourcePorts,
    flows: Arc<FlowTable>,
    awaited: Awaited,
    introduction: Introduction,
    pool: tunnel::Pool<Dialer>,
    share: Arc<Share>,
}

impl Pod {
    /// A pod whose listeners are bound but not yet served.
    #[must_use]
    pub fn new(
        shared: Arc<Shared>,
        who: WorkloadRef,
        netns: Arc<Netns>,
        transparent: bool,
    ) -> Arc<Self> {
        let dialer = Dialer {
            shared: Arc::clone(&shared),
            netns: Arc::clone(&netns),
        };
        let pool = tunnel::Pool::new(
            Arc::clone(&shared.settings.tunnel),
            dialer,
            shared.buffers.clone(),
        )
        .counted(shared.pools.clone());
        Arc::new(Self {
            share: shared.shares.pod(),
            shared,
            who,
            netns,
            transparent,
            source_ports: SourcePorts::new(),
            flows: Arc::default(),
            awaited: Awaited::default(),
            introduction: Introduction::default(),
            pool,
        })
    }

    /// The flows that are open now.
    #[must_use]
    pub fn flows(&self) -> &Arc<FlowTable> {
        &self.flows
    }

    /// Serves `listeners` until `stop` asks for an end and all flows have ended, or `stop` forces it.
    pub async fn serve(self: Arc<Self>, listeners: PodListeners, stop: Stop) {
        let judge = judge::run(&self);
        let PodListeners {
            outbound,
            inbound_plaintext,
            hbone,
            ..
        } = listeners;
        let serve = async {
            let pod = || Arc::clone(&self);
            tokio::join!(
                accept::serve(
                    pod(),
                    outbound,
                    Reporter::Source,
                    stop.clone(),
                    outbound::carry
                ),
                accept::serve(
                    pod(),
                    inbound_plaintext,
                    Reporter::Destination,
                    stop.clone(),
                    plaintext::carry
                ),
                inbound::serve(pod(), hbone, stop.clone()),
                self.shared.neighbours.host(&self, &stop),
            );
        };
        tokio::select! {
            () = serve => {}
            () = judge => {}
        }
        self.pool.release();
    }

    /// Serves a listener for SOCKS5 besides, to the end of its own flows.
    pub async fn serve_socks5(self: Arc<Self>, listener: TcpListener, names: Names, stop: Stop) {
        socks5::serve(self, listener, names, stop).await;
    }

    /// Serves one HBONE listener alone, as for the proxy's own pod.
    pub async fn serve_hbone(self: Arc<Self>, listener: TcpListener, stop: Stop) {
        let judge = judge::run(&self);
        tokio::select! {
            () = inbound::serve(Arc::clone(&self), listener.into(), stop) => {}
            () = judge => {}
        }
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    pub(super) fn pool(&self) -> &tunnel::Pool<Dialer> {
        &self.pool
    }

    /// Its names, by which its record is found.
    pub(super) fn who(&self) -> &WorkloadRef {
        &self.who
    }

    /// Policies that its record names in vain.
    pub(super) fn awaited(&self) -> &Awaited {
        &self.awaited
    }

    /// What it tells peers of itself.
    pub(super) fn introduction(&self) -> &Introduction {
        &self.introduction
    }

    pub(super) fn source_ports(&self) -> &SourcePorts {
        &self.source_ports
    }

    /// What it holds of the memory.
    pub(super) fn share(&self) -> &Arc<Share> {
        &self.share
    }

    /// Whether it takes another flow. Counts nothing: who is sent elsewhere is asked for again there.
    pub(super) fn takes_more(&self) -> bool {
        self.is_below_limit(self.flows.len()) && !self.is_greedy()
    }

    /// Whether it gets nothing new, because memory is very short and it holds much of it; counts it if so.
    pub(super) fn is_to_blame(&self) -> bool {
        let is_to_blame = self.is_greedy();
        Relief::FlowRefused.count(is_to_blame.into());
        is_to_blame
    }

    fn is_greedy(&self) -> bool {
        pressure() == Pressure::Critical && !self.share.is_modest()
    }

    fn is_below_limit(&self, open: usize) -> bool {
        open < self.settings().limits.flows_per_pod
    }

    /// Whether another one is let in beside so many connections or flows; counts it if not.
    pub(super) fn has_room(&self, open: usize) -> bool {
        let has_room = self.is_below_limit(open);
        if !has_room {
            self.hits(Limit::FlowsPerPod);
        }
        has_room
    }

    /// This pod has hit `limit`.
    pub(super) fn hits(&self, limit: Limit) {
        let WorkloadRef {
            namespace, name, ..
        } = &self.who;
        let who = format_args!("{namespace}/{name}");
        self.shared.limits.hit(limit, &who);
    }

    /// The record of this pod. Waits for it as long as the settings say.
    pub(super) async fn workload(&self) -> Option<Arc<Workload>> {
        let patience = Instant::now() + self.settings().workload_wait;
        self.shared.mesh.local_workload(&self.who, patience).await
    }

    /// As [`Self::workload`], and waits until `deadline` at the latest.
    pub(super) async fn workload_by(&self, deadline: Instant) -> Option<Arc<Workload>> {
        timeout_at(deadline, self.workload()).await.ok().flatten()
    }

    /// The record of this pod, if it is there.
    pub(super) fn known_workload(&self) -> Option<Arc<Workload>> {
        self.shared.mesh.read().local_workload(&self.who).cloned()
    }

    /// The workload behind a peer's address, if it is there.
    pub(super) fn known_peer(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        self.shared
            .mesh
            .read()
            .workload_at(&self.settings().network, ip)
            .cloned()
    }

    /// Connects from the pod's namespace with the pod's own address.
    pub(super) async fn dial(
        &self,
        to: SocketAddr,
    ) -> Result<listen::Upstream, listen::ConnectError> {
        let connecting = self.shared.connect(&self.netns, to, LocalAddress::Any);
        self.shared
            .timed((Step::Connect, Reporter::Source), connecting)
            .await
    }

    /// Connects to the pod's application, with the client's address where that is possible.
    pub(super) async fn dial_application(
        &self,
        _permit: Permit,
        to: SocketAddr,
        client: IpAddr,
    ) -> Result<listen::Upstream, listen::ConnectError> {
        let from = if self.transparent {
            LocalAddress::Client {
                ip: client,
                ports: &self.source_ports,
            }
        } else {
            LocalAddress::Any
        };
        let connecting = self.shared.connect(&self.netns, to, from);
        self.shared
            .timed((Step::Connect, Reporter::Destination), connecting)
            .await
    }
}

/// Opens the connections below the tunnels of one pod.
#[derive(Debug)]
pub(super) struct Dialer {
    shared: Arc<Shared>,
    netns: Arc<Netns>,
}

impl tunnel::Dial for Dialer {
    type Io = TcpStream;

    fn dial(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(async move {
            let connecting = self.shared.connect(&self.netns, to, LocalAddress::Any);
            match self
                .shared
                .timed((Step::Connect, Reporter::Source), connecting)
                .await
            {
                Ok(upstream) => {
                    listen::watch_peer(&upstream.stream, &self.shared.settings.sockets)?;
                    Ok(upstream.stream)
                }
                Err(error @ listen::ConnectError::Timeout { .. }) => {
                    Err(io::Error::new(io::ErrorKind::TimedOut, error))
                }
                Err(listen::ConnectError::Connect { source, .. }) => Err(source),
                Err(error) => Err(io::Error::other(error)),
            }
        })
    }

    fn tls<'a>(
        &'a self,
        key: &'a tunnel::Key,
    ) -> BoxFuture<'a, Result<tunnel::Credentials, Box<dyn std::error::Error + Send + Sync>>> {
        Box::pin(async move {
            let svid = self.shared.agent.svid(&key.source).await?;
            Ok(tunnel::Credentials {
                config: svid.client_config(&key.expected),
                not_after: svid.not_after(),
                tracker: svid.server_tracker(),
            })
        })
    }
}
