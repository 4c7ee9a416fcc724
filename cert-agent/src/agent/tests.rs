//! The agent under a paused clock, with a source that does as it is told.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::time::sleep;

use super::*;
use crate::{
    BoxFuture, CertificateState, CsrSource, InProcessCa, KeyedChain, Retry,
    testing::{HOUR, id, paused_clock},
};

const WEB: &str = "spiffe://td/ns/shop/sa/web";
const DB: &str = "spiffe://td/ns/shop/sa/db";
const SECOND: Duration = Duration::from_secs(1);

/// A working CA behind switches.
struct Source {
    ca: CsrSource<InProcessCa>,
    latency: Mutex<Duration>,
    /// The next calls fail with these.
    failures: Mutex<Vec<Retry>>,
    down: AtomicBool,
    /// When and for whom it was called.
    calls: Mutex<Vec<(Instant, SpiffeId)>>,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
    released: Mutex<Vec<SpiffeId>>,
}

impl Source {
    fn calls(&self) -> usize {
        self.calls.lock().len()
    }

    fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Relaxed);
    }

    fn next_failure(&self) -> Option<Retry> {
        self.failures
            .lock()
            .pop()
            .or_else(|| self.down.load(Ordering::Relaxed).then_some(Retry::Soon))
    }
}

/// Counts a call out, also when it is dropped.
struct InFlight<'a>(&'a AtomicUsize);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl crate::Source for Source {
    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<KeyedChain, ObtainError>> {
        Box::pin(async move {
            self.calls.lock().push((Instant::now(), id.clone()));
            let now = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
            self.most_in_flight.fetch_max(now, Ordering::Relaxed);
            let _guard = InFlight(&self.in_flight);
            let latency = *self.latency.lock();
            sleep(latency).await;
            match self.next_failure() {
                Some(retry) => Err(ObtainError::refused("down for tests", retry)),
                None => self.ca.obtain(id).await,
            }
        })
    }

    fn release(&self, id: &SpiffeId) {
        self.released.lock().push(id.clone());
    }
}

/// A running agent. Tests hold it; dropping it ends everything.
struct World {
    agent: Agent,
    source: Arc<Source>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

fn world(lifetime: Duration) -> World {
    let clock = paused_clock();
    let ca = InProcessCa::random().unwrap();
    let ca = ca.with_lifetime(lifetime).with_clock(clock.clone());
    let source = Arc::new(Source {
        ca: CsrSource::new(ca),
        latency: Mutex::new(Duration::ZERO),
        failures: Mutex::default(),
        down: AtomicBool::new(false),
        calls: Mutex::default(),
        in_flight: AtomicUsize::new(0),
        most_in_flight: AtomicUsize::new(0),
        released: Mutex::default(),
    });
    let options = AgentOptions {
        clock,
        ..AgentOptions::default()
    };
    let dynamic: Arc<dyn crate::Source> = Arc::<Source>::clone(&source);
    let agent = Agent::new(dynamic, options);
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let (running, until) = (agent.clone(), stop.clone());
    tasks.spawn(async move { running.run(until).await });
    World {
        agent,
        source,
        stop,
        tasks,
    }
}

impl World {
    fn state(&self, which: &str) -> Option<CertificateState> {
        let statuses = self.agent.snapshot().into_iter();
        statuses
            .filter(|status| status.identity == id(which))
            .map(|status| status.state)
            .next()
    }

    async fn pause(&self, time: Duration) {
        sleep(time).await;
    }
}

#[tokio::test(start_paused = true)]
async fn callers_of_one_identity_share_one_fetch() {
    let world = world(24 * HOUR);
    *world.source.latency.lock() = SECOND;
    let mut callers = JoinSet::new();
    for _ in 0..20 {
        let agent = world.agent.clone();
        callers.spawn(async move { agent.svid(&id(WEB)).await.unwrap() });
    }
    let got = callers.join_all().await;
    assert!(got.iter().all(|svid| Arc::ptr_eq(svid, &got[0])));
    world.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(world.source.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn connections_go_before_warm_up_within_eight_calls() {
    let world = world(24 * HOUR);
    *world.source.latency.lock() = SECOND;
    for n in 0..20 {
        world
            .agent
            .prefetch(&id(&format!("spiffe://td/ns/n/sa/a{n:02}")));
    }
    world.pause(SECOND / 2).await;
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert!(asked.elapsed() < 2 * SECOND, "{:?}", asked.elapsed());
    assert_eq!(world.source.calls.lock()[8].1, id(WEB));
    world.pause(5 * SECOND).await;
    assert_eq!(world.source.calls(), 21);
    assert_eq!(world.source.most_in_flight.load(Ordering::Relaxed), 8);
}

#[tokio::test(start_paused = true)]
async fn renews_at_half_life_with_a_new_key() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    world.pause(HOUR * 107 / 10).await;
    assert_eq!(world.source.calls(), 1, "too early");
    world.pause(HOUR * 26 / 10).await;
    assert_eq!(world.source.calls(), 2);
    let second = world.agent.svid(&id(WEB)).await.unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    let key = |svid: &Svid| {
        let leaf = svid.chain()[0].clone();
        let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).unwrap();
        leaf.public_key().raw.to_vec()
    };
    assert_ne!(key(&first), key(&second));
}

#[tokio::test(start_paused = true)]
async fn renewals_of_many_are_spread() {
    let world = world(24 * HOUR);
    for n in 0..100 {
        world
            .agent
            .prefetch(&id(&format!("spiffe://td/ns/n/sa/a{n}")));
    }
    world.pause(14 * HOUR).await;
    let calls = world.source.calls.lock();
    assert_eq!(calls.len(), 200);
    let renewals: Vec<_> = calls.iter().skip(100).map(|(at, _)| *at).collect();
    let spread = *renewals.iter().max().unwrap() - *renewals.iter().min().unwrap();
    assert!(spread > HOUR, "{spread:?}");
}

#[tokio::test(start_paused = true)]
async fn short_certificates_cause_no_hot_loop() {
    let half_minute = world(30 * SECOND);
    half_minute.agent.prefetch(&id(WEB));
    half_minute.pause(60 * SECOND).await;
    let calls = half_minute.source.calls();
    assert!(
        (4..=6).contains(&calls),
        "{calls} calls in a minute for 30 s"
    );

    let shorter = world(2 * SECOND);
    shorter.agent.prefetch(&id(WEB));
    shorter.pause(60 * SECOND).await;
    let calls = shorter.source.calls.lock();
    assert!(calls.len() > 30, "{} calls", calls.len());
    assert!(calls.windows(2).all(|pair| pair[1].0 - pair[0].0 >= SECOND));
}

#[tokio::test(start_paused = true)]
async fn unused_identities_nobody_keeps_are_dropped_at_renewal() {
    let world = world(24 * HOUR);
    world.agent.svid(&id(WEB)).await.unwrap();
    // Used once at the start: renewed once, then unused for a whole term.
    world.pause(60 * HOUR).await;
    assert_eq!(world.source.calls(), 2);
    assert_eq!(world.state(WEB), None);
    assert_eq!(*world.source.released.lock(), [id(WEB)]);
}

#[tokio::test(start_paused = true)]
async fn early_failures_do_not_fail_the_connection() {
    let world = world(24 * HOUR);
    *world.source.failures.lock() = vec![Retry::Soon; 3];
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(world.source.calls(), 4);
    assert!(asked.elapsed() <= 4 * SECOND, "{:?}", asked.elapsed());
    assert_eq!(world.state(WEB), Some(CertificateState::Available));
}

#[tokio::test(start_paused = true)]
async fn hopeless_failures_fail_at_once() {
    let world = world(24 * HOUR);
    *world.source.failures.lock() = vec![Retry::Slowly];
    let asked = Instant::now();
    let error = world.agent.svid(&id(WEB)).await.unwrap_err();
    assert!(matches!(error, SvidError::Unavailable { .. }), "{error}");
    assert!(error.to_string().ends_with("down for tests"), "{error}");
    assert!(asked.elapsed() < SECOND);
}

#[tokio::test(start_paused = true)]
async fn lasting_outage_fails_soon_and_ends_with_the_first_that_asks() {
    let world = world(24 * HOUR);
    world.source.set_down(true);
    world.agent.prefetch(&id(WEB));
    assert_eq!(world.state(WEB), Some(CertificateState::Initializing));
    world.pause(600 * SECOND).await;
    let state = world.state(WEB).unwrap().to_string();
    assert_eq!(state, "Unavailable: down for tests");
    let background = world.source.calls();
    assert!((8..=16).contains(&background), "{background} retries");

    let asked = Instant::now();
    for _ in 0..5 {
        world.agent.svid(&id(WEB)).await.unwrap_err();
    }
    assert_eq!(world.source.calls(), background + 5);
    let spent = asked.elapsed();
    assert!(spent >= 4 * SECOND && spent <= 6 * SECOND, "{spent:?}");

    world.source.set_down(false);
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert!(asked.elapsed() <= 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn waits_as_long_as_the_authority_asked() {
    let world = world(24 * HOUR);
    *world.source.failures.lock() = vec![Retry::After(4 * SECOND)];
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert!(asked.elapsed() >= 4 * SECOND && asked.elapsed() < 5 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn hung_fetch_is_bounded_and_blocks_no_other() {
    let world = world(24 * HOUR);
    *world.source.latency.lock() = 10 * HOUR;
    let asked = Instant::now();
    let error = world.agent.svid(&id(WEB)).await.unwrap_err();
    assert!(matches!(error, SvidError::Timeout { .. }), "{error}");
    assert_eq!(asked.elapsed(), 10 * SECOND);
    *world.source.latency.lock() = Duration::ZERO;
    world.agent.svid(&id(DB)).await.unwrap();
    world.pause(79 * SECOND).await;
    assert_eq!(world.source.in_flight.load(Ordering::Relaxed), 1);
    world.pause(2 * SECOND).await;
    assert_eq!(world.source.in_flight.load(Ordering::Relaxed), 0);
    world.agent.svid(&id(WEB)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn failed_renewal_keeps_the_certificate_until_its_end() {
    let world = world(HOUR);
    world.agent.prefetch(&id(WEB));
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    world.source.set_down(true);
    world.pause(HOUR - 5 * SECOND).await;
    let still = world.agent.svid(&id(WEB)).await.unwrap();
    assert!(Arc::ptr_eq(&first, &still));
    assert_eq!(world.state(WEB), Some(CertificateState::Available));
    assert!(world.source.calls() > 5);

    world.pause(10 * SECOND).await;
    assert!(world.agent.current(&id(WEB)).is_none());
    let error = world.agent.svid(&id(WEB)).await.unwrap_err();
    assert!(error.to_string().contains("down for tests"), "{error}");
    let status = world.agent.snapshot().remove(0);
    assert_eq!(status.state.to_string(), "Unavailable: down for tests");

    world.source.set_down(false);
    world.agent.svid(&id(WEB)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn expired_certificate_is_not_served_while_renewal_hangs() {
    let world = world(HOUR);
    world.agent.prefetch(&id(WEB));
    world.agent.svid(&id(WEB)).await.unwrap();
    *world.source.latency.lock() = 10 * HOUR;
    world.pause(HOUR + SECOND).await;
    let error = world.agent.svid(&id(WEB)).await.unwrap_err();
    assert!(error.to_string().contains("no answer"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn forgotten_identity_returns_within_the_grace() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    world.agent.forget(&id(WEB));
    world.pause(10 * SECOND).await;
    assert!(world.agent.current(&id(WEB)).is_some());
    world.agent.prefetch(&id(WEB));
    world.pause(100 * SECOND).await;
    let again = world.agent.svid(&id(WEB)).await.unwrap();
    assert!(Arc::ptr_eq(&first, &again));
    assert_eq!(world.source.calls(), 1);

    world.agent.forget(&id(WEB));
    world.pause(61 * SECOND).await;
    assert!(world.agent.snapshot().is_empty());
    assert_eq!(*world.source.released.lock(), [id(WEB)]);
}

#[tokio::test(start_paused = true)]
async fn forgetting_during_the_first_fetch_discards_it() {
    let world = world(24 * HOUR);
    *world.source.latency.lock() = 2 * SECOND;
    let agent = world.agent.clone();
    let mut waiting = JoinSet::new();
    waiting.spawn(async move { agent.svid(&id(WEB)).await.map(|_| ()) });
    world.pause(SECOND).await;
    world.agent.forget(&id(WEB));
    let error = waiting.join_next().await.unwrap().unwrap().unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("the identity is no longer needed")
    );
    world.pause(5 * SECOND).await;
    assert!(world.agent.snapshot().is_empty());
    assert_eq!(world.source.in_flight.load(Ordering::Relaxed), 0);
    world.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(world.source.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn forgetting_during_a_renewal_discards_its_result() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    *world.source.latency.lock() = 10 * SECOND;
    world.agent.refresh(&id(WEB));
    world.pause(SECOND).await;
    assert_eq!(world.source.calls(), 2);
    world.agent.forget(&id(WEB));
    world.pause(20 * SECOND).await;
    let held = world.agent.current(&id(WEB)).unwrap();
    assert!(Arc::ptr_eq(&first, &held));
    // The workload returns: the renewal that was cut short is made up for.
    world.agent.prefetch(&id(WEB));
    world.pause(20 * SECOND).await;
    assert!(!Arc::ptr_eq(
        &first,
        &world.agent.current(&id(WEB)).unwrap()
    ));
}

#[tokio::test(start_paused = true)]
async fn refresh_replaces_the_certificate() {
    let world = world(24 * HOUR);
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    world.agent.refresh(&id(WEB));
    world.pause(SECOND).await;
    let second = world.agent.svid(&id(WEB)).await.unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    world.agent.refresh(&id(DB));
    assert_eq!(world.state(DB), None);
}

#[tokio::test(start_paused = true)]
async fn stopping_ends_all_tasks() {
    let mut world = world(24 * HOUR);
    *world.source.latency.lock() = HOUR;
    world.agent.prefetch(&id(WEB));
    world.pause(SECOND).await;
    assert_eq!(world.source.in_flight.load(Ordering::Relaxed), 1);
    world.stop.cancel();
    world.tasks.join_next().await.unwrap().unwrap();
    assert_eq!(world.source.in_flight.load(Ordering::Relaxed), 0);

    // A later run takes up what was left.
    *world.source.latency.lock() = Duration::ZERO;
    let agent = world.agent.clone();
    let run = CancellationToken::new();
    world.tasks.spawn(async move { agent.run(run).await });
    world.agent.svid(&id(WEB)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn snapshot_tells_everything_but_keys() {
    let world = world(24 * HOUR);
    world.agent.svid(&id(WEB)).await.unwrap();
    world.agent.svid(&id(DB)).await.unwrap();
    let statuses = world.agent.snapshot();
    let ids: Vec<_> = statuses.iter().map(|it| it.identity.as_str()).collect();
    assert_eq!(ids, [DB, WEB]);
    let status = &statuses[0];
    assert_eq!(status.state.to_string(), "Available");
    assert_eq!((status.chain.len(), status.roots.len()), (1, 1));
    let leaf = &status.chain[0];
    let life = leaf.not_after.duration_since(leaf.not_before).unwrap();
    assert_eq!(life, 24 * HOUR + 120 * SECOND);
    assert!(leaf.serial.bytes().all(|digit| digit.is_ascii_digit()));
    assert!(leaf.serial.parse::<u128>().unwrap() > 0);
    assert!(leaf.pem.starts_with("-----BEGIN CERTIFICATE-----\n"));
    assert!(!format!("{statuses:?}").contains("PRIVATE"));
}
