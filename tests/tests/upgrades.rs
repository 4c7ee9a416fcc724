//! One proxy of a node after the other, under load: no new connection may fail.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use nix::sys::signal::Signal;
use testkit::{
    Mesh, Netns, Node, NodeRun, Pod, PodSpec, ProxyOptions, World,
    traffic::{self, Behaviour, End},
    wait,
};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

/// What became of the connections of a load.
#[derive(Debug, Default)]
struct Outcome {
    count: usize,
    failures: Vec<String>,
    slowest: Duration,
}

impl Outcome {
    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.failures.extend(other.failures);
        self.slowest = self.slowest.max(other.slowest);
    }
}

/// New connections at a rate, however long each takes, until told to stop.
async fn load(from: Arc<Pod>, to: SocketAddr, rate: u32, stop: CancellationToken) -> Outcome {
    let mut turns = interval(Duration::from_secs(1) / rate);
    turns.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut calls, mut outcome) = (JoinSet::new(), Outcome::default());
    let began = Instant::now();
    while !stop.is_cancelled() {
        turns.tick().await;
        let from = Arc::clone(&from);
        calls.spawn(async move {
            let began = Instant::now();
            let answer = from.ask(to, b"hello").await;
            (answer, began)
        });
        while let Some(ended) = calls.try_join_next() {
            outcome.note(ended.unwrap(), began);
        }
    }
    for ended in calls.join_all().await {
        outcome.note(ended, began);
    }
    outcome
}

impl Outcome {
    fn note(&mut self, (answer, call): (std::io::Result<Vec<u8>>, Instant), began: Instant) {
        self.count += 1;
        self.slowest = self.slowest.max(call.elapsed());
        match answer {
            Ok(answer) if answer == b"hello" => {}
            other => {
                let at = call.duration_since(began);
                self.failures.push(format!("call at {at:?}: {other:?}"));
            }
        }
    }
}

/// Two nodes; the proxy of the second is exchanged, while `web` on the first calls `api` there, and `caller` there calls `web`.
struct Stage {
    world: World,
    web: Arc<Pod>,
    api: Arc<Pod>,
    caller: Arc<Pod>,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let pod = |node: usize, name| world.node(node).pod(&PodSpec::captured(name)).unwrap();
        let (web, api, caller) = (pod(0, "web"), pod(1, "api"), pod(1, "caller"));
        Mesh::of(&[&web, &api, &caller])
            .write(&ProxyOptions::mesh_file(&world))
            .unwrap();
        Self {
            world,
            web,
            api,
            caller,
        }
    }

    fn node(&self) -> &Node {
        self.world.node(1)
    }

    fn options(&self, deadline: &str) -> ProxyOptions {
        ProxyOptions::new(&self.world, self.node()).env("CONNECTION_TERMINATION_DEADLINE", deadline)
    }

    /// The proxy of the first node, which stays.
    async fn neighbour(&self) -> NodeRun<'_> {
        let node = self.world.node(0);
        let options = ProxyOptions::new(&self.world, node);
        let pods: [&Pod; 1] = [&self.web];
        NodeRun::start(&self.world, node, &options, &pods)
            .await
            .unwrap()
    }

    /// The first proxy of the second node.
    async fn start(&self, options: &ProxyOptions) -> NodeRun<'_> {
        NodeRun::start(&self.world, self.node(), options, &self.pods())
            .await
            .unwrap()
    }

    fn pods(&self) -> [&Pod; 2] {
        [&self.api, &self.caller]
    }

    /// Starts load in both directions, half of `rate` each.
    fn load(&self, rate: u32, stop: &CancellationToken) -> JoinSet<Outcome> {
        let mut loads = JoinSet::new();
        for (from, to) in [
            (&self.web, self.api.at(8080)),
            (&self.caller, self.web.at(8080)),
        ] {
            loads.spawn(load(Arc::clone(from), to, rate / 2, stop.clone()));
        }
        loads
    }

    /// Starts a successor of the proxy, which is ready when this returns.
    async fn successor<'a>(
        &self,
        old: &mut NodeRun<'_>,
        options: &ProxyOptions,
        netns: &'a Netns,
    ) -> (testkit::Proxy<'a>, testkit::Session) {
        let proxy = options.start_in(netns, "successor").unwrap();
        let session = wait::soon("the successor connects", old.agent.accept());
        let session = session.await.unwrap();
        session.snapshot(&self.pods()).await.unwrap();
        proxy.ready().await;
        (proxy, session)
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "test runs are steered by the environment"
)]
fn number(variable: &str, default: u32) -> u32 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// `CULVERT_TEST_UPGRADES=20 CULVERT_TEST_RATE=1000`, with an optimised program as `CULVERT_BIN`, is the full size.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::print_stderr, reason = "figures for who runs it in full")]
async fn upgrades_in_a_row_lose_no_new_connection() {
    let (upgrades, rate) = (
        number("CULVERT_TEST_UPGRADES", 4),
        number("CULVERT_TEST_RATE", 100),
    );
    let stage = Stage::new();
    let _neighbour = stage.neighbour().await;
    let options = stage.options("5s");
    let second = stage.node().second_proxy_netns().unwrap();
    let homes = [&second, stage.node().proxy_netns()];
    let mut run = stage.start(&options).await;
    let _servers = [&stage.api, &stage.web].map(|pod| pod.serve(8080, Behaviour::Echo).unwrap());
    let stop = CancellationToken::new();
    let loads = stage.load(rate, &stop);
    let mut longest_exit = Duration::ZERO;
    for index in 0..upgrades {
        let home = homes[usize::try_from(index).unwrap() % 2];
        let mut open = stage.web.connect(stage.api.at(8080)).await.unwrap();
        traffic::ping(&mut open, b"before").await.unwrap();
        let (proxy, session) = stage.successor(&mut run, &options, home).await;
        run.proxy.signal(Signal::SIGTERM).unwrap();
        let stopped = Instant::now();
        // What is open goes on at the predecessor.
        tokio::time::sleep(Duration::from_millis(700)).await;
        traffic::ping(&mut open, b"while it drains").await.unwrap();
        drop(open);
        let status = run.proxy.exit(wait::SOON).await.unwrap();
        assert!(status.success(), "upgrade {index}: {status}");
        longest_exit = longest_exit.max(stopped.elapsed());
        (run.proxy, run.session) = (proxy, session);
    }
    stop.cancel();
    let mut outcome = Outcome::default();
    for one in loads.join_all().await {
        outcome.add(one);
    }
    let Outcome {
        count,
        failures,
        slowest,
    } = outcome;
    eprintln!(
        "{upgrades} upgrades: {count} new connections, {} failed, the slowest took {slowest:?}; \
         a predecessor was gone after {longest_exit:?} at the latest",
        failures.len()
    );
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(count > 50, "{count}");
}

/// A predecessor that is asked to stop lets connections finish, cuts what is left at its deadline, and ends in order.
#[tokio::test]
async fn what_does_not_finish_is_cut_at_the_deadline_and_the_exit_code_is_zero() {
    let stage = Stage::new();
    let _neighbour = stage.neighbour().await;
    let options = stage.options("2s");
    let second = stage.node().second_proxy_netns().unwrap();
    let mut run = stage.start(&options).await;
    let _server = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut open = stage.web.connect(stage.api.at(8080)).await.unwrap();
    traffic::ping(&mut open, b"before").await.unwrap();
    let _successor = stage.successor(&mut run, &options, &second).await;
    run.proxy.signal(Signal::SIGTERM).unwrap();
    let stopped = Instant::now();
    while stopped.elapsed() < Duration::from_millis(1500) {
        traffic::ping(&mut open, b"graceful").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let end = traffic::closed(&mut open, wait::SOON).await.unwrap();
    assert_eq!(end, End::Reset, "what is cut does not look complete");
    let cut = stopped.elapsed();
    assert!((2.0..3.5).contains(&cut.as_secs_f64()), "{cut:?}");
    let status = run.proxy.exit(wait::SOON).await.unwrap();
    assert!(status.success(), "{status}");
    let gone = stopped.elapsed();
    assert!(gone < Duration::from_secs(5), "{gone:?}");
    assert_eq!(
        stage.web.ask(stage.api.at(8080), b"next").await.unwrap(),
        b"next"
    );
}

/// An upgrade that is taken back: the younger proxy stops, and the older one serves on. A listener that closes points
/// to the one that was bound after it; the youngest has none, so what arrives between its last accept and its close is reset: one
/// connection, if any.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_that_is_taken_back_loses_hardly_any_new_connection() {
    const TAKEN_BACK: usize = 3;
    let stage = Stage::new();
    let _neighbour = stage.neighbour().await;
    let options = stage.options("5s");
    let second = stage.node().second_proxy_netns().unwrap();
    let mut run = stage.start(&options).await;
    let _servers = [&stage.api, &stage.web].map(|pod| pod.serve(8080, Behaviour::Echo).unwrap());
    let stop = CancellationToken::new();
    let loads = stage.load(number("CULVERT_TEST_RATE", 100), &stop);
    for _ in 0..TAKEN_BACK {
        let (mut younger, session) = stage.successor(&mut run, &options, &second).await;
        younger.signal(Signal::SIGTERM).unwrap();
        let status = younger.exit(wait::SOON).await.unwrap();
        assert!(status.success(), "{status}");
        drop(session);
    }
    stop.cancel();
    let failures = loads.join_all().await.into_iter();
    let failures: Vec<_> = failures.flat_map(|one| one.failures).collect();
    assert!(
        failures.len() <= TAKEN_BACK,
        "{} failed: {failures:#?}",
        failures.len()
    );
}

/// The process dies under load, and another one is started in its place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::print_stderr, reason = "a figure for who asks")]
async fn a_killed_proxy_is_replaced_at_once() {
    let stage = Stage::new();
    let _neighbour = stage.neighbour().await;
    let options = stage.options("5s");
    let mut run = stage.start(&options).await;
    let _servers = [&stage.api, &stage.web].map(|pod| pod.serve(8080, Behaviour::Echo).unwrap());
    let stop = CancellationToken::new();
    let loads = stage.load(100, &stop);
    tokio::time::sleep(Duration::from_millis(500)).await;
    run.proxy.signal(Signal::SIGKILL).unwrap();
    run.proxy.exit(wait::SOON).await.unwrap();
    let started = Instant::now();
    let proxy = options.start(stage.node()).unwrap();
    let connecting = wait::soon("the next one connects", run.agent.accept());
    let session = connecting.await.unwrap();
    let connected = started.elapsed();
    session.snapshot(&stage.pods()).await.unwrap();
    let flows = async |from: &Pod, to| from.ask(to, b"hello").await.ok().map(drop);
    for (from, to) in [
        (&stage.web, stage.api.at(8080)),
        (&stage.caller, stage.web.at(8080)),
    ] {
        wait::until(wait::SOON, "new connections flow", async || {
            flows(from, to).await
        })
        .await;
    }
    let flowing = started.elapsed();
    eprintln!(
        "after its start: connected to the agent in {connected:?}, new connections in {flowing:?}"
    );
    assert!(flowing < Duration::from_secs(2), "{flowing:?}");
    proxy.ready().await;
    stop.cancel();
    let _killed_with_it = loads.join_all().await;
}
