//! Two proxies on one node, as during an upgrade.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    io,
    net::{Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use nix::sys::signal::Signal;
use parking_lot::Mutex;
use testkit::{
    Mesh, NodeRun, Pod, PodSpec, ProxyOptions, World,
    traffic::{self, Behaviour, Server},
    wait,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Calls one after the other until told to stop; none may fail. Yields their number.
async fn call(client: Arc<Pod>, to: SocketAddr, stop: CancellationToken) -> usize {
    let mut count = 0;
    while !stop.is_cancelled() {
        let seen = client
            .seen_as(to)
            .await
            .expect("no connect is refused or reset");
        assert_eq!(seen.ip(), client.ip4());
        count += 1;
    }
    count
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_takes_over_without_a_lost_connection() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let client = node.pod(&PodSpec::plain("client")).unwrap();
    let pod = node.pod(&PodSpec::captured("api")).unwrap();
    Mesh::of(&[&pod, &client])
        .write(&ProxyOptions::mesh_file(&world))
        .unwrap();
    let options = ProxyOptions::new(&world, node);
    let mut old = NodeRun::start(&world, node, &options, &[&pod])
        .await
        .unwrap();
    let app = pod.serve(8080, Behaviour::Whoami).unwrap();
    let mut long = client.connect(app.address).await.unwrap();
    let mut greeting = vec![0; 64];
    assert!(long.read(&mut greeting).await.unwrap() > 0);

    let netns = node.second_proxy_netns().unwrap();
    let new = options.start_in(&netns, "successor").unwrap();
    let session = wait::soon("the successor connects", old.agent.accept())
        .await
        .unwrap();
    session.snapshot(&[&pod]).await.unwrap();
    new.ready().await;

    let (mut calls, stop) = (JoinSet::new(), CancellationToken::new());
    for _ in 0..4 {
        calls.spawn(call(Arc::clone(&client), app.address, stop.clone()));
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    old.proxy.signal(Signal::SIGTERM).unwrap();
    let enough = |count: f64| count > 100.0;
    new.metric("istio_tcp_connections_opened_total", &[], enough)
        .await;
    traffic::ping(&mut long, b"the predecessor finishes its connections")
        .await
        .unwrap();
    stop.cancel();
    let total: usize = calls.join_all().await.into_iter().sum();
    assert!(total > 100, "{total}");
    drop(long);
    assert!(old.proxy.exit(wait::SOON).await.unwrap().success());
}

/// What a proxy of another make says first, at each of its ports.
const OTHER: &[u8] = b"other";

/// A proxy of another make, as far as it matters here: the sockets that it holds in a pod, bound as the CNI's rules want them: each
/// port once, on both families, with `SO_REUSEPORT` and nothing that steers the group. Each connection is told [`OTHER`], and then
/// echoed.
struct OtherMake {
    listening: JoinSet<()>,
    /// What it has accepted; goes on when it stops to listen.
    _carrying: Arc<Mutex<JoinSet<()>>>,
}

impl OtherMake {
    fn start(pod: &Pod) -> io::Result<Self> {
        let (mut listening, carrying) = (JoinSet::new(), Arc::default());
        for port in [15001, 15006, 15008] {
            let at = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
            let socket = traffic::tcp_socket(pod.netns(), at)?;
            socket.set_only_v6(false)?;
            socket.set_reuse_port(true)?;
            socket.bind(&at.into())?;
            socket.listen(1024)?;
            let listener = TcpListener::from_std(socket.into())?;
            listening.spawn(Self::accept(listener, Arc::clone(&carrying)));
        }
        Ok(Self {
            listening,
            _carrying: carrying,
        })
    }

    async fn accept(listener: TcpListener, carrying: Arc<Mutex<JoinSet<()>>>) {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut carrying = carrying.lock();
            carrying.spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = writer.write_all(OTHER).await;
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
            while carrying.try_join_next().is_some() {}
        }
    }

    /// Closes its listeners; what waits in their queues is reset by the kernel.
    async fn stop_listening(&mut self) {
        self.listening.shutdown().await;
    }
}

/// A pod that proxies of two makes serve in turn, and a client of its application.
struct TwoMakes {
    world: World,
    client: Arc<Pod>,
    pod: Arc<Pod>,
    app: Server,
}

/// Who has answered calls, and how many failed.
#[derive(Debug, Default)]
struct Answers {
    other: usize,
    ours: usize,
    failed: usize,
}

impl TwoMakes {
    fn new() -> Self {
        let world = World::new(1).unwrap();
        let node = world.node(0);
        let client = node.pod(&PodSpec::plain("client")).unwrap();
        let pod = node.pod(&PodSpec::captured("api")).unwrap();
        Mesh::of(&[&pod, &client])
            .write(&ProxyOptions::mesh_file(&world))
            .unwrap();
        let app = pod.serve(8080, Behaviour::Whoami).unwrap();
        Self {
            world,
            client,
            pod,
            app,
        }
    }

    async fn ours(&self) -> NodeRun<'_> {
        let options = ProxyOptions::new(&self.world, self.world.node(0));
        let node = self.world.node(0);
        let pods: [&Pod; 1] = [&self.pod];
        let run = NodeRun::start(&self.world, node, &options, &pods);
        run.await.unwrap()
    }

    /// A connection that the one proxy which listens so far carries, past its greeting.
    async fn held(&self) -> TcpStream {
        let mut stream = self.client.connect(self.app.address).await.unwrap();
        assert!(stream.read(&mut [0; 64]).await.unwrap() > 0);
        stream
    }

    /// Calls by four clients, each one after the other, until told to stop.
    fn load(&self, stop: &CancellationToken) -> JoinSet<Answers> {
        let mut loads = JoinSet::new();
        for _ in 0..4 {
            let (client, to) = (Arc::clone(&self.client), self.app.address);
            let stop = stop.clone();
            loads.spawn(async move {
                let mut answers = Answers::default();
                while !stop.is_cancelled() {
                    match client.ask(to, b"").await {
                        Ok(answer) if answer == OTHER => answers.other += 1,
                        Ok(answer) => {
                            let seen = format!("{}:", client.ip4());
                            assert!(answer.starts_with(seen.as_bytes()), "{answer:?}");
                            answers.ours += 1;
                        }
                        Err(_) => answers.failed += 1,
                    }
                }
                answers
            });
        }
        loads
    }

    /// Waits until our proxy has carried so many calls more.
    async fn carried(&self, more: usize) {
        let until = self.app.peers().len() + more;
        self.app.accepted(until).await;
    }
}

async fn sum(loads: JoinSet<Answers>) -> Answers {
    let mut sum = Answers::default();
    for one in loads.join_all().await {
        sum.other += one.other;
        sum.ours += one.ours;
        sum.failed += one.failed;
    }
    sum
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_of_another_make_hands_over_under_load() {
    let stage = TwoMakes::new();
    let mut other = OtherMake::start(&stage.pod).unwrap();
    let mut held = stage.held().await;
    let stop = CancellationToken::new();
    let loads = stage.load(&stop);
    let _run = stage.ours().await;
    stage.carried(50).await;
    other.stop_listening().await;
    stage.carried(200).await;
    traffic::ping(&mut held, b"at the other one").await.unwrap();
    stop.cancel();
    let answers = sum(loads).await;
    assert!(answers.other > 0 && answers.ours >= 250, "{answers:?}");
    // What its queue held is lost with it: one call of each client at most.
    assert!(answers.failed <= 4, "{answers:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_of_another_make_takes_over_under_load() {
    let stage = TwoMakes::new();
    let mut run = stage.ours().await;
    let mut held = stage.held().await;
    let stop = CancellationToken::new();
    let loads = stage.load(&stop);
    stage.carried(50).await;
    let other = OtherMake::start(&stage.pod).unwrap();
    stage.carried(50).await;
    run.proxy.signal(Signal::SIGTERM).unwrap();
    run.session.closed(wait::SOON).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    traffic::ping(&mut held, b"at ours").await.unwrap();
    let before = stage.app.peers().len();
    for _ in 0..50 {
        assert_eq!(
            stage.client.ask(stage.app.address, b"").await.unwrap(),
            OTHER
        );
    }
    assert_eq!(stage.app.peers().len(), before, "ours takes none any more");
    stop.cancel();
    let answers = sum(loads).await;
    assert!(answers.other > 0 && answers.ours >= 100, "{answers:?}");
    assert_eq!(answers.failed, 0, "{answers:?}");
    drop(held);
    assert!(run.proxy.exit(wait::SOON).await.unwrap().success());
    drop(other);
}

/// `INPOD_PORT_REUSE=false`: a pod has one proxy at a time, and the next one serves it when the first is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_that_are_not_shared_are_had_one_after_the_other() {
    let stage = TwoMakes::new();
    let node = stage.world.node(0);
    let options = ProxyOptions::new(&stage.world, node).env("INPOD_PORT_REUSE", "false");
    let pods: [&Pod; 1] = [&stage.pod];
    let first = NodeRun::start(&stage.world, node, &options, &pods).await;
    let mut first = first.unwrap();
    let netns = node.second_proxy_netns().unwrap();
    let second = options.start_in(&netns, "second").unwrap();
    let session = wait::soon("the second connects", first.agent.accept());
    let session = session.await.unwrap();
    let refused = session.add(&stage.pod).await.unwrap().unwrap_err();
    assert!(refused.contains("15001"), "{refused}");
    stage.client.seen_as(stage.app.address).await.unwrap();
    first.proxy.signal(Signal::SIGTERM).unwrap();
    assert!(first.proxy.exit(wait::SOON).await.unwrap().success());
    session.snapshot_sent().await.unwrap().unwrap();
    second.ready().await;
    let served = async || stage.client.seen_as(stage.app.address).await.ok();
    let seen = wait::until(wait::SOON, "the second serves", served).await;
    assert_eq!(seen.ip(), stage.client.ip4());
}
