//! The authority is away.

use super::*;

#[tokio::test(start_paused = true)]
async fn absence_at_the_start_ends_with_the_first_that_asks() {
    let world = world(24 * HOUR);
    world.authority.set_down(true);
    world.agent.prefetch(&id(WEB));
    assert_eq!(world.state(WEB).unwrap(), "Initializing");
    assert_eq!(world.stage(WEB), Some(Stage::Queued));
    sleep(600 * SECOND).await;
    assert_eq!(world.state(WEB).unwrap(), "Unavailable: down for tests");
    assert_eq!(world.stage(WEB), Some(Stage::Failing));
    let background = world.authority.calls();
    assert!((8..=16).contains(&background), "{background} retries");

    // Each caller has it tried again, once per second.
    let asked = Instant::now();
    for _ in 0..5 {
        world.agent.svid(&id(WEB)).await.unwrap_err();
    }
    assert_eq!(world.authority.calls(), background + 5);
    let spent = asked.elapsed();
    assert!(spent >= 4 * SECOND && spent <= 6 * SECOND, "{spent:?}");

    world.authority.set_down(false);
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert!(asked.elapsed() <= 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn what_lacked_comes_up_by_itself() {
    let world = world(24 * HOUR);
    world.authority.set_down(true);
    for n in 0..50 {
        world.agent.prefetch(&nth(n));
    }
    sleep(600 * SECOND).await;
    world.authority.set_down(false);
    sleep(181 * SECOND).await;
    let statuses = world.agent.snapshot();
    assert_eq!(statuses.len(), 50);
    assert!(statuses.iter().all(|status| status.stage == Stage::Held));
}

/// Nobody asks for it: one of all that lack a certificate finds out, and the rest follow.
#[tokio::test(start_paused = true)]
async fn what_lacked_comes_up_within_seconds_of_the_return() {
    for count in [1, 12, 100] {
        let world = world(24 * HOUR);
        world.authority.set_away(true);
        for n in 0..count {
            world.agent.prefetch(&nth(n));
        }
        sleep(600 * SECOND).await;
        let before = world.authority.calls();
        sleep(600 * SECOND).await;
        let per_minute = (world.authority.calls() - before) / 10;
        assert!((8..=60).contains(&per_minute), "{per_minute} of {count}");
        world.authority.set_away(false);
        sleep(10 * SECOND).await;
        let statuses = world.agent.snapshot();
        let held = statuses.iter().filter(|one| one.stage == Stage::Held);
        assert_eq!(held.count(), statuses.len(), "of {count}");
    }
}

/// One that fails by itself is not driven by the successes of others.
#[tokio::test(start_paused = true)]
async fn a_failure_of_ones_own_keeps_its_pauses() {
    let world = world(10 * SECOND);
    for n in 0..20 {
        world.agent.prefetch(&nth(n));
    }
    sleep(60 * SECOND).await;
    world.authority.refused.lock().insert(id(WEB));
    world.agent.prefetch(&id(WEB));
    sleep(600 * SECOND).await;
    let calls = world.authority.calls_for(&id(WEB));
    assert!((8..=16).contains(&calls), "{calls} retries");
}

#[tokio::test(start_paused = true)]
async fn a_burst_of_callers_of_a_failing_identity_makes_one_call_per_second() {
    let world = world(24 * HOUR);
    world.authority.set_down(true);
    world.agent.prefetch(&id(WEB));
    sleep(600 * SECOND).await;
    let before = world.authority.calls();
    let mut callers = JoinSet::new();
    for n in 0..100 {
        let agent = world.agent.clone();
        callers.spawn(async move {
            sleep(SECOND / 50 * n).await;
            agent.svid(&id(WEB)).await.map(|_| ()).unwrap_err()
        });
    }
    callers.join_all().await;
    let calls = world.authority.calls() - before;
    assert!((2..=4).contains(&calls), "{calls} calls in two seconds");
}

#[tokio::test(start_paused = true)]
async fn absence_at_renewal_goes_unnoticed_until_the_end_of_the_certificate() {
    let world = world(HOUR);
    world.agent.prefetch(&id(WEB));
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    world.authority.set_down(true);
    sleep(HOUR - 5 * SECOND).await;
    let asked = Instant::now();
    let still = world.agent.svid(&id(WEB)).await.unwrap();
    assert!(Arc::ptr_eq(&first, &still));
    assert_eq!(asked.elapsed(), Duration::ZERO);
    assert_eq!(world.state(WEB).unwrap(), "Available");
    assert!(world.authority.calls() > 5);

    sleep(5 * SECOND).await;
    assert!(world.agent.current(&id(WEB)).is_none());
    let error = world.agent.svid(&id(WEB)).await.unwrap_err();
    assert!(error.to_string().contains("down for tests"), "{error}");
    assert_eq!(world.state(WEB).unwrap(), "Unavailable: down for tests");
    assert_eq!(world.stage(WEB), Some(Stage::Expired));

    world.authority.set_down(false);
    let asked = Instant::now();
    world.agent.svid(&id(WEB)).await.unwrap();
    assert!(asked.elapsed() <= 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn after_the_outage_new_handshakes_use_the_new_certificate() {
    let world = world(HOUR);
    world.agent.prefetch(&id(WEB));
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    world.authority.set_down(true);
    sleep(HOUR * 50 / 60).await;
    world.authority.set_down(false);
    sleep(181 * SECOND).await;
    assert!(!Arc::ptr_eq(&first, &world.current(WEB)));
    // Who holds the old one keeps it.
    assert!(first.is_valid_at(world.clock.now()));
}

#[tokio::test(start_paused = true)]
async fn expired_certificate_is_not_served_while_renewal_hangs() {
    let world = world(HOUR);
    world.agent.prefetch(&id(WEB));
    world.agent.svid(&id(WEB)).await.unwrap();
    world.authority.mute.lock().insert(id(WEB));
    sleep(HOUR + SECOND).await;
    assert!(world.agent.current(&id(WEB)).is_none());
    let error = world.agent.svid(&id(WEB)).await.unwrap_err();
    assert!(error.to_string().contains("no answer"), "{error}");
}
