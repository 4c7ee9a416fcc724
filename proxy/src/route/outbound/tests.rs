mod hops;

use std::net::IpAddr;

use rand::{SeedableRng, rngs::SmallRng};
use xds_client::proto::workload as wire;

use crate::route::{
    Outbound,
    testing::{World, at, by_name, bytes, host, of, pod, service, show, with},
};

const WEB: &str = "10.96.0.1:80";

/// The service `web`, 10.96.0.1, port 80 to 8080.
fn web() -> wire::Service {
    service("web", "10.96.0.1", &[(80, 8080)])
}

fn balanced(
    mode: wire::load_balancing::Mode,
    scopes: &[wire::load_balancing::Scope],
) -> wire::Service {
    with(web(), |service| {
        service.load_balancing = Some(wire::LoadBalancing {
            mode: mode.into(),
            routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
            ..Default::default()
        });
    })
}

fn open_to_all(service: wire::Service) -> wire::Service {
    with(service, |service| {
        let balancing = service.load_balancing.get_or_insert_default();
        balancing.health_policy = wire::load_balancing::HealthPolicy::AllowAll.into();
    })
}

fn unhealthy(workload: wire::Workload) -> wire::Workload {
    with(workload, |workload| {
        workload.status = wire::WorkloadStatus::Unhealthy.into();
    })
}

fn on_network(workload: wire::Workload, network: &str) -> wire::Workload {
    with(workload, |workload| workload.network = network.into())
}

fn waypoint(name: &str, ip: &str) -> (wire::Service, wire::Workload) {
    let vip = format!("10.96.1.{}", ip.rsplit('.').next().unwrap());
    let service = service(name, &vip, &[(15008, 15008)]);
    (service, of(pod(&format!("{name}-1"), ip), name, &[]))
}

#[test]
fn unknown_addresses_pass_through() {
    assert_eq!(
        World::new([], []).ask("93.184.216.34:443"),
        "passthrough 93.184.216.34:443"
    );
    assert_eq!(
        World::new([], []).ask("[::ffff:1.2.3.4]:443"),
        "passthrough 1.2.3.4:443"
    );
}

#[test]
fn a_pod_is_tunnelled_to_by_its_own_protocol() {
    let plain = with(pod("plain", "10.0.0.3"), |workload| {
        workload.tunnel_protocol = 0;
    });
    let mut world = World::new([], [pod("web", "10.0.0.2"), plain, pod("six", "fd00::2")]);
    let cases = [
        (
            "10.0.0.2:8080",
            "hbone 10.0.0.2:15008 for 10.0.0.2:8080 expects web",
        ),
        ("10.0.0.3:8080", "direct 10.0.0.3:8080"),
        (
            "[fd00::2]:8080",
            "hbone [fd00::2]:15008 for [fd00::2]:8080 expects six",
        ),
    ];
    for (to, answer) in cases {
        assert_eq!(world.ask(to), answer);
    }
}

#[test]
fn a_tunnel_that_the_application_makes_by_itself_is_not_put_into_another() {
    let mut world = World::new([], [pod("web", "10.0.0.2")]);
    assert_eq!(world.ask("10.0.0.2:15008"), "direct 10.0.0.2:15008");
    assert_eq!(
        world.ask("10.0.0.2:15009"),
        "hbone 10.0.0.2:15008 for 10.0.0.2:15009 expects web"
    );
}

#[test]
fn a_virtual_address_leads_to_an_endpoint_and_its_target_port() {
    let mut world = World::new([web()], [of(pod("web-1", "10.0.0.2"), "web", &[])]);
    assert_eq!(
        world.ask(WEB),
        "hbone 10.0.0.2:15008 for 10.0.0.2:8080 expects web-1"
    );
    let Outbound::Hbone(hop) = world.decide(WEB) else {
        panic!("not a tunnel")
    };
    assert_eq!(**hop.service.unwrap().hostname(), host("web"));
}

#[test]
fn a_port_that_the_service_lacks_is_refused() {
    let mut world = World::new([web()], [of(pod("web-1", "10.0.0.2"), "web", &[])]);
    assert_eq!(
        world.ask("10.96.0.1:81"),
        "refused: no healthy upstream: 10.96.0.1:81"
    );
}

#[test]
fn health_is_judged_for_services_and_not_for_pods() {
    let endpoint = unhealthy(of(pod("web-1", "10.0.0.2"), "web", &[]));
    let mut world = World::new([web()], [endpoint]);
    assert_eq!(world.ask(WEB), "refused: no healthy upstream: 10.96.0.1:80");
    assert!(
        world
            .ask("10.0.0.2:8080")
            .starts_with("hbone 10.0.0.2:15008")
    );
    // The service alone is sent again: its endpoints are judged anew.
    world.add([open_to_all(web())], []);
    assert!(world.ask(WEB).starts_with("hbone 10.0.0.2:15008"));
}

#[test]
fn expected_identities_are_a_sorted_set_without_unparsable_names() {
    let names = [
        "spiffe://cluster.local/ns/default/sa/zz",
        "spiffe://cluster.local/ns/default/sa/aa",
        "dns:x",
    ];
    let service = with(web(), |service| {
        service.subject_alt_names = names
            .iter()
            .chain(&names)
            .map(ToString::to_string)
            .collect();
    });
    let mut world = World::new([service], [of(pod("mm", "10.0.0.2"), "web", &[])]);
    assert!(world.ask(WEB).ends_with("expects aa,mm,zz"));
}

#[test]
fn failover_uses_the_nearest_group_that_has_a_usable_endpoint() {
    use wire::load_balancing::{Mode, Scope};
    let place = |workload, region: &str, zone: &str| {
        with(workload, |workload: &mut wire::Workload| {
            workload.locality = Some(wire::Locality {
                region: region.into(),
                zone: zone.into(),
                subzone: String::new(),
            });
        })
    };
    let near = place(of(pod("near", "10.0.0.2"), "web", &[]), "r1", "z1");
    let far = place(of(pod("far", "10.0.0.3"), "web", &[]), "r1", "z2");
    let farther = place(of(pod("farther", "10.0.0.4"), "web", &[]), "r2", "z1");
    let service = balanced(
        Mode::Failover,
        &[Scope::Network, Scope::Region, Scope::Zone],
    );
    let client = place(pod("client", "10.0.0.1"), "r1", "z1");
    let mut world = World::new(
        [service],
        [client, farther.clone(), near.clone(), far.clone()],
    );
    let only = |world: &mut World, name: &str| {
        let tally = world.tally(WEB, 50);
        assert_eq!(tally.len(), 1, "{tally:?}");
        assert!(
            tally[0].0.ends_with(&format!("expects {name}")),
            "{tally:?}"
        );
    };
    only(&mut world, "near");
    // What was tried in vain gives way to the next group, too.
    let mut tried = Vec::new();
    for next in ["near", "far", "farther"] {
        let answer = world.ask_without(&tried, WEB);
        assert!(answer.ends_with(&format!("expects {next}")), "{answer}");
        tried.push(world.workload(next));
    }
    world.add([], [unhealthy(near)]);
    only(&mut world, "far");
    world.add([], [unhealthy(far)]);
    only(&mut world, "farther");
    world.add([], [unhealthy(farther)]);
    assert!(world.ask(WEB).starts_with("refused: no healthy upstream"));
}

#[test]
fn endpoints_that_were_tried_are_passed_over() {
    let members = ["web-1", "web-2"].map(|name| {
        let ip = name.replace("web-", "10.0.1.");
        of(pod(name, &ip), "web", &[])
    });
    let mut world = World::new([web()], members);
    let tried = [world.workload("web-1")];
    for _ in 0..20 {
        assert!(world.ask_without(&tried, WEB).ends_with("expects web-2"));
    }
    let all = [world.workload("web-1"), world.workload("web-2")];
    assert!(
        world
            .ask_without(&all, WEB)
            .starts_with("refused: no healthy upstream")
    );
    let by_address = world.ask_without(&tried, "10.0.1.1:80");
    assert!(
        by_address.ends_with("expects web-1"),
        "it was dialled itself: {by_address}"
    );
}

#[test]
fn strict_scopes_must_all_agree() {
    use wire::load_balancing::{Mode, Scope};
    let elsewhere = with(of(pod("web-1", "10.0.0.2"), "web", &[]), |workload| {
        workload.node = "node2".into();
    });
    let mut world = World::new([balanced(Mode::Strict, &[Scope::Node])], [elsewhere]);
    assert_eq!(world.ask(WEB), "refused: no healthy upstream: 10.96.0.1:80");
    world.add([], [of(pod("web-2", "10.0.0.3"), "web", &[])]);
    assert!(world.ask(WEB).ends_with("expects web-2"));
}

#[test]
fn connections_are_shared_by_capacity() {
    let endpoint = |name, ip, capacity| {
        with(of(pod(name, ip), "web", &[]), |workload| {
            workload.capacity = capacity;
        })
    };
    let mut world = World::new(
        [web()],
        [
            endpoint("a", "10.0.0.2", None),
            endpoint("b", "10.0.0.3", Some(3)),
            endpoint("c", "10.0.0.4", Some(0)),
        ],
    );
    let tally = world.tally(WEB, 4000);
    assert_eq!(tally.len(), 2, "{tally:?}");
    assert!(tally[0].1.abs_diff(1000) < 150, "{tally:?}");
    world.add(
        [],
        [
            endpoint("a", "10.0.0.2", Some(0)),
            endpoint("b", "10.0.0.3", Some(0)),
        ],
    );
    assert!(world.ask(WEB).starts_with("refused: no healthy upstream"));
}

#[test]
fn the_address_is_of_the_dialled_family_unless_the_service_says_otherwise() {
    let dual = with(of(pod("web-1", "10.0.0.2"), "web", &[]), |workload| {
        workload.addresses = vec![bytes("fd00::2"), bytes("10.0.0.2")];
    });
    let families = |families: wire::IpFamilies| {
        with(web(), |service| {
            service.ip_families = families.into();
            service.addresses.push(at("net", "fd00:96::1"));
        })
    };
    use wire::IpFamilies as F;
    let mut world = World::new([], [dual]);
    let cases = [
        (F::Automatic, WEB, "hbone 10.0.0.2:15008"),
        (F::Automatic, "[fd00:96::1]:80", "hbone [fd00::2]:15008"),
        (F::Dual, WEB, "hbone 10.0.0.2:15008"),
        (F::Ipv4Only, "[fd00:96::1]:80", "hbone 10.0.0.2:15008"),
        (F::Ipv6Only, WEB, "hbone [fd00::2]:15008"),
    ];
    for (only, to, answer) in cases {
        world.add([families(only)], []);
        assert!(
            world.ask(to).starts_with(answer),
            "{only:?} {to}: {}",
            world.ask(to)
        );
    }
}

#[test]
fn named_target_ports_are_those_of_each_pod() {
    let named = service("web", "10.96.0.1", &[(80, 0)]);
    let mut world = World::new(
        [named],
        [
            of(pod("a", "10.0.0.2"), "web", &[(80, 8001)]),
            of(pod("b", "10.0.0.3"), "web", &[(80, 8002)]),
            of(pod("c", "10.0.0.4"), "web", &[]),
        ],
    );
    let answers: Vec<String> = world
        .tally(WEB, 100)
        .into_iter()
        .map(|(answer, _)| answer)
        .collect();
    assert_eq!(
        answers,
        [
            "hbone 10.0.0.2:15008 for 10.0.0.2:8001 expects a",
            "hbone 10.0.0.3:15008 for 10.0.0.3:8002 expects b",
        ]
    );
}

fn range(name: &str, namespace: &str, ip: &str, length: u32) -> wire::Service {
    with(service(name, ip, &[(80, 80)]), |service| {
        service.namespace = namespace.into();
        service.addresses[0].length = Some(length);
        service.load_balancing = Some(wire::LoadBalancing {
            mode: wire::load_balancing::Mode::Passthrough.into(),
            ..Default::default()
        });
    })
}

#[test]
fn the_range_of_the_own_namespace_wins_and_a_workload_wins_over_ranges() {
    let wide = range("wide", "default", "10.0.0.0", 8);
    let narrow = range("narrow", "other", "10.1.0.0", 16);
    let mut world = World::new([wide, narrow], [pod("web", "10.1.0.2")]);
    let Outbound::Passthrough { service, .. } = world.decide("10.1.2.3:80") else {
        panic!("not passed through")
    };
    assert_eq!(&**service.unwrap().name(), "wide");
    assert!(world.ask("10.1.0.2:80").starts_with("hbone 10.1.0.2:15008"));
}

#[test]
fn an_address_that_is_virtual_and_a_workload_is_the_service_throughout() {
    let (waypoint, way) = waypoint("way", "10.0.0.9");
    let both = service("both", "10.0.0.5", &[(80, 8080)]);
    let mut world = World::new(
        [both.clone(), waypoint],
        [of(pod("both", "10.0.0.5"), "both", &[]), way],
    );
    assert!(
        world
            .ask("10.0.0.5:80")
            .starts_with("hbone 10.0.0.5:15008 for 10.0.0.5:8080")
    );
    assert!(
        world
            .ask("10.0.0.5:81")
            .starts_with("refused: no healthy upstream")
    );
    world.add(
        [with(both, |service| {
            service.waypoint = Some(by_name("way"));
        })],
        [],
    );
    assert!(
        world
            .ask("10.0.0.5:80")
            .starts_with("waypoint 10.0.0.9:15008 for 10.0.0.5:80")
    );
}

#[test]
fn resolution_none_uses_the_dialled_address_unless_there_is_a_waypoint() {
    let (waypoint, way) = waypoint("way", "10.0.0.9");
    let outside = balanced(wire::load_balancing::Mode::Passthrough, &[]);
    let mut world = World::new([outside.clone(), waypoint], [way]);
    assert_eq!(world.ask("10.96.0.1:12345"), "passthrough 10.96.0.1:12345");
    world.add(
        [with(outside, |service| {
            service.waypoint = Some(by_name("way"));
        })],
        [],
    );
    assert!(
        world
            .ask("10.96.0.1:12345")
            .starts_with("waypoint 10.0.0.9:15008 for 10.96.0.1:12345")
    );
}

#[test]
fn services_that_are_not_visible_do_not_exist() {
    let hidden = with(web(), |service| {
        service.namespace = "other".into();
        service.visibility = wire::service::Visibility::Namespace.into();
    });
    assert_eq!(
        World::new([hidden], []).ask(WEB),
        "passthrough 10.96.0.1:80"
    );
}

#[test]
fn a_host_name_is_resolved_and_dialled_in_the_family_of_the_service() {
    let named = with(of(pod("db", "10.0.0.2"), "web", &[]), |workload| {
        workload.addresses.clear();
        workload.hostname = "db.example.com".into();
    });
    let mut world = World::new([web()], [named]);
    assert_eq!(world.ask(WEB), "resolve db.example.com");
    let mut resolve = |addresses: &[&str]| {
        let addresses: Vec<IpAddr> = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        let Outbound::Resolve(lookup) = world.decide(WEB) else {
            panic!("not a look-up")
        };
        show(&lookup.resolved(&addresses, &mut SmallRng::seed_from_u64(1)))
    };
    assert_eq!(
        resolve(&["fd00::7", "192.0.2.7", "fd00::8"]),
        "hbone 192.0.2.7:15008 for 192.0.2.7:8080 expects db"
    );
    assert_eq!(
        resolve(&["fd00::7"]),
        "hbone [fd00::7]:15008 for [fd00::7]:8080 expects db"
    );
    let uid = "Kubernetes//Pod/default/db";
    assert_eq!(
        resolve(&[]),
        format!("refused: no ip addresses were resolved for workload: {uid}")
    );
}

#[test]
fn pods_of_the_host_network_are_not_found_by_address() {
    let host = with(pod("host", "10.0.0.2"), |workload| {
        workload.network_mode = wire::NetworkMode::HostNetwork.into();
    });
    assert_eq!(
        World::new([], [host]).ask("10.0.0.2:80"),
        "passthrough 10.0.0.2:80"
    );
}

#[test]
fn dialling_the_proxy_on_loopback_is_refused() {
    let mut world = World::new([], []);
    for to in [
        "127.0.0.1:15001",
        "127.0.0.2:15006",
        "[::1]:15008",
        "[::ffff:127.0.0.1]:15001",
    ] {
        assert_eq!(
            world.ask(to),
            "refused: attempted recursive call to ourselves",
            "{to}"
        );
    }
    for to in ["127.0.0.1:15080", "127.0.0.1:80", "10.9.9.9:15001"] {
        assert_eq!(world.ask(to), format!("passthrough {to}"));
    }
}
