//! What readers see between the turns of one update, where a turn is as short as it may be.

use std::{net::IpAddr, sync::Arc};

use proptest::prelude::*;
use xds_client::{
    Extent,
    local::NamedPolicy,
    proto::{security, workload as pb},
};

use super::{
    super::*,
    fixture::*,
    histories::{Answers, IPS, Model, NETWORKS, histories, pairs, update},
    key, uid,
};

/// Takes an update in, and shows what readers see after each of its turns.
fn by_turns(mesh: &Mesh, take_in: impl FnOnce(&mut Intake<'_>), mut seen: impl FnMut(&State)) {
    let mut pool = mesh.shared.pool.lock();
    let turns = {
        let state = mesh.read();
        let mut intake = Intake::new(&state, &mut pool);
        take_in(&mut intake);
        order::turns(intake.finish().steps, &state, 1)
    };
    let mut effects = Effects::default();
    for turn in turns {
        mesh.shared
            .state
            .write(|state| state.apply(turn, &mut effects));
        seen(&mesh.read());
    }
}

fn addresses_of(extent: Extent, update: Update) -> impl FnOnce(&mut Intake<'_>) {
    let [addresses, _] = batches(extent, update);
    move |intake| intake.batch(&addresses)
}

fn told(addresses: impl IntoIterator<Item = pb::Address>) -> Update {
    Update {
        addresses: addresses.into_iter().collect(),
        ..Update::default()
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Who owns an address: a service by its own address or a range, else a workload.
fn owner(state: &State, network: &str, at: &str) -> Option<Arc<str>> {
    let service = state.service_at(network, ip(at), None);
    let workload = || uid(state.workload_at(network, ip(at))).map(Arc::from);
    key(service).map(Arc::from).or_else(workload)
}

#[test]
fn an_address_that_moves_always_has_an_owner() {
    let cases: [(&str, [pb::Service; 2], [pb::Service; 2]); 4] = [
        (
            "from the first to the second",
            [service("a", "s1", &["10.96.0.1"]), service("a", "s2", &[])],
            [service("a", "s1", &[]), service("a", "s2", &["10.96.0.1"])],
        ),
        (
            "from the second to the first",
            [service("a", "s1", &[]), service("a", "s2", &["10.96.0.1"])],
            [service("a", "s1", &["10.96.0.1"]), service("a", "s2", &[])],
        ),
        (
            "out of a range",
            [
                service("a", "s1", &["10.96.0.0/24"]),
                service("a", "s2", &[]),
            ],
            [service("a", "s1", &[]), service("a", "s2", &["10.96.0.1"])],
        ),
        (
            "into a range",
            [service("a", "s1", &["10.96.0.1"]), service("a", "s2", &[])],
            [
                service("a", "s1", &[]),
                service("a", "s2", &["10.96.0.0/24"]),
            ],
        ),
    ];
    for (what, before, after) in cases {
        let mesh = mesh();
        put(&mesh, before.map(Into::into));
        let update = told(after.map(Into::into));
        by_turns(&mesh, addresses_of(Extent::Changes, update), |state| {
            assert!(owner(state, "", "10.96.0.1").is_some(), "{what}");
        });
    }
}

#[test]
fn an_address_goes_from_a_record_that_is_removed_to_one_that_comes() {
    for extent in [Extent::Changes, Extent::Everything] {
        let mesh = mesh();
        let others = || (0..3).map(|n| pod(&format!("w{n}"), "").into());
        put(&mesh, others());
        put(&mesh, [service("a", "old", &["10.96.0.1"]).into()]);
        let mut update = told(others().chain([service("a", "new", &["10.96.0.1"]).into()]));
        if extent == Extent::Changes {
            update.removed_addresses = vec!["a/old".into()];
        }
        by_turns(&mesh, addresses_of(extent, update), |state| {
            assert!(owner(state, "", "10.96.0.1").is_some(), "{extent:?}");
        });
        assert_eq!(
            owner(&mesh.read(), "", "10.96.0.1").as_deref(),
            Some("a/new")
        );
    }
}

#[test]
fn addresses_are_swapped_at_once() {
    let mesh = mesh();
    let pods = |ips: [&str; 3]| {
        let named = ips.into_iter().zip(["w0", "w1", "w2"]);
        told(named.map(|(ip, uid)| pod(uid, ip).into()))
    };
    put(&mesh, pods(["10.0.0.1", "10.0.0.2", "10.0.0.3"]).addresses);
    let swapped = pods(["10.0.0.2", "10.0.0.3", "10.0.0.1"]);
    let mut turns = 0;
    by_turns(&mesh, addresses_of(Extent::Changes, swapped), |state| {
        turns += 1;
        for (ip, uid) in [("10.0.0.2", "w0"), ("10.0.0.3", "w1"), ("10.0.0.1", "w2")] {
            assert_eq!(owner(state, "", ip).as_deref(), Some(uid));
        }
    });
    assert_eq!(turns, 1);
}

#[test]
fn the_policies_of_a_response_come_into_force_together() {
    let mesh = mesh();
    let named = |name: &str, action: security::Action| {
        let mut policy = policy(name, security::Scope::Namespace);
        policy.policy.action = action.into();
        policy
    };
    let update = |policies: Vec<NamedPolicy>, removed: &[&str]| Update {
        policies,
        removed_policies: removed.iter().map(ToString::to_string).collect(),
        ..Update::default()
    };
    let first = [
        named("shop/allow", security::Action::Deny),
        named("shop/gone", security::Action::Deny),
    ];
    apply(&mesh, Extent::Changes, update(first.into(), &[]));
    let widened = [
        named("shop/allow", security::Action::Allow),
        named("shop/deny", security::Action::Deny),
    ];
    let [_, policies] = batches(Extent::Changes, update(widened.into(), &["shop/gone"]));
    by_turns(
        &mesh,
        |intake| intake.batch(&policies),
        |state| {
            let known =
                ["shop/allow", "shop/deny", "shop/gone"].map(|key| state.policy(key).is_some());
            assert_eq!(known, [true, true, false]);
            let allows = state.policy("shop/allow").unwrap().action == Action::Allow;
            assert!(allows);
        },
    );
}

#[test]
fn a_file_names_its_policies_after_it_tells_of_them() {
    let mesh = mesh();
    let document = |name: &str| Document {
        addresses: vec![
            workload("w", "10.0.0.7", |w| {
                w.authorization_policies = vec![name.into()];
            })
            .into(),
        ],
        policies: vec![policy(name, security::Scope::WorkloadSelector)],
        ..Document::default()
    };
    mesh.load(&document("shop/p1"));
    by_turns(
        &mesh,
        |intake| intake.document(&document("shop/p2")),
        |state| {
            let workload = state.workload("w").unwrap();
            let missing = state
                .policies_for(workload)
                .any(|one| matches!(one, Applicable::Missing(_)));
            assert!(!missing);
        },
    );
    assert!(mesh.read().policy("shop/p1").is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn what_has_an_owner_before_and_after_has_one_all_along(history in histories()) {
        let mesh = mesh();
        let mut model = Model::default();
        let owned = |state: &State| {
            pairs(&NETWORKS, &IPS).map(|(network, ip)| owner(state, network, ip).is_some()).collect::<Vec<_>>()
        };
        for push in history {
            model.run(&push);
            let (extent, steps) = push;
            let mut seen = vec![owned(&mesh.read())];
            for batch in batches(extent, update(steps)) {
                by_turns(&mesh, |intake| intake.batch(&batch), |state| seen.push(owned(state)));
            }
            let (before, after) = (&seen[0], &seen[seen.len() - 1]);
            for between in &seen {
                let mut all = before.iter().zip(after).zip(between);
                prop_assert!(all.all(|((before, after), between)| !(*before && *after) || *between));
            }
            prop_assert_eq!(Answers::of(&mesh.read()), model.answers());
        }
    }
}
