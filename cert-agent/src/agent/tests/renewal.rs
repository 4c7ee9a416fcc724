//! Renewal: when, how often, with which clock.

use super::*;

#[tokio::test(start_paused = true)]
async fn renews_after_half_of_the_life_with_a_new_key() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    sleep(HOUR * 12 - SECOND).await;
    assert_eq!(world.authority.calls(), 1, "too early");
    sleep(HOUR * 48 / 10 + 2 * SECOND).await;
    assert_eq!(world.authority.calls(), 2);
    let second = world.current(WEB);
    let key = |svid: &Svid| {
        let leaf = svid.chain()[0].clone();
        let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).unwrap();
        leaf.public_key().raw.to_vec()
    };
    assert_ne!(key(&first), key(&second));
}

#[tokio::test(start_paused = true)]
async fn follows_the_life_that_was_granted_by_a_slow_authority() {
    let world = world(HOUR);
    world.authority.set_latency(8 * SECOND);
    world.agent.prefetch(&id(WEB));
    world.agent.svid(&id(WEB)).await.unwrap();
    sleep(HOUR * 45 / 60).await;
    let times = world.authority.times(0);
    assert_eq!(times.len(), 2);
    let pause = times[1] - times[0];
    assert!(pause > HOUR / 2 && pause < HOUR * 43 / 60, "{pause:?}");
}

#[tokio::test(start_paused = true)]
async fn renewals_of_many_are_spread() {
    let world = world(24 * HOUR);
    for n in 0..100 {
        world.agent.prefetch(&nth(n));
    }
    sleep(17 * HOUR).await;
    let renewals = world.authority.times(100);
    assert_eq!(renewals.len(), 100);
    let spread = *renewals.iter().max().unwrap() - *renewals.iter().min().unwrap();
    assert!(spread > 3 * HOUR, "{spread:?}");
    let busiest = renewals.iter().map(|from| {
        let minute = *from..*from + 60 * SECOND;
        renewals.iter().filter(|at| minute.contains(at)).count()
    });
    assert!(busiest.max().unwrap() < 10);
}

#[tokio::test(start_paused = true)]
async fn the_window_can_be_chosen() {
    let world = world_with(HOUR, |options| options.renewal_window = (0.1, 0.1));
    world.agent.prefetch(&id(WEB));
    sleep(HOUR / 10 - SECOND).await;
    assert_eq!(world.authority.calls(), 1);
    sleep(2 * SECOND).await;
    assert_eq!(world.authority.calls(), 2);

    for senseless in [(f64::NAN, 0.5), (-3.0, -2.0), (7.0, f64::INFINITY)] {
        let world = world_with(HOUR, |options| options.renewal_window = senseless);
        world.agent.prefetch(&id(WEB));
        sleep(HOUR / 2 + SECOND).await;
        assert_eq!(world.authority.calls(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn short_backdated_certificates_cause_no_hot_loop() {
    // Backdated by two minutes: half of their life is over before they are issued.
    let half_minute = world(30 * SECOND);
    half_minute.agent.prefetch(&id(WEB));
    sleep(60 * SECOND).await;
    let calls = half_minute.authority.calls();
    assert!((3..=5).contains(&calls), "{calls} calls in a minute");

    let shorter = world(2 * SECOND);
    shorter.agent.prefetch(&id(WEB));
    sleep(60 * SECOND).await;
    let calls = shorter.authority.calls();
    assert!((30..=61).contains(&calls), "{calls} calls");
}

#[tokio::test(start_paused = true)]
async fn failed_renewals_are_tried_again_with_growing_pauses() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    sleep(SECOND).await;
    world.authority.set_down(true);
    world.agent.refresh(&id(WEB));
    sleep(HOUR).await;
    let calls = world.authority.calls();
    assert!((25..=40).contains(&calls), "{calls} calls in an hour");
    assert_eq!(world.stage(WEB), Some(Stage::Renewing));
    let status = world.status(WEB).unwrap();
    assert_eq!(status.state, CertificateState::Available);
    assert_eq!(status.last_failure.as_deref(), Some("down for tests"));
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_slept_renews_within_a_minute() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    sleep(90 * SECOND).await;
    // The monotonic clock stood still meanwhile.
    world.step_clock(18 * 3600);
    world
        .authority
        .answer_next([Answer::Certificate(48 * HOUR)]);
    sleep(61 * SECOND).await;
    assert_eq!(world.authority.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_slept_too_long_presents_nothing_expired() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    world.agent.svid(&id(WEB)).await.unwrap();
    sleep(SECOND).await;
    world.step_clock(25 * 3600);
    assert!(world.agent.current(&id(WEB)).is_none());
    assert_eq!(world.stage(WEB), Some(Stage::Expired));
    world
        .authority
        .answer_next([Answer::Certificate(48 * HOUR)]);
    let asked = Instant::now();
    let svid = world.agent.svid(&id(WEB)).await.unwrap();
    assert!(svid.is_valid_at(world.clock.now()));
    assert!(asked.elapsed() < SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_back_does_not_delay_renewal() {
    let world = world_with(24 * HOUR, |options| options.renewal_window = (0.5, 0.5));
    world.agent.prefetch(&id(WEB));
    sleep(SECOND).await;
    world.step_clock(-170);
    sleep(12 * HOUR).await;
    assert_eq!(world.authority.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_to_and_fro_causes_no_storm() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    sleep(SECOND).await;
    for _ in 0..30 {
        world.step_clock(25 * 3600);
        sleep(10 * SECOND).await;
        world.step_clock(-25 * 3600);
        assert!(world.agent.current(&id(WEB)).is_some(), "valid again");
        sleep(10 * SECOND).await;
    }
    let calls = world.authority.calls();
    assert!(calls < 30, "{calls} calls in ten minutes");
    sleep(200 * SECOND).await;
    assert_eq!(world.stage(WEB), Some(Stage::Held));
}

#[tokio::test(start_paused = true)]
async fn refresh_replaces_the_certificate() {
    let world = world(24 * HOUR);
    let first = world.agent.svid(&id(WEB)).await.unwrap();
    world.agent.refresh(&id(WEB));
    sleep(2 * SECOND).await;
    assert!(!Arc::ptr_eq(&first, &world.current(WEB)));
    world.agent.refresh(&id(DB));
    assert_eq!(world.state(DB), None);
}

#[tokio::test(start_paused = true)]
async fn refresh_during_a_fetch_is_not_lost() {
    let world = world(24 * HOUR);
    world.authority.set_latency(SECOND);
    world.agent.prefetch(&id(WEB));
    sleep(SECOND / 2).await;
    world.agent.refresh(&id(WEB));
    sleep(3 * SECOND).await;
    assert_eq!(world.authority.calls(), 2);
    sleep(HOUR).await;
    assert_eq!(world.authority.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn refresh_ends_the_pause_after_a_failure() {
    let world = world(24 * HOUR);
    world.authority.set_down(true);
    world.agent.prefetch(&id(WEB));
    sleep(200 * SECOND).await;
    world.authority.set_down(false);
    world.agent.refresh(&id(WEB));
    sleep(2 * SECOND).await;
    assert_eq!(world.stage(WEB), Some(Stage::Held));
}

#[tokio::test(start_paused = true)]
async fn a_source_that_keeps_refreshing_is_slowed_down() {
    let world = world(24 * HOUR);
    world.agent.prefetch(&id(WEB));
    for _ in 0..100 {
        sleep(SECOND / 10).await;
        world.agent.refresh(&id(WEB));
    }
    let calls = world.authority.calls();
    assert!((9..=11).contains(&calls), "{calls} calls in ten seconds");
}

#[tokio::test(start_paused = true)]
async fn unused_identities_nobody_keeps_are_dropped_at_renewal() {
    let world = world(24 * HOUR);
    world.agent.svid(&id(WEB)).await.unwrap();
    // Used once at the start: renewed once, then unused for a whole term.
    sleep(60 * HOUR).await;
    assert_eq!(world.authority.calls(), 2);
    assert_eq!(world.state(WEB), None);
    assert_eq!(world.authority.log.lock().released, [id(WEB)]);
}
