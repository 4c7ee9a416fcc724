//! Readers that stop: what they cost the proxy, and their neighbours in the tunnel. Prints figures; `--nocapture` shows them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]
#![allow(clippy::print_stdout, reason = "figures for who asks for them")]

use std::time::Duration;

use testkit::{
    raw::{RawClient, Tunnel},
    stage::ForeignClient,
    traffic::{self, Behaviour},
    wait,
};
use tokio::{task::JoinSet, time::Instant};

/// What each stalled stream is to carry, in MiB.
const FLOOD: usize = 64;

/// What its neighbour carries.
const PAYLOAD: usize = 8 << 20;

/// What the proxy may need for a stalled stream.
const EACH: u64 = 1 << 20;

/// What it may need besides: the first few streams of a fast way get more.
const FIRST: u64 = 32 << 20;

/// How long the bytes take to a reader that reads all of them.
async fn carried(client: &RawClient, target: &str, bytes: &[u8]) -> Duration {
    let began = Instant::now();
    let mut tunnel = client.tunnel(target).await.unwrap();
    tunnel.write(bytes).await.unwrap();
    tunnel.finish().unwrap();
    let receipt = wait::soon("the receipt", tunnel.read_to_end()).await;
    assert_eq!(receipt.unwrap(), traffic::receipt(bytes));
    began.elapsed()
}

/// Ends only if all of it was taken.
async fn flood(mut tunnel: Tunnel) {
    let block = vec![7; 1 << 20];
    for _ in 0..FLOOD {
        if tunnel.write(&block).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_readers_cost_little_and_stop_nobody() {
    let foreign = ForeignClient::new().unwrap();
    let talk = foreign.talk(Behaviour::Sink).await;
    let _stall = foreign.api.serve(8081, Behaviour::Stall).unwrap();
    let proxy = talk.cluster.proxy(0);
    let payload = traffic::pattern(PAYLOAD);
    carried(&talk.client, &talk.target, &payload).await;
    let before = proxy.resident_bytes().unwrap();
    let mut stalled = JoinSet::new();
    for count in [0, 1, 10, 50, 99] {
        while stalled.len() < count {
            let tunnel = talk.client.tunnel(&foreign.target(8081)).await.unwrap();
            stalled.spawn(flood(tunnel));
        }
        let took = carried(&talk.client, &talk.target, &payload).await;
        let held = proxy.resident_bytes().unwrap().saturating_sub(before);
        println!(
            "{count} stalled: {:.0} MB/s beside them, {} KiB of memory more",
            PAYLOAD as f64 / 1e6 / took.as_secs_f64(),
            held >> 10
        );
        let bound = count as u64 * EACH + FIRST;
        assert!(held < bound, "{count} stalled streams hold {held} bytes");
    }
    assert!(stalled.try_join_next().is_none(), "one was not held back");
}
