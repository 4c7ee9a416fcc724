//! The agent hands pods over, and the proxy serves them: the conversation, and the life of a pod.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use nix::unistd::{Uid, fchown};
use testkit::{
    Agent, Mesh, Netns, NodeRun, Pod, PodSpec, Proxy, ProxyOptions, Session, World,
    traffic::{self, Behaviour},
    wait,
    zds::{AddWorkload, DelWorkload, Request, SnapshotSent, WorkloadInfo},
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::Instant,
};

const LISTENERS: [u16; 4] = [15001, 15006, 15008, DNS];
const DNS: u16 = 15053;
const OTHER_USER: u32 = 65_534;

/// A node whose proxy has said hello and waits for the snapshot.
async fn connected<'a>(world: &'a World, mesh: &Mesh) -> (Agent, Proxy<'a>, Session) {
    mesh.write(&ProxyOptions::mesh_file(world)).unwrap();
    let node = world.node(0);
    let options = ProxyOptions::new(world, node).env("ISTIO_META_DNS_CAPTURE", "true");
    let run = NodeRun::connect(world, node, &options).await.unwrap();
    (run.agent, run.proxy, run.session)
}

/// As [`connected`], of a world with one captured pod.
async fn with_one_pod(world: &World) -> (Arc<Pod>, Agent, Proxy<'_>, Session) {
    let pod = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let (agent, proxy, session) = connected(world, &Mesh::of(&[&pod])).await;
    (pod, agent, proxy, session)
}

/// Whether anything accepts a connection at a loopback port of the namespace.
async fn listens(netns: &Netns, port: u16) -> bool {
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    // One that is not carried is reset.
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    !traffic::connect(netns, to).await.is_err_and(refused)
}

async fn served(netns: &Netns) -> bool {
    for port in LISTENERS {
        if !listens(netns, port).await {
            return false;
        }
    }
    true
}

async fn becomes_unserved(netns: &Netns) {
    for port in LISTENERS {
        let gone = async || (!listens(netns, port).await).then_some(());
        wait::until(wait::SOON, "the listeners are closed", gone).await;
    }
}

/// Waits until a metric of the pods that the proxy serves has this value.
async fn counted(proxy: &Proxy<'_>, metric: &str, count: usize) {
    let name = format!("workload_manager_{metric}");
    proxy.metric(&name, &[], |now| now == count as f64).await;
}

/// Whether both sockets for names are bound at this loopback address.
async fn serves_names(netns: &Netns, loopback: IpAddr) -> bool {
    let at = SocketAddr::new(loopback, DNS);
    let bound = netns.run(|| UdpSocket::bind(at));
    bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
        && traffic::connect(netns, at).await.is_ok()
}

/// Holds a port that the proxy needs in the pod. Where there are other users it is one of them, who would share the port: users do
/// not share with one another.
fn squat(pod: &Pod) -> TcpListener {
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 15008);
    let socket = traffic::tcp_socket(pod.netns(), any).unwrap();
    socket.set_only_v6(false).unwrap();
    if fchown(&socket, Some(Uid::from_raw(OTHER_USER)), None).is_ok() {
        socket.set_reuse_port(true).unwrap();
    }
    socket.bind(&any.into()).unwrap();
    socket.listen(1).unwrap();
    TcpListener::from_std(socket.into()).unwrap()
}

/// An answer that comes within a second.
async fn prompt<T>(answer: impl Future<Output = T>) -> T {
    wait::within(Duration::from_secs(1), "the answer", answer).await
}

async fn files_return_to(proxy: &Proxy<'_>, count: usize) {
    let back = async || (proxy.open_files().unwrap() <= count).then_some(());
    wait::until(
        wait::SOON,
        &format!("the proxy has {count} descriptors again"),
        back,
    )
    .await;
}

#[tokio::test]
async fn the_proxy_says_hello_and_a_pod_is_served_when_its_add_is_acknowledged() {
    let world = World::new(1).unwrap();
    let (pod, _agent, proxy, session) = with_one_pod(&world).await;
    assert_eq!(session.hello, [0x08, 0x01]);
    session.silent(Duration::from_millis(700)).await.unwrap();
    assert!(!proxy.is_ready().await, "no snapshot yet");

    prompt(session.add(&pod)).await.unwrap().unwrap();
    assert!(
        served(pod.netns()).await,
        "acknowledged before the listeners were bound"
    );
    for loopback in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
        assert!(serves_names(pod.netns(), loopback).await, "{loopback}");
    }
    let unknown = prompt(session.keep("some-pod-that-it-never-saw")).await;
    unknown.unwrap().unwrap();
    session
        .send(Request::SnapshotSent(SnapshotSent {}), &[])
        .await
        .unwrap();
    let answer = prompt(session.receive(wait::SOON)).await.unwrap();
    assert_eq!(answer, [0x0a, 0x00]);
    proxy.ready().await;

    let (files, again) = (proxy.open_files().unwrap(), Session::add_request(&pod));
    for _ in 0..5 {
        session
            .send(again.clone(), &[pod.netns().as_fd()])
            .await
            .unwrap();
        session.answer().await.unwrap().unwrap();
    }
    files_return_to(&proxy, files).await;
    assert!(served(pod.netns()).await);
    session.del("never heard of").await.unwrap().unwrap();
    session.silent(Duration::from_millis(300)).await.unwrap();
}

#[tokio::test]
async fn a_recreated_sandbox_takes_the_pod_along() {
    let world = World::new(1).unwrap();
    let old = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let new = world.node(0).pod(old.spec()).unwrap();
    let (_agent, proxy, session) = connected(&world, &Mesh::of(&[&old])).await;
    session.snapshot(&[&old]).await.unwrap();
    proxy.ready().await;
    session.add(&new).await.unwrap().unwrap();
    assert!(served(new.netns()).await);
    becomes_unserved(old.netns()).await;
    counted(&proxy, "active_proxy_count", 1).await;
}

#[tokio::test]
async fn a_pod_that_cannot_be_bound_is_reported_and_tried_again() {
    let world = World::new(1).unwrap();
    let (pod, _agent, proxy, session) = with_one_pod(&world).await;
    session.snapshot(&[]).await.unwrap();
    proxy.ready().await;
    let squatter = squat(&pod);

    session
        .send(Session::add_request(&pod), &[pod.netns().as_fd()])
        .await
        .unwrap();
    let answer = session.receive(wait::SOON).await.unwrap();
    assert!(
        answer.len() > 2 && answer.len() < 1000,
        "{}",
        String::from_utf8_lossy(&answer)
    );
    proxy.unready().await;
    counted(&proxy, "pending_proxy_count", 1).await;
    assert!(
        !listens(pod.netns(), 15001).await,
        "one failure fails the whole pod"
    );

    session.silent(Duration::from_millis(700)).await.unwrap();
    drop(squatter);
    let bound = async || served(pod.netns()).await.then_some(());
    wait::until(Duration::from_secs(6), "the pod is tried again", bound).await;
    proxy.ready().await;
    counted(&proxy, "pending_proxy_count", 0).await;
}

#[tokio::test]
async fn a_pending_pod_can_be_deleted_or_replaced() {
    let world = World::new(1).unwrap();
    let dead = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let good = world.node(0).pod(dead.spec()).unwrap();
    let (_agent, proxy, session) = connected(&world, &Mesh::of(&[&dead])).await;
    session.snapshot(&[]).await.unwrap();
    let squatter = squat(&dead);

    let shown = async || {
        let dump = proxy.document("/config_dump").await.unwrap();
        dump["workloadState"][dead.uid()].clone()
    };
    session.add(&dead).await.unwrap().unwrap_err();
    proxy.unready().await;
    let pending = shown().await;
    assert_eq!(pending["state"], "Pending", "{pending}");
    assert!(pending.get("connections").is_none(), "{pending}");
    session.del(dead.uid()).await.unwrap().unwrap();
    proxy.ready().await;
    assert!(shown().await.is_null());

    session.add(&dead).await.unwrap().unwrap_err();
    session.add(&good).await.unwrap().unwrap();
    proxy.ready().await;
    drop(squatter);
    // Longer than the pause between two tries: a try of the dead sandbox would now succeed and take the good listeners away.
    session.silent(Duration::from_secs(6)).await.unwrap();
    assert!(served(good.netns()).await);
    assert!(!listens(dead.netns(), 15008).await);
}

/// Two captured pods, and one outside with an application.
struct Trio {
    world: World,
    kept: Arc<Pod>,
    other: Arc<Pod>,
    outside: Arc<Pod>,
}

impl Trio {
    fn new() -> Self {
        let world = World::new(1).unwrap();
        let pod = |spec| world.node(0).pod(&spec).unwrap();
        let (kept, other) = (
            pod(PodSpec::captured("kept")),
            pod(PodSpec::captured("other")),
        );
        let outside = pod(PodSpec::plain("outside"));
        Self {
            world,
            kept,
            other,
            outside,
        }
    }

    async fn connected(&self) -> (Agent, Proxy<'_>, Session) {
        connected(&self.world, &Mesh::of(&[&self.kept, &self.other])).await
    }

    /// More connections of `other`: by tunnel and from a tunnel, from outside the mesh, and one for names.
    async fn more_of_other(&self) -> Others {
        let Self {
            kept,
            other,
            outside,
            ..
        } = self;
        let servers = [kept, other].map(|pod| pod.serve(8080, Behaviour::Echo).unwrap());
        let mut streams = Vec::new();
        for (from, to) in [(other, kept), (kept, other), (outside, other)] {
            let mut stream = from.connect(to.at(8080)).await.unwrap();
            traffic::ping(&mut stream, b"open").await.unwrap();
            streams.push(stream);
        }
        let names = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), DNS);
        streams.push(other.connect(names).await.unwrap());
        Others {
            streams,
            _servers: servers,
        }
    }

    /// Has both captured pods served and opens a connection of each to the application.
    async fn hold(&self, session: &Session) -> Held {
        session.snapshot(&[&self.kept, &self.other]).await.unwrap();
        let server = self.outside.serve(7000, Behaviour::Echo).unwrap();
        let mut kept = self.kept.connect(server.address).await.unwrap();
        let mut other = self.other.connect(server.address).await.unwrap();
        traffic::ping(&mut kept, b"one").await.unwrap();
        traffic::ping(&mut other, b"two").await.unwrap();
        Held {
            kept,
            other,
            server,
        }
    }
}

/// Connections of one pod, and the applications at their ends.
struct Others {
    streams: Vec<TcpStream>,
    _servers: [traffic::Server; 2],
}

/// A connection of each captured pod.
struct Held {
    kept: TcpStream,
    other: TcpStream,
    server: traffic::Server,
}

#[tokio::test]
async fn a_new_snapshot_ends_what_it_does_not_name_and_leaves_the_rest_alone() {
    let trio = Trio::new();
    let (mut agent, proxy, session) = trio.connected().await;
    let mut held = trio.hold(&session).await;
    proxy.ready().await;

    drop(session);
    let session = wait::soon("the proxy comes back", agent.accept())
        .await
        .unwrap();
    proxy.unready().await;
    traffic::ping(&mut held.other, b"still here").await.unwrap();
    session.keep(trio.kept.uid()).await.unwrap().unwrap();
    session.snapshot_sent().await.unwrap().unwrap();
    traffic::closed(&mut held.other, wait::SOON).await.unwrap();
    becomes_unserved(trio.other.netns()).await;
    traffic::ping(&mut held.kept, b"survives").await.unwrap();
    proxy.ready().await;
}

#[tokio::test]
async fn captured_pods_work_on_while_the_agent_is_away() {
    let trio = Trio::new();
    let (agent, proxy, session) = trio.connected().await;
    let mut held = trio.hold(&session).await;
    proxy.ready().await;

    drop((agent, session));
    proxy.unready().await;
    for word in [b"at first", b"later on"] {
        traffic::ping(&mut held.kept, word).await.unwrap();
        let answer = trio.other.ask(held.server.address, word).await;
        assert_eq!(answer.unwrap(), word);
        tokio::time::sleep(wait::outage()).await;
    }

    let mut agent =
        Agent::bind(&ProxyOptions::agent_socket(&trio.world, trio.world.node(0))).unwrap();
    let back = wait::within(
        Duration::from_secs(16),
        "the proxy finds the new socket",
        agent.accept(),
    );
    let session = back.await.unwrap();
    session.snapshot(&[&trio.kept, &trio.other]).await.unwrap();
    proxy.ready().await;
    traffic::ping(&mut held.kept, b"survived").await.unwrap();
}

#[tokio::test]
async fn a_deleted_pod_loses_its_connections_at_once_and_its_namespace_is_free() {
    let trio = Trio::new();
    let (_agent, proxy, session) = trio.connected().await;
    let mut held = trio.hold(&session).await;
    let mut others = trio.more_of_other().await;

    let asked = Instant::now();
    session.del(trio.other.uid()).await.unwrap().unwrap();
    for stream in others.streams.iter_mut().chain([&mut held.other]) {
        traffic::closed(stream, Duration::from_secs(2))
            .await
            .unwrap();
    }
    assert!(asked.elapsed() < Duration::from_secs(2));
    becomes_unserved(trio.other.netns()).await;
    let (device, inode) = trio.other.netns().id();
    let free = async || (!holds_netns(proxy.pid(), device, inode)).then_some(());
    wait::until(wait::SOON, "no descriptor of the namespace is left", free).await;
    let socketless = async || {
        let ss = ["-H", "-t", "-u", "-a", "-n", "-p"];
        let sockets = trio.other.netns().command("ss", &ss, "").unwrap();
        let owner = format!("pid={},", proxy.pid());
        (!sockets.contains(&owner)).then_some(())
    };
    wait::until(wait::SOON, "no socket is left there", socketless).await;
    traffic::ping(&mut held.kept, b"the other pod lives")
        .await
        .unwrap();
}

fn holds_netns(pid: u32, device: u64, inode: u64) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let files = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten();
    let mut metas = files.filter_map(|file| std::fs::metadata(file.path()).ok());
    metas.any(|meta| (meta.dev(), meta.ino()) == (device, inode))
}

/// What a broken agent may send.
fn slips(pod: &Pod) -> Vec<(&'static str, Vec<u8>, usize)> {
    use prost::Message as _;
    use testkit::zds::WorkloadRequest;
    let packet = |request| {
        WorkloadRequest {
            payload: Some(request),
        }
        .encode_to_vec()
    };
    let bare = AddWorkload {
        uid: "bare".into(),
        workload_info: None,
    };
    vec![
        ("2000 bytes", vec![0x0a; 2000], 0),
        (
            "add without descriptor",
            packet(Session::add_request(pod)),
            0,
        ),
        (
            "add with two descriptors",
            packet(Session::add_request(pod)),
            2,
        ),
        (
            "del with a descriptor",
            packet(Request::Del(DelWorkload { uid: "x".into() })),
            1,
        ),
        ("garbage", vec![0xff, 0xfe, 0xfd, 0x00, 0x17], 0),
        ("garbage with a descriptor", vec![0xff, 0xfe, 0xfd], 1),
        ("unknown request", vec![0x3a, 0x02, 0x0a, 0x00], 0),
        ("many descriptors", packet(Session::add_request(pod)), 20),
        ("add without workload info", packet(Request::Add(bare)), 1),
    ]
}

#[tokio::test]
async fn no_slip_of_the_agent_stops_the_proxy_or_leaks_a_descriptor() {
    let world = World::new(1).unwrap();
    let (pod, mut agent, proxy, mut session) = with_one_pod(&world).await;
    session.snapshot(&[]).await.unwrap();
    proxy.ready().await;
    let files = proxy.open_files().unwrap();
    for (slip, packet, count) in slips(&pod) {
        let fds: Vec<BorrowedFd<'_>> = vec![pod.netns().as_fd(); count];
        session.send_raw(&packet, &fds).await.unwrap();
        if let Ok(answer) = session.answer().await {
            assert!(answer.is_err(), "{slip} was taken");
        }
        drop(session);
        session = wait::soon(slip, agent.accept()).await.unwrap();
        session.snapshot(&[]).await.unwrap();
        proxy.ready().await;
    }
    // A second end of the snapshot, too.
    let _ = session.snapshot_sent().await;
    drop(session);
    let session = wait::soon("back after two snapshot ends", agent.accept())
        .await
        .unwrap();
    session.snapshot(&[]).await.unwrap();
    files_return_to(&proxy, files).await;
    session.add(&pod).await.unwrap().unwrap();
    assert!(served(pod.netns()).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_adds_back_to_back_are_answered_in_order() {
    const COUNT: usize = 200;
    let world = World::new(1).unwrap();
    let (_agent, proxy, session) = connected(&world, &Mesh::default()).await;
    let sandboxes: Vec<Netns> = (0..COUNT).map(|_| Netns::new().unwrap()).collect();
    let before = Instant::now();
    let send = async {
        for (index, netns) in sandboxes.iter().enumerate() {
            let info = WorkloadInfo {
                name: format!("pod-{index}"),
                namespace: "shop".into(),
                service_account: "default".into(),
            };
            let add = AddWorkload {
                uid: format!("uid-{index}"),
                workload_info: Some(info),
            };
            session
                .send(Request::Add(add), &[netns.as_fd()])
                .await
                .unwrap();
        }
    };
    let read = async {
        for _ in 0..COUNT {
            session.answer().await.unwrap().unwrap();
        }
    };
    tokio::join!(send, read);
    assert!(
        before.elapsed() < Duration::from_secs(5),
        "{:?}",
        before.elapsed()
    );
    session.snapshot_sent().await.unwrap().unwrap();
    proxy.ready().await;
    counted(&proxy, "active_proxy_count", COUNT).await;
    counted(&proxy, "proxies_started_total", COUNT).await;
}

#[tokio::test]
async fn ipv6_can_be_left_out() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let web = node.pod(&PodSpec::captured("web")).unwrap();
    let outside = node.pod(&PodSpec::plain("outside")).unwrap();
    let mesh = ProxyOptions::mesh_file(&world);
    Mesh::of(&[&web]).write(&mesh).unwrap();
    let options = ProxyOptions::new(&world, node).env("IPV6_ENABLED", "false");
    let _run = NodeRun::start(&world, node, &options, &[&web])
        .await
        .unwrap();
    let app = outside.serve(7000, Behaviour::Echo).unwrap();
    assert_eq!(web.ask(app.address, b"four").await.unwrap(), b"four");
    // What is captured all the same fails, and does not pass the mesh by.
    let refused = web.connect(app.address6).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn pods_without_ipv6_and_with_bindv6only_are_served() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let old = node.pod(&PodSpec::captured("old")).unwrap();
    let odd = node.pod(&PodSpec::captured("odd")).unwrap();
    let outside = node.pod(&PodSpec::plain("outside")).unwrap();
    old.netns()
        .sysctl("ipv6/conf/lo/disable_ipv6", "1")
        .unwrap();
    odd.netns().sysctl("ipv6/bindv6only", "1").unwrap();
    let (_agent, proxy, session) = connected(&world, &Mesh::of(&[&old, &odd])).await;
    session.snapshot(&[&old, &odd]).await.unwrap();
    proxy.ready().await;
    let app = outside.serve(7000, Behaviour::Whoami).unwrap();
    for pod in [&old, &odd] {
        let seen = pod.seen_as(app.address).await.unwrap();
        assert_eq!(seen.ip(), pod.ip4());
        let line = proxy.log().wait("access line", |line| {
            line.is_access("connection complete")
                && line
                    .field("src.addr")
                    .starts_with(&format!("{}:", pod.ip4()))
        });
        assert_eq!(line.await.field("dst.addr"), app.address.to_string());
    }
}
