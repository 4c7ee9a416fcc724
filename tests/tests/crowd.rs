//! More connections of one client to one pod than the range of ephemeral ports is wide.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit};
use testkit::{
    Netns, NodeRun, Pod, Proxy, ProxyOptions, Session,
    raw::{RawClient, Tunnel},
    stage::ForeignClient,
    sys::Running,
    traffic, wait,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::TcpListener,
    process::{ChildStdin, ChildStdout},
    sync::mpsc,
    task::JoinSet,
    time::Instant,
};

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

/// Processes that it takes to hold `count` sockets, with a quarter of the descriptors to spare: the kernel deals clients out to
/// proxies by chance.
fn processes_for(count: usize) -> usize {
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

/// A line, long enough that the client's library does not take many unread ones for an attack.
fn greeting(client: IpAddr) -> Vec<u8> {
    format!("{client:<255}\n").into_bytes()
}

async fn greet_all(listener: TcpListener, met: mpsc::Sender<IpAddr>) {
    loop {
        let (mut stream, client) = listener.accept().await.unwrap();
        stream.write_all(&greeting(client.ip())).await.unwrap();
        drop(stream);
        met.send(client.ip()).await.unwrap();
    }
}

/// The proxies of one node that together have descriptors enough.
struct Proxies<'a> {
    first: NodeRun<'a>,
    others: Vec<(Proxy<'a>, Session)>,
}

impl<'a> Proxies<'a> {
    async fn start(foreign: &'a ForeignClient, beside: &'a [Netns]) -> Self {
        let (world, node) = (&foreign.world, foreign.world.node(0));
        let mesh = foreign.mesh();
        mesh.write(&ProxyOptions::mesh_file(world)).unwrap();
        let options = ProxyOptions::new(world, node).env("RUST_LOG", "warn");
        // Clients that come faster than they are accepted would wait for a second each time the queue is full.
        let options = options.env("LISTEN_BACKLOG", "4096");
        let first = NodeRun::start(world, node, &options, &[&foreign.api]).await;
        let mut first = first.unwrap();
        let mut others = Vec::new();
        for netns in beside {
            others.push(join(&mut first, netns, &options, &foreign.api).await);
        }
        Self { first, others }
    }

    fn all(&self) -> impl Iterator<Item = &Proxy<'a>> {
        let others = self.others.iter().map(|(proxy, _)| proxy);
        std::iter::once(&self.first.proxy).chain(others)
    }

    /// Checks that they have so many sockets open, and tells what each takes for it.
    fn hold(&self, sockets: usize) -> String {
        let files: Vec<usize> = self.all().map(|it| it.open_files().unwrap()).collect();
        assert!(files.iter().sum::<usize>() >= sockets, "{files:?}");
        let memory = self.all().map(|it| it.resident_bytes().unwrap() >> 20);
        let memory: Vec<u64> = memory.collect();
        format!("each proxy has {files:?} descriptors and {memory:?} MiB")
    }
}

/// Namespaces for as many proxies, but the first.
fn beside(foreign: &ForeignClient, proxies: usize) -> Vec<Netns> {
    let more = || foreign.world.node(0).second_proxy_netns().unwrap();
    (1..proxies).map(|_| more()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_thousand_connections_of_one_client_keep_its_address() {
    let (count, start) = (connections(), Instant::now());
    let foreign = Arc::new(ForeignClient::new().unwrap());
    let beside = beside(&foreign, processes_for(count));
    let proxies = Proxies::start(&foreign, &beside).await;
    // The ports of one client towards one port of the application just suffice for one proxy. Several know nothing of each
    // other's choice and meet too often when few are left, so there the application listens at as many ports.
    let application = Application::new(&foreign.api, count, proxies.all().count());

    let crowd = Crowd::open(&foreign, count, &application.ports).await;
    let opened = start.elapsed();
    let held = proxies.hold(count);

    let client = foreign.peer.ip4();
    assert_eq!(application.greet(count).await, HashSet::from([client]));
    for mut tunnel in crowd.tunnels {
        assert_eq!(tunnel.read_to_end().await.unwrap(), greeting(client));
    }
    let greeted = start.elapsed();
    report(&format!(
        "{count} tunnels open after {opened:?}, greeted after {greeted:?}; {held}"
    ));
}

/// Opens connections to a host and port, says so, and reads a line from each once it is told to; then it tells which lines it read.
const CALLER: &str = r#"
open=()
for ((i = 0; i < $1; i++)); do
    exec {fd}<>"/dev/tcp/$2/$3" || exit 1
    open+=("$fd")
done
echo open
read -r
for fd in "${open[@]}"; do
    read -r line <&"$fd" || exit 1
    [[ $line == "$last" ]] || echo "$line"
    last=$line
done
echo end
"#;

/// A process that has plaintext connections of its own.
struct Caller {
    says: Lines<BufReader<ChildStdout>>,
    tell: ChildStdin,
    _running: Running,
}

impl Caller {
    /// Has it open `count` connections.
    fn start(pod: &Pod, count: usize, to: SocketAddr) -> Self {
        let (ip, port) = (to.ip().to_string(), to.port().to_string());
        let mut command = Command::new("bash");
        command.args(["-c", CALLER, "caller", &count.to_string(), &ip, &port]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut running = pod.netns().spawn(command).unwrap();
        Self {
            says: BufReader::new(running.child.stdout.take().unwrap()).lines(),
            tell: running.child.stdin.take().unwrap(),
            _running: running,
        }
    }

    async fn next(&mut self) -> String {
        let line = wait::within(PATIENCE, "the caller goes on", self.says.next_line());
        line.await
            .unwrap()
            .expect("a connection of the caller failed")
    }

    /// All that its connections were told.
    async fn heard(mut self) -> HashSet<String> {
        self.tell.write_all(b"\n").await.unwrap();
        let mut heard = HashSet::new();
        loop {
            let line = self.next().await;
            if line == "end" {
                return heard;
            }
            heard.insert(line);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_do_thirty_thousand_in_plaintext() {
    let (count, start) = (connections(), Instant::now());
    let foreign = ForeignClient::new().unwrap();
    // Two sockets for each.
    let proxies = processes_for(2 * count);
    let beside = beside(&foreign, proxies);
    let proxies = Proxies::start(&foreign, &beside).await;
    let application = Application::new(&foreign.api, count, proxies.all().count());
    let shares = u16::try_from(processes_for(count).max(application.ports.len())).unwrap();
    let mut callers = Vec::new();
    for (index, port) in (0..shares).zip(application.ports.iter().cycle()) {
        // The rules send connections to all ports of the pod to one port of the proxy, so what two of them come from must differ.
        let from = CALLERS_PORTS / shares * index;
        let range = format!(
            "{} {}",
            from + FIRST_OF_CALLERS,
            from + FIRST_OF_CALLERS + CALLERS_PORTS / shares - 1
        );
        foreign
            .peer
            .netns()
            .sysctl("ipv4/ip_local_port_range", &range)
            .unwrap();
        let share = |index: u16| count * usize::from(index) / usize::from(shares);
        let to = foreign.api.at(*port);
        let mut caller = Caller::start(&foreign.peer, share(index + 1) - share(index), to);
        assert_eq!(caller.next().await, "open");
        callers.push(caller);
    }
    let all_there = async || (opened(&proxies).await == count as f64).then_some(());
    wait::until(PATIENCE, "all connections are carried", all_there).await;
    let opened = start.elapsed();
    let held = proxies.hold(2 * count);

    let client = foreign.peer.ip4();
    assert_eq!(application.greet(count).await, HashSet::from([client]));
    for caller in callers {
        assert_eq!(caller.heard().await, HashSet::from([client.to_string()]));
    }
    let greeted = start.elapsed();
    report(&format!(
        "{count} connections open after {opened:?}, greeted after {greeted:?}; {held}"
    ));
}

/// Flows that have been opened at all proxies together.
async fn opened(proxies: &Proxies<'_>) -> f64 {
    let mut count = 0.0;
    for proxy in proxies.all() {
        let metrics = proxy.metrics().await.unwrap();
        count += metrics.sum("istio_tcp_connections_opened_total", &[]);
    }
    count
}

/// Where a client's own ports are, and where the proxy takes none.
const FIRST_OF_CALLERS: u16 = 32_768;
const CALLERS_PORTS: u16 = 32_767;
/// Thousands of connections take their time.
const PATIENCE: Duration = Duration::from_secs(120);

#[expect(clippy::print_stderr, reason = "figures for those who choose the size")]
fn report(figures: &str) {
    eprintln!("{figures}");
}
