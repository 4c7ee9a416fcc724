use bytes::Bytes;
use proptest::prelude::*;

use super::*;

const ROOM: usize = 1000;

fn node() -> Node {
    Node {
        id: "ztunnel~1.1.1.1~a.b~b.svc.cluster.local".into(),
        ..Node::default()
    }
}

fn nothing(_: Kind) -> Versions {
    Versions::with_room(ROOM)
}

fn holding(names: &[(&str, &str)]) -> impl Fn(Kind) -> Versions {
    move |kind| {
        let mut versions = Versions::with_room(ROOM);
        for (name, version) in names.iter().filter(|_| kind == Kind::Address) {
            versions.add(name, version);
        }
        versions
    }
}

fn response(kind: Kind, nonce: &str) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: kind.type_url().into(),
        nonce: nonce.into(),
        resources: vec![Bytes::from_static(b"")],
        removed_resources: vec!["gone".into()],
        ..DeltaDiscoveryResponse::default()
    }
}

#[test]
fn a_stream_opens_with_both_kinds_and_no_names() {
    let (_, requests) = Session::open(&node(), Mode::Everything, nothing, &[]);
    let urls = requests.each_ref().map(|request| &*request.type_url);
    assert_eq!(urls, Kind::ALL.map(Kind::type_url));
    for request in &requests {
        assert_eq!(request.node, Some(node()));
        assert!(request.resource_names_subscribe.is_empty());
        assert!(request.resource_names_unsubscribe.is_empty());
        assert!(request.initial_resource_versions.is_empty());
        assert!(request.response_nonce.is_empty());
    }
}

#[test]
fn on_demand_subscribes_to_no_workload_and_to_all_policies() {
    let awaited = ["/10.0.0.7".to_owned()];
    let held = holding(&[("uid", "v1")]);
    let (mut session, [addresses, policies]) =
        Session::open(&node(), Mode::OnDemand, held, &awaited);
    assert_eq!(addresses.resource_names_subscribe, ["*"]);
    assert_eq!(addresses.resource_names_unsubscribe, ["*"]);
    assert!(policies.resource_names_subscribe.is_empty());
    assert!(policies.resource_names_unsubscribe.is_empty());
    let claimed = &addresses.initial_resource_versions;
    assert_eq!((&*claimed["uid"], &*claimed["/10.0.0.7"]), ("v1", ""));

    for asked_already in ["uid", "/10.0.0.7"] {
        assert_eq!(session.ask(asked_already), None);
    }
    let request = session.ask("/10.0.0.8").unwrap();
    assert_eq!(request.resource_names_subscribe, ["/10.0.0.8"]);
    assert_eq!((request.node, &*request.response_nonce), (None, ""));
    assert_eq!(session.ask("/10.0.0.8"), None);
    assert_eq!(session.asked(), 3);
}

#[test]
fn nothing_is_asked_for_where_everything_is_followed() {
    let (mut session, _) = Session::open(&node(), Mode::Everything, nothing, &[]);
    assert_eq!(session.ask("/10.0.0.8"), None);
}

#[test]
fn versions_are_told_and_the_answer_is_a_difference() {
    let held = holding(&[("a", "1"), ("b", "2")]);
    let (mut session, [addresses, _]) = Session::open(&node(), Mode::Everything, held, &[]);
    assert_eq!(addresses.initial_resource_versions.len(), 2);
    let (batch, _) = session.receive(response(Kind::Address, "n"));
    assert_eq!(batch.unwrap().extent(), Extent::Changes);
}

#[test]
fn without_versions_the_first_response_of_a_kind_is_everything() {
    let too_many = |_| {
        let mut versions = Versions::with_room(10);
        versions.add("a name that has no room", "1");
        versions
    };
    let (mut session, requests) = Session::open(&node(), Mode::Everything, too_many, &[]);
    assert!(requests[0].initial_resource_versions.is_empty());
    for kind in Kind::ALL {
        let (batch, _) = session.receive(response(kind, "1"));
        assert_eq!(batch.unwrap().extent(), Extent::Everything);
        let (batch, _) = session.receive(response(kind, "2"));
        assert_eq!(batch.unwrap().extent(), Extent::Changes);
    }
}

#[test]
fn an_acceptance_is_bare() {
    let (mut session, _) = Session::open(&node(), Mode::Everything, nothing, &[]);
    let (_, receipt) = session.receive(response(Kind::Authorization, "n7"));
    let expected = DeltaDiscoveryRequest {
        type_url: Kind::Authorization.type_url().into(),
        response_nonce: "n7".into(),
        ..DeltaDiscoveryRequest::default()
    };
    assert_eq!(receipt.answer(&[]), expected);
}

#[test]
fn a_rejection_names_every_resource_and_reason() {
    let (mut session, _) = Session::open(&node(), Mode::Everything, nothing, &[]);
    let (_, receipt) = session.receive(response(Kind::Address, "n"));
    let rejected = ["a", "b"].map(|name| Rejected {
        name: name.into(),
        reason: "no".into(),
    });
    let error = receipt.answer(&rejected).error_detail.unwrap();
    assert_eq!((error.code, &*error.message), (3, "a: no; b: no"));
}

#[test]
fn an_unknown_type_is_answered_and_not_applied() {
    let (mut session, _) = Session::open(&node(), Mode::Everything, nothing, &[]);
    let strange = DeltaDiscoveryResponse {
        type_url: "type.googleapis.com/other".into(),
        nonce: "n".into(),
        ..DeltaDiscoveryResponse::default()
    };
    let (batch, receipt) = session.receive(strange);
    assert!(batch.is_none());
    assert_eq!(receipt.answer(&[]).type_url, "type.googleapis.com/other");
}

proptest! {
    #[test]
    fn the_message_of_a_rejection_is_bounded(count in 0..3000_usize, length in 0..3000_usize) {
        let rejected: Vec<_> = (0..count)
            .map(|number| Rejected { name: number.to_string(), reason: "x".repeat(length) })
            .collect();
        let message = reasons(&rejected);
        prop_assert!(message.len() < MAX_REASONS_BYTES + 3 * count + 40);
        let told = message.split("; ").filter(|part| !part.starts_with("and ")).count();
        let complete = message.rsplit("; and ").next().and_then(|rest| rest.strip_suffix(" more"));
        let more: usize = complete.map_or(0, |more| more.parse().unwrap());
        prop_assert_eq!(if count == 0 { 0 } else { told + more }, count);
    }
}
