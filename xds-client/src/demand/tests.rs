use std::iter;

use super::*;
use crate::{Mode, Versions, proto::discovery::Node};

const LIMIT: Duration = Duration::from_secs(5);

fn session(awaited: &[String]) -> Session {
    let nothing = |_| Versions::with_room(0);
    Session::open(&Node::default(), Mode::OnDemand, nothing, awaited).0
}

/// Starts asking and stops waiting.
async fn ask(demand: &Demand, name: &str) {
    assert_eq!(demand.fetch(name, Duration::ZERO).await, Answer::Unanswered);
}

#[tokio::test(start_paused = true)]
async fn a_wait_has_a_limit() {
    let demand = Demand::default();
    let began = tokio::time::Instant::now();
    assert_eq!(demand.fetch("a", LIMIT).await, Answer::Unanswered);
    assert_eq!(began.elapsed(), LIMIT);
}

#[tokio::test(start_paused = true)]
async fn a_name_is_asked_for_once() {
    let demand = Demand::default();
    ask(&demand, "a").await;
    ask(&demand, "a").await;
    let mut session = session(&[]);
    assert_eq!(demand.requests(&mut session).len(), 1);
    ask(&demand, "a").await;
    assert!(demand.requests(&mut session).is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_does_not_exist_is_remembered_until_it_does_or_a_stream_opens() {
    let demand = Demand::default();
    for forget in [Demand::opened as fn(&Demand), |demand: &Demand| {
        demand.delivered(["a"]);
    }] {
        ask(&demand, "a").await;
        demand.absent(&["a".into(), "never asked for".into()]);
        assert!(demand.begin().is_empty(), "an attempt asks for it no more");
        assert_eq!(demand.fetch("a", LIMIT).await, Answer::Absent);
        forget(&demand);
        ask(&demand, "a").await;
        demand.delivered(["a"]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_came_and_went_is_not_waited_for() {
    let demand = Demand::default();
    let mut session = session(&[]);
    ask(&demand, "/10.0.0.7").await;
    assert_eq!(demand.requests(&mut session).len(), 1);
    demand.delivered(["/10.0.0.7"]);
    // The workload was removed by its uid; the subscription of its address lives on and would tell of a successor.
    let asking = demand.fetch("/10.0.0.7", LIMIT);
    let playing = async { assert!(demand.requests(&mut session).is_empty()) };
    let (answer, ()) = tokio::join!(asking, playing);
    assert_eq!(answer, Answer::Absent);
}

#[tokio::test(start_paused = true)]
async fn only_what_is_waited_for_goes_into_a_new_stream() {
    let demand = Demand::default();
    ask(&demand, "given up").await;
    let waiting = demand.fetch("awaited", LIMIT);
    let playing = async {
        let awaited = demand.begin();
        assert_eq!(awaited, ["awaited"]);
        assert!(demand.requests(&mut session(&awaited)).is_empty());
        demand.delivered(["awaited"]);
    };
    let (answer, ()) = tokio::join!(waiting, playing);
    assert_eq!(answer, Answer::Delivered);
}

#[tokio::test(start_paused = true)]
async fn the_number_of_names_is_bounded() {
    let demand = Demand::default();
    for number in 0..MAX_NAMES {
        ask(&demand, &number.to_string()).await;
    }
    assert!(demand.is_full());
    assert_eq!(demand.fetch("one more", LIMIT).await, Answer::Unanswered);
    assert_eq!(demand.begin(), iter::empty::<String>().collect::<Vec<_>>());
    assert!(!demand.is_full());
}
