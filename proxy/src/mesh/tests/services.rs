//! Services of one host name or address, and ranges of addresses.

use super::*;

fn contender(namespace: &str, edit: impl FnOnce(&mut pb::Service)) -> pb::Service {
    let mut contender = service(namespace, "h", &["10.96.0.1"]);
    edit(&mut contender);
    contender
}

fn expect_service(
    what: &str,
    services: Vec<pb::Service>,
    client: Option<&str>,
    expected: Option<&str>,
) {
    let mesh = mesh();
    put(&mesh, services.into_iter().map(Into::into));
    let state = mesh.read();
    let at = state.service_at("", addr("10.96.0.1"), client);
    assert_eq!(key(at), expected, "{what}");
    assert_eq!(key(state.service_by_host("h", client)), expected, "{what}");
}

#[test]
fn ranks_services_of_one_address_or_host() {
    let plain = |ns: &str| contender(ns, |_| {});
    let canonical = |ns: &str| contender(ns, |s| s.canonical = true);
    let both = || vec![plain("a"), canonical("b")];
    expect_service("own namespace", both(), Some("a"), Some("a/h"));
    expect_service("canonical", both(), Some("c"), Some("b/h"));
    let plains = vec![plain("b"), plain("a")];
    expect_service("the first by key", plains, Some("c"), Some("a/h"));
    expect_service("nothing", vec![], Some("a"), None);
}

#[test]
fn hides_private_services() {
    let public = |ns: &str| contender(ns, |s| s.canonical = true);
    let private = |ns: &str| contender(ns, |s| s.visibility = 1);
    let both = || vec![private("a"), public("b")];
    expect_service("from other namespaces", both(), Some("c"), Some("b/h"));
    expect_service("not from its own", both(), Some("a"), Some("a/h"));
    expect_service("wholly", vec![private("a")], Some("b"), None);
    expect_service(
        "not from nobody in particular",
        vec![private("a")],
        None,
        Some("a/h"),
    );
    let odd = vec![contender("a", |s| s.visibility = 7)];
    expect_service("unknown visibility is public", odd, Some("b"), Some("a/h"));
}

#[test]
fn services_of_one_namespace_share_an_address() {
    let mesh = mesh();
    put(
        &mesh,
        [
            service("a", "h1", &["10.96.0.1"]).into(),
            service("a", "h2", &["10.96.0.1"]).into(),
        ],
    );
    let at = |mesh: &Mesh| {
        key(mesh.read().service_at("", addr("10.96.0.1"), Some("a"))).map(str::to_owned)
    };
    assert_eq!(at(&mesh).as_deref(), Some("a/h1"));
    remove(&mesh, "a/h1");
    assert_eq!(at(&mesh).as_deref(), Some("a/h2"));
    put(&mesh, [service("a", "h1", &["10.96.0.2"]).into()]);
    assert_eq!(at(&mesh).as_deref(), Some("a/h2"));
}

#[test]
fn ranks_ranges_around_an_address() {
    let ranged = |ns: &str, host: &str, net: &str| {
        let mut s = service(ns, host, &[]);
        s.addresses.push(network_address("", net));
        s
    };
    let own_wide = || ranged("a", "wide", "10.0.0.0/8");
    let wide = || ranged("b", "wide", "10.0.0.0/8");
    let narrow = || ranged("b", "narrow", "10.1.0.0/16");
    let host = || ranged("b", "host", "10.1.2.3/32");
    let all = || ranged("b", "all", "0.0.0.0/0");
    let six = || ranged("b", "six", "fd00::/8");
    let cases = [
        (
            "own before length",
            vec![own_wide(), narrow()],
            "10.1.2.3",
            Some("a/wide"),
        ),
        (
            "the longest of others",
            vec![wide(), narrow()],
            "10.1.2.3",
            Some("b/narrow"),
        ),
        (
            "outside of the longest",
            vec![wide(), narrow()],
            "10.2.2.3",
            Some("b/wide"),
        ),
        (
            "address before range",
            vec![own_wide(), host()],
            "10.1.2.3",
            Some("b/host"),
        ),
        ("everything", vec![all()], "10.1.2.3", Some("b/all")),
        ("families do not mix", vec![six()], "10.1.2.3", None),
    ];
    for (what, services, ip, expected) in cases {
        let mesh = mesh();
        put(&mesh, services.into_iter().map(Into::into));
        let state = mesh.read();
        assert_eq!(
            key(state.service_at("", addr(ip), Some("a"))),
            expected,
            "{what}"
        );
        assert_eq!(
            key(state.service_at("other", addr(ip), Some("a"))),
            None,
            "{what}"
        );
    }
}

#[test]
fn an_invisible_address_falls_through_to_a_range() {
    let mesh = mesh();
    let hidden = pb::Service {
        visibility: 1,
        ..service("b", "hidden", &["10.1.2.3"])
    };
    let mut open = service("b", "open", &[]);
    open.addresses.push(network_address("", "10.0.0.0/8"));
    put(&mesh, [hidden.into(), open.into()]);
    assert_eq!(
        key(mesh.read().service_at("", addr("10.1.2.3"), Some("a"))),
        Some("b/open")
    );
}

#[test]
fn replacing_a_service_with_ranges_leaves_no_trace() {
    let mesh = mesh();
    let ranged = |net: &str| {
        let mut s = service("a", "h", &[]);
        s.addresses.push(network_address("", net));
        s
    };
    put(&mesh, [ranged("10.0.0.0/8").into()]);
    put(
        &mesh,
        [workload("w", "10.9.9.9", |w| link(w, "a/h", &[])).into()],
    );
    put(&mesh, [ranged("11.0.0.0/8").into()]);
    let state = mesh.read();
    assert_eq!(key(state.service_at("", addr("10.1.2.3"), None)), None);
    let found = state.service_at("", addr("11.1.2.3"), None).unwrap();
    assert_eq!(state.endpoints(found).count(), 1);
}
