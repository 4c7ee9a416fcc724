//! Names while a proxy stops, alone or with a successor beside it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{sync::Arc, time::Duration};

use hickory_proto::rr::RecordType;
use nix::sys::signal::Signal;
use testkit::{
    NodeRun, Pod, ProxyOptions, dns,
    stage::{Named, RESOLVER},
    traffic::{self, Behaviour},
    wait,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

fn a(name: &str) -> Vec<u8> {
    dns::query(name, RecordType::A).to_vec().unwrap()
}

/// Whether the pod learns the one address of a name.
async fn knows(pod: &Pod, name: &str) -> bool {
    let answer = pod.datagram(RESOLVER, &a(name)).await;
    answer.is_ok_and(|answer| dns::read(&answer).answers.len() == 1)
}

/// Alternately a name of the mesh and one of the upstream, until told to stop; none may be lost. Yields their number.
async fn ask(pod: Arc<Pod>, stop: CancellationToken) -> usize {
    let mut count = 0;
    while !stop.is_cancelled() {
        for name in ["cart.shop.", "fast.up.example."] {
            assert!(knows(&pod, name).await, "{name} after {count}");
            count += 1;
        }
    }
    count
}

#[tokio::test]
async fn names_are_served_as_long_as_connections_are() {
    let stage = Named::new().unwrap();
    let _upstream = stage.scripted().unwrap();
    let mut mesh = stage.mesh();
    mesh.service("cart", [10, 96, 7, 1].into(), &[(80, 80)], &[]);
    mesh.write(&ProxyOptions::mesh_file(&stage.world)).unwrap();
    let node = stage.world.node(0);
    let pods: [&Pod; 2] = [&stage.web, &stage.shopper];
    let mut run = NodeRun::start(&stage.world, node, &stage.options(), &pods)
        .await
        .unwrap();
    let app = stage.desk.serve(7000, Behaviour::Echo).unwrap();
    let mut held = stage.web.connect(app.address).await.unwrap();
    traffic::ping(&mut held, b"before").await.unwrap();
    let mut asked = stage.web.connect(RESOLVER).await.unwrap();
    dns::send(&mut asked, &a("slow.up.example.")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;

    run.proxy.signal(Signal::SIGTERM).unwrap();
    run.session.closed(wait::SOON).await.unwrap();
    let slow = wait::soon("what was asked", dns::receive(&mut asked)).await;
    assert_eq!(dns::read(&slow.unwrap()).answers.len(), 1);
    traffic::ping(&mut held, b"draining").await.unwrap();
    for name in ["cart.shop.", "fast.up.example."] {
        assert!(knows(&stage.web, name).await, "{name}");
    }
    // The last query is asked while nothing but it keeps the proxy.
    let slow = a("slow.up.example.");
    let last = stage.web.datagram(RESOLVER, &slow);
    let end = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(held);
    };
    let (last, ()) = tokio::join!(last, end);
    assert_eq!(dns::read(&last.unwrap()).answers.len(), 1);
    assert!(run.proxy.exit(wait::SOON).await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_takes_over_without_a_lost_query() {
    let stage = Named::new().unwrap();
    let _upstream = stage.scripted().unwrap();
    let mut mesh = stage.mesh();
    mesh.service("cart", [10, 96, 7, 1].into(), &[(80, 80)], &[]);
    mesh.write(&ProxyOptions::mesh_file(&stage.world)).unwrap();
    let (node, options) = (stage.world.node(0), stage.options());
    let mut old = NodeRun::start(&stage.world, node, &options, &[&stage.web])
        .await
        .unwrap();
    let (mut asking, stop) = (JoinSet::new(), CancellationToken::new());
    for _ in 0..4 {
        asking.spawn(ask(Arc::clone(&stage.web), stop.clone()));
    }
    let netns = node.second_proxy_netns().unwrap();
    let new = options.start_in(&netns, "successor").unwrap();
    let session = wait::soon("the successor connects", old.agent.accept());
    let session = session.await.unwrap();
    session.snapshot(&[&stage.web]).await.unwrap();
    new.ready().await;
    old.proxy.signal(Signal::SIGTERM).unwrap();
    assert!(old.proxy.exit(wait::SOON).await.unwrap().success());
    let enough = |count: f64| count > 100.0;
    new.metric("istio_dns_requests_total", &[], enough).await;
    stop.cancel();
    let total: usize = asking.join_all().await.into_iter().sum();
    assert!(total > 100, "{total}");
}
