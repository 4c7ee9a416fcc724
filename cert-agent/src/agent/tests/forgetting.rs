//! The last workload of an identity leaves, and may return.

use super::*;
use crate::agent::entry::{Now, Urgency};

#[tokio::test(start_paused = true)]
async fn forgotten_identity_returns_within_the_grace() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    world.agent.forget(&id(WEB));
    sleep(10 * SECOND).await;
    assert_eq!(world.stage(WEB), Some(Stage::Forgotten));
    assert!(Arc::ptr_eq(&first, &world.current(WEB)));
    world.agent.prefetch(&id(WEB));
    sleep(100 * SECOND).await;
    assert!(Arc::ptr_eq(&first, &world.current(WEB)));
    assert_eq!(world.authority.calls(), 1);

    world.agent.forget(&id(WEB));
    sleep(59 * SECOND).await;
    world.agent.forget(&id(WEB)); // does not prolong it
    sleep(2 * SECOND).await;
    assert!(world.agent.snapshot().is_empty());
    assert_eq!(world.authority.log.lock().released, [id(WEB)]);
}

#[tokio::test(start_paused = true)]
async fn forgetting_during_the_first_fetch_discards_it() {
    let world = world(24 * HOUR);
    world.authority.set_latency(2 * SECOND);
    let agent = world.agent.clone();
    let mut waiting = JoinSet::new();
    waiting.spawn(async move { agent.svid(&id(WEB)).await.map(|_| ()) });
    sleep(SECOND).await;
    world.agent.forget(&id(WEB));
    let error = waiting.join_next().await.unwrap().unwrap().unwrap_err();
    let reason = "the identity is no longer needed";
    assert!(error.to_string().ends_with(reason), "{error}");
    sleep(5 * SECOND).await;
    assert_eq!(world.authority.in_flight(), 0);
    assert_eq!(world.state(WEB).unwrap(), format!("Unavailable: {reason}"));
    assert_eq!(world.status(WEB).unwrap().chain.len(), 0);

    // It returns, and the first connection after that is served.
    world.agent.prefetch(&id(WEB));
    world.agent.svid(&id(WEB)).await.unwrap();
    assert_eq!(world.authority.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn forgetting_during_a_renewal_discards_its_result() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    world.authority.set_latency(10 * SECOND);
    world.agent.refresh(&id(WEB));
    sleep(2 * SECOND).await;
    assert_eq!(world.authority.in_flight(), 1);
    world.agent.forget(&id(WEB));
    sleep(20 * SECOND).await;
    assert!(Arc::ptr_eq(&first, &world.current(WEB)));
    // The workload returns: the renewal that was cut short is made up for.
    world.agent.prefetch(&id(WEB));
    sleep(20 * SECOND).await;
    assert!(!Arc::ptr_eq(&first, &world.current(WEB)));
    assert_eq!(world.authority.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn coming_and_going_makes_no_more_than_a_call_per_second() {
    let world = world(24 * HOUR);
    world.authority.set_latency(SECOND / 20);
    for _ in 0..200 {
        world.agent.prefetch(&id(WEB));
        sleep(SECOND / 40).await;
        world.agent.forget(&id(WEB));
        sleep(SECOND / 40).await;
    }
    let calls = world.authority.calls();
    assert!((5..=11).contains(&calls), "{calls} calls in ten seconds");
    sleep(61 * SECOND).await;
    assert!(world.agent.snapshot().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_forgotten_are_neither_renewed_nor_retried() {
    let world = world_with(30 * SECOND, |options| options.forget_grace = HOUR);
    world.agent.prefetch(&id(WEB));
    world.agent.svid(&id(WEB)).await.unwrap();
    world.authority.set_down(true);
    world.agent.prefetch(&id(DB));
    sleep(SECOND).await;
    let calls = world.authority.calls();
    world.agent.forget(&id(WEB));
    world.agent.forget(&id(DB));
    sleep(120 * SECOND).await;
    assert_eq!(world.authority.calls(), calls);
    assert!(world.agent.current(&id(WEB)).is_none(), "expired");
}

/// What came of its last stay does not hold up its next one.
#[tokio::test(start_paused = true)]
async fn an_identity_that_returns_does_not_serve_out_a_pause() {
    let world = world(24 * HOUR);
    world.authority.set_down(true);
    world.agent.prefetch(&id(WEB));
    sleep(200 * SECOND).await;
    world.agent.forget(&id(WEB));
    world.authority.set_down(false);
    sleep(2 * SECOND).await;
    world.agent.prefetch(&id(WEB));
    sleep(2 * SECOND).await;
    assert_eq!(world.stage(WEB), Some(Stage::Held));
}

/// A task that is aborted may still be at work on another thread for a moment.
#[tokio::test(start_paused = true)]
async fn a_call_that_was_given_up_has_ended_before_the_next_starts() {
    let now = || Now {
        mono: Instant::now(),
        wall: SystemTime::now(),
    };
    let mut entry = Entry::new(now().mono);
    let mut tasks = JoinSet::new();
    let task = tasks.spawn(std::future::pending::<()>());
    let number = task.id();
    entry.started(task, Urgency::WarmUp, Instant::now());
    entry.forget(now(), HOUR);
    entry.want(now());
    sleep(60 * SECOND).await;
    assert_eq!(entry.due(now()), None);
    assert!(!entry.runs(number), "its result is not wanted");
    assert!(entry.reap(number));
    assert_eq!(
        entry.due(now()).map(|rank| rank.urgency),
        Some(Urgency::WarmUp)
    );
}
