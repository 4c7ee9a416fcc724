//! Getting a first certificate: sharing, priority, limits.

use super::*;

#[tokio::test(start_paused = true)]
async fn callers_of_one_identity_share_one_fetch() {
    let world = world(24 * HOUR);
    world.authority.set_latency(SECOND);
    let mut callers = JoinSet::new();
    for _ in 0..20 {
        let agent = world.agent.clone();
        callers.spawn(async move { agent.svid(&id(WEB)).await.unwrap() });
    }
    let got = callers.join_all().await;
    assert!(got.iter().all(|svid| Arc::ptr_eq(svid, &got[0])));
    world.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(world.authority.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn three_workloads_of_one_identity_need_one_certificate() {
    let world = world(24 * HOUR);
    for _ in 0..3 {
        world.agent.prefetch(&id(WEB));
        sleep(SECOND / 10).await;
    }
    assert_eq!(world.authority.calls(), 1);
    assert_eq!(world.agent.snapshot().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn warm_up_uses_several_calls_at_once() {
    let world = world(24 * HOUR);
    world.authority.set_latency(SECOND);
    for n in 0..12 {
        world.agent.prefetch(&nth(n));
    }
    sleep(SECOND * 5 / 2).await;
    let statuses = world.agent.snapshot();
    assert!(statuses.iter().all(|status| status.stage == Stage::Held));
    assert_eq!(world.authority.log.lock().most_in_flight, 6);
}

#[tokio::test(start_paused = true)]
async fn connections_go_before_warm_up_and_find_a_place_kept_free() {
    let world = world(24 * HOUR);
    world.authority.set_latency(SECOND);
    for n in 0..20 {
        world.agent.prefetch(&nth(n));
    }
    sleep(SECOND / 2).await;
    // Queued behind all others, then raised.
    world.agent.prefetch(&id(WEB));
    sleep(SECOND / 10).await;
    assert_eq!(world.stage(WEB), Some(Stage::Queued));
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(asked.elapsed(), SECOND);
    assert_eq!(world.authority.log.lock().calls[6].1, id(WEB));
    sleep(5 * SECOND).await;
    assert_eq!(world.authority.calls(), 21);
}

#[tokio::test(start_paused = true)]
async fn connections_go_before_others_once_all_places_are_taken() {
    let world = world_with(24 * HOUR, |options| options.max_fetches = 2);
    world.authority.set_latency(SECOND);
    for n in 0..20 {
        world.agent.prefetch(&nth(n));
    }
    sleep(SECOND / 2).await;
    assert_eq!(world.authority.in_flight(), 2);
    world.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(world.authority.log.lock().calls[2].1, id(WEB));
}

#[tokio::test(start_paused = true)]
async fn warm_up_goes_before_renewal() {
    let world = world_with(24 * HOUR, |options| options.max_fetches = 1);
    world.agent.prefetch(&id(DB));
    sleep(SECOND).await;
    world.authority.set_latency(SECOND);
    world.agent.prefetch(&nth(0));
    sleep(SECOND / 2).await;
    world.agent.refresh(&id(DB));
    world.agent.prefetch(&id(WEB));
    sleep(5 * SECOND).await;
    let log = world.authority.log.lock();
    let order: Vec<_> = log.calls.iter().map(|(_, id)| id.clone()).collect();
    assert_eq!(order, [id(DB), nth(0), id(WEB), id(DB)]);
}

#[tokio::test(start_paused = true)]
async fn hung_fetch_is_bounded_and_blocks_no_other() {
    let world = world(24 * HOUR);
    world.authority.mute.lock().insert(id(WEB));
    let asked = Instant::now();
    let error = world.agent.svid(&id(WEB)).await.unwrap_err();
    assert!(matches!(error, SvidError::Timeout { .. }), "{error}");
    assert_eq!(asked.elapsed(), 10 * SECOND);
    assert_eq!(world.stage(WEB), Some(Stage::Fetching));
    world.agent.svid(&id(DB)).await.unwrap();
    sleep(79 * SECOND).await;
    assert_eq!(world.authority.in_flight(), 1);
    world.authority.mute.lock().clear();
    sleep(2 * SECOND).await;
    assert_eq!(world.authority.in_flight(), 0);
    world.agent.svid(&id(WEB)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn hung_warm_ups_do_not_keep_a_connection_out() {
    let world = world(24 * HOUR);
    for n in 0..20 {
        world.authority.mute.lock().insert(nth(n));
        world.agent.prefetch(&nth(n));
    }
    sleep(SECOND).await;
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert!(asked.elapsed() < SECOND);
    // A connection that joins a hung call does not count as a warm-up: another one moves up.
    assert_eq!(world.authority.in_flight(), 6);
    let agent = world.agent.clone();
    let mut joined = JoinSet::new();
    joined.spawn(async move { agent.svid(&nth(0)).await.unwrap_err() });
    sleep(SECOND).await;
    assert_eq!(world.authority.in_flight(), 7);
}

#[tokio::test(start_paused = true)]
async fn hung_calls_of_waiting_connections_keep_no_other_out() {
    let world = world(24 * HOUR);
    let mut hung = JoinSet::new();
    for n in 0..16 {
        world.authority.mute.lock().insert(nth(n));
        let agent = world.agent.clone();
        hung.spawn(async move { agent.svid(&nth(n)).await.unwrap_err() });
    }
    sleep(SECOND).await;
    assert_eq!(world.authority.in_flight(), 8);
    // It waits for two rounds of calls that hang, and still has its turn within its time.
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(asked.elapsed(), 9 * SECOND);
    // From then on the way is free.
    let asked = Instant::now();
    world.agent.svid(&id(DB)).await.unwrap();
    assert_eq!(asked.elapsed(), Duration::ZERO);
    hung.join_all().await;
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_answers_nobody_is_asked_in_bounds() {
    let world = world(24 * HOUR);
    let asked = Instant::now();
    for n in 0..60 {
        if n < 50 {
            world.authority.mute.lock().insert(nth(n));
        }
        world.agent.prefetch(&nth(n));
    }
    sleep(60 * SECOND).await;
    // No connection waits, so a quarter of the quick ones stays free.
    assert_eq!(world.authority.log.lock().most_in_flight, 6 + 24);
    // Those that were never asked for go before those that failed.
    while (50..60).any(|n| world.agent.current(&nth(n)).is_none()) {
        sleep(SECOND).await;
    }
    assert!(asked.elapsed() < 190 * SECOND, "{:?}", asked.elapsed());
    assert_eq!(world.authority.log.lock().most_in_flight, 6 + 24);
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_takes_a_minute_serves_everybody_in_the_end() {
    let world = world(24 * HOUR);
    world.authority.set_latency(60 * SECOND);
    for n in 0..40 {
        world.agent.prefetch(&nth(n));
    }
    sleep(150 * SECOND).await;
    assert_eq!(world.authority.calls(), 40);
    let statuses = world.agent.snapshot();
    assert!(statuses.iter().all(|status| status.stage == Stage::Held));
}

#[tokio::test(start_paused = true)]
async fn refusals_of_a_new_workload_do_not_fail_its_connection() {
    let world = world(24 * HOUR);
    // As istiod answers until it has heard of the pod.
    world
        .authority
        .answer_next([Answer::Refusal(Retry::Soon); 3]);
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(world.authority.calls(), 4);
    assert!(asked.elapsed() <= 4 * SECOND, "{:?}", asked.elapsed());
    assert_eq!(world.stage(WEB), Some(Stage::Held));
}

#[tokio::test(start_paused = true)]
async fn hopeless_failures_fail_at_once() {
    let world = world(24 * HOUR);
    world
        .authority
        .answer_next([Answer::Refusal(Retry::Slowly)]);
    let asked = Instant::now();
    let error = world.agent.svid(&id(WEB)).await.unwrap_err();
    assert!(matches!(error, SvidError::Unavailable { .. }), "{error}");
    assert!(error.to_string().ends_with("down for tests"), "{error}");
    assert!(asked.elapsed() < SECOND);
    // Nor does it stick: somebody may have changed something.
    world.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(asked.elapsed(), 5 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn hopeless_failures_are_tried_again_slowly() {
    let world = world(24 * HOUR);
    let refusals = [
        Answer::Refusal(Retry::Slowly),
        Answer::Refusal(Retry::Slowly),
    ];
    world.authority.answer_next(refusals);
    world.agent.prefetch(&id(WEB));
    sleep(29 * SECOND).await;
    assert_eq!(world.authority.calls(), 1);
    sleep(32 * SECOND).await;
    assert_eq!(world.authority.calls(), 3);
    assert_eq!(world.stage(WEB), Some(Stage::Held));
}

#[tokio::test(start_paused = true)]
async fn waits_as_long_as_the_authority_asked() {
    let world = world(24 * HOUR);
    let wait = Retry::After(4 * SECOND);
    world.authority.answer_next([Answer::Refusal(wait)]);
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert!(asked.elapsed() >= 4 * SECOND && asked.elapsed() < 5 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn connections_do_not_wait_for_what_comes_too_late() {
    let world = world(24 * HOUR);
    let wait = Retry::After(200 * SECOND);
    world.authority.answer_next([Answer::Refusal(wait)]);
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap_err();
    assert!(asked.elapsed() < SECOND);
    sleep(210 * SECOND).await;
    assert_eq!(world.authority.calls(), 2);
    assert_eq!(world.authority.times(1), [asked + 200 * SECOND]);
}

#[tokio::test(start_paused = true)]
async fn unusable_answers_are_refused_and_asked_for_again() {
    let world = world(24 * HOUR);
    world.authority.answer_next([
        Answer::ForSomebodyElse,
        Answer::Certificate(Duration::ZERO),
        Answer::Panic,
    ]);
    world.agent.prefetch(&id(WEB));
    let mut states = Vec::new();
    for _ in 0..4 {
        sleep(SECOND / 10).await;
        states.push(world.state(WEB).unwrap());
        // Traffic has it tried again.
        let agent = world.agent.clone();
        let _ = tokio::time::timeout(SECOND, agent.svid(&id(WEB))).await;
    }
    assert!(
        states[0].contains("spiffe://td/ns/some/sa/body"),
        "{states:?}"
    );
    assert!(states[1].contains("expired"), "{states:?}");
    assert!(states[2].contains("panicked"), "{states:?}");
    assert_eq!(states[3], "Available");
}

#[tokio::test(start_paused = true)]
async fn stopping_ends_all_tasks() {
    let mut world = world(24 * HOUR);
    world.authority.set_latency(HOUR);
    world.agent.prefetch(&id(WEB));
    sleep(SECOND).await;
    assert_eq!(world.authority.in_flight(), 1);
    world.stop.cancel();
    world.tasks.join_next().await.unwrap().unwrap();
    assert_eq!(world.authority.in_flight(), 0);

    // A later run takes up what was left.
    world.authority.set_latency(Duration::ZERO);
    let agent = world.agent.clone();
    let run = CancellationToken::new();
    world.tasks.spawn(async move { agent.run(run).await });
    world.agent.svid(&id(WEB)).await.unwrap();
}
