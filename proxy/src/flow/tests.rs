//! What an open flow costs. Everything a connection needs only until its first byte is boxed and
//! given back, so that the futures which live as long as the flow stay small.

use std::{mem::size_of_val, net::SocketAddr, sync::Arc, time::Duration};

use cert_agent::{Agent, AgentOptions, CsrSource, InProcessCa, SpiffeId};
use prometheus_client::registry::Registry;
use tokio::{
    net::{TcpListener, TcpStream},
    time::Instant,
};
use xds_client::{Demand, local::Document, proto::workload as wire};

use super::*;
use crate::{
    config::{self, WorkloadRef},
    listen::{Descriptors, Netns},
    mesh::{Mesh, View},
    relay::Buffers,
    resolve::Resolver,
    route::LoopGuard,
    telemetry::{
        AuthorizationLog, Labels, Limits, OnDemandDns, Party, Reporter, Security, ServiceName,
        Traffic,
    },
};

fn pod() -> Arc<Pod> {
    pod_with(None)
}

/// A pod that nobody has told of, whose connects may take a second.
pub(super) fn pod_with(demand: Option<Demand>) -> Arc<Pod> {
    pod_of(&Arc::new(shared(demand)), "web")
}

/// The pod `name` of the namespace `shop`, with an account of the same name.
pub(super) fn pod_of(shared: &Arc<Shared>, name: &str) -> Arc<Pod> {
    let who = WorkloadRef::new("shop", name, name);
    let netns = Netns::current().expect("netns");
    Pod::new(Arc::clone(shared), who, netns, false)
}

/// What a control plane tells of that pod.
pub(super) fn told(name: &str, address: [u8; 4], trust_domain: &str) -> wire::Address {
    wire::Address {
        r#type: Some(wire::address::Type::Workload(wire::Workload {
            uid: format!("c//Pod/shop/{name}"),
            name: name.into(),
            namespace: "shop".into(),
            service_account: name.into(),
            addresses: vec![address.to_vec()],
            trust_domain: trust_domain.into(),
            tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
            ..Default::default()
        })),
    }
}

/// Makes the mesh hold these and nobody else.
pub(super) fn tell(shared: &Shared, addresses: Vec<wire::Address>) {
    let document = Document {
        addresses,
        ..Default::default()
    };
    assert_eq!(shared.mesh.load(&document).rejected, []);
}

/// Lists a flow to `pod`, in which it has shown itself as `shown`.
pub(super) fn enter(pod: &Pod, shown: Option<SpiffeId>) -> table::Entry {
    let labels = Labels {
        reporter: Reporter::Destination,
        security: Security::Unknown,
        source: Party::default(),
        destination: Party::default(),
        service: ServiceName::default(),
    };
    let direction = Direction::Inbound {
        source: ([10, 0, 0, 1], 40000).into(),
        destination: ([10, 0, 0, 2], 80).into(),
        identity: None,
        service: None,
    };
    let watch = pod.shared().traffic.open(&labels).watch();
    pod.flows().enter(direction, shown, watch)
}

pub(super) fn shared(demand: Option<Demand>) -> Shared {
    let ca = InProcessCa::random().expect("root");
    Shared {
        mesh: Mesh::new(View {
            node_name: None,
            network: "".into(),
            cluster_id: "c".into(),
        }),
        agent: Agent::new(Arc::new(CsrSource::new(ca)), AgentOptions::default()),
        traffic: Traffic::default(),
        traces: Default::default(),
        pools: crate::tunnel::PoolMetrics::default(),
        verdicts: AuthorizationLog::new(false),
        buffers: Buffers::new(),
        demand,
        resolver: Resolver::new("/nonexistent", true),
        resolutions: OnDemandDns::register(&mut Registry::default(), config::Metrics::default()),
        neighbours: Neighbours::default(),
        limits: Limits::default(),
        shares: Default::default(),
        descriptors: Descriptors::default(),
        settings: Settings {
            limits: config::Limits::default(),
            same_node: config::SameNode::default(),
            sockets: sockets(),
            tunnel: Arc::new(tunnel()),
            inbound: config::Inbound {
                baggage: true,
                localhost_app_tunnel: true,
            },
            guard: LoopGuard::default(),
            network: "".into(),
            workload_wait: Duration::from_millis(50),
        },
    }
}

fn sockets() -> config::Sockets {
    config::Sockets {
        mark: None,
        reuse_port: false,
        original_source: config::OriginalSource::Off,
        ipv6: true,
        keepalive: None,
        user_timeout: None,
        tunnel_timeout: Some(Duration::from_secs(15)),
        connect_timeout: Duration::from_secs(1),
        backlog: 16,
    }
}

fn tunnel() -> config::Tunnel {
    config::Tunnel {
        stream_window: 4 << 20,
        connection_window: 16 << 20,
        frame_size: 1 << 20,
        pool_max_streams: 100,
        pool_idle_release: Duration::from_secs(300),
        max_age: config::MaxAge::Unlimited,
        server_max_streams: 200,
        server_max_header_bytes: 65_536,
        client_max_header_bytes: 16_384,
        max_control_frames: 1000,
        max_resets: 500,
        handshake_timeout: Duration::from_secs(10),
        preface_timeout: Duration::from_secs(10),
        answer_timeout: Duration::from_secs(20),
        ping_interval: Duration::from_secs(10),
        ping_timeout: Duration::from_secs(20),
    }
}

async fn socket() -> (TcpStream, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let connecting = TcpStream::connect(listener.local_addr().expect("address"));
    let (accepted, _client) = tokio::join!(listener.accept(), connecting);
    accepted.expect("accepted")
}

#[tokio::test]
async fn futures_of_open_flows_keep_their_budget() {
    let pod = pod();
    let (stream, peer) = socket().await;
    let outbound = outbound::carry(Arc::clone(&pod), stream, peer);
    let (stream, peer) = socket().await;
    let plaintext = plaintext::carry(Arc::clone(&pod), stream, peer);
    let inbound = inbound::budget(&pod);
    let sizes = [size_of_val(&outbound), size_of_val(&plaintext), inbound];
    assert!(
        sizes.iter().all(|size| *size <= BUDGET),
        "{sizes:?} bytes, budget {BUDGET}"
    );
}

#[tokio::test]
async fn a_connection_of_an_unknown_pod_ends_after_the_wait() {
    let pod = pod();
    let (stream, peer) = socket().await;
    outbound::carry(Arc::clone(&pod), stream, peer).await;
    assert!(pod.flows().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_own_record_is_waited_for_within_the_deadline_of_the_connection() {
    let (pod, began) = (pod(), Instant::now());
    let wait = pod.settings().workload_wait;
    assert_eq!(pod.workload().await, None);
    assert_eq!(began.elapsed(), wait);
    let sooner = Instant::now() + wait / 2;
    assert_eq!(pod.workload_by(sooner).await, None);
    assert_eq!(Instant::now(), sooner);
    assert_eq!(pod.workload_by(Instant::now() + 2 * wait).await, None);
    assert_eq!(Instant::now(), sooner + wait);
}

/// Bytes of the future of one open flow.
const BUDGET: usize = 480;
