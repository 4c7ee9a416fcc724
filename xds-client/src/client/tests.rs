use futures_util::{FutureExt, stream};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use prost::Message;
use tokio::{sync::oneshot, task::JoinHandle};

use super::*;
use crate::{Answer, demand::MAX_NAMES, proto::discovery::Resource};

/// Hands each attempt to the test, which plays the control plane.
struct Script(mpsc::Sender<Attempt>);

struct Attempt {
    requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    outcome: oneshot::Sender<Result<Responses, OpenError>>,
    at: Instant,
}

impl Connect for Script {
    fn open(
        &self,
        requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    ) -> BoxFuture<'_, Result<Responses, OpenError>> {
        async {
            let (outcome, decided) = oneshot::channel();
            let at = Instant::now();
            let attempt = Attempt {
                requests,
                outcome,
                at,
            };
            self.0.send(attempt).await.ok().unwrap();
            decided.await.unwrap()
        }
        .boxed()
    }

    fn improved(&self) -> BoxFuture<'_, ()> {
        std::future::pending().boxed()
    }
}

/// Keeps names, and refuses those that start with `bad`.
#[derive(Default)]
struct Names(Mutex<Vec<String>>);

impl Sink for Names {
    fn held(&self, kind: Kind, versions: &mut Versions) {
        if kind == Kind::Address {
            self.0
                .lock()
                .iter()
                .for_each(|name| versions.add(name, "v"));
        }
    }

    fn apply(&self, batch: Batch) -> Vec<Rejected> {
        let names = batch.resources().flatten().map(|resource| resource.name);
        let (bad, good): (Vec<_>, Vec<_>) = names.partition(|name| name.starts_with("bad"));
        self.0.lock().extend(good);
        let reason = "it is bad".to_owned();
        bad.into_iter()
            .map(|name| Rejected {
                name,
                reason: reason.clone(),
            })
            .collect()
    }
}

struct Bench {
    attempts: mpsc::Receiver<Attempt>,
    sink: Arc<Names>,
    synced: watch::Receiver<bool>,
    demand: Demand,
    registry: Registry,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

fn start(mode: Mode) -> Bench {
    let (attempts_tx, attempts) = mpsc::channel(1);
    let sink = Arc::new(Names::default());
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let script = Arc::new(Script(attempts_tx));
    let demand = Demand::default();
    let client = Client::new(Node::default(), script, Arc::clone(&sink) as _, metrics);
    let client = match mode {
        Mode::Everything => client,
        Mode::OnDemand => client.on_demand(demand.clone()),
    };
    let stop = CancellationToken::new();
    Bench {
        attempts,
        sink,
        synced: client.synced(),
        demand,
        registry,
        running: {
            let run = client.run(stop.clone());
            #[expect(clippy::disallowed_methods, reason = "the test awaits it")]
            tokio::spawn(run)
        },
        stop,
    }
}

impl Bench {
    async fn attempt(&mut self) -> Attempt {
        self.attempts.recv().await.unwrap()
    }

    /// Accepts the next stream; drops its two first requests.
    async fn accept(&mut self) -> Peer {
        let mut attempt = self.attempt().await;
        let first = [
            attempt.requests.recv().await.unwrap(),
            attempt.requests.recv().await.unwrap(),
        ];
        let (responses, rx) = mpsc::channel(4);
        let from = |mut rx: mpsc::Receiver<_>| async move { Some((rx.recv().await?, rx)) };
        let stream = stream::unfold(rx, from).boxed();
        attempt.outcome.send(Ok(stream)).ok().unwrap();
        Peer {
            first,
            requests: attempt.requests,
            responses,
        }
    }

    async fn refuse(&mut self, error: OpenError) -> Instant {
        let attempt = self.attempt().await;
        attempt.outcome.send(Err(error)).ok().unwrap();
        attempt.at
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    #[track_caller]
    fn assert_metric(&self, line: &str) {
        let text = self.metrics();
        assert!(text.lines().any(|held| held == line), "{line} in {text}");
    }
}

struct Peer {
    first: [DeltaDiscoveryRequest; 2],
    requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

impl Peer {
    async fn push(&self, kind: Kind, names: &[&str], removed: &[&str]) {
        self.respond(kind, names.iter().map(|name| resource(name, &[])), removed)
            .await;
    }

    async fn respond(
        &self,
        kind: Kind,
        resources: impl Iterator<Item = Resource>,
        removed: &[&str],
    ) {
        let response = DeltaDiscoveryResponse {
            type_url: kind.type_url().into(),
            nonce: format!("{kind:?}"),
            resources: resources.map(|one| one.encode_to_vec().into()).collect(),
            removed_resources: removed.iter().map(ToString::to_string).collect(),
            ..DeltaDiscoveryResponse::default()
        };
        self.responses.send(Ok(response)).await.unwrap();
    }

    async fn request(&mut self) -> DeltaDiscoveryRequest {
        self.requests.recv().await.unwrap()
    }
}

fn resource(name: &str, aliases: &[&str]) -> Resource {
    Resource {
        name: name.into(),
        aliases: aliases.iter().map(ToString::to_string).collect(),
        ..Resource::default()
    }
}

fn unreachable() -> OpenError {
    OpenError::Unreachable("no route".into())
}

#[tokio::test(start_paused = true)]
async fn the_first_responses_count_even_if_a_resource_is_bad() {
    let mut bench = start(Mode::Everything);
    let mut peer = bench.accept().await;
    peer.push(Kind::Address, &["a", "bad", "b"], &[]).await;
    let answer = peer.request().await;
    assert_eq!(answer.error_detail.unwrap().message, "bad: it is bad");
    assert_eq!(*bench.sink.0.lock(), ["a", "b"]);
    assert!(!*bench.synced.borrow());

    peer.push(Kind::Authorization, &[], &[]).await;
    assert_eq!(peer.request().await.error_detail, None);
    assert!(*bench.synced.wait_for(|synced| *synced).await.unwrap());
    bench.assert_metric("istio_xds_connected 1");
    let url = Kind::Address.type_url();
    bench.assert_metric(&format!(
        "istio_xds_message_rejections_total{{url=\"{url}\"}} 1"
    ));
    bench.stop.cancel();
    bench.running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_broken_stream_is_opened_again_with_what_is_held() {
    let mut bench = start(Mode::Everything);
    let mut peer = bench.accept().await;
    peer.push(Kind::Address, &["a"], &[]).await;
    peer.request().await;
    let goaway = Status::unavailable("transport is closing");
    peer.responses.send(Err(goaway)).await.unwrap();
    let lost = Instant::now();

    let peer = bench.accept().await;
    assert!(lost.elapsed() < Duration::from_secs(1));
    assert_eq!(peer.first[0].initial_resource_versions["a"], "v");
    bench.assert_metric("istio_xds_connection_terminations_total{reason=\"Reconnect\"} 1");
}

#[tokio::test(start_paused = true)]
async fn attempts_thin_out_and_a_stream_of_use_starts_over() {
    let mut bench = start(Mode::Everything);
    let mut last = Instant::now();
    let mut longest = Duration::ZERO;
    for _ in 0..40 {
        let at = bench.refuse(unreachable()).await;
        longest = longest.max(at - last);
        last = at;
    }
    // Forty draws that all fall into the lower half: less than one in a billion.
    assert!((10..=20).contains(&longest.as_secs()), "{longest:?}");

    let peer = bench.accept().await;
    bench.assert_metric("istio_xds_connection_terminations_total{reason=\"ConnectionError\"} 40");
    sleep(HEALTHY).await;
    drop(peer);
    let lost = Instant::now();
    let attempt = bench.attempt().await;
    assert!(attempt.at - lost < Duration::from_secs(1));
    bench.assert_metric("istio_xds_connection_terminations_total{reason=\"Complete\"} 1");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_at_once_again_and_again_is_no_success() {
    let mut bench = start(Mode::Everything);
    let began = Instant::now();
    for _ in 0..40 {
        bench.accept().await;
    }
    assert!(began.elapsed() > Duration::from_secs(60));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_reads_less_than_expected_gets_no_versions() {
    let mut bench = start(Mode::Everything);
    bench.sink.0.lock().push("a".into());
    let too_large = "grpc: received message larger than max (5000000 vs. 4194304)";
    let status = Status::resource_exhausted(too_large);
    bench.refuse(OpenError::Refused(status)).await;
    let peer = bench.accept().await;
    assert!(peer.first[0].initial_resource_versions.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_is_given_up() {
    let mut bench = start(Mode::Everything);
    let silent = bench.attempt().await;
    let next = bench.attempt().await;
    assert!(next.at - silent.at >= FIRST_RESPONSE_LIMIT);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_reads_nothing_is_given_up() {
    let mut bench = start(Mode::Everything);
    let peer = bench.accept().await;
    for _ in 0..=REQUESTS_UNDERWAY {
        peer.push(Kind::Address, &[], &[]).await;
    }
    bench.attempt().await;
    bench.assert_metric("istio_xds_connection_terminations_total{reason=\"Error\"} 1");
}

#[tokio::test(start_paused = true)]
async fn a_type_that_was_not_asked_for_is_refused_by_name() {
    let mut bench = start(Mode::Everything);
    let mut peer = bench.accept().await;
    let strange = DeltaDiscoveryResponse {
        type_url: "other".into(),
        nonce: "n".into(),
        ..DeltaDiscoveryResponse::default()
    };
    peer.responses.send(Ok(strange)).await.unwrap();
    let answer = peer.request().await;
    assert_eq!((&*answer.type_url, &*answer.response_nonce), ("other", "n"));
    assert!(answer.error_detail.is_some());
}

#[tokio::test(start_paused = true)]
async fn on_demand_an_alias_answers_everybody_who_waits() {
    let mut bench = start(Mode::OnDemand);
    let mut peer = bench.accept().await;
    let limit = Duration::from_secs(5);
    let asking = || bench.demand.fetch("/10.0.0.7", limit);
    let playing = async {
        let asked = peer.request().await;
        assert_eq!(asked.resource_names_subscribe, ["/10.0.0.7"]);
        let delivered = [resource("uid", &["/10.0.0.7"])];
        peer.respond(Kind::Address, delivered.into_iter(), &[])
            .await;
        let answer = peer.request().await;
        assert!(answer.resource_names_subscribe.is_empty());
    };
    let began = Instant::now();
    let (one, other, ()) = tokio::join!(asking(), asking(), playing);
    assert_eq!([one, other], [Answer::Delivered; 2]);
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn on_demand_only_policies_are_waited_for_at_the_start() {
    let mut bench = start(Mode::OnDemand);
    let peer = bench.accept().await;
    peer.push(Kind::Authorization, &[], &[]).await;
    bench.synced.wait_for(|synced| *synced).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn on_demand_what_nobody_answers_is_asked_for_on_the_next_stream() {
    let mut bench = start(Mode::OnDemand);
    let peer = bench.accept().await;
    let waiting = bench.demand.fetch("ns/host", Duration::from_secs(60));
    let playing = async {
        drop(peer);
        let attempt = bench.attempts.recv().await.unwrap();
        let mut requests = attempt.requests;
        let first = requests.recv().await.unwrap();
        assert_eq!(first.initial_resource_versions["ns/host"], "");
    };
    tokio::select! {
        answer = waiting => panic!("{answer:?}"),
        () = playing => {}
    }
}

#[tokio::test(start_paused = true)]
async fn on_demand_a_table_that_fills_at_once_is_renewed_after_a_while() {
    let mut bench = start(Mode::OnDemand);
    let mut peer = bench.accept().await;
    let opened = Instant::now();
    for number in 0..MAX_NAMES {
        let name = number.to_string();
        let asking = bench.demand.fetch(&name, Duration::MAX);
        assert_eq!(asking.now_or_never(), None);
    }
    for _ in 0..MAX_NAMES {
        peer.request().await;
    }
    let limit = Duration::from_secs(5);
    let asking = bench.demand.fetch("one more", limit);
    assert_eq!(asking.await, Answer::Unanswered);
    let next = timeout(FORGET_INTERVAL * 2, bench.attempt()).await.unwrap();
    assert!(next.at - opened >= FORGET_INTERVAL);
    let asking = bench.demand.fetch("one more", limit);
    assert_eq!(asking.now_or_never(), None, "there is room");
}
