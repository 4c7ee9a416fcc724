use proptest::prelude::*;
use xds_client::local::{self, Document};

use super::*;
use crate::mesh::{Mesh, View};

const RULES: Rules<'_> = Rules {
    cluster_domain: "cluster.local",
    search: None,
    preferred_namespace: None,
    ipv6: true,
};

/// A mesh with the pod `shop/client` on network `n1`, and what `yaml` adds.
fn mesh(services: &str, workloads: &str) -> Mesh {
    let mesh = Mesh::new(View {
        node_name: None,
        network: "n1".into(),
        cluster_id: "Kubernetes".into(),
    });
    let text = format!(
        "services: [{services}]\nworkloads:\n- {{uid: client, name: client, namespace: shop, network: n1, \
         workloadIps: ['10.0.0.1'], services: {{}}}}\n{workloads}"
    );
    let document: Document = local::parse(&text).unwrap();
    assert_eq!(document.rejected, []);
    assert_eq!(mesh.load(&document).rejected, []);
    mesh
}

fn ask_by(mesh: &Mesh, rules: &Rules<'_>, name: &str, family: Family) -> Option<Found> {
    let state = mesh.read();
    let client = state.workload("client").unwrap();
    let mut found = find(&state, client, rules, name, family)?;
    found.addresses.sort();
    Some(found)
}

fn ask(mesh: &Mesh, name: &str) -> Option<Found> {
    ask_by(mesh, &RULES, name, Family::V4)
}

fn told(addresses: &[&str]) -> Option<Found> {
    Some(Found {
        alias: None,
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        supported: true,
    })
}

fn service(namespace: &str, host: &str, more: &str) -> String {
    format!("{{name: s, namespace: {namespace}, hostname: '{host}', ports: {{80: 80}}, {more}}}")
}

#[test]
fn a_service_is_found_by_every_form_of_its_name() {
    let mesh = mesh(
        &service(
            "shop",
            "cart.shop.svc.cluster.local",
            "vips: [n1/10.96.0.1]",
        ),
        "",
    );
    for name in [
        "cart",
        "cart.shop",
        "cart.shop.svc",
        "cart.shop.svc.cluster.local",
    ] {
        assert_eq!(ask(&mesh, name), told(&["10.96.0.1"]), "{name}");
    }
    for name in ["other", "cart.web", "cart.shop.svc.cluster.example"] {
        assert_eq!(ask(&mesh, name), None, "{name}");
    }
}

#[test]
fn a_search_domain_too_many_is_told_as_an_alias() {
    let mesh = mesh(
        &service("web", "cart.web.svc.cluster.local", "vips: [n1/10.96.0.1]"),
        "",
    );
    let found = ask(&mesh, "cart.web.shop.svc.cluster.local").unwrap();
    assert_eq!(found.alias.as_deref(), Some("cart.web"));
    assert_eq!(found.addresses.len(), 1);
}

#[test]
fn only_addresses_of_the_clients_network_are_told() {
    let vips = "vips: [n1/10.96.0.1, n2/10.96.0.2, 'n1/fd00::1']";
    let mesh = mesh(&service("shop", "a.example", vips), "");
    assert_eq!(ask(&mesh, "a.example"), told(&["10.96.0.1"]));
    let v6 = ask_by(&mesh, &RULES, "a.example", Family::V6);
    assert_eq!(v6, told(&["fd00::1"]));
}

#[test]
fn a_family_that_the_service_or_the_node_lacks_is_an_empty_answer() {
    let vips = "vips: [n1/10.96.0.1, 'n1/fd00::1']";
    let only_v4 = service("shop", "four.example", &format!("ipFamilies: IPv4, {vips}"));
    let both = service("shop", "both.example", vips);
    let mesh = mesh(&format!("{only_v4}, {both}"), "");
    let no_v6 = Rules {
        ipv6: false,
        ..RULES
    };
    for (rules, name) in [(&RULES, "four.example"), (&no_v6, "both.example")] {
        let found = ask_by(&mesh, rules, name, Family::V6).unwrap();
        assert!(found.addresses.is_empty() && !found.supported, "{name}");
    }
    assert!(
        ask_by(&mesh, &RULES, "both.example", Family::V6)
            .unwrap()
            .supported
    );
}

#[test]
fn a_headless_service_stands_for_its_eligible_endpoints() {
    let host = "db.shop.svc.cluster.local";
    let workload = |name: &str, ips: &str, status: &str| {
        format!(
            "- {{uid: {name}, name: {name}, namespace: shop, workloadIps: [{ips}], status: {status}, \
             network: far, services: {{'shop/{host}': {{80: 80}}}}}}\n"
        )
    };
    let workloads = [
        workload("db-0", "10.1.0.1, 10.1.0.9", "Healthy"),
        workload("db-1", "10.1.0.2", "Unhealthy"),
        workload("db-2", "'fd00::3'", "Healthy"),
    ]
    .concat();
    let strict = mesh(&service("shop", host, "vips: []"), &workloads);
    assert_eq!(ask(&strict, "db"), told(&["10.1.0.1"]));
    let balancing =
        "loadBalancer: {routingPreferences: [], mode: Standard, healthPolicy: AllowAll}";
    let open = mesh(
        &service("shop", host, &format!("vips: [], {balancing}")),
        &workloads,
    );
    assert_eq!(ask(&open, "db"), told(&["10.1.0.1", "10.1.0.2"]));
}

#[test]
fn what_has_no_address_and_is_no_service_of_the_cluster_is_asked_of_others() {
    let ranges = "vips: [], cidrVips: [{network: n1, cidr: 10.0.0.0/8}]";
    let mesh = mesh(&service("shop", "api.example", ranges), "");
    assert_eq!(ask(&mesh, "api.example"), None);
}

#[test]
fn wildcards_cover_what_no_name_does() {
    let wild = service("shop", "*.example.com", "vips: [n1/10.96.0.1]");
    let exact = service("shop", "www.example.com", "vips: [n1/10.96.0.2]");
    let mesh = mesh(&format!("{wild}, {exact}"), "");
    assert_eq!(ask(&mesh, "x.y.example.com"), told(&["10.96.0.1"]));
    assert_eq!(ask(&mesh, "www.example.com"), told(&["10.96.0.2"]));
    assert_eq!(ask(&mesh, "example.com"), None);
}

#[test]
fn the_own_namespace_goes_first_then_the_canonical_then_the_preferred_one() {
    let of = |namespace: &str, ip: &str, more: &str| {
        service(namespace, "h.example", &format!("vips: [n1/{ip}], {more}"))
    };
    let own = of("shop", "10.96.0.1", "");
    let canonical = of("b", "10.96.0.2", "canonical: true");
    let preferred = of("c", "10.96.0.3", "");
    let first = of("a", "10.96.0.4", "");
    let hidden = of("aa", "10.96.0.5", "visibility: Namespace, canonical: true");
    let rules = Rules {
        preferred_namespace: Some("c"),
        ..RULES
    };
    let all = [own, canonical, preferred, first, hidden];
    let expected = ["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4"];
    for (left_out, expected) in expected.into_iter().enumerate() {
        let mesh = mesh(&all[left_out..].join(", "), "");
        assert_eq!(
            ask_by(&mesh, &rules, "h.example", Family::V4),
            told(&[expected])
        );
    }
    let mesh = mesh(&all[4], "");
    assert_eq!(ask(&mesh, "h.example"), None);
}

proptest! {
    #[test]
    fn no_name_is_too_odd(name in "[a-z*.]{0,60}|\\PC{0,40}") {
        let mesh = mesh(&service("shop", "a.shop.svc.cluster.local", "vips: [n1/10.96.0.1]"), "");
        let _found = ask(&mesh, &name);
    }
}
