//! Connections of a pod of which the control plane has not told yet.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::time::Duration;

use testkit::{
    Mesh, NodeRun, PodSpec, ProxyOptions, World,
    traffic::{self, Behaviour},
    wait,
};
use tokio::{io::AsyncWriteExt as _, time::Instant};

#[tokio::test]
async fn a_connection_waits_for_the_record_of_its_own_pod() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let early = node.pod(&PodSpec::captured("early")).unwrap();
    let never = node.pod(&PodSpec::captured("never")).unwrap();
    let known = node.pod(&PodSpec::captured("known")).unwrap();
    let outside = node.pod(&PodSpec::plain("outside")).unwrap();
    let mut mesh = Mesh::of(&[&known]);
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    let options = ProxyOptions::new(&world, node).env("WORKLOAD_WAIT", "5s");
    let run = NodeRun::connect(&world, node, &options).await.unwrap();
    let (_agent, proxy, session) = (run.agent, run.proxy, run.session);
    session.snapshot(&[&early, &never, &known]).await.unwrap();
    proxy.ready().await;
    let app = outside.serve(7000, Behaviour::Echo).unwrap();

    let start = Instant::now();
    let mut waiting = early.connect(app.address).await.unwrap();
    let mut doomed = never.connect(app.address).await.unwrap();
    let mut peer = outside.connect(never.at(15008)).await.unwrap();
    waiting.write_all(b"patience").await.unwrap();
    assert_eq!(
        known.ask(app.address, b"others go on").await.unwrap(),
        b"others go on"
    );
    assert_eq!(app.peers().len(), 1);
    session.silent(Duration::from_secs(2)).await.unwrap();
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
    traffic::closed(&mut peer, Duration::from_secs(3))
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
