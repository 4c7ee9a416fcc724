//! The rules of look-ups, one table each. Histories against a model are in `histories`.

use std::net::IpAddr;

use xds_client::{
    Extent,
    proto::{security, workload as pb},
};

use super::*;
use crate::config::WorkloadRef;

mod fixture;
mod histories;
mod large;
mod services;
mod shared_names;
mod sources;
mod turns;

use fixture::*;

fn uid(found: Option<&Arc<Workload>>) -> Option<&str> {
    found.map(|workload| workload.uid())
}

fn key(found: Option<&Arc<Service>>) -> Option<&str> {
    found.map(|service| &**service.key())
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn finds_a_workload_by_uid_address_and_name() {
    let mesh = mesh();
    let mut here = pod("c1//Pod/shop/cart", "10.0.0.7");
    here.node = "n1".into();
    let elsewhere = pod("c1//Pod/shop/web", "10.0.0.8");
    put(&mesh, [here.into(), elsewhere.into()]);
    let state = mesh.read();
    let found = state.workload("c1//Pod/shop/cart").unwrap();
    assert_eq!((found.name(), &**found.namespace()), ("cart", "shop"));
    assert_eq!(
        uid(state.workload_at("", addr("10.0.0.7"))),
        Some(found.uid())
    );
    assert_eq!(
        uid(state.workload_at("", addr("::ffff:10.0.0.7"))),
        Some(found.uid())
    );
    assert_eq!(uid(state.workload_at("n2", addr("10.0.0.7"))), None);
    let who = |name: &str, account: &str| WorkloadRef::new("shop", name, account);
    assert_eq!(
        uid(state.local_workload(&who("cart", "default"))),
        Some(found.uid())
    );
    assert_eq!(uid(state.local_workload(&who("cart", "other"))), None);
    assert_eq!(
        uid(state.local_workload(&who("web", "default"))),
        None,
        "not on this node"
    );
}

#[test]
fn applies_identity_defaults() {
    let mesh = mesh();
    put(&mesh, [pod("c1//Pod/shop/cart", "10.0.0.7").into()]);
    let state = mesh.read();
    let found = state.workload("c1//Pod/shop/cart").unwrap();
    let id = found.identity().unwrap().as_str();
    assert_eq!(id, "spiffe://cluster.local/ns/shop/sa/default");
    assert_eq!((&**found.cluster_id(), found.capacity()), ("Kubernetes", 1));
}

#[test]
fn ranks_workloads_of_one_address() {
    let hbone = |uid| workload(uid, "10.0.0.7", |w| w.tunnel_protocol = 1);
    let plain = |uid| workload(uid, "10.0.0.7", |_| {});
    let host = |uid| workload(uid, "10.0.0.7", |w| w.network_mode = 1);
    let cases: [(&str, Vec<pb::Workload>, Option<&str>); 5] = [
        (
            "pods go before tunnels",
            vec![hbone("we"), plain("c//Pod/a/b")],
            Some("c//Pod/a/b"),
        ),
        (
            "tunnelled pods first",
            vec![hbone("c//Pod/a/b"), plain("c//Pod/a/c")],
            Some("c//Pod/a/b"),
        ),
        (
            "tunnels go before the rest",
            vec![hbone("we1"), plain("we2")],
            Some("we1"),
        ),
        (
            "the last among equals",
            vec![plain("we2"), plain("we1")],
            Some("we1"),
        ),
        (
            "never the host network",
            vec![host("c//Pod/a/b"), host("c//Pod/a/c")],
            None,
        ),
    ];
    for (what, workloads, expected) in cases {
        let mesh = mesh();
        put(&mesh, workloads.into_iter().map(Into::into));
        assert_eq!(
            uid(mesh.read().workload_at("", addr("10.0.0.7"))),
            expected,
            "{what}"
        );
    }
}

#[test]
fn removing_the_owner_of_an_address_leaves_the_others() {
    let mesh = mesh();
    put(
        &mesh,
        [
            pod("c//Pod/a/b", "10.0.0.7").into(),
            pod("we", "10.0.0.7").into(),
        ],
    );
    remove(&mesh, "c//Pod/a/b");
    assert_eq!(
        uid(mesh.read().workload_at("", addr("10.0.0.7"))),
        Some("we")
    );
}

#[test]
fn replacing_keeps_the_age_of_a_workload() {
    let mesh = mesh();
    put(
        &mesh,
        [pod("old", "10.0.0.7").into(), pod("new", "10.0.0.7").into()],
    );
    put(
        &mesh,
        [workload("old", "10.0.0.7", |w| w.status = 1).into()],
    );
    assert_eq!(
        uid(mesh.read().workload_at("", addr("10.0.0.7"))),
        Some("new")
    );
}

#[test]
fn links_converge_in_any_order() {
    let linked = || {
        workload("c//Pod/a/b", "10.0.0.7", |w| {
            link(w, "a/s.a", &[(80, 8080)]);
        })
    };
    let target = || service("a", "s.a", &["10.96.0.7"]);
    let orders: [Vec<Vec<pb::Address>>; 4] = [
        vec![vec![linked().into()], vec![target().into()]],
        vec![vec![target().into()], vec![linked().into()]],
        vec![vec![target().into(), linked().into()]],
        vec![vec![linked().into(), target().into()]],
    ];
    for order in orders {
        let mesh = mesh();
        for batch in order {
            put(&mesh, batch);
        }
        let state = mesh.read();
        let found = state.service("a", "s.a").unwrap();
        let endpoints: Vec<_> = state
            .endpoints(found)
            .map(|e| (e.workload.uid(), e.target_port(80)))
            .collect();
        assert_eq!(endpoints, [("c//Pod/a/b", Some(8080))]);
        let of = state.workload("c//Pod/a/b").unwrap();
        assert_eq!(
            state
                .services_of(of)
                .map(|(s, _)| &**s.key())
                .collect::<Vec<_>>(),
            ["a/s.a"]
        );
    }
}

#[test]
fn moving_a_workload_moves_its_link() {
    let mesh = mesh();
    put(
        &mesh,
        [
            service("a", "s1", &[]).into(),
            service("a", "s2", &[]).into(),
            workload("w", "10.0.0.7", |w| link(w, "a/s1", &[])).into(),
        ],
    );
    put(
        &mesh,
        [workload("w", "10.0.0.7", |w| link(w, "a/s2", &[])).into()],
    );
    let state = mesh.read();
    let count = |host| state.endpoints(state.service("a", host).unwrap()).count();
    assert_eq!((count("s1"), count("s2")), (0, 1));
}

#[test]
fn endpoints_are_kept_whatever_their_health_and_through_the_absence_of_the_service() {
    let mesh = mesh();
    let sick = workload("w", "10.0.0.7", |w| {
        link(w, "a/s", &[(80, 0)]);
        w.status = 1;
    });
    put(&mesh, [service("a", "s", &[]).into(), sick.into()]);
    remove(&mesh, "a/s");
    assert_eq!(mesh.read().counts().staged_services, 1);
    put(&mesh, [service("a", "s", &[]).into()]);
    let state = mesh.read();
    let endpoint = state
        .endpoints(state.service("a", "s").unwrap())
        .next()
        .unwrap();
    assert_eq!(
        (endpoint.workload.health(), endpoint.target_port(80)),
        (Health::Unhealthy, None)
    );
}

/// One service per namespace, all of host `h` and address 10.96.0.1.
#[test]
fn finds_workloads_by_host_name() {
    let mesh = mesh();
    let named = |uid: &str, ns: &str| {
        workload(uid, "", |w| {
            w.hostname = "db.example".into();
            w.namespace = ns.into();
        })
    };
    put(&mesh, [named("w1", "a").into(), named("w2", "b").into()]);
    assert_eq!(
        uid(mesh.read().workload_by_hostname("b", "db.example")),
        Some("w2")
    );
    assert_eq!(
        uid(mesh.read().workload_by_hostname("c", "db.example")),
        None
    );
}

#[test]
fn host_names_match_in_any_spelling_and_keep_their_own() {
    let mesh = mesh();
    let named = workload("w1", "", |w| {
        w.hostname = "DB.example".into();
        w.namespace = "a".into();
    });
    let long = "Api.A-Name-Of-More-Than-One-Block-Of-32-Bytes.example";
    put(&mesh, [named.into(), service("a", long, &[]).into()]);
    for spelling in [long.to_owned(), long.to_lowercase(), long.to_uppercase()] {
        let state = mesh.read();
        let found = state.service("a", &spelling).unwrap();
        assert_eq!(&**found.hostname(), long);
        assert!(state.service_by_host(&spelling, None).is_some());
        assert_eq!(state.services_named(&spelling).count(), 1);
    }
    for spelling in ["db.example", "Db.Example"] {
        let state = mesh.read();
        assert_eq!(uid(state.workload_by_hostname("a", spelling)), Some("w1"));
    }
    let other = long.replace("32", "33");
    assert!(mesh.read().service("a", &other).is_none());
}

#[test]
fn collects_the_policies_of_a_workload() {
    let mesh = mesh();
    let policies = [
        policy("root/global", security::Scope::Global),
        policy("shop/own", security::Scope::Namespace),
        policy("other/foreign", security::Scope::Namespace),
        policy("shop/selected", security::Scope::WorkloadSelector),
        policy("shop/unselected", security::Scope::WorkloadSelector),
    ];
    change(
        &mesh,
        Update {
            policies: policies.into(),
            ..Update::default()
        },
    );
    let names = [
        "shop/selected",
        "shop/own",
        "root/global",
        "shop/gone",
        "other/foreign",
    ];
    put(
        &mesh,
        [workload("w", "10.0.0.7", |w| {
            w.authorization_policies = names.map(String::from).into();
            w.namespace = "shop".into();
        })
        .into()],
    );
    let state = mesh.read();
    let found: Vec<_> = state
        .policies_for(state.workload("w").unwrap())
        .map(|one| match one {
            Applicable::Policy(policy) => policy.key.to_string(),
            Applicable::Missing(key) => format!("?{key}"),
        })
        .collect();
    assert_eq!(
        found,
        [
            "root/global",
            "shop/own",
            "shop/selected",
            "?shop/gone",
            "other/foreign"
        ]
    );
}

#[test]
fn a_policy_that_changes_scope_moves() {
    let mesh = mesh();
    put(&mesh, [pod("c//Pod/shop/w", "10.0.0.7").into()]);
    let count = |mesh: &Mesh| {
        let state = mesh.read();
        state
            .policies_for(state.workload("c//Pod/shop/w").unwrap())
            .count()
    };
    for (scope, expected) in [
        (security::Scope::Namespace, 1),
        (security::Scope::Global, 1),
        (security::Scope::WorkloadSelector, 0),
        (security::Scope::Namespace, 1),
    ] {
        change(
            &mesh,
            Update {
                policies: vec![policy("shop/p", scope)],
                ..Update::default()
            },
        );
        assert_eq!(count(&mesh), expected, "{scope:?}");
    }
    change(
        &mesh,
        Update {
            removed_policies: vec!["shop/p".into()],
            ..Update::default()
        },
    );
    assert_eq!(count(&mesh), 0);
}

#[test]
fn what_is_not_new_changes_nothing() {
    let mesh = mesh();
    let batch = || Update {
        addresses: vec![
            workload("w", "10.0.0.7", |w| {
                link(w, "a/h", &[(80, 8080), (443, 8443)]);
            })
            .into(),
            service("a", "h", &["10.96.0.1"]).into(),
        ],
        policies: vec![policy("shop/p", security::Scope::Global)],
        ..Update::default()
    };
    assert!(change(&mesh, batch()).is_effective());
    let changes = mesh.changes();
    let held = Arc::clone(mesh.read().workload("w").unwrap());
    assert!(!change(&mesh, batch()).is_effective());
    assert!(!apply(&mesh, Extent::Everything, batch()).is_effective());
    assert!(!remove(&mesh, "c1//Pod/x/unknown").is_effective());
    assert!(!changes.has_changed().unwrap());
    assert!(Arc::ptr_eq(&held, mesh.read().workload("w").unwrap()));
}

#[test]
fn the_last_of_one_name_holds_and_removals_come_after() {
    let mesh = mesh();
    let sick = || workload("w", "10.0.0.7", |w| w.status = 1);
    put(&mesh, [pod("w", "10.0.0.7").into()]);
    put(&mesh, [sick().into(), pod("w", "10.0.0.7").into()]);
    assert_eq!(mesh.read().workload("w").unwrap().health(), Health::Healthy);
    let report = change(
        &mesh,
        Update {
            addresses: vec![pod("x", "10.0.0.8").into(), sick().into()],
            removed_addresses: vec!["x".into(), "w".into()],
            ..Update::default()
        },
    );
    assert!(report.is_effective());
    assert_eq!(mesh.read().counts(), Counts::default());
}

fn change(mesh: &Mesh, update: Update) -> Report {
    apply(mesh, Extent::Changes, update)
}

#[test]
fn tells_which_identities_this_node_needs() {
    let mesh = mesh();
    let here = |uid: &str, account: &str, protocol| {
        workload(uid, "10.0.0.7", |w| {
            w.node = "n1".into();
            w.service_account = account.into();
            w.tunnel_protocol = protocol;
        })
    };
    let id = |account: &str| SpiffeId::new("cluster.local", "shop", account).unwrap();
    let report = put(
        &mesh,
        [
            here("w1", "cart", 1).into(),
            here("w2", "cart", 1).into(),
            here("w3", "plain", 0).into(),
            workload("w4", "10.0.0.9", |w| {
                w.node = "n1".into();
                w.service_account = "waypoint".into();
                w.tunnel_protocol = 1;
                w.native_tunnel = true;
            })
            .into(),
            pod("elsewhere", "10.0.0.8").into(),
        ],
    );
    assert_eq!(report.identities_appeared, [id("cart")]);
    let report = put(&mesh, [here("w1", "web", 1).into()]);
    assert_eq!(
        (report.identities_appeared, report.identities_departed),
        (vec![id("web")], vec![])
    );
    let report = remove(&mesh, "w2");
    assert_eq!(
        (report.identities_appeared, report.identities_departed),
        (vec![], vec![id("cart")])
    );
    assert!(mesh.read().has_local_identity(&id("web")));
}
