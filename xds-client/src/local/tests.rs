use std::time::Duration;

use super::*;
use crate::proto::workload::{
    Address, Service, Workload, address::Type, gateway_address::Destination,
};

const SAMPLE: &str = r#"
workloads:
- {uid: c1//Pod/shop/cart, name: cart, namespace: shop, serviceAccount: cart, trustDomain: cluster.local,
   workloadIps: ["10.0.0.7"], protocol: HBONE, node: n1, services: {"shop/cart.shop.svc.cluster.local": {80: 8080}}}
services:
- {name: cart, namespace: shop, hostname: cart.shop.svc.cluster.local, vips: ["/10.96.0.7"], ports: {80: 8080}, canonical: true}
policies:
- {name: only-web, namespace: shop, scope: Namespace, action: Allow, dryRun: false,
   rules: [[[{principals: [!Exact cluster.local/ns/shop/sa/web]}]]]}
"#;

fn workloads(document: &Document) -> Vec<&Workload> {
    let workload = |address: &'_ Address| matches!(address.r#type, Some(Type::Workload(_)));
    let found = document
        .addresses
        .iter()
        .filter(|address| workload(address));
    found
        .map(|address| match &address.r#type {
            Some(Type::Workload(workload)) => workload,
            other => panic!("{other:?}"),
        })
        .collect()
}

fn services(document: &Document) -> Vec<&Service> {
    let service = |address: &'_ Address| matches!(address.r#type, Some(Type::Service(_)));
    let found = document.addresses.iter().filter(|address| service(address));
    found
        .map(|address| match &address.r#type {
            Some(Type::Service(service)) => service,
            other => panic!("{other:?}"),
        })
        .collect()
}

fn only_workload(text: &str) -> Workload {
    let document = parse(&format!("workloads: [{text}]")).unwrap();
    assert_eq!(document.unusable().count(), 0);
    workloads(&document)[0].clone()
}

#[test]
fn reads_the_sample() {
    use security::string_match::MatchType;
    let document = parse(SAMPLE).unwrap();
    assert_eq!(document.unusable().count(), 0);
    let cart = workloads(&document)[0];
    assert_eq!(
        (&*cart.uid, &*cart.service_account, &*cart.node),
        ("c1//Pod/shop/cart", "cart", "n1")
    );
    assert_eq!(
        (cart.addresses.as_slice(), cart.tunnel_protocol),
        ([vec![10, 0, 0, 7]].as_slice(), 1)
    );
    let port = cart.services["shop/cart.shop.svc.cluster.local"].ports[0];
    assert_eq!((port.service_port, port.target_port), (80, 8080));
    let service = services(&document)[0];
    assert!(service.canonical);
    assert_eq!(service.addresses[0].address, [10, 96, 0, 7]);
    assert_eq!(service.addresses[0].network, "");
    let policy = &document.policies[0];
    assert_eq!((&*policy.name, policy.policy.scope), ("shop/only-web", 1));
    let principal = &policy.policy.rules[0].clauses[0].matches[0].principals[0];
    let exact = MatchType::Exact("cluster.local/ns/shop/sa/web".into());
    assert_eq!(principal.match_type, Some(exact));
}

#[test]
fn an_empty_text_is_an_empty_mesh() {
    for text in ["", "# nothing\n", "---\n", "{}", "workloads: []"] {
        assert_eq!(parse(text).unwrap(), Document::default(), "{text:?}");
    }
}

#[test]
fn a_text_that_cannot_be_used_at_all_tells_where() {
    let cases = [
        ("workloads:\n- {uid: [}", 2),
        ("workloads: []\npods: []", 2),
        ("workloads:\n  uid: x", 2),
        ("- a\n", 1),
        ("workloads: []\nworkloads: []", 1),
    ];
    for (text, line) in cases {
        let Err(LocalError::Yaml(error)) = parse(text) else {
            panic!("accepted {text:?}");
        };
        assert!(
            error.location().is_some_and(|at| at.line() >= line),
            "{text:?}: {error}"
        );
    }
}

/// Puts `record` before a good one and expects that only it is refused.
fn expect_rejection(list: &str, record: &str, name: &str, reason: &str) {
    let mut text = String::new();
    let good = [
        (
            "workloads",
            "{uid: good, namespace: n, workloadIps: [], services: {}}",
        ),
        (
            "services",
            "{name: s, namespace: n, hostname: good, vips: [], ports: {}}",
        ),
        (
            "policies",
            "{name: p, namespace: n, scope: Global, action: Deny, dryRun: false, rules: []}",
        ),
    ];
    for (good_list, good) in good {
        let bad = if good_list == list { record } else { "" };
        let separator = if bad.is_empty() { "" } else { ", " };
        text += &format!("{good_list}: [{bad}{separator}{good}]\n");
    }
    let document = parse(&text).unwrap();
    let unusable: Vec<_> = document.unusable().collect();
    let [rejected] = unusable.as_slice() else {
        panic!("{record}: {unusable:?}");
    };
    assert_eq!(rejected.name, name, "{record}");
    let told = &rejected.reason;
    assert!(
        told.contains(reason) && told.starts_with(&format!("{list}[0]")),
        "{record}: {told}"
    );
    assert_eq!(
        (document.addresses.len(), document.policies.len()),
        (2, 1),
        "{record}"
    );
}

#[test]
fn a_bad_workload_is_named_and_the_rest_used() {
    let with =
        |rest: &str| format!("{{uid: u, namespace: n, workloadIps: [], services: {{}}, {rest}}}");
    let cases = [
        (with("colour: red"), "u", "colour"),
        (with("protocol: UDP"), "u", "UDP"),
        (
            with("waypoint: {destination: x, hboneMtlsPort: 1}"),
            "u",
            "`x`",
        ),
        (
            "{uid: u, namespace: n, workloadIps: [300.0.0.1], services: {}}".into(),
            "u",
            "IP address",
        ),
        (
            "{uid: u, namespace: n, services: {}}".into(),
            "u",
            "workloadIps",
        ),
        (
            "{uid: u, namespace: n, workloadIps: []}".into(),
            "u",
            "services",
        ),
        (
            "{uid: u, namespace: n, workloadIps: [], services: {n/h: {http: 80}}}".into(),
            "u",
            "invalid digit",
        ),
        (
            "{name: w, namespace: n, workloadIps: 1}".into(),
            "Kubernetes//Pod/n/w",
            "sequence",
        ),
        (
            "{namespace: n, workloadIps: [], services: {}}".into(),
            "workloads[0]",
            "uid or a name",
        ),
        ("7".into(), "workloads[0]", "struct Workload"),
    ];
    for (record, name, reason) in cases {
        expect_rejection("workloads", &record, name, reason);
    }
}

#[test]
fn a_bad_service_is_named_and_the_rest_used() {
    let with = |vips: &str, rest: &str| {
        format!("{{name: s, namespace: n, hostname: h, vips: [{vips}], ports: {{}}, {rest}}}")
    };
    let cases = [
        (with("10.0.0.1", ""), "`10.0.0.1`"),
        (with("", "cidrVips: [{cidr: 10.0.0.0/33}]"), "10.0.0.0/33"),
        (
            with("", "loadBalancer: {mode: Strict}"),
            "routingPreferences",
        ),
        (with("", "weightedWaypoints: [{weight: 1}]"), "destination"),
        (with("", "port: {}"), "unknown field `port`"),
    ];
    for (record, reason) in cases {
        expect_rejection("services", &record, "n/h", reason);
    }
}

#[test]
fn a_bad_policy_is_named_and_the_rest_used() {
    let with = |scope: &str, one: &str| {
        format!(
            "{{name: q, namespace: n, scope: {scope}, action: Deny, dryRun: false, rules: [[[{{{one}}}]]]}}"
        )
    };
    let cases = [
        (with("World", ""), "World"),
        (with("Global", "principal: []"), "principal"),
        (with("Global", "principals: [!Like x]"), "string match"),
        (with("Global", "principals: [x]"), "string match"),
        (with("Global", "principals: [!Exact [x]]"), "string"),
        (with("Global", "principals: [!Presence x]"), "invalid type"),
        (with("Global", "sourceIps: [10.0.0.0/40]"), "10.0.0.0/40"),
        (with("Global", "destinationPorts: [http]"), "u32"),
        (
            "{name: q, namespace: n, scope: Global, action: Deny, rules: []}".into(),
            "dryRun",
        ),
    ];
    for (record, reason) in cases {
        expect_rejection("policies", &record, "n/q", reason);
    }
}

#[test]
fn string_matches_may_be_tags_or_maps() {
    use security::string_match::MatchType;
    let forms = [
        ("!Exact x", MatchType::Exact("x".into())),
        ("{Exact: x}", MatchType::Exact("x".into())),
        ("!Prefix x", MatchType::Prefix("x".into())),
        ("{Prefix: x}", MatchType::Prefix("x".into())),
        ("!Suffix x", MatchType::Suffix("x".into())),
        ("{Suffix: x}", MatchType::Suffix("x".into())),
        ("!Presence []", MatchType::Presence(())),
        ("{Presence: []}", MatchType::Presence(())),
        ("!Presence null", MatchType::Presence(())),
    ];
    for (form, expected) in forms {
        let text = format!(
            "policies: [{{name: p, namespace: n, scope: Global, action: Deny, dryRun: true, \
             rules: [[[{{notNamespaces: [{form}]}}]]]}}]"
        );
        let document = parse(&text).unwrap();
        assert_eq!(document.unusable().count(), 0, "{form}");
        let found = &document.policies[0].policy.rules[0].clauses[0].matches[0].not_namespaces[0];
        assert_eq!(found.match_type, Some(expected), "{form}");
    }
}

#[test]
fn gateways_are_addresses_or_names() {
    let at = |destination: &str| {
        let text = format!(
            "{{uid: u, namespace: n, workloadIps: [], services: {{}}, \
             waypoint: {{destination: \"{destination}\", hboneMtlsPort: 15008}}}}"
        );
        only_workload(&text).waypoint.unwrap().destination.unwrap()
    };
    let Destination::Address(address) = at("net/fd00::1") else {
        panic!();
    };
    assert_eq!((&*address.network, address.address.len()), ("net", 16));
    let Destination::Hostname(name) = at("ns/way.example") else {
        panic!();
    };
    assert_eq!((&*name.namespace, &*name.hostname), ("ns", "way.example"));
}

#[test]
fn a_workload_without_uid_gets_that_of_a_pod() {
    let workload = only_workload("{name: w, namespace: n, workloadIps: [], services: {}}");
    assert_eq!(workload.uid, "Kubernetes//Pod/n/w");
}

#[test]
fn endpoints_of_a_service_become_links_of_its_workloads() {
    let document = parse(
        r#"
workloads:
- {uid: a, namespace: n, workloadIps: [], services: {"n/h": {80: 1}}}
- {uid: b, namespace: n, workloadIps: [], services: {}}
services:
- name: s
  namespace: n
  hostname: h
  vips: []
  ports: {"80": 8080, 81: 8081}
  endpoints:
    a: {workloadUid: a, port: {80: 2, 81: 3}, status: Unhealthy}
    b: {port: {"80": 4}}
    c: {workloadUid: c, port: {}}
"#,
    )
    .unwrap();
    let ports = |position: usize| {
        let ports = &workloads(&document)[position].services["n/h"].ports;
        ports
            .iter()
            .map(|port| (port.service_port, port.target_port))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        ports(0),
        [(80, 1), (81, 3)],
        "what the workload says goes first"
    );
    assert_eq!(ports(1), [(80, 4)]);
    assert_eq!(
        workloads(&document)[0].status,
        0,
        "the status of the workload counts"
    );
    assert_eq!(document.misshapen, []);
    assert_eq!(document.rejected.len(), 1);
    assert_eq!(document.rejected[0].name, "c");
}

#[test]
fn every_key_of_a_workload_has_its_field() {
    let workload = only_workload(
        "{uid: u, name: w, namespace: n, workloadIps: ['fd00::1', 10.0.0.1], services: {}, trustDomain: t, \
          serviceAccount: s, network: net, workloadName: wn, workloadType: cronjob, canonicalName: cn, \
          canonicalRevision: cr, hostname: h, node: no, clusterId: c, protocol: HBONE, networkMode: HostNetwork, \
          status: Unhealthy, nativeTunnel: true, capacity: 0, authorizationPolicies: [n/p], \
          locality: {region: r, zone: z, subzone: sz, extra: ignored}, \
          networkGateway: {destination: n/h, hboneMtlsPort: 15008}, applicationTunnel: {protocol: PROXY, port: 9}}",
    );
    let expected = Workload {
        uid: "u".into(),
        name: "w".into(),
        namespace: "n".into(),
        addresses: vec![
            [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1].into(),
            vec![10, 0, 0, 1],
        ],
        trust_domain: "t".into(),
        service_account: "s".into(),
        network: "net".into(),
        workload_name: "wn".into(),
        workload_type: 1,
        canonical_name: "cn".into(),
        canonical_revision: "cr".into(),
        hostname: "h".into(),
        node: "no".into(),
        cluster_id: "c".into(),
        tunnel_protocol: 1,
        network_mode: 1,
        status: 1,
        native_tunnel: true,
        capacity: Some(0),
        authorization_policies: vec!["n/p".into()],
        locality: Some(workload::Locality {
            region: "r".into(),
            zone: "z".into(),
            subzone: "sz".into(),
        }),
        network_gateway: workload.network_gateway.clone(),
        application_tunnel: Some(workload::ApplicationTunnel {
            protocol: 1,
            port: 9,
        }),
        ..Workload::default()
    };
    assert_eq!(workload, expected);
    assert!(workload.network_gateway.is_some());
}

#[test]
fn every_key_of_a_service_has_its_field() {
    let document = parse(
        "services: [{name: s, namespace: n, hostname: h, vips: [net/10.0.0.1], ports: {80: 0}, \
         cidrVips: [{network: net, cidr: 10.1.0.0/16}], subjectAltNames: [a], ipFamilies: IPv6, visibility: Namespace, \
         weightedWaypoints: [{destination: {destination: n/h, hboneMtlsPort: 15008}, weight: 10}], \
         loadBalancer: {routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster], mode: Failover, \
         healthPolicy: AllowAll}}]",
    )
    .unwrap();
    assert_eq!(document.unusable().count(), 0);
    let service = services(&document)[0];
    let balancing = service.load_balancing.as_ref().unwrap();
    assert_eq!(balancing.routing_preference, [6, 1, 2, 3, 4, 5]);
    assert_eq!((balancing.mode, balancing.health_policy), (2, 1));
    assert_eq!(
        (service.ip_families, service.visibility, service.canonical),
        (2, 1, false)
    );
    assert_eq!(service.addresses[1].length, Some(16));
    assert_eq!(service.weighted_waypoints[0].weight, 10);
    assert_eq!(service.subject_alt_names, ["a"]);
}

fn pod(name: &str) -> String {
    format!("workloads: [{{uid: {name}, namespace: n, workloadIps: [], services: {{}}}}]")
}

fn uid(document: &Document) -> &str {
    &workloads(document)[0].uid
}

#[tokio::test]
async fn follows_a_file_through_every_kind_of_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    std::fs::write(&path, pod("first")).unwrap();
    let mut file = LocalFile::new(&path);
    assert_eq!(uid(&file.load().await.unwrap()), "first");

    std::fs::write(&path, pod("in-place")).unwrap();
    assert_eq!(uid(&file.changed().await.unwrap()), "in-place");

    let aside = dir.path().join("aside");
    std::fs::write(&aside, pod("renamed")).unwrap();
    std::fs::rename(&aside, &path).unwrap();
    assert_eq!(uid(&file.changed().await.unwrap()), "renamed");

    std::fs::write(&path, "workloads: [").unwrap();
    assert!(matches!(file.changed().await, Err(LocalError::Yaml(_))));
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(file.changed().await, Err(LocalError::Read { .. })));

    for name in ["one", "two"] {
        std::fs::write(dir.path().join(name), pod(name)).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(name, &link).unwrap();
        std::fs::rename(&link, &path).unwrap();
        assert_eq!(uid(&file.changed().await.unwrap()), name);
    }
}

#[tokio::test]
async fn a_file_without_news_tells_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    std::fs::write(&path, pod("same")).unwrap();
    let mut file = LocalFile::new(&path);
    file.load().await.unwrap();
    std::fs::write(&path, pod("same")).unwrap();
    let quiet = tokio::time::timeout(Duration::from_millis(200), file.changed()).await;
    assert!(quiet.is_err());
}

#[tokio::test(start_paused = true)]
async fn what_is_being_written_does_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    std::fs::write(&path, pod("first")).unwrap();
    let mut file = LocalFile::new(&path);
    file.load().await.unwrap();
    std::fs::write(&path, "workloads: []").unwrap();
    let writing = async {
        for part in ["half", "whole"] {
            tokio::time::sleep(crate::watch::SETTLE / 2).await;
            std::fs::write(&path, pod(part)).unwrap();
        }
    };
    let (found, ()) = tokio::join!(file.changed(), writing);
    assert_eq!(uid(&found.unwrap()), "whole");
}

#[tokio::test(start_paused = true)]
async fn a_file_that_became_empty_is_not_usable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    for empty in ["", "\n", "# to be continued\n"] {
        std::fs::write(&path, pod("first")).unwrap();
        let mut file = LocalFile::new(&path);
        file.load().await.unwrap();
        std::fs::write(&path, empty).unwrap();
        let found = file.changed().await;
        assert!(matches!(found, Err(LocalError::Empty { .. })), "{empty:?}");
        std::fs::write(&path, "workloads: []").unwrap();
        assert_eq!(file.changed().await.unwrap(), Document::default());
    }
    std::fs::write(&path, "").unwrap();
    let begun = LocalFile::new(&path).load().await.unwrap();
    assert_eq!(begun, Document::default(), "at the start it is a mesh");
}

#[tokio::test(start_paused = true)]
async fn endpoints_of_a_service_that_cannot_be_read_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    let mesh = |service: &str| {
        format!(
            "workloads: [{{uid: a, namespace: n, workloadIps: [], services: {{}}}}]\n\
             services: [{service}]"
        )
    };
    let service = |more: &str| {
        mesh(&format!(
            "{{name: s, namespace: n, hostname: h, vips: [], ports: {{80: 8080}}, {more}}}"
        ))
    };
    let linked = |document: &Document| {
        let services = &workloads(document)[0].services;
        let ports = services.get("n/h").map(|list| list.ports[0].target_port);
        (ports, document.unusable().count())
    };
    let twice = mesh(
        "{name: s, namespace: n, hostname: h, strange: 1}, \
         {name: s, namespace: n, hostname: h, vips: [], ports: {}, endpoints: {a: {port: {80: 4}}}}",
    );
    let mut file = LocalFile::new(&path);
    std::fs::write(&path, service("endpoints: {a: {port: {80: 1}}}")).unwrap();
    assert_eq!(linked(&file.load().await.unwrap()), (Some(1), 0));
    let cases = [
        (
            service("strange: 1, endpoints: {a: {port: {80: 2}}}"),
            (Some(1), 1),
        ),
        (
            service("waypoint: {destination: x, hboneMtlsPort: 1}"),
            (Some(1), 1),
        ),
        (service("endpoints: {a: {port: {80: 3}}}"), (Some(3), 0)),
        (service("strange: 1"), (Some(3), 1)),
        (twice, (Some(4), 1)),
        (mesh(""), (None, 0)),
        (service("strange: 1"), (None, 1)),
    ];
    for (text, expected) in cases {
        std::fs::write(&path, &text).unwrap();
        let document = file.changed().await.unwrap();
        assert_eq!(linked(&document), expected, "{text}");
    }
}

proptest::proptest! {
    #[test]
    fn any_text_is_answered(text in ".{0,200}|(workloads|services|policies): *[\\[\\]{}!&*a-z0-9:, \n-]{0,100}") {
        let _ = parse(&text);
    }
}
