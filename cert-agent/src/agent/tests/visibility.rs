//! What can be seen from outside, and what cannot.

use super::*;

fn exported(agent: &Agent) -> String {
    let mut registry = Registry::default();
    agent.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text
}

fn seconds(time: SystemTime) -> u64 {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    since_epoch.as_secs()
}

#[tokio::test(start_paused = true)]
async fn snapshot_has_all_that_a_dump_needs() {
    let world = world(24 * HOUR);
    world.agent.svid(&id(WEB)).await.unwrap();
    world.agent.svid(&id(DB)).await.unwrap();
    let statuses = world.agent.snapshot();
    let ids: Vec<_> = statuses.iter().map(|it| it.identity.as_str()).collect();
    assert_eq!(ids, [DB, WEB]);
    let status = &statuses[0];
    assert_eq!(status.state.to_string(), "Available");
    assert_eq!(status.obtained_at, Some(world.clock.now()));
    assert_eq!((status.chain.len(), status.roots.len()), (1, 1));
    let leaf = &status.chain[0];
    let life = leaf.not_after.duration_since(leaf.not_before).unwrap();
    assert_eq!(life, 24 * HOUR + 120 * SECOND);
    assert!(leaf.serial.bytes().all(|digit| digit.is_ascii_digit()));
    assert!(leaf.serial.parse::<u128>().unwrap() > 0);
    assert!(leaf.pem.starts_with("-----BEGIN CERTIFICATE-----\n"));
}

#[tokio::test(start_paused = true)]
async fn metrics_tell_the_state_of_each_identity_and_go_with_it() {
    let world = world(HOUR);
    world.agent.prefetch(&id(WEB));
    let svid = world.agent.svid(&id(WEB)).await.unwrap();
    world.authority.mute.lock().insert(id(DB));
    world.agent.prefetch(&id(DB));
    sleep(SECOND).await;
    let (ends, came) = (seconds(svid.not_after()), seconds(world.clock.now()) - 1);
    let text = exported(&world.agent);
    for line in [
        format!("istio_certificate_expiry_timestamp_seconds{{identity=\"{WEB}\"}} {ends}\n"),
        format!("istio_certificate_last_renewal_timestamp_seconds{{identity=\"{WEB}\"}} {came}\n"),
        format!("istio_certificate_state{{identity=\"{WEB}\",state=\"held\"}} 1\n"),
        format!("istio_certificate_state{{identity=\"{DB}\",state=\"fetching\"}} 1\n"),
    ] {
        assert!(text.contains(&line), "{line} in {text}");
    }
    assert_eq!(text.matches(DB).count(), 1, "{text}");

    world.agent.forget(&id(WEB));
    assert!(exported(&world.agent).contains("state=\"forgotten\"} 1\n"));
    sleep(61 * SECOND).await;
    assert!(!exported(&world.agent).contains(WEB));
}

#[tokio::test(start_paused = true)]
async fn metrics_count_calls_errors_and_who_waits() {
    let world = world(HOUR);
    world.authority.set_latency(2 * SECOND);
    let (hint, slow) = (Retry::After(SECOND), Retry::Slowly);
    world.authority.answer_next([
        Answer::Refusal(Retry::Soon),
        Answer::Refusal(hint),
        Answer::ForSomebodyElse,
        Answer::Panic,
        Answer::Refusal(slow),
    ]);
    let mut callers = JoinSet::new();
    for _ in 0..3 {
        let agent = world.agent.clone();
        callers.spawn(async move { drop(agent.svid(&id(WEB)).await) });
    }
    sleep(SECOND).await;
    assert!(exported(&world.agent).contains("istio_certificate_waiting_connections 3\n"));
    callers.join_all().await;
    world.agent.prefetch(&id(WEB));
    sleep(HOUR / 3).await;
    world.authority.mute.lock().insert(id(DB));
    world.agent.prefetch(&id(DB));
    sleep(91 * SECOND).await;
    let text = exported(&world.agent);
    for reason in [
        "unavailable",
        "throttled",
        "rejected",
        "panic",
        "denied",
        "deadline",
    ] {
        let line = format!("istio_certificate_fetch_errors_total{{reason=\"{reason}\"}} 1\n");
        assert!(text.contains(&line), "{line} in {text}");
    }
    for line in [
        "istio_certificate_fetch_errors_total{reason=\"request\"} 0\n",
        "istio_certificate_fetches_total 7\n",
        "istio_certificate_waiting_connections 0\n",
        // The one that panicked did not end as a call.
        "istio_certificate_call_duration_seconds_count 6\n",
        "istio_certificate_call_duration_seconds_sum 100.0\n",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}
