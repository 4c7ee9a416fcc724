//! Waypoints and gateways.

use rand::{SeedableRng, rngs::SmallRng};
use xds_client::proto::workload as wire;

use super::{WEB, balanced, on_network, unhealthy, waypoint, web};
use crate::route::{
    Outbound,
    testing::{World, by_ip, by_name, host, of, pod, port_list, service, show, with},
};

#[test]
fn a_service_waypoint_is_never_gone_around() {
    let (waypoint, way) = waypoint("way", "10.0.0.9");
    let service = with(web(), |service| service.waypoint = Some(by_name("way")));
    let endpoint = of(pod("web-1", "10.0.0.2"), "web", &[]);
    let mut world = World::new([service, waypoint], [endpoint]);
    let refused = format!("refused: unknown waypoint: default/{}:15008", host("way"));
    assert_eq!(world.ask(WEB), refused);
    world.add([], [unhealthy(way.clone())]);
    assert_eq!(world.ask(WEB), refused);
    world.add([], [way]);
    assert_eq!(
        world.ask(WEB),
        "waypoint 10.0.0.9:15008 for 10.96.0.1:80 expects way-1"
    );
    assert!(
        world
            .ask("10.96.0.1:81")
            .starts_with("waypoint 10.0.0.9:15008 for 10.96.0.1:81")
    );
}

#[test]
fn a_workload_waypoint_takes_what_is_sent_to_the_pod_only() {
    let (waypoint, way) = waypoint("way", "10.0.0.9");
    let endpoint = of(pod("web-1", "10.0.0.2"), "web", &[]);
    let endpoint = with(endpoint, |workload| {
        workload.waypoint = Some(by_name("way"));
    });
    let mut world = World::new([web(), waypoint], [endpoint, way, pod("other", "10.0.0.8")]);
    let through = "waypoint 10.0.0.9:15008 for 10.0.0.2:8080 expects way-1";
    let direct = "hbone 10.0.0.2:15008 for 10.0.0.2:8080 expects web-1";
    assert_eq!(world.ask("10.0.0.2:8080"), through);
    assert_eq!(world.ask(WEB), direct);
    let from = |world: &mut World, name, ip| show(&world.decide_from(name, ip, "10.0.0.2:8080"));
    assert_eq!(from(&mut world, "way-1", "10.0.0.9"), direct);
    assert_eq!(
        from(&mut world, "way-1", "10.0.0.7"),
        through,
        "the address must agree too"
    );
    assert_eq!(
        from(&mut world, "other", "10.0.0.9"),
        through,
        "the identity must agree too"
    );
}

#[test]
fn a_waypoint_may_be_named_by_address() {
    let (waypoint, way) = waypoint("way", "10.0.0.9");
    let by_vip = with(web(), |service| {
        service.waypoint = Some(by_ip("net", "10.96.1.9"));
    });
    let by_pod = with(service("api", "10.96.0.2", &[(80, 80)]), |service| {
        service.waypoint = Some(by_ip("net", "10.0.0.9"));
    });
    let mut world = World::new([waypoint, by_vip, by_pod], [way]);
    assert_eq!(
        world.ask(WEB),
        "waypoint 10.0.0.9:15008 for 10.96.0.1:80 expects way-1"
    );
    assert_eq!(
        world.ask("10.96.0.2:80"),
        "waypoint 10.0.0.9:15008 for 10.96.0.2:80 expects way-1"
    );
}

#[test]
fn weighted_waypoints_share_by_weight() {
    let weighted = |first, second| {
        let entry = |name, weight| wire::WeightedWaypoint {
            destination: Some(by_name(name)),
            weight,
        };
        with(web(), |service| {
            service.waypoint = Some(by_name("one"));
            service.weighted_waypoints = vec![entry("one", first), entry("two", second)];
        })
    };
    let (one, first) = waypoint("one", "10.0.0.8");
    let (two, second) = waypoint("two", "10.0.0.9");
    let mut world = World::new([weighted(90, 10), one, two], [first, second]);
    let tally = world.tally(WEB, 5000);
    assert!(tally[1].0.starts_with("waypoint 10.0.0.9"), "{tally:?}");
    assert!(tally[1].1.abs_diff(500) < 120, "{tally:?}");
    for weights in [(100, 0), (0, 0)] {
        world.add([weighted(weights.0, weights.1)], []);
        let tally = world.tally(WEB, 200);
        assert_eq!(tally.len(), 1, "{tally:?}");
        assert!(tally[0].0.starts_with("waypoint 10.0.0.8"), "{tally:?}");
    }
}

#[test]
fn a_weighted_waypoint_that_was_tried_gives_way_to_another() {
    let (one, first) = waypoint("one", "10.0.0.8");
    let (two, second) = waypoint("two", "10.0.0.9");
    let service = with(web(), |service| {
        let entry = |destination, weight| wire::WeightedWaypoint {
            destination: Some(destination),
            weight,
        };
        service.waypoint = Some(by_name("one"));
        service.weighted_waypoints = vec![
            entry(by_name("one"), 90),
            entry(by_name("two"), 10),
            entry(by_ip("net", "10.0.0.7"), 80),
        ];
    });
    let alone = pod("three", "10.0.0.7");
    let mut world = World::new([service, one, two], [first, second, alone]);
    let mut tried = vec![world.workload("one-1"), world.workload("three")];
    for _ in 0..50 {
        let answer = world.ask_without(&tried, WEB);
        assert!(answer.starts_with("waypoint 10.0.0.9"), "{answer}");
    }
    tried.push(world.workload("two-1"));
    tried.remove(1);
    for _ in 0..50 {
        let answer = world.ask_without(&tried, WEB);
        assert!(answer.starts_with("waypoint 10.0.0.7"), "{answer}");
    }
}

/// All endpoints of `web` on network `far`, as the control plane sends them.
fn remote(gateway: Option<wire::GatewayAddress>) -> wire::Workload {
    with(
        on_network(of(pod("far", "10.0.0.2"), "web", &[]), "far"),
        |workload| {
            workload.addresses.clear();
            workload.network_gateway = gateway;
        },
    )
}

#[test]
fn remote_endpoints_are_reached_through_their_gateway() {
    let service = with(web(), |service| {
        service.subject_alt_names = vec!["spiffe://cluster.local/ns/default/sa/backend".into()];
    });
    let gateway = on_network(pod("gate", "192.0.2.1"), "far");
    let mut world = World::new([service], [remote(None)]);
    assert!(world.ask(WEB).starts_with("refused: no healthy upstream"));
    world.add([], [remote(Some(by_ip("far", "192.0.2.1")))]);
    assert!(
        world
            .ask(WEB)
            .starts_with("refused: unknown network gateway")
    );
    world.add([], [gateway]);
    let name = host("web");
    assert_eq!(
        world.ask(WEB),
        format!(
            "gateway 192.0.2.1:15008 for {name}:80 expects gate; inner for {name}:80 expects backend"
        )
    );
}

#[test]
fn what_is_behind_a_gateway_that_was_tried_gives_way_to_what_is_behind_another() {
    let endpoint = |name: &str, network: &str, gateway| {
        with(
            on_network(of(pod(name, "10.0.0.2"), "web", &[]), network),
            |workload| {
                workload.addresses.clear();
                workload.network_gateway = Some(gateway);
            },
        )
    };
    let gate = |name: &str, ip: &str, network: &str| {
        let gate = on_network(of(pod(&format!("{name}-1"), ip), name, &[]), network);
        // Gateways are on the network that they lead to, and may be told to be behind themselves.
        with(gate, |gate| gate.network_gateway = Some(by_name(name)))
    };
    let gates = |name, vip| service(name, vip, &[(15008, 15008)]);
    let mut world = World::new(
        [
            web(),
            gates("east", "10.96.2.1"),
            gates("west", "10.96.2.2"),
        ],
        [
            endpoint("far-east", "e", by_name("east")),
            endpoint("far-west", "w", by_name("west")),
            gate("east", "192.0.2.1", "e"),
            gate("west", "192.0.2.2", "w"),
        ],
    );
    assert_eq!(world.tally(WEB, 50).len(), 2);
    let mut tried = vec![world.workload("east-1")];
    for _ in 0..50 {
        let answer = world.ask_without(&tried, WEB);
        assert!(answer.starts_with("gateway 192.0.2.2"), "{answer}");
    }
    tried.push(world.workload("west-1"));
    let answer = world.ask_without(&tried, WEB);
    assert!(
        answer.starts_with("refused: no healthy upstream"),
        "{answer}"
    );
}

#[test]
fn an_addressed_endpoint_on_another_network_needs_a_gateway() {
    let far = on_network(of(pod("far", "10.0.0.2"), "web", &[]), "far");
    let mut world = World::new([web()], [far]);
    assert!(
        world
            .ask(WEB)
            .starts_with("refused: no valid routing destination for workload")
    );
}

#[test]
fn a_gateway_known_by_host_name_is_resolved() {
    let gateway = with(on_network(pod("gate", "192.0.2.1"), "far"), |workload| {
        workload.addresses.clear();
        workload.hostname = host("gate");
    });
    let mut world = World::new([web()], [remote(Some(by_name("gate"))), gateway]);
    let Outbound::Resolve(lookup) = world.decide(WEB) else {
        panic!("not a look-up")
    };
    let found = ["198.51.100.1".parse().unwrap()];
    let decided = lookup.resolved(&found, &mut SmallRng::seed_from_u64(1));
    assert!(
        show(&decided).starts_with("gateway 198.51.100.1:15008"),
        "{}",
        show(&decided)
    );
}

#[test]
fn a_waypoint_on_another_network_is_reached_through_its_gateway() {
    let (waypoint, way) = waypoint("way", "10.0.0.9");
    let waypoint = with(waypoint, |service| {
        service.subject_alt_names = vec!["spiffe://cluster.local/ns/default/sa/far-way".into()];
    });
    let way = with(on_network(way, "far"), |workload| {
        workload.addresses.clear();
        workload.network_gateway = Some(by_ip("far", "192.0.2.1"));
    });
    let service = with(web(), |service| service.waypoint = Some(by_name("way")));
    let gateway = on_network(pod("gate", "192.0.2.1"), "far");
    let mut world = World::new([service, waypoint], [way, gateway]);
    let name = host("web");
    assert_eq!(
        world.ask(WEB),
        format!(
            "gateway 192.0.2.1:15008 for {name}:80 expects gate; inner for {name}:80 expects far-way"
        )
    );
}

#[test]
fn local_endpoints_go_first_where_the_network_does() {
    use wire::load_balancing::{Mode, Scope};
    let far = remote(Some(by_ip("far", "192.0.2.1")));
    let near = of(pod("near", "10.0.0.3"), "web", &[]);
    let gateway = on_network(pod("gate", "192.0.2.1"), "far");
    let service = balanced(Mode::Failover, &[Scope::Network]);
    let mut world = World::new([service], [far, near.clone(), gateway]);
    let tally = world.tally(WEB, 50);
    assert_eq!(tally.len(), 1, "{tally:?}");
    assert!(tally[0].0.ends_with("expects near"), "{tally:?}");
    world.add([], [unhealthy(near)]);
    assert!(world.ask(WEB).starts_with("gateway 192.0.2.1:15008"));
}

#[test]
fn a_waypoint_with_an_application_tunnel_takes_ports_its_service_does_not_list() {
    let tunnel = |port| wire::ApplicationTunnel {
        protocol: wire::application_tunnel::Protocol::Proxy.into(),
        port,
    };
    let (waypoint, way) = waypoint("way", "10.0.0.9");
    let waypoint = with(waypoint, |service| service.ports = port_list(&[(80, 80)]));
    let service = with(web(), |service| service.waypoint = Some(by_name("way")));
    let mut world = World::new([service, waypoint], [way.clone()]);
    assert!(world.ask(WEB).starts_with("refused: unknown waypoint"));
    world.add(
        [],
        [with(way, |workload| {
            workload.application_tunnel = Some(tunnel(15088));
        })],
    );
    assert_eq!(
        world.ask(WEB),
        "waypoint 10.0.0.9:15008 for 10.96.0.1:80 expects way-1"
    );
}

#[test]
fn what_might_lead_elsewhere_is_named() {
    let missing = |world: &mut World, to: &str| {
        let source = world.workload("client");
        let missing = world.decide(to).missing(&source);
        missing.map(|missing| missing.to_string())
    };
    let behind = with(web(), |service| service.waypoint = Some(by_name("way")));
    let endpoint = with(pod("web-1", "10.0.0.2"), |workload| {
        workload.waypoint = Some(by_ip("net", "10.96.1.9"));
    });
    let far = with(on_network(pod("far", "10.0.0.4"), "far"), |workload| {
        workload.network_gateway = Some(by_ip("far", "2001:db8::1"));
    });
    let across = service("across", "10.96.0.4", &[(80, 80)]);
    let far = of(far, "across", &[]);
    let mut world = World::new([behind, across], [endpoint, far, pod("plain", "10.0.0.3")]);
    let way = format!("default/{}", host("way"));
    for (to, expected) in [
        ("10.7.7.7:80", Some("net/10.7.7.7")),
        ("[2001:0db8::0007]:80", Some("net/2001:db8::7")),
        ("[::ffff:10.7.7.7]:80", Some("net/10.7.7.7")),
        (WEB, Some(&*way)),
        ("10.0.0.2:80", Some("net/10.96.1.9")),
        ("10.96.0.4:80", Some("far/2001:db8::1")),
        ("10.0.0.3:80", None),
        ("127.0.0.1:15001", None),
    ] {
        assert_eq!(missing(&mut world, to).as_deref(), expected, "{to}");
    }
}
