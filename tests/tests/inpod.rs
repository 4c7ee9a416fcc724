//! The agent hands pods over, and the proxy serves them: the conversation, and the life of a pod.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use testkit::{
    Agent, Mesh, Netns, Pod, PodSpec, Proxy, ProxyOptions, Session, World,
    traffic::{self, Behaviour},
    wait,
    zds::{AddWorkload, DelWorkload, Request, SnapshotSent, WorkloadInfo},
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::Instant};

const LISTENERS: [u16; 3] = [15001, 15006, 15008];

/// A node whose proxy has said hello and waits for the snapshot.
async fn connected<'a>(world: &'a World, mesh: &Mesh) -> (Agent, Proxy<'a>, Session) {
    mesh.write(&ProxyOptions::mesh_file(world)).unwrap();
    let node = world.node(0);
    let mut agent = Agent::bind(&ProxyOptions::agent_socket(world, node)).unwrap();
    let proxy = ProxyOptions::new(world, node).start(node).unwrap();
    let session = wait::soon("the proxy connects", agent.accept())
        .await
        .unwrap();
    (agent, proxy, session)
}

/// Whether anything accepts a connection at a loopback port of the namespace.
async fn listens(netns: &Netns, port: u16) -> bool {
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    traffic::connect(netns, to).await.is_ok()
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
    let pod = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let (_agent, proxy, session) = connected(&world, &Mesh::of(&[&pod])).await;
    assert_eq!(session.hello, [0x08, 0x01]);
    session.silent(Duration::from_millis(700)).await.unwrap();
    assert!(!proxy.is_ready().await, "no snapshot yet");

    let asked = Instant::now();
    session.add(&pod).await.unwrap().unwrap();
    assert!(
        served(pod.netns()).await,
        "acknowledged before the listeners were bound"
    );
    session
        .keep("some-pod-that-it-never-saw")
        .await
        .unwrap()
        .unwrap();
    session
        .send(Request::SnapshotSent(SnapshotSent {}), &[])
        .await
        .unwrap();
    assert_eq!(session.receive(wait::SOON).await.unwrap(), [0x0a, 0x00]);
    assert!(
        asked.elapsed() < Duration::from_secs(3),
        "each answer within a second"
    );
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
    proxy
        .metric("workload_manager_active_proxy_count", &[], |count| {
            count == 1.0
        })
        .await;
}

#[tokio::test]
async fn a_pod_that_cannot_be_bound_is_reported_and_tried_again() {
    let world = World::new(1).unwrap();
    let pod = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let (_agent, proxy, session) = connected(&world, &Mesh::of(&[&pod])).await;
    session.snapshot(&[]).await.unwrap();
    proxy.ready().await;
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 15008);
    let squatter = traffic::listen(pod.netns(), any).unwrap();

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
    proxy
        .metric("workload_manager_pending_proxy_count", &[], |count| {
            count == 1.0
        })
        .await;
    assert!(
        !listens(pod.netns(), 15001).await,
        "one failure fails the whole pod"
    );

    drop(squatter);
    let bound = async || served(pod.netns()).await.then_some(());
    wait::until(Duration::from_secs(7), "the pod is tried again", bound).await;
    proxy.ready().await;
    proxy
        .metric("workload_manager_pending_proxy_count", &[], |count| {
            count == 0.0
        })
        .await;
}

#[tokio::test]
async fn a_pending_pod_can_be_deleted_or_replaced() {
    let world = World::new(1).unwrap();
    let dead = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let good = world.node(0).pod(dead.spec()).unwrap();
    let (_agent, proxy, session) = connected(&world, &Mesh::of(&[&dead])).await;
    session.snapshot(&[]).await.unwrap();
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 15008);
    let squatter = traffic::listen(dead.netns(), any).unwrap();

    session.add(&dead).await.unwrap().unwrap_err();
    proxy.unready().await;
    session.del(dead.uid()).await.unwrap().unwrap();
    proxy.ready().await;

    session.add(&dead).await.unwrap().unwrap_err();
    session.add(&good).await.unwrap().unwrap();
    proxy.ready().await;
    drop(squatter);
    // Longer than the pause between two tries: a try of the dead sandbox would now succeed and take the good listeners away.
    session.silent(Duration::from_secs(6)).await.unwrap();
    assert!(served(good.netns()).await);
    assert!(!listens(dead.netns(), 15008).await);
}

/// Two captured pods that hold a connection each to a pod outside.
struct Held {
    kept: Arc<Pod>,
    gone: Arc<Pod>,
    kept_stream: TcpStream,
    gone_stream: TcpStream,
    server: traffic::Server,
}

impl Held {
    async fn new(session: &Session, pods: [Arc<Pod>; 3]) -> Self {
        let [kept, gone, outside] = pods;
        session.snapshot(&[&kept, &gone]).await.unwrap();
        let server = outside.serve(7000, Behaviour::Echo).unwrap();
        let mut kept_stream = kept.connect(server.address).await.unwrap();
        let mut gone_stream = gone.connect(server.address).await.unwrap();
        traffic::ping(&mut kept_stream, b"one").await.unwrap();
        traffic::ping(&mut gone_stream, b"two").await.unwrap();
        Self {
            kept,
            gone,
            kept_stream,
            gone_stream,
            server,
        }
    }
}

#[tokio::test]
async fn a_new_snapshot_ends_what_it_does_not_name_and_leaves_the_rest_alone() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let pods = [
        PodSpec::captured("kept"),
        PodSpec::captured("gone"),
        PodSpec::plain("outside"),
    ]
    .map(|spec| node.pod(&spec).unwrap());
    let mesh = Mesh::of(&[&pods[0], &pods[1]]);
    let (mut agent, proxy, session) = connected(&world, &mesh).await;
    let mut held = Held::new(&session, pods).await;
    proxy.ready().await;

    drop(session);
    let session = wait::soon("the proxy comes back", agent.accept())
        .await
        .unwrap();
    proxy.unready().await;
    traffic::ping(&mut held.gone_stream, b"still here")
        .await
        .unwrap();
    session.keep(held.kept.uid()).await.unwrap().unwrap();
    session.snapshot_sent().await.unwrap().unwrap();
    traffic::closed(&mut held.gone_stream, wait::SOON)
        .await
        .unwrap();
    becomes_unserved(held.gone.netns()).await;
    traffic::ping(&mut held.kept_stream, b"survives")
        .await
        .unwrap();
    proxy.ready().await;
}

#[tokio::test]
async fn captured_pods_work_on_while_the_agent_is_away() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let pods = [
        PodSpec::captured("kept"),
        PodSpec::captured("other"),
        PodSpec::plain("outside"),
    ]
    .map(|spec| node.pod(&spec).unwrap());
    let mesh = Mesh::of(&[&pods[0], &pods[1]]);
    let (agent, proxy, session) = connected(&world, &mesh).await;
    let mut held = Held::new(&session, pods).await;
    proxy.ready().await;

    drop((agent, session));
    proxy.unready().await;
    traffic::ping(&mut held.kept_stream, b"established")
        .await
        .unwrap();
    assert_eq!(
        held.gone.ask(held.server.address, b"new").await.unwrap(),
        b"new"
    );

    let mut agent = Agent::bind(&ProxyOptions::agent_socket(&world, node)).unwrap();
    let back = wait::within(
        Duration::from_secs(16),
        "the proxy finds the new socket",
        agent.accept(),
    );
    let session = back.await.unwrap();
    session.snapshot(&[&held.kept, &held.gone]).await.unwrap();
    proxy.ready().await;
    traffic::ping(&mut held.kept_stream, b"survived")
        .await
        .unwrap();
}

#[tokio::test]
async fn a_deleted_pod_loses_its_connections_at_once_and_its_namespace_is_free() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let pods = [
        PodSpec::captured("kept"),
        PodSpec::captured("gone"),
        PodSpec::plain("outside"),
    ]
    .map(|spec| node.pod(&spec).unwrap());
    let mesh = Mesh::of(&[&pods[0], &pods[1]]);
    let (_agent, proxy, session) = connected(&world, &mesh).await;
    let Held {
        kept: _kept,
        gone,
        mut kept_stream,
        mut gone_stream,
        server,
    } = Held::new(&session, pods).await;

    let asked = Instant::now();
    session.del(gone.uid()).await.unwrap().unwrap();
    traffic::closed(&mut gone_stream, Duration::from_secs(2))
        .await
        .unwrap();
    assert!(asked.elapsed() < Duration::from_secs(2));
    becomes_unserved(gone.netns()).await;
    let (device, inode) = gone.netns().id();
    let free = async || (!holds_netns(proxy.pid(), device, inode)).then_some(());
    wait::until(wait::SOON, "no descriptor of the namespace is left", free).await;
    traffic::ping(&mut kept_stream, b"the other pod lives")
        .await
        .unwrap();
    drop(server);
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
    let pod = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let (mut agent, proxy, mut session) = connected(&world, &Mesh::of(&[&pod])).await;
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
    proxy
        .metric("workload_manager_active_proxy_count", &[], |count| {
            count == COUNT as f64
        })
        .await;
    proxy
        .metric("workload_manager_proxies_started_total", &[], |count| {
            count == COUNT as f64
        })
        .await;
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

#[tokio::test]
async fn a_connection_waits_for_the_record_of_its_own_pod() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let early = node.pod(&PodSpec::captured("early")).unwrap();
    let never = node.pod(&PodSpec::captured("never")).unwrap();
    let known = node.pod(&PodSpec::captured("known")).unwrap();
    let outside = node.pod(&PodSpec::plain("outside")).unwrap();
    let mut mesh = Mesh::of(&[&known]);
    let (_agent, proxy, session) = connected(&world, &mesh).await;
    session.snapshot(&[&early, &never, &known]).await.unwrap();
    proxy.ready().await;
    let app = outside.serve(7000, Behaviour::Echo).unwrap();

    let start = Instant::now();
    let mut waiting = early.connect(app.address).await.unwrap();
    let mut doomed = never.connect(app.address).await.unwrap();
    waiting.write_all(b"patience").await.unwrap();
    assert_eq!(
        known.ask(app.address, b"others go on").await.unwrap(),
        b"others go on"
    );
    assert_eq!(app.peers().len(), 1);
    mesh.pod(&early);
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    let answer = wait::within(
        Duration::from_secs(5),
        "the record lets it go",
        traffic::exchange(&mut waiting, b""),
    );
    assert_eq!(answer.await.unwrap(), b"patience");
    traffic::closed(&mut doomed, Duration::from_secs(8))
        .await
        .unwrap();
    let waited = start.elapsed();
    assert!(
        waited > Duration::from_secs(4) && waited < Duration::from_secs(8),
        "{waited:?}"
    );
    let failed = proxy
        .log()
        .wait("early rejection", |line| {
            line.is_access("connection failed")
        })
        .await;
    assert!(
        failed
            .field("error")
            .contains("failed to fetch information about local workload"),
        "{}",
        failed.raw
    );
}
