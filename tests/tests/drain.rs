//! What is open when the process is told to stop: for how long it lives, and what still counts meanwhile.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::time::Duration;

use nix::sys::signal::Signal;
use testkit::{
    NodeRun, ProxyOptions,
    mesh::{Match, Policy},
    raw::{RawClient, Tunnel},
    stage::ForeignClient,
    traffic::{self, Behaviour, Server},
    wait,
};
use tokio::{net::TcpStream, time::Instant};

/// A proxy with a flow of each kind.
struct Busy<'a> {
    run: NodeRun<'a>,
    outwards: TcpStream,
    inwards: TcpStream,
    _client: RawClient,
    tunnel: Tunnel,
    _servers: [Server; 2],
}

impl<'a> Busy<'a> {
    async fn start(foreign: &'a ForeignClient, (key, value): (&str, &str)) -> Self {
        let (world, node) = (&foreign.world, foreign.world.node(0));
        let mesh = foreign.mesh();
        mesh.write(&ProxyOptions::mesh_file(world)).unwrap();
        let options = ProxyOptions::new(world, node).env(key, value);
        let run = NodeRun::start(world, node, &options, &[&foreign.api]).await;
        let inside = foreign.api.serve(8080, Behaviour::Echo).unwrap();
        let outside = foreign.peer.serve(7000, Behaviour::Echo).unwrap();
        let client = foreign.client().await;
        let mut busy = Self {
            run: run.unwrap(),
            outwards: foreign.api.connect(outside.address).await.unwrap(),
            inwards: foreign.peer.connect(inside.address).await.unwrap(),
            tunnel: client.tunnel(&foreign.target(8080)).await.unwrap(),
            _client: client,
            _servers: [inside, outside],
        };
        busy.go_on().await;
        busy
    }

    async fn go_on(&mut self) {
        let word = b"still here";
        traffic::ping(&mut self.outwards, word).await.unwrap();
        traffic::ping(&mut self.inwards, word).await.unwrap();
        self.tunnel.ping(word).await.unwrap();
    }

    /// Tells the process to stop, and waits until it has begun to.
    async fn stop(&mut self) -> Instant {
        self.run.proxy.signal(Signal::SIGTERM).unwrap();
        let told = Instant::now();
        self.run.session.closed(wait::SOON).await.unwrap();
        told
    }
}

/// At the size that Kubernetes has by default.
#[tokio::test]
async fn of_thirty_seconds_of_grace_connections_have_twenty_five() {
    let foreign = ForeignClient::new().unwrap();
    let mut busy = Busy::start(&foreign, ("TERMINATION_GRACE_PERIOD_SECONDS", "30")).await;
    let told = busy.stop().await;
    while told.elapsed() < Duration::from_secs(24) {
        busy.go_on().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    for stream in [&mut busy.outwards, &mut busy.inwards] {
        traffic::closed(stream, wait::SOON).await.unwrap();
    }
    assert!(busy.tunnel.read_to_end().await.is_err());
    let lasted = told.elapsed().as_secs_f64();
    assert!((24.5..27.0).contains(&lasted), "{lasted} s");
    let status = busy.run.proxy.exit(wait::SOON).await.unwrap();
    assert!(status.success(), "{status}");
    let lasted = told.elapsed();
    assert!(lasted < Duration::from_secs(30), "{lasted:?}");
}

#[tokio::test]
async fn policies_count_to_the_end() {
    let foreign = ForeignClient::new().unwrap();
    let mut busy = Busy::start(&foreign, ("CONNECTION_TERMINATION_DEADLINE", "60s")).await;
    let told = busy.stop().await;
    let mut mesh = foreign.mesh();
    mesh.policy(Policy::deny("late", vec![Match::port(8080)]));
    mesh.write(&ProxyOptions::mesh_file(&foreign.world))
        .unwrap();
    traffic::closed(&mut busy.inwards, wait::SOON)
        .await
        .unwrap();
    assert!(busy.tunnel.read_to_end().await.is_err());
    let words = "connection closed due to policy change: explicitly denied by: shop/late";
    let cut = |line: &testkit::Line| line.field("error") == words;
    let log = busy.run.proxy.log();
    wait::until(wait::SOON, "both are told", async || {
        (log.since(0, cut).len() == 2).then_some(())
    })
    .await;
    // What no policy is about goes on, and with its end the process ends.
    traffic::ping(&mut busy.outwards, b"not judged here")
        .await
        .unwrap();
    drop(busy.outwards);
    let status = busy.run.proxy.exit(wait::SOON).await.unwrap();
    assert!(status.success(), "{status}");
    assert!(told.elapsed() < Duration::from_secs(30));
}
