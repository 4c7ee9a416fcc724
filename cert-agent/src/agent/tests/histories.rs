//! Random histories: whatever comes, the promises hold.

use proptest::prelude::*;
use tokio::time::timeout;

use super::*;

const IDENTITIES: usize = 5;
const PLACES: usize = 3;

/// Something that happens.
#[derive(Debug, Clone)]
enum Event {
    Prefetch(usize),
    Forget(usize),
    Refresh(usize),
    /// A connection of the identity arrives.
    Connect(usize),
    /// What the next calls meet.
    Answers(Vec<Answer>),
    /// How long calls take from now on, in milliseconds.
    Latency(u64),
    /// The authority comes or goes.
    Down(bool),
    /// Our wall clock is set, in seconds.
    Clock(i64),
    /// Time passes, in milliseconds.
    Pass(u64),
}

fn answer() -> impl Strategy<Value = Answer> {
    let moment = |range: std::ops::Range<u64>| range.prop_map(Duration::from_millis);
    prop_oneof![
        6 => moment(1..3_600_000).prop_map(Answer::Certificate),
        2 => moment(0..5_000).prop_map(Answer::Certificate),
        1 => Just(Answer::ForSomebodyElse),
        2 => Just(Answer::Refusal(Retry::Soon)),
        1 => Just(Answer::Refusal(Retry::Slowly)),
        // Shorter than the grace of a forgotten identity, with which a hint is forgotten too.
        2 => moment(0..50_000).prop_map(|wait| Answer::Refusal(Retry::After(wait))),
        1 => Just(Answer::Silence),
        1 => Just(Answer::Panic),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let who = 0..IDENTITIES;
    prop_oneof![
        4 => who.clone().prop_map(Event::Prefetch),
        3 => who.clone().prop_map(Event::Forget),
        1 => who.clone().prop_map(Event::Refresh),
        6 => who.prop_map(Event::Connect),
        3 => prop::collection::vec(answer(), 1..8).prop_map(Event::Answers),
        1 => prop_oneof![Just(0), 1_u64..30_000].prop_map(Event::Latency),
        1 => any::<bool>().prop_map(Event::Down),
        1 => prop_oneof![-200_i64..200, -200_000_i64..200_000].prop_map(Event::Clock),
        8 => prop_oneof![1_u64..2_000, 1_u64..60_000].prop_map(Event::Pass),
    ]
}

/// Lives through `events`, then through a quarter of an hour in which everything works.
async fn live(events: Vec<Event>) {
    let world = world_with(HOUR, |options| {
        options.max_fetches = PLACES;
        options.max_slow_fetches = 1;
    });
    let mut wanted = HashSet::new();
    let mut connections = JoinSet::new();
    for event in events {
        match event {
            Event::Prefetch(n) => {
                world.agent.prefetch(&nth(n));
                wanted.insert(n);
            }
            Event::Forget(n) => {
                world.agent.forget(&nth(n));
                wanted.remove(&n);
            }
            Event::Refresh(n) => world.agent.refresh(&nth(n)),
            Event::Connect(n) => {
                connections.spawn(connect(world.agent.clone(), world.clock.clone(), n));
            }
            Event::Answers(answers) => world.authority.answer_next(answers),
            Event::Latency(ms) => world.authority.set_latency(Duration::from_millis(ms)),
            Event::Down(down) => world.authority.set_down(down),
            Event::Clock(seconds) => world.step_clock(seconds),
            Event::Pass(ms) => sleep(Duration::from_millis(ms)).await,
        }
        nothing_expired_is_served(&world);
    }
    everything_works_again(&world).await;
    sleep(900 * SECOND).await;
    connections.join_all().await;
    nothing_expired_is_served(&world);
    let held = world.agent.snapshot();
    for n in wanted {
        let status = held.iter().find(|status| status.identity == nth(n));
        let state = status.map(|status| status.state.clone());
        assert_eq!(state, Some(CertificateState::Available), "{n}");
    }
    let forgotten = held.iter().filter(|it| it.stage == Stage::Forgotten);
    assert_eq!(forgotten.count(), 0, "the grace is over");
}

/// One connection: gets what it may present, or an error, within its time.
async fn connect(agent: Agent, clock: Clock, n: usize) {
    let limit = 10 * SECOND + SECOND / 100;
    let answer = timeout(limit, agent.svid(&nth(n))).await;
    if let Ok(svid) = answer.expect("a connection waits no longer than that") {
        assert!(svid.is_valid_at(clock.now()), "expired");
        assert_eq!(*svid.id(), nth(n));
    }
}

fn nothing_expired_is_served(world: &World) {
    for n in 0..IDENTITIES {
        if let Some(svid) = world.agent.current(&nth(n)) {
            assert!(svid.not_after() > world.clock.now());
        }
    }
}

/// From here on. Once calls that hang have ended, whoever asks is served.
async fn everything_works_again(world: &World) {
    world.authority.answers.lock().clear();
    world.authority.set_latency(Duration::ZERO);
    world.authority.set_down(false);
    world.ahead.store(0, Ordering::Relaxed);
    sleep(91 * SECOND).await;
    for n in 0..IDENTITIES {
        let asked = Instant::now();
        world.agent.svid(&nth(n)).await.unwrap();
        assert!(asked.elapsed() <= 5 * SECOND, "{:?}", asked.elapsed());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// The world checks on its end: never two calls of one identity, never more than allowed,
    /// never sooner than a second after the one before or than the authority said.
    #[test]
    fn promises_hold_in_any_history(events in prop::collection::vec(event(), 1..80)) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(live(events));
    }
}
