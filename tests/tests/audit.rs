//! The proxy finds out by itself that a pod is not served although everyone believes so.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::time::Duration;

use testkit::{
    Cluster, NodeRun, Pod, Proxy, Redirect,
    stage::Pair,
    traffic::{Behaviour, closed, ping},
    wait,
};

const UNPROTECTED: &str = "culvert_pods_unprotected";
/// An audit is due every thirty seconds.
const ROUND: Duration = Duration::from_secs(40);

/// What the dump says of the rules in a pod; null before the first audit.
async fn redirection(proxy: &Proxy<'_>, uid: &str) -> serde_json::Value {
    let dump = proxy.document("/config_dump").await.unwrap();
    dump["workloadState"][uid]["redirection"].clone()
}

/// The agent names the pod once more, on a new connection.
async fn named_again<'a>(node: NodeRun<'a>, pod: &Pod) -> NodeRun<'a> {
    let NodeRun {
        mut agent,
        session,
        proxy,
    } = node;
    drop(session);
    let session = agent.accept().await.unwrap();
    session.snapshot(&[pod]).await.unwrap();
    NodeRun {
        agent,
        session,
        proxy,
    }
}

async fn audited<'a>(stage: &'a Pair) -> Cluster<'a> {
    let cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    for (node, pod) in [(0, &stage.web), (1, &stage.api)] {
        let proxy = cluster.proxy(node);
        wait::until(wait::SOON, "the first audit", async || {
            let found = redirection(proxy, pod.uid()).await;
            (found["ipv4"] == "works" && found["ipv6"] == "works").then_some(())
        })
        .await;
    }
    cluster
}

#[tokio::test]
async fn lost_rules_are_told_and_so_is_their_return() {
    let stage = Pair::new().unwrap();
    let mut cluster = audited(&stage).await;
    let node = cluster.nodes.remove(0);
    let found = redirection(&node.proxy, stage.web.uid()).await;
    assert_eq!(found["mtu"], 1500);
    node.proxy.metric(UNPROTECTED, &[], |v| v == 0.0).await;

    // A snapshot makes the proxy look again.
    let rules = Redirect::default();
    let netns = stage.web.netns();
    netns.command("nft", &["flush", "ruleset"], "").unwrap();
    let node = named_again(node, &stage.web).await;
    let proxy = &node.proxy;
    proxy.metric(UNPROTECTED, &[], |v| v == 1.0).await;
    assert_eq!(redirection(proxy, stage.web.uid()).await["ipv4"], "missing");
    let line = proxy
        .log()
        .wait("the warning", |line| line.raw.contains("not redirected"))
        .await;
    assert!(line.raw.contains("web"), "{line:?}");
    // Readiness is about what this process can do something about.
    assert!(proxy.is_ready().await);

    netns
        .command("nft", &["-f", "-"], &rules.ruleset())
        .unwrap();
    let node = named_again(node, &stage.web).await;
    node.proxy.metric(UNPROTECTED, &[], |v| v == 0.0).await;
}

#[tokio::test]
async fn a_listener_that_was_killed_is_opened_again_under_open_connections() {
    let stage = Pair::new().unwrap();
    let cluster = audited(&stage).await;
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut open = stage.web.connect(Pair::SERVICE).await.unwrap();
    ping(&mut open, b"before").await.unwrap();

    let kill = ["-K", "-l", "-t", "sport", "=", "15001"];
    stage.web.netns().command("ss", &kill, "").unwrap();
    assert!(stage.web.ask(Pair::SERVICE, b"deaf").await.is_err());
    wait::until(ROUND, "the repair", async || {
        let echo = stage.web.ask(Pair::SERVICE, b"again").await;
        echo.is_ok_and(|echo| echo == b"again").then_some(())
    })
    .await;
    ping(&mut open, b"after").await.unwrap();
    let proxy = cluster.proxy(0);
    proxy
        .metric("culvert_pods_repaired_total", &[], |v| v == 1.0)
        .await;
    let line = proxy
        .log()
        .wait("the repair", |line| line.raw.contains("had been closed"))
        .await;
    assert!(
        line.raw.contains("15001") && line.raw.contains("web"),
        "{line:?}"
    );

    // What the repair left behind ends with the pod.
    let deleted = cluster.nodes[0].session.del(stage.web.uid()).await.unwrap();
    assert_eq!(deleted, Ok(()));
    closed(&mut open, wait::SOON).await.unwrap();
}
