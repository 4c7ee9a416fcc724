//! Endpoints that cannot be reached, while others can.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use testkit::{
    Cluster, Mesh, Pod, PodSpec, World,
    mesh::workload_uid,
    traffic::{Behaviour, End},
};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

/// `web` calls a service of the other three pods: one on its node, two on the other.
struct Stage {
    world: World,
    web: Arc<Pod>,
    apps: [Arc<Pod>; 3],
}

const VIP: [u8; 4] = [10, 96, 0, 1];

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let pod = |node: usize, name| world.node(node).pod(&PodSpec::captured(name)).unwrap();
        let apps = [pod(0, "app-0"), pod(1, "app-1"), pod(1, "app-2")];
        Self {
            web: pod(0, "web"),
            apps,
            world,
        }
    }

    async fn start(&self) -> Cluster<'_> {
        let [one, two, three] = &self.apps;
        let pods = [&self.web, one, two, three];
        let mut mesh = Mesh::of(&[&self.web, one, two, three]);
        mesh.service("app", VIP.into(), &[(80, 8080)], &[one, two, three]);
        Cluster::start(&self.world, &mesh, &pods).await.unwrap()
    }

    /// Calls until any endpoint was most likely tried.
    async fn call_often(&self) {
        for _ in 0..20 {
            assert_eq!(self.call().await.unwrap(), b"hello");
        }
    }

    async fn call(&self) -> std::io::Result<Vec<u8>> {
        self.web.ask(SocketAddr::from((VIP, 80)), b"hello").await
    }
}

/// Applications restart in their turn while four clients call without a pause; the mesh does not hear of it.
/// `CULVERT_TEST_RESTARTS` sets how often each of the three does.
#[tokio::test]
#[expect(clippy::print_stderr, reason = "figures for whoever asks")]
async fn a_restart_of_one_endpoint_after_the_other_loses_no_connection() {
    let stage = Arc::new(Stage::new());
    let cluster = stage.start().await;
    let serve = |app: &Arc<Pod>| app.serve(8080, Behaviour::Echo).unwrap();
    let mut servers: Vec<_> = stage.apps.iter().map(serve).collect();
    let (stop, mut load) = (CancellationToken::new(), JoinSet::new());
    for _ in 0..4 {
        load.spawn(call_all_the_time(Arc::clone(&stage), stop.clone()));
    }
    for _ in 0..restarts() {
        for app in &stage.apps {
            let server = servers.remove(0);
            // An application that ends takes no connections any more, and answers those that it has.
            app.netns().command("nft", &["-f", "-"], REFUSE).unwrap();
            stage.call_often().await;
            server.idle().await;
            server.stop().await;
            app.netns()
                .command("nft", &["delete", "table", "inet", "leaving"], "")
                .unwrap();
            stage.call_often().await;
            servers.push(serve(app));
        }
    }
    stop.cancel();
    let calls: usize = load.join_all().await.into_iter().sum();
    let retries = cluster.proxy(0).metrics().await.unwrap();
    let retries = retries.sum("istio_tcp_connection_retries_total", &[]);
    eprintln!("{calls} requests under restarts, none lost; {retries} connections went elsewhere");
    assert!(retries > 0.0, "no connection met a stopped endpoint");
}

async fn call_all_the_time(stage: Arc<Stage>, stop: CancellationToken) -> usize {
    let mut calls = 0;
    while !stop.is_cancelled() {
        let answer = stage.call().await;
        let answer = answer.unwrap_or_else(|error| panic!("request {calls}: {error}"));
        assert_eq!(answer, b"hello", "request {calls}");
        calls += 1;
    }
    calls
}

#[expect(
    clippy::disallowed_methods,
    reason = "test runs are steered by the environment"
)]
fn restarts() -> usize {
    let set = std::env::var("CULVERT_TEST_RESTARTS").ok();
    set.map_or(1, |set| set.parse().expect("CULVERT_TEST_RESTARTS"))
}

/// Nothing that comes for the proxy arrives.
const SILENCE: &str = "table inet silence {
  chain input {
    type filter hook input priority 0; policy accept;
    tcp dport 15008 drop
  }
}
";

/// New connections to the application are refused.
const REFUSE: &str = "table inet leaving {
  chain input {
    type filter hook input priority 0; policy accept;
    tcp dport 8080 tcp flags & (syn | ack) == syn reject with tcp reset
  }
}
";

/// One call finds out, and those that follow do not wait for an endpoint that does not answer.
#[tokio::test]
async fn a_silent_endpoint_is_waited_for_once() {
    let stage = Stage::new();
    let cluster = stage.start().await;
    let serve = |app: &Arc<Pod>| app.serve(8080, Behaviour::Echo).unwrap();
    let _servers: Vec<_> = stage.apps.iter().map(serve).collect();
    let [.., mute] = &stage.apps;
    mute.netns().command("nft", &["-f", "-"], SILENCE).unwrap();
    let waited = async || {
        let began = Instant::now();
        assert_eq!(stage.call().await.unwrap(), b"hello");
        began.elapsed() > Duration::from_secs(3)
    };
    let mut calls = 1;
    while !waited().await {
        calls += 1;
        assert!(calls < 60, "it was never dialled");
    }
    for _ in 0..30 {
        assert!(!waited().await, "another one waited");
    }
    let proxy = cluster.proxy(0);
    let metrics = proxy.metrics().await.unwrap();
    let retries = metrics.sum("istio_tcp_connection_retries_total", &[]);
    assert_eq!(retries, 1.0);
    let question = "/debug/explain?from=shop/web&to=app:80";
    let told = proxy.document(question).await.unwrap();
    let endpoints = told["endpoints"].as_array().unwrap();
    let of = |pod: &Pod| {
        let mut endpoints = endpoints.iter();
        let endpoint = endpoints.find(|one| one["workload"] == workload_uid(pod));
        endpoint.unwrap()["because"].as_str().unwrap()
    };
    assert_eq!(of(mute), "tried in vain lately");
    assert_eq!(of(&stage.apps[0]), "port 8080");
}

/// What was delivered once may not be delivered to somebody else.
#[tokio::test]
async fn who_has_got_a_byte_has_no_stand_in() {
    let stage = Stage::new();
    let cluster = stage.start().await;
    let serve = |app: &Arc<Pod>| app.serve(8080, Behaviour::Reset).unwrap();
    let servers: Vec<_> = stage.apps.iter().map(serve).collect();
    for calls in 1..=12 {
        assert!(!stage.call().await.is_ok_and(|answer| !answer.is_empty()));
        let reached = servers.iter().map(|server| server.peers().len());
        assert_eq!(reached.sum::<usize>(), calls, "one application for each");
    }
    let metrics = cluster.proxy(0).metrics().await.unwrap();
    assert_eq!(metrics.sum("istio_tcp_connection_retries_total", &[]), 0.0);
}

#[tokio::test]
async fn where_nobody_can_be_reached_the_connection_ends() {
    let stage = Stage::new();
    let cluster = stage.start().await;
    let vip = SocketAddr::from((VIP, 80));
    assert_eq!(stage.web.turned_away(vip).await.unwrap(), End::Reset);
    for app in &stage.apps {
        let log = cluster.proxy(0).log();
        log.wait(app.name(), |line| {
            line.is_access("connection complete")
                && line.field("direction") == "outbound"
                && line.field("dst.workload") == app.name()
        })
        .await;
    }
    let metrics = cluster.proxy(0).metrics().await.unwrap();
    let retries = metrics.sum("istio_tcp_connection_retries_total", &[]);
    assert_eq!(retries, 2.0, "each endpoint is tried once");
}

#[tokio::test]
async fn an_endpoint_that_was_dialled_by_its_own_address_has_no_stand_in() {
    let stage = Stage::new();
    let cluster = stage.start().await;
    let _others = stage.apps[1].serve(8080, Behaviour::Echo).unwrap();
    let to = SocketAddr::new(stage.apps[2].ip4(), 8080);
    assert_eq!(stage.web.turned_away(to).await.unwrap(), End::Reset);
    let metrics = cluster.proxy(0).metrics().await.unwrap();
    assert_eq!(metrics.sum("istio_tcp_connection_retries_total", &[]), 0.0);
}
