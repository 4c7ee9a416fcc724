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
use testkit::{
    Mesh, NodeRun, Pod, PodSpec, ProxyOptions, World,
    traffic::{self, Behaviour},
    wait,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
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

/// What a proxy of another make answers at its ports.
const OTHER: &[u8] = b"other";

/// The sockets that a proxy of another make holds in a pod, bound as the CNI's rules want them: each port once, on both families,
/// with `SO_REUSEPORT` and nothing that steers the group. Each connection is told [`OTHER`]. Dropping it closes the sockets.
fn other_make(pod: &Pod) -> io::Result<JoinSet<()>> {
    let mut tasks = JoinSet::new();
    for port in [15001, 15006, 15008] {
        let at = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
        let socket = traffic::tcp_socket(pod.netns(), at)?;
        socket.set_only_v6(false)?;
        socket.set_reuse_port(true)?;
        socket.bind(&at.into())?;
        socket.listen(1024)?;
        let listener = TcpListener::from_std(socket.into())?;
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(OTHER).await;
            }
        });
    }
    Ok(tasks)
}

/// Calls until one is answered by the other make, if `other`, or by the pod's application; none may fail.
async fn answered_by(other: bool, client: &Pod, to: SocketAddr) {
    wait::until(wait::SOON, "the proxy answers", async || {
        ((client.ask(to, b"").await.unwrap() == OTHER) == other).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_of_another_make_hands_over() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let client = node.pod(&PodSpec::plain("client")).unwrap();
    let pod = node.pod(&PodSpec::captured("api")).unwrap();
    Mesh::of(&[&pod, &client])
        .write(&ProxyOptions::mesh_file(&world))
        .unwrap();
    let app = pod.serve(8080, Behaviour::Whoami).unwrap();
    let mut other = other_make(&pod).unwrap();
    answered_by(true, &client, app.address).await;

    let options = ProxyOptions::new(&world, node);
    let _run = NodeRun::start(&world, node, &options, &[&pod])
        .await
        .unwrap();
    answered_by(false, &client, app.address).await;
    answered_by(true, &client, app.address).await;
    other.shutdown().await;
    for _ in 0..50 {
        let seen = client.seen_as(app.address).await.unwrap();
        assert_eq!(seen.ip(), client.ip4());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_of_another_make_takes_over() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let client = node.pod(&PodSpec::plain("client")).unwrap();
    let pod = node.pod(&PodSpec::captured("api")).unwrap();
    Mesh::of(&[&pod, &client])
        .write(&ProxyOptions::mesh_file(&world))
        .unwrap();
    let app = pod.serve(8080, Behaviour::Whoami).unwrap();
    let options = ProxyOptions::new(&world, node);
    let mut run = NodeRun::start(&world, node, &options, &[&pod])
        .await
        .unwrap();
    answered_by(false, &client, app.address).await;

    let _other = other_make(&pod).unwrap();
    run.proxy.signal(Signal::SIGTERM).unwrap();
    answered_by(true, &client, app.address).await;
    assert!(run.proxy.exit(wait::SOON).await.unwrap().success());
    for _ in 0..50 {
        assert_eq!(client.ask(app.address, b"").await.unwrap(), OTHER);
    }
}
