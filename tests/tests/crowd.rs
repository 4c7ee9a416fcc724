//! More connections of one client to one pod than the range of ephemeral ports is wide.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::HashSet, net::IpAddr, sync::Arc};

use nix::sys::resource::{Resource, getrlimit};
use testkit::{
    Netns, NodeRun, Pod, Proxy, ProxyOptions, Session,
    raw::{RawClient, Tunnel},
    stage::ForeignClient,
    traffic, wait,
};
use tokio::{io::AsyncWriteExt as _, net::TcpListener, sync::mpsc, task::JoinSet, time::Instant};

/// Unless [`SIZE`] says otherwise.
const CONNECTIONS: usize = 30_000;
/// The variable that sets the number of connections.
const SIZE: &str = "CULVERT_TEST_CONNECTIONS";
/// Streams that the proxy admits on one HTTP/2 connection.
const STREAMS: usize = 200;
/// HTTP/2 connections that are set up at the same time.
const CALLERS: usize = 8;
const FIRST_PORT: u16 = 8080;

#[expect(
    clippy::disallowed_methods,
    reason = "test runs are steered by the environment"
)]
fn connections() -> usize {
    std::env::var(SIZE).map_or(CONNECTIONS, |size| size.parse().expect(SIZE))
}

/// Proxies that it takes to hold `count` upstream connections, with a quarter of the descriptors to spare: the kernel deals
/// clients out to them by chance.
fn proxies_for(count: usize) -> usize {
    let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let each = usize::try_from(limit / 4 * 3).unwrap();
    count.div_ceil(each)
}

/// A further proxy beside the first one, as during an upgrade: they share the ports of the pod.
async fn join<'a>(
    first: &mut NodeRun<'_>,
    netns: &'a Netns,
    options: &ProxyOptions,
    pod: &Pod,
) -> (Proxy<'a>, Session) {
    let proxy = options.start_in(netns, "another").unwrap();
    let session = wait::soon("another proxy connects", first.agent.accept())
        .await
        .unwrap();
    session.snapshot(&[pod]).await.unwrap();
    proxy.ready().await;
    (proxy, session)
}

/// Tunnels to ports of the application, some of them on each HTTP/2 connection.
struct Crowd {
    _clients: Vec<RawClient>,
    tunnels: Vec<Tunnel>,
}

impl Crowd {
    /// Opens `count` tunnels; the ports are dealt out evenly.
    async fn open(foreign: &Arc<ForeignClient>, count: usize, ports: &[u16]) -> Self {
        let mut waiting = (0..count).step_by(STREAMS).zip(ports.iter().cycle());
        let (mut calls, mut clients, mut tunnels) = (JoinSet::new(), Vec::new(), Vec::new());
        loop {
            while calls.len() < CALLERS
                && let Some((from, port)) = waiting.next()
            {
                let (foreign, streams) = (Arc::clone(foreign), STREAMS.min(count - from));
                calls.spawn(call(foreign, *port, streams));
            }
            let Some(opened) = calls.join_next().await else {
                break;
            };
            let (client, streams) = opened.unwrap();
            clients.push(client);
            tunnels.extend(streams);
        }
        Self {
            _clients: clients,
            tunnels,
        }
    }
}

async fn call(foreign: Arc<ForeignClient>, port: u16, streams: usize) -> (RawClient, Vec<Tunnel>) {
    let (client, to) = (foreign.client().await, foreign.target(port));
    let mut tunnels = Vec::with_capacity(streams);
    for _ in 0..streams {
        let tunnel = client.tunnel(&to).await.unwrap();
        assert_eq!(tunnel.status.as_u16(), 200);
        tunnels.push(tunnel);
    }
    (client, tunnels)
}

/// An application that lets `count` connections come before it meets the first, and tells each whom it sees.
struct Application {
    ports: Vec<u16>,
    listeners: Vec<TcpListener>,
}

impl Application {
    fn new(pod: &Pod, count: usize, ports: usize) -> Self {
        pod.netns()
            .sysctl("core/somaxconn", &count.to_string())
            .unwrap();
        let ports: Vec<u16> = (FIRST_PORT..).take(ports).collect();
        let room = i32::try_from(count).unwrap();
        let listen = |port: &u16| traffic::listen_for(pod.netns(), pod.at(*port), room).unwrap();
        let listeners = ports.iter().map(listen).collect();
        Self { ports, listeners }
    }

    /// Meets `count` clients, greets each and lets it go; yields the addresses that it saw.
    async fn greet(self, count: usize) -> HashSet<IpAddr> {
        let (met_tx, mut met_rx) = mpsc::channel(STREAMS);
        let mut tasks = JoinSet::new();
        for listener in self.listeners {
            tasks.spawn(greet_all(listener, met_tx.clone()));
        }
        let mut seen = HashSet::new();
        for _ in 0..count {
            let client = wait::soon("a connection waits", met_rx.recv()).await;
            seen.insert(client.unwrap());
        }
        seen
    }
}

/// Long enough that the client's library does not take many unread ones for an attack.
fn greeting(client: IpAddr) -> Vec<u8> {
    format!("{client:<256}").into_bytes()
}

async fn greet_all(listener: TcpListener, met: mpsc::Sender<IpAddr>) {
    loop {
        let (mut stream, client) = listener.accept().await.unwrap();
        stream.write_all(&greeting(client.ip())).await.unwrap();
        drop(stream);
        met.send(client.ip()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_thousand_connections_of_one_client_keep_its_address() {
    let (count, start) = (connections(), Instant::now());
    let foreign = Arc::new(ForeignClient::new().unwrap());
    let world = &foreign.world;
    let node = world.node(0);
    foreign
        .mesh()
        .write(&ProxyOptions::mesh_file(world))
        .unwrap();
    let options = ProxyOptions::new(world, node).env("RUST_LOG", "warn");
    let proxies = proxies_for(count);
    let beside: Vec<Netns> = (1..proxies)
        .map(|_| node.second_proxy_netns().unwrap())
        .collect();
    let mut first = NodeRun::start(world, node, &options, &[&foreign.api])
        .await
        .unwrap();
    let mut others = Vec::new();
    for netns in &beside {
        others.push(join(&mut first, netns, &options, &foreign.api).await);
    }
    // The ports of one client towards one port of the application just suffice for one proxy. Several know nothing of each
    // other's choice and meet too often when few are left, so there the application listens at as many ports.
    let application = Application::new(&foreign.api, count, proxies);

    let crowd = Crowd::open(&foreign, count, &application.ports).await;
    let opened = start.elapsed();
    let all = || std::iter::once(&first.proxy).chain(others.iter().map(|(proxy, _)| proxy));
    let files: Vec<usize> = all().map(|proxy| proxy.open_files().unwrap()).collect();
    let memory: Vec<u64> = all()
        .map(|proxy| proxy.resident_bytes().unwrap() >> 20)
        .collect();
    assert!(
        files.iter().sum::<usize>() >= count,
        "{files:?} descriptors"
    );

    let client = foreign.peer.ip4();
    assert_eq!(application.greet(count).await, HashSet::from([client]));
    for mut tunnel in crowd.tunnels {
        assert_eq!(tunnel.read_to_end().await.unwrap(), greeting(client));
    }
    report(&format!(
        "{count} connections open after {opened:?}, greeted after {:?}; of each proxy {files:?} descriptors, {memory:?} MiB",
        start.elapsed()
    ));
}

#[expect(clippy::print_stderr, reason = "figures for those who choose the size")]
fn report(figures: &str) {
    eprintln!("{figures}");
}
