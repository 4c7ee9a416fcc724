//! The agent under a paused clock, with an authority that does as it is told.

mod fetching;
mod forgetting;
mod histories;
mod outages;
mod renewal;
mod revocation;
mod visibility;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::atomic::{AtomicBool, AtomicI64, Ordering},
    time::SystemTime,
};

use parking_lot::Mutex;
use tokio::time::sleep;

use super::*;
use crate::{
    BoxFuture, CertificateState, CsrSource, InProcessCa, KeyedChain, ObtainError, Retry, RootPair,
    Stage,
    testing::{HOUR, id, paused_clock},
};

const WEB: &str = "spiffe://td/ns/shop/sa/web";
const DB: &str = "spiffe://td/ns/shop/sa/db";
const SECOND: Duration = Duration::from_secs(1);

/// What the authority does with one call.
#[derive(Debug, Clone, Copy)]
enum Answer {
    /// Signs for this long.
    Certificate(Duration),
    /// Signs for somebody else.
    ForSomebodyElse,
    Refusal(Retry),
    /// Is not there.
    Absence,
    /// Never answers.
    Silence,
    /// Comes down.
    Panic,
}

/// An authority and its log.
struct Authority {
    root: RootPair,
    /// Its clock is right, whatever ours says.
    clock: Clock,
    lifetime: Duration,
    latency: Mutex<Duration>,
    down: AtomicBool,
    away: AtomicBool,
    /// For the next calls; then it is up or down.
    answers: Mutex<VecDeque<Answer>>,
    /// Calls for these get no answer.
    mute: Mutex<HashSet<SpiffeId>>,
    /// Whom it refuses.
    refused: Mutex<HashSet<SpiffeId>>,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    /// When and for whom it was called.
    calls: Vec<(Instant, SpiffeId)>,
    in_flight: Vec<SpiffeId>,
    most_in_flight: usize,
    ended: HashMap<SpiffeId, Instant>,
    /// No call for these before the given time.
    not_before: HashMap<SpiffeId, Instant>,
    released: Vec<SpiffeId>,
    /// What the agent must never do, and did.
    violations: Vec<String>,
}

impl Authority {
    fn calls(&self) -> usize {
        self.log.lock().calls.len()
    }

    fn calls_for(&self, id: &SpiffeId) -> usize {
        let log = self.log.lock();
        log.calls.iter().filter(|(_, asked)| asked == id).count()
    }

    /// When it was called, from the `nth` call on.
    fn times(&self, nth: usize) -> Vec<Instant> {
        let log = self.log.lock();
        log.calls.iter().skip(nth).map(|(at, _)| *at).collect()
    }

    fn in_flight(&self) -> usize {
        self.log.lock().in_flight.len()
    }

    fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Relaxed);
    }

    fn set_away(&self, away: bool) {
        self.away.store(away, Ordering::Relaxed);
    }

    fn set_latency(&self, latency: Duration) {
        *self.latency.lock() = latency;
    }

    fn answer_next(&self, answers: impl IntoIterator<Item = Answer>) {
        self.answers.lock().extend(answers);
    }

    fn next_answer(&self, id: &SpiffeId) -> Answer {
        if self.mute.lock().contains(id) {
            Answer::Silence
        } else if self.refused.lock().contains(id) {
            Answer::Refusal(Retry::Soon)
        } else if let Some(answer) = self.answers.lock().pop_front() {
            answer
        } else if self.away.load(Ordering::Relaxed) {
            Answer::Absence
        } else if self.down.load(Ordering::Relaxed) {
            Answer::Refusal(Retry::Soon)
        } else {
            Answer::Certificate(self.lifetime)
        }
    }

    /// Writes down a call, and what is wrong with it.
    fn begin(&self, id: &SpiffeId) -> Call<'_> {
        let now = Instant::now();
        let mut log = self.log.lock();
        if log.in_flight.contains(id) {
            log.violations.push(format!("second call for {id}"));
        }
        if let Some(ended) = log.ended.get(id).copied()
            && now - ended < SECOND
        {
            let pause = now - ended;
            log.violations.push(format!("{id} again after {pause:?}"));
        }
        if log.not_before.remove(id).is_some_and(|at| now < at) {
            log.violations.push(format!("{id} sooner than allowed"));
        }
        log.calls.push((now, id.clone()));
        log.in_flight.push(id.clone());
        log.most_in_flight = log.most_in_flight.max(log.in_flight.len());
        Call(self, id.clone())
    }

    async fn sign(&self, id: &SpiffeId, lifetime: Duration) -> Result<KeyedChain, ObtainError> {
        let root = &self.root;
        let ca = InProcessCa::from_pem(&root.certificate_pem, &root.key_pem).unwrap();
        let ca = ca.with_lifetime(lifetime).with_clock(self.clock.clone());
        CsrSource::new(ca).obtain(id).await
    }
}

/// Writes down the end of a call, also when it is dropped.
struct Call<'a>(&'a Authority, SpiffeId);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let mut log = self.0.log.lock();
        let place = log.in_flight.iter().position(|id| *id == self.1).unwrap();
        log.in_flight.swap_remove(place);
        log.ended.insert(self.1.clone(), Instant::now());
    }
}

impl Source for Authority {
    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<KeyedChain, ObtainError>> {
        Box::pin(async move {
            let _call = self.begin(id);
            let (answer, latency) = (self.next_answer(id), *self.latency.lock());
            sleep(latency).await;
            match answer {
                Answer::Certificate(lifetime) => self.sign(id, lifetime).await,
                Answer::ForSomebodyElse => {
                    let other = "spiffe://td/ns/some/sa/body".parse().unwrap();
                    self.sign(&other, self.lifetime).await
                }
                Answer::Refusal(retry) => {
                    if let Retry::After(wait) = retry {
                        let until = Instant::now() + wait;
                        self.log.lock().not_before.insert(id.clone(), until);
                    }
                    Err(ObtainError::refused("down for tests", retry))
                }
                Answer::Absence => Err(ObtainError::Unreachable("away for tests".into())),
                Answer::Silence => std::future::pending().await,
                Answer::Panic => panic!("on purpose"),
            }
        })
    }

    fn release(&self, id: &SpiffeId) {
        self.log.lock().released.push(id.clone());
    }
}

/// A running agent. Tests hold it; dropping it ends everything.
struct World {
    agent: Agent,
    authority: Arc<Authority>,
    clock: Clock,
    /// Seconds that our wall clock is ahead.
    ahead: Arc<AtomicI64>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

fn world(lifetime: Duration) -> World {
    world_with(lifetime, |_| {})
}

/// A world whose authority signs for `lifetime` unless told otherwise.
fn world_with(lifetime: Duration, adjust: impl FnOnce(&mut AgentOptions)) -> World {
    let right = paused_clock();
    let ahead = Arc::new(AtomicI64::new(0));
    let (authoritys, offset) = (right.clone(), Arc::clone(&ahead));
    let clock = Clock::new(move || {
        let offset = offset.load(Ordering::Relaxed);
        let by = Duration::from_secs(offset.unsigned_abs());
        let now = right.now();
        if offset < 0 { now - by } else { now + by }
    });
    let authority = Arc::new(Authority {
        root: RootPair::generate("tests").unwrap(),
        clock: authoritys,
        lifetime,
        latency: Mutex::default(),
        down: AtomicBool::new(false),
        away: AtomicBool::new(false),
        answers: Mutex::default(),
        mute: Mutex::default(),
        refused: Mutex::default(),
        log: Mutex::default(),
    });
    let mut options = AgentOptions {
        clock: clock.clone(),
        ..AgentOptions::default()
    };
    adjust(&mut options);
    let source: Arc<dyn Source> = Arc::<Authority>::clone(&authority);
    let agent = Agent::new(source, options);
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let (running, until) = (agent.clone(), stop.clone());
    tasks.spawn(async move { running.run(until).await });
    World {
        agent,
        authority,
        clock,
        ahead,
        stop,
        tasks,
    }
}

impl World {
    fn status(&self, which: &str) -> Option<IdentityStatus> {
        let mut statuses = self.agent.snapshot().into_iter();
        statuses.find(|status| status.identity.as_str() == which)
    }

    fn state(&self, which: &str) -> Option<String> {
        Some(self.status(which)?.state.to_string())
    }

    fn stage(&self, which: &str) -> Option<Stage> {
        Some(self.status(which)?.stage)
    }

    /// What a handshake of this moment would be given.
    fn current(&self, which: &str) -> Arc<Svid> {
        self.agent.current(&id(which)).unwrap()
    }

    /// The wall clock of the machine is set, or a suspended machine wakes up.
    fn step_clock(&self, seconds: i64) {
        self.ahead.fetch_add(seconds, Ordering::Relaxed);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let log = self.authority.log.lock();
            assert_eq!(log.violations, [""; 0]);
            let options = &self.agent.0.options;
            assert!(log.most_in_flight <= options.max_fetches + options.max_slow_fetches);
        }
    }
}

fn nth(n: usize) -> SpiffeId {
    id(&format!("spiffe://td/ns/n/sa/a{n:03}"))
}
