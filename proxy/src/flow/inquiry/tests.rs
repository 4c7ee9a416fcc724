use std::cell::Cell;

use super::*;
use crate::flow::tests::pod_with;

/// Half of the connect limit of the test pod.
const LIMIT: Duration = Duration::from_millis(500);

fn address(last: u8) -> Destination {
    Destination::Address {
        network: "".into(),
        ip: [10, 0, 0, last].into(),
    }
}

/// A decision that counts, and lacks what `missing` says of its number.
async fn decisions(demand: Option<Demand>, missing: impl Fn(u8) -> Option<Destination>) -> u8 {
    let made = Cell::new(0);
    let decide = || {
        made.set(made.get() + 1);
        made.get()
    };
    let last = pod_with(demand)
        .decided(decide, |made| missing(*made))
        .await;
    assert_eq!(last, made.get(), "the last decision counts");
    last
}

#[tokio::test(start_paused = true)]
async fn where_everything_is_told_a_decision_is_made_once() {
    let began = Instant::now();
    let missing = |_| unreachable!("nobody is asked");
    assert_eq!(decisions(None, missing).await, 1);
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_decision_that_lacks_nothing_asks_nothing() {
    let began = Instant::now();
    assert_eq!(decisions(Some(Demand::default()), |_| None).await, 1);
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_name_is_asked_for_once_and_for_a_limited_time() {
    let began = Instant::now();
    let same = |_| Some(address(1));
    assert_eq!(decisions(Some(Demand::default()), same).await, 2);
    assert_eq!(began.elapsed(), LIMIT);
}

#[tokio::test(start_paused = true)]
async fn what_was_asked_for_turns_up_again_and_is_not_asked_for_again() {
    let in_turn = |made| Some(address(made % 3));
    assert_eq!(decisions(Some(Demand::default()), in_turn).await, 4);
}

#[tokio::test(start_paused = true)]
async fn many_names_share_one_limit_and_are_bounded() {
    let began = Instant::now();
    let ever_more = |made| Some(address(made));
    let made = decisions(Some(Demand::default()), ever_more).await;
    assert_eq!(usize::from(made), 1 + MAX_QUESTIONS);
    assert_eq!(began.elapsed(), LIMIT);
}

#[tokio::test(start_paused = true)]
async fn a_peer_is_waited_for_more_briefly_than_a_way() {
    let peer = IpAddr::from([10, 0, 0, 1]);
    let began = Instant::now();
    assert_eq!(pod_with(None).peer(peer).await, None);
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(pod_with(Some(Demand::default())).peer(peer).await, None);
    assert_eq!(began.elapsed(), LIMIT / 5);
}

#[test]
fn names_are_those_of_the_control_plane() {
    let at = |network: &str, ip: &str| Destination::Address {
        network: network.into(),
        ip: ip.parse().unwrap(),
    };
    assert_eq!(at("", "10.0.0.7").to_string(), "/10.0.0.7");
    let long = "2001:0DB8:0:0:0:0:0:1";
    assert_eq!(at("net1", long).to_string(), "net1/2001:db8::1");
    let host = Destination::Host {
        namespace: "shop".into(),
        hostname: "api.shop.svc.cluster.local".into(),
    };
    assert_eq!(host.to_string(), "shop/api.shop.svc.cluster.local");
}
