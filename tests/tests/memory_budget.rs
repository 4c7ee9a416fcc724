//! A storm against one pod, with a small memory budget: the proxy lives, and other pods are served. Prints figures; `--nocapture`
//! shows them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]
#![allow(clippy::print_stdout, reason = "figures for who asks for them")]

use std::{collections::BTreeMap, future::poll_fn, sync::Arc, time::Duration};

use bytes::Bytes;
use testkit::{
    Cluster, Mesh, Pod, PodSpec, World,
    raw::{Hello, RawClient, Tunnel},
    traffic::Behaviour,
    wait,
};
use tokio::{task::JoinSet, time::timeout};

/// More than the proxy needs without traffic, and far less than the storm would make it hold.
const BUDGET: u64 = 96 << 20;
/// HBONE connections of the storm, each with [`STREAMS`] streams to an application that reads nothing.
const CONNECTIONS: usize = 40;
const STREAMS: usize = 20;

/// Sends as much as the proxy takes.
async fn flood(mut tunnel: Tunnel, block: Bytes) {
    loop {
        tunnel.send.reserve_capacity(block.len());
        let Some(Ok(room)) = poll_fn(|cx| tunnel.send.poll_capacity(cx)).await else {
            return;
        };
        if tunnel
            .send
            .send_data(block.slice(..room.min(block.len())), false)
            .is_err()
        {
            return;
        }
    }
}

/// Opens connections and floods them, until the pod gets nothing new.
async fn storm(peer: &Pod, hello: &Hello, target: &Pod) -> (Vec<RawClient>, JoinSet<()>) {
    let block = Bytes::from(vec![7; 256 << 10]);
    let (mut clients, mut floods) = (Vec::new(), JoinSet::new());
    let authority = target.at(8081).to_string();
    for _ in 0..CONNECTIONS {
        let connecting = RawClient::connect(peer.netns(), target.at(15008), hello);
        let Ok(Ok(client)) = timeout(Duration::from_secs(3), Box::pin(connecting)).await else {
            continue;
        };
        for _ in 0..STREAMS {
            let tunnel = client.tunnel(&authority);
            if let Ok(Ok(tunnel)) = timeout(Duration::from_secs(3), tunnel).await
                && tunnel.status.is_success()
            {
                floods.spawn(flood(tunnel, block.clone()));
            }
        }
        clients.push(client);
    }
    (clients, floods)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_against_one_pod_neither_kills_the_proxy_nor_starves_others() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let captured = |name| node.pod(&PodSpec::captured(name)).unwrap();
    let (greedy, modest) = (captured("greedy"), captured("modest"));
    let peer = node.pod(&PodSpec::plain("peer")).unwrap();
    let pods: [&Arc<Pod>; 2] = [&greedy, &modest];
    let mesh = Mesh::of(&[&greedy, &modest, &peer]);
    let budget = BUDGET.to_string();
    let env = BTreeMap::from([("MEMORY_BUDGET", &*budget), ("RUST_LOG", "info,access=off")]);
    let cluster = Cluster::start_with(&world, &mesh, &pods, &env)
        .await
        .unwrap();
    let _stall = greedy.serve(8081, Behaviour::Stall).unwrap();
    let echoes = pods.map(|pod| pod.serve(8080, Behaviour::Echo).unwrap());
    let hello = Hello::new(&world.authority().issue(&peer.spiffe_id()).unwrap());
    let proxy = cluster.proxy(0);
    assert_eq!(peer.ask(modest.at(8080), b"calm").await.unwrap(), b"calm");
    println!(
        "before: {} MiB resident",
        proxy.resident_bytes().unwrap() >> 20
    );

    let held = storm(&peer, &hello, &greedy).await;
    proxy
        .metric("culvert_memory_pressure", &[], |level| level == 2.0)
        .await;
    let refused = [("relief", "flow_refused")];
    let refused = proxy
        .metric("culvert_memory_relief_total", &refused, |count| count > 0.0)
        .await;
    let mut largest = 0;
    for round in 0..20 {
        let client = RawClient::connect(peer.netns(), modest.at(15008), &hello);
        let client = wait::soon("another pod's HBONE", Box::pin(client))
            .await
            .unwrap();
        let mut tunnel = client.tunnel(&modest.at(8080).to_string()).await.unwrap();
        tunnel.ping(b"as ever").await.unwrap();
        let answer = peer.ask(modest.at(8080), b"plain").await;
        assert_eq!(answer.unwrap(), b"plain", "round {round}");
        largest = largest.max(proxy.resident_bytes().unwrap());
    }
    println!(
        "in the storm: {} MiB resident, {refused} refused",
        largest >> 20
    );
    assert!(largest < BUDGET / 2 * 3, "{largest} bytes of {BUDGET}");

    drop(held);
    proxy
        .metric("culvert_memory_pressure", &[], |level| level == 0.0)
        .await;
    println!(
        "after: {} MiB resident",
        proxy.resident_bytes().unwrap() >> 20
    );
    for echo in &echoes {
        assert_eq!(peer.ask(echo.address, b"again").await.unwrap(), b"again");
    }
}
