//! Names that the mesh answers, asked by real clients of captured pods.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use testkit::{
    Cluster, Mesh, Pod,
    dns::{Dnsmasq, Dug, Library},
    mesh::{Service, workload_uid},
    stage::{Named, RESOLVER, RESOLVER6, UPSTREAM},
    traffic, wait,
};

/// A service of the cluster.
fn service<'m>(mesh: &'m mut Mesh, namespace: &str, name: &str, vips: &[&str]) -> &'m mut Service {
    let hostname = format!("{name}.{namespace}.svc.cluster.local");
    host(mesh, namespace, &hostname, vips)
}

/// A service of any name.
fn host<'m>(mesh: &'m mut Mesh, namespace: &str, name: &str, vips: &[&str]) -> &'m mut Service {
    mesh.services.push(Service {
        name: name.split('.').next().unwrap().to_owned(),
        namespace: namespace.to_owned(),
        hostname: name.to_owned(),
        vips: vips.iter().map(|&vip| vip.to_owned()).collect(),
        ports: BTreeMap::from([(80, 8080)]),
        canonical: false,
        more: BTreeMap::new(),
    });
    mesh.services.last_mut().unwrap()
}

/// Makes pods the endpoints of a service.
fn endpoints(mesh: &mut Mesh, service: &str, pods: &[&Pod]) {
    for pod in pods {
        let services = &mut mesh.workload(pod).services;
        services.insert(service.to_owned(), BTreeMap::from([(80, 8080)]));
    }
}

/// What the pod's resolver says to a question of type A.
async fn a(pod: &Pod, name: &str) -> Dug {
    dig(pod, name, "A").await
}

async fn dig(pod: &Pod, name: &str, kind: &str) -> Dug {
    let at = format!("@{}", RESOLVER.ip());
    pod.dig(&[&at, name, kind]).await.unwrap()
}

/// An answer of the mesh: authoritative, and recursion could have been had.
fn assert_local(dug: &Dug) {
    assert_eq!(dug.status, "NOERROR", "{dug:?}");
    assert!(dug.has("aa") && dug.has("ra") && dug.has("rd"), "{dug:?}");
    assert!(dug.authority.is_empty(), "{dug:?}");
}

/// An answer of the upstream, in `up.example`.
async fn upstream(stage: &Named) -> Dnsmasq {
    let records = ["host-record=host.up.example,192.0.2.7,2001:db8::7".to_owned()];
    stage.dnsmasq("up.example", &records).await.unwrap()
}

#[tokio::test]
async fn every_form_of_a_services_name_gives_its_address() {
    let stage = Named::new().unwrap();
    let mut mesh = stage.mesh();
    service(&mut mesh, "shop", "cart", &["/10.96.7.1"]);
    service(&mut mesh, "bank", "vault", &["/10.96.7.2"]);
    let cluster = stage.start(&mesh).await.unwrap();

    for name in [
        "cart",
        "cart.shop",
        "cart.shop.svc",
        "cart.shop.svc.cluster.local",
        "CART.Shop.Svc.Cluster.Local",
    ] {
        let dug = a(&stage.web, name).await;
        assert_local(&dug);
        let owner = name.to_lowercase();
        assert_eq!(dug.answer, [format!("{owner}. 30 IN A 10.96.7.1")]);
        assert!(dug.server.starts_with("10.96.0.10#53"), "{dug:?}");
    }
    // What resolvers make of a name with the search list of their pod, before they try the name itself.
    let artefact = a(&stage.web, "vault.bank.shop.svc.cluster.local").await;
    assert_local(&artefact);
    assert_eq!(
        artefact.answer,
        [
            "vault.bank.shop.svc.cluster.local. 30 IN CNAME vault.bank.",
            "vault.bank. 30 IN A 10.96.7.2"
        ]
    );
    let line = |name: &'static str| {
        move |line: &testkit::Line| line.scope == "dns" && line.field("domain") == name
    };
    let log = cluster.proxy(0).log();
    let line = log.wait("the query", line("cart.shop.svc.")).await;
    let fields = [
        "query",
        "result",
        "endpoints",
        "src.workload",
        "src.namespace",
    ];
    assert_eq!(
        fields.map(|name| line.field(name)),
        ["A", "success", "1", "web", "shop"]
    );
    assert_eq!((&*line.level, &*line.message), ("debug", ""));
}

/// A cluster whose domain is told by nothing but the search list of the proxy's own pod.
#[tokio::test]
async fn names_of_a_cluster_with_a_domain_of_its_own_are_known_by_every_form() {
    let stage = Named::new().unwrap();
    let search = "istio-system.svc.corp.example svc.corp.example corp.example";
    let text = format!("search {search}\nnameserver {UPSTREAM}\noptions ndots:5\n");
    stage.upstreams(&text).unwrap();
    let _upstream = upstream(&stage).await;
    let mut mesh = stage.mesh();
    let vip = &["/10.96.7.1"];
    host(&mut mesh, "shop", "cart.shop.svc.corp.example", vip);
    host(&mut mesh, "shop", "peers.shop.svc.corp.example", &[]);
    let key = "shop/peers.shop.svc.corp.example";
    endpoints(&mut mesh, key, &[&stage.web]);
    let _cluster = stage.start(&mesh).await.unwrap();
    let web = stage.web.ip4().to_string();
    for (name, address) in [
        ("cart", "10.96.7.1"),
        ("cart.shop.svc", "10.96.7.1"),
        ("cart.shop.svc.corp.example", "10.96.7.1"),
        ("cart.shop.shop.svc.corp.example", "10.96.7.1"),
        ("peers.shop", &web),
    ] {
        let dug = a(&stage.web, name).await;
        assert_local(&dug);
        assert_eq!(dug.data("A"), [address], "{name}");
    }
    let elsewhere = a(&stage.web, "cart.shop.svc.cluster.local").await;
    assert!(!elsewhere.has("aa"), "{elsewhere:?}");
}

#[tokio::test]
async fn answers_come_from_the_address_that_was_asked_over_both_families_and_transports() {
    let stage = Named::new().unwrap();
    let mut mesh = stage.mesh();
    service(&mut mesh, "shop", "cart", &["/10.96.7.1"]);
    let cluster = stage.start(&mesh).await.unwrap();
    for resolver in [RESOLVER.ip(), RESOLVER6.ip()] {
        for (option, transport) in [("+notcp", "(UDP)"), ("+tcp", "(TCP)")] {
            let at = format!("@{resolver}");
            // dig does not take an answer from elsewhere.
            let dug = stage.web.dig(&[&at, option, "cart", "A"]).await.unwrap();
            assert_eq!(dug.data("A"), ["10.96.7.1"], "{resolver} {option}");
            assert!(dug.server.starts_with(&resolver.to_string()), "{dug:?}");
            assert!(dug.server.ends_with(transport), "{dug:?}");
        }
    }
    for transport in ["udp", "tcp"] {
        let labels = [
            ("request_query_type", "a"),
            ("request_protocol", transport),
            ("source_canonical_service", "web-app"),
            ("source_canonical_revision", "v1"),
        ];
        let proxy = cluster.proxy(0);
        let all = proxy.metrics().await.unwrap();
        assert_eq!(all.sum("istio_dns_requests_total", &labels), 2.0);
        assert_eq!(all.sum("istio_dns_upstream_requests_total", &[]), 0.0);
    }
}

#[tokio::test]
async fn a_family_that_a_service_lacks_is_an_empty_answer_and_a_name_that_nobody_knows_is_none() {
    let stage = Named::new().unwrap();
    let _upstream = upstream(&stage).await;
    let mut mesh = stage.mesh();
    service(&mut mesh, "shop", "four", &["/10.96.7.1"]).set("ipFamilies", "IPv4");
    service(&mut mesh, "shop", "both", &["/10.96.7.2", "/fd96::2"]).set("ipFamilies", "Dual");
    service(&mut mesh, "shop", "some", &["/10.96.7.3"]);
    let cluster = stage.start(&mesh).await.unwrap();

    for name in ["four", "some"] {
        let empty = dig(&stage.web, name, "AAAA").await;
        assert_local(&empty);
        assert!(empty.answer.is_empty(), "{empty:?}");
    }
    let both = dig(&stage.web, "both", "AAAA").await;
    assert_eq!(both.data("AAAA"), ["fd96::2"]);
    assert_eq!(a(&stage.web, "both").await.data("A"), ["10.96.7.2"]);

    let unknown = a(&stage.web, "nobody.up.example").await;
    assert_eq!(unknown.status, "NXDOMAIN");
    let soa = "up.example. 77 IN SOA ns.up.example.";
    assert!(unknown.authority[0].starts_with(soa), "{unknown:?}");
    let known = dig(&stage.web, "host.up.example", "AAAA").await;
    assert_eq!(known.answer, ["host.up.example. 77 IN AAAA 2001:db8::7"]);

    let log = cluster.proxy(0).log();
    for (domain, query, result) in [
        ("four.", "AAAA", "service does not support this record type"),
        ("some.", "AAAA", "no records"),
        ("nobody.up.example.", "A", "forwarded"),
    ] {
        let is = |line: &testkit::Line| {
            line.scope == "dns" && line.field("domain") == domain && line.field("query") == query
        };
        assert_eq!(log.wait(domain, is).await.field("result"), result);
    }
}

#[tokio::test]
async fn a_headless_service_stands_for_its_healthy_pods_and_other_names_without_address_are_forwarded()
 {
    let stage = Named::new().unwrap();
    let _upstream = upstream(&stage).await;
    let mut mesh = stage.mesh();
    service(&mut mesh, "shop", "peers", &[]);
    let any_health = "{routingPreferences: [], mode: Standard, healthPolicy: AllowAll}";
    service(&mut mesh, "shop", "all", &[]).set("loadBalancer", any_health);
    host(&mut mesh, "shop", "host.up.example", &[]);
    let pods = [&*stage.web, &*stage.shopper, &*stage.teller];
    for name in ["peers", "all"] {
        let key = format!("shop/{name}.shop.svc.cluster.local");
        endpoints(&mut mesh, &key, &pods);
    }
    "Unhealthy".clone_into(&mut mesh.workload(&stage.teller).status);
    let _cluster = stage.start(&mesh).await.unwrap();

    let told = |pods: &[&Arc<Pod>]| {
        let mut told: Vec<_> = pods.iter().map(|pod| pod.ip4().to_string()).collect();
        told.sort_unstable();
        told
    };
    let peers = a(&stage.web, "peers").await;
    assert_local(&peers);
    assert_eq!(peers.data("A"), told(&[&stage.web, &stage.shopper]));
    let all = a(&stage.web, "all").await;
    let everybody = told(&[&stage.web, &stage.shopper, &stage.teller]);
    assert_eq!(all.data("A"), everybody);

    let forwarded = a(&stage.web, "host.up.example").await;
    assert_eq!(forwarded.answer, ["host.up.example. 77 IN A 192.0.2.7"]);
}

#[tokio::test]
async fn a_wildcard_covers_names_below_it_without_an_alias() {
    let stage = Named::new().unwrap();
    let mut mesh = stage.mesh();
    host(&mut mesh, "shop", "*.example.com", &["/10.96.7.1"]);
    host(&mut mesh, "shop", "own.example.com", &["/10.96.7.2"]);
    let _cluster = stage.start(&mesh).await.unwrap();
    for (name, address) in [
        ("x.y.example.com", "10.96.7.1"),
        ("x.example.com", "10.96.7.1"),
        ("own.example.com", "10.96.7.2"),
        ("x.example.com.shop.svc.cluster.local", "10.96.7.1"),
    ] {
        let dug = a(&stage.web, name).await;
        assert_local(&dug);
        assert_eq!(dug.answer, [format!("{name}. 30 IN A {address}")]);
    }
}

#[tokio::test]
async fn of_one_name_in_many_namespaces_the_clients_own_goes_first() {
    let stage = Named::new().unwrap();
    let mut mesh = stage.mesh();
    for (namespace, vip) in [("shop", "/10.96.7.1"), ("depot", "/10.96.7.2")] {
        host(&mut mesh, namespace, "api.corp.example", &[vip]);
    }
    host(&mut mesh, "yard", "api.corp.example", &["/10.96.7.3"]).canonical = true;
    for (namespace, vip) in [("depot", "/10.96.8.1"), ("yard", "/10.96.8.2")] {
        host(&mut mesh, namespace, "log.corp.example", &[vip]);
    }
    let options = stage.options().env("PREFERED_SERVICE_NAMESPACE", "yard");
    let _cluster = stage.start_with(&mesh, &options).await.unwrap();
    for (pod, name, address) in [
        (&stage.web, "api.corp.example", "10.96.7.1"),
        (&stage.teller, "api.corp.example", "10.96.7.3"),
        (&stage.teller, "log.corp.example", "10.96.8.2"),
    ] {
        assert_eq!(a(pod, name).await.data("A"), [address], "{}", pod.name());
    }
}

#[tokio::test]
async fn a_service_that_is_private_to_another_namespace_is_asked_of_others() {
    let stage = Named::new().unwrap();
    let _upstream = upstream(&stage).await;
    let mut mesh = stage.mesh();
    host(&mut mesh, "bank", "host.up.example", &["/10.96.7.1"]).set("visibility", "Namespace");
    let _cluster = stage.start(&mesh).await.unwrap();
    let of = |dug: Dug| dug.data("A").join(" ");
    assert_eq!(of(a(&stage.teller, "host.up.example").await), "10.96.7.1");
    assert_eq!(of(a(&stage.web, "host.up.example").await), "192.0.2.7");
}

#[tokio::test]
async fn only_addresses_of_the_clients_network_are_told() {
    let stage = Named::new().unwrap();
    let mut mesh = stage.mesh();
    service(&mut mesh, "shop", "cart", &["/10.96.7.1", "far/10.96.7.2"]);
    service(&mut mesh, "shop", "away", &["far/10.96.7.3"]);
    let _cluster = stage.start(&mesh).await.unwrap();
    assert_eq!(a(&stage.web, "cart").await.data("A"), ["10.96.7.1"]);
    let away = a(&stage.web, "away").await;
    assert_local(&away);
    assert!(away.answer.is_empty(), "{away:?}");
}

#[tokio::test]
async fn a_name_with_upper_case_letters_matches_like_any_other() {
    let stage = Named::new().unwrap();
    let mut mesh = stage.mesh();
    host(&mut mesh, "shop", "API.Corp.Example", &["/10.96.7.1"]);
    host(&mut mesh, "shop", "*.Wild.Example", &["/10.96.7.2"]);
    service(&mut mesh, "shop", "Peers", &[]);
    endpoints(
        &mut mesh,
        "shop/Peers.shop.svc.cluster.local",
        &[&stage.web],
    );
    let _cluster = stage.start(&mesh).await.unwrap();
    let web = stage.web.ip4().to_string();
    for (name, address) in [
        ("api.corp.example", "10.96.7.1"),
        ("API.Corp.Example", "10.96.7.1"),
        ("x.wild.example", "10.96.7.2"),
        ("peers", &web),
    ] {
        assert_eq!(a(&stage.web, name).await.data("A"), [address], "{name}");
    }
}

#[tokio::test]
async fn both_c_libraries_find_services_and_the_world_outside() {
    let stage = Named::new().unwrap();
    let _upstream = upstream(&stage).await;
    let mut mesh = stage.mesh();
    service(&mut mesh, "shop", "cart", &["/10.96.7.1", "/fd96::1"]).set("ipFamilies", "Dual");
    service(&mut mesh, "bank", "vault", &["/10.96.7.2"]);
    let _cluster = stage.start(&mesh).await.unwrap();
    let resolv_conf = stage.pod_resolv_conf("shop").unwrap();
    for library in [Library::Glibc, Library::Musl] {
        let found = async |name| {
            let how = (library, &*resolv_conf);
            let found = stage.web.look_up(&stage.world, how, name).await.unwrap();
            found.iter().map(IpAddr::to_string).collect::<Vec<_>>()
        };
        assert_eq!(found("cart").await, ["10.96.7.1", "fd96::1"], "{library:?}");
        for name in [
            "vault.bank",
            "vault.bank.svc",
            "vault.bank.svc.cluster.local",
        ] {
            assert_eq!(found(name).await, ["10.96.7.2"], "{library:?} {name}");
        }
        let outside = found("host.up.example.").await;
        assert_eq!(outside, ["192.0.2.7", "2001:db8::7"], "{library:?}");
        assert_eq!(found("nobody.up.example.").await, [""; 0], "{library:?}");
    }
}

#[tokio::test]
async fn without_capture_there_is_neither_socket_nor_metric() {
    let stage = Named::new().unwrap();
    let options = stage.options().env("ISTIO_META_DNS_CAPTURE", "false");
    let cluster = stage.start_with(&stage.mesh(), &options).await.unwrap();
    let sockets = stage.web.netns().command("ss", &["-Hlntu"], "").unwrap();
    assert!(sockets.contains(":15001"), "{sockets}");
    assert!(!sockets.contains(":15053"), "{sockets}");
    let metrics = cluster.proxy(0).metrics().await.unwrap();
    let families = metrics.help.keys().filter(|name| name.contains("dns"));
    assert_eq!(families.collect::<Vec<_>>(), [""; 0]);
}

#[tokio::test]
async fn a_pod_without_ipv6_on_its_loopback_is_served_over_ipv4() {
    let stage = Named::new().unwrap();
    let mut mesh = stage.mesh();
    service(&mut mesh, "shop", "cart", &["/10.96.7.1"]);
    stage
        .web
        .netns()
        .sysctl("ipv6/conf/lo/disable_ipv6", "1")
        .unwrap();
    let _cluster = stage.start(&mesh).await.unwrap();
    assert_eq!(a(&stage.web, "cart").await.data("A"), ["10.96.7.1"]);
    for (pod, v6) in [(&stage.web, false), (&stage.shopper, true)] {
        let sockets = pod.netns().command("ss", &["-Hlntu"], "").unwrap();
        assert_eq!(sockets.matches("127.0.0.1:15053").count(), 2, "{sockets}");
        assert_eq!(sockets.contains("[::1]:15053"), v6, "{sockets}");
    }
}

#[tokio::test]
async fn sockets_are_there_when_the_pod_is_acknowledged_and_unknown_pods_wait_for_their_record() {
    let stage = Named::new().unwrap();
    let mut mesh = stage.mesh();
    service(&mut mesh, "shop", "cart", &["/10.96.7.1"]);
    let uid = workload_uid(&stage.web);
    let mut without = mesh.clone();
    without.workloads.retain(|one| one.uid != uid);
    let options = stage.options().env("WORKLOAD_WAIT", "4s");
    let cluster: Cluster<'_> = stage.start_with(&without, &options).await.unwrap();
    let loopback = (std::net::Ipv4Addr::LOCALHOST, 15053).into();
    traffic::connect(stage.web.netns(), loopback).await.unwrap();

    let later = async {
        let labels = [("source_canonical_service", "unknown")];
        let refused = a(&stage.web, "cart").await;
        assert_eq!(refused.status, "SERVFAIL", "nobody knows this pod");
        let proxy = cluster.proxy(0);
        let all = proxy.metrics().await.unwrap();
        assert_eq!(all.sum("istio_dns_requests_total", &labels), 1.0);
    };
    wait::soon("an answer after the wait for the record", later).await;
    let (answered, ()) = tokio::join!(a(&stage.web, "cart"), async {
        mesh.write(&cluster.mesh_file).unwrap();
    });
    assert_eq!(answered.data("A"), ["10.96.7.1"]);
}
