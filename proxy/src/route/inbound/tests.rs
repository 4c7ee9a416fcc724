use std::net::SocketAddr;

use http::StatusCode;
use xds_client::proto::workload as wire;

use crate::route::{
    Authority, ClientAddress, InboundQuery, InboundRefusal, InboundRoute, LoopGuard,
    PlaintextQuery, ProxyTarget, guess_service, inbound, inbound_plaintext,
    testing::{World, at, by_ip, by_name, host, of, pod, service, with},
};

type Answer = Result<InboundRoute, InboundRefusal>;

fn ask(world: &World, (local, ip): (&str, &str), authority: &str) -> Answer {
    ask_with(world, (local, ip), authority, true)
}

fn ask_with(world: &World, (local, ip): (&str, &str), authority: &str, loopback: bool) -> Answer {
    let authority: Authority = authority.parse().unwrap();
    let ask = InboundQuery {
        local: &world.workload(local),
        local_ip: ip.parse().unwrap(),
        authority: &authority,
        forwarded_host: None,
        localhost_app_tunnel: loopback,
    };
    inbound(&world.mesh.read(), &LoopGuard::default(), &ask)
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The service `web`, 10.96.0.1, port 80 to 8080, behind this waypoint.
fn web(waypoint: Option<wire::GatewayAddress>) -> wire::Service {
    with(service("web", "10.96.0.1", &[(80, 8080)]), |service| {
        service.waypoint = waypoint;
    })
}

const WEB: (&str, &str) = ("web", "10.0.0.2");
const WAY: (&str, &str) = ("way", "10.0.0.9");

#[test]
fn delivers_to_the_own_address() {
    let world = World::new([], [pod("web", "10.0.0.2")]);
    let route = ask(&world, WEB, "10.0.0.2:8080").unwrap();
    assert_eq!(
        (route.to, route.destination),
        (addr("10.0.0.2:8080"), addr("10.0.0.2:8080"))
    );
    assert_eq!(
        (route.from, route.proxy_target),
        (ClientAddress::Original, None)
    );
}

#[test]
fn refuses_the_address_of_another_pod_or_service() {
    for service in [web(None), web(Some(by_name("elsewhere")))] {
        let world = World::new(
            [service],
            [pod("web", "10.0.0.2"), pod("other", "10.0.0.3")],
        );
        for authority in ["10.0.0.3:80", "10.96.0.1:80", "10.7.7.7:80"] {
            let refusal = ask(&world, WEB, authority).unwrap_err();
            let named = addr(authority).ip();
            assert_eq!(
                refusal.to_string(),
                format!("ip mismatch: 10.0.0.2 != {named}")
            );
            assert_eq!(refusal.status(), StatusCode::BAD_REQUEST);
        }
    }
}

#[test]
fn a_waypoint_takes_the_addresses_that_it_serves_and_delivers_to_itself() {
    let waypoint = service("way", "10.96.1.9", &[(15008, 15008)]);
    let way = of(pod("way", "10.0.0.9"), "way", &[]);
    let canary = wire::WeightedWaypoint {
        destination: Some(by_name("way")),
        weight: 10,
    };
    let weighted = with(web(None), |service| {
        service.weighted_waypoints = vec![canary];
    });
    for served in [
        web(Some(by_name("way"))),
        web(Some(by_ip("net", "10.96.1.9"))),
        web(Some(by_ip("net", "10.0.0.9"))),
        weighted,
    ] {
        let world = World::new([waypoint.clone(), served], [way.clone()]);
        let route = ask(&world, WAY, "10.96.0.1:80").unwrap();
        assert_eq!(route.to, addr("10.0.0.9:80"));
        assert!(ask(&world, WAY, "10.96.0.2:80").is_err());
    }
    let behind = with(pod("web", "10.0.0.2"), |workload| {
        workload.waypoint = Some(by_name("way"));
    });
    let world = World::new([waypoint], [way, behind]);
    assert_eq!(
        ask(&world, WAY, "10.0.0.2:80").unwrap().to,
        addr("10.0.0.9:80")
    );
}

#[test]
fn a_host_name_leads_to_the_port_of_this_pod() {
    let services = [
        web(None),
        service("named", "10.96.0.2", &[(80, 0), (81, 0)]),
    ];
    let local = of(
        of(pod("web", "10.0.0.2"), "web", &[]),
        "named",
        &[(80, 9000)],
    );
    let world = World::new(services, [local]);
    let to = |name: &str, port: u16| {
        ask(&world, WEB, &format!("{}:{port}", host(name)))
            .map(|route| route.to.port())
            .map_err(|refusal| (refusal.status(), refusal.to_string()))
    };
    let unavailable = |text: String| Err((StatusCode::SERVICE_UNAVAILABLE, text));
    assert_eq!(to("web", 80), Ok(8080));
    assert_eq!(to("named", 80), Ok(9000));
    assert_eq!(
        to("named", 81),
        unavailable(format!("no target port for {}:81", host("named")))
    );
    assert_eq!(
        to("web", 81),
        unavailable(format!("no target port for {}:81", host("web")))
    );
    assert_eq!(
        to("none", 80),
        unavailable(format!("unknown service host: {}", host("none")))
    );
}

#[test]
fn a_host_name_is_served_by_its_endpoints_and_its_waypoint_only() {
    let way = of(pod("way", "10.0.0.9"), "way", &[]);
    let services = [
        service("way", "10.96.1.9", &[(15008, 15008)]),
        web(Some(by_name("way"))),
        service("other", "10.96.0.2", &[(80, 8080)]),
    ];
    let world = World::new(services, [way, pod("web", "10.0.0.2")]);
    let status = |who, name| {
        let route = ask(&world, who, &format!("{}:80", host(name)));
        route.map_err(|refusal| (refusal.status().as_u16(), refusal.to_string()))
    };
    assert_eq!(status(WAY, "web").unwrap().to, addr("10.0.0.9:8080"));
    let foreign = (400, format!("not served here: {}", host("other")));
    assert_eq!(status(WAY, "other").unwrap_err(), foreign);
    assert_eq!(status(WEB, "other").unwrap_err(), foreign);
    assert_eq!(status(WEB, "web").unwrap_err().0, 400, "no endpoint");

    // Of two services of one name, it is the one that the pod belongs to.
    let elsewhere = with(service("web", "10.96.0.3", &[(80, 9090)]), |service| {
        service.namespace = "elsewhere".into();
    });
    let mut member = pod("web", "10.0.0.2");
    let key = format!("elsewhere/{}", host("web"));
    member.services.insert(key, wire::PortList::default());
    let world = World::new([web(None), elsewhere], [member]);
    let route = ask(&world, WEB, &format!("{}:80", host("web"))).unwrap();
    assert_eq!(route.to, addr("10.0.0.2:9090"));
}

#[test]
fn ports_of_the_proxy_are_refused() {
    let world = World::new([], [pod("web", "10.0.0.2")]);
    for port in [15001, 15006, 15008] {
        let refusal = ask(&world, WEB, &format!("10.0.0.2:{port}")).unwrap_err();
        assert_eq!(refusal.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(refusal.to_string(), "attempted recursive call to ourselves");
        for ip in ["10.0.0.2", "10.9.9.9"] {
            let ask = PlaintextQuery {
                local: &world.workload("web"),
                destination: SocketAddr::new(ip.parse().unwrap(), port),
            };
            let refusal =
                inbound_plaintext(&world.mesh.read(), &LoopGuard::default(), &ask).unwrap_err();
            assert_eq!(refusal, InboundRefusal::Recursion);
        }
    }
}

#[test]
fn plaintext_goes_where_it_was_sent() {
    let world = World::new([web(None)], [of(pod("web", "10.0.0.2"), "web", &[])]);
    let ask = PlaintextQuery {
        local: &world.workload("web"),
        destination: addr("[::ffff:10.0.0.2]:8080"),
    };
    let route = inbound_plaintext(&world.mesh.read(), &LoopGuard::default(), &ask).unwrap();
    assert_eq!(
        (route.to, route.destination),
        (addr("10.0.0.2:8080"), addr("10.0.0.2:8080"))
    );
    assert_eq!(&**route.service.unwrap().name(), "web");
}

fn sandwiched(protocol: wire::application_tunnel::Protocol, port: u32) -> wire::Workload {
    with(pod("way", "10.0.0.9"), |workload| {
        workload.application_tunnel = Some(wire::ApplicationTunnel {
            protocol: protocol.into(),
            port,
        });
    })
}

fn target(address: &str, service: Option<&str>) -> ProxyTarget {
    ProxyTarget {
        address: addr(address),
        service: service.map(|name| host(name).into()),
    }
}

#[test]
fn an_application_tunnel_takes_any_address_and_may_change_the_port() {
    use wire::application_tunnel::Protocol;
    let plain = World::new([], [sandwiched(Protocol::None, 15088)]);
    let route = ask(&plain, WAY, "10.96.0.7:80").unwrap();
    assert_eq!(
        (route.to, route.destination),
        (addr("10.0.0.9:15088"), addr("10.0.0.9:15088"))
    );
    assert_eq!(
        (route.from, route.proxy_target),
        (ClientAddress::Original, None)
    );

    let proxied = World::new([], [sandwiched(Protocol::Proxy, 0)]);
    let route = ask(&proxied, WAY, "10.96.0.7:80").unwrap();
    assert_eq!(
        (route.to, route.destination),
        (addr("127.0.0.1:80"), addr("10.0.0.9:80"))
    );
    assert_eq!(route.from, ClientAddress::Loopback);
    assert_eq!(route.proxy_target, Some(target("10.96.0.7:80", None)));
    let route = ask(&proxied, ("way", "fd00::9"), "10.96.0.7:80").unwrap();
    assert_eq!(route.to, addr("[::1]:80"));
    let route = ask_with(&proxied, WAY, "10.96.0.7:80", false).unwrap();
    assert_eq!(
        (route.to, route.from),
        (addr("10.0.0.9:80"), ClientAddress::Original)
    );

    let looping = World::new([], [sandwiched(Protocol::Proxy, 15008)]);
    assert_eq!(
        ask(&looping, WAY, "10.96.0.7:80").unwrap_err(),
        InboundRefusal::Recursion
    );
}

#[test]
fn a_proxy_header_names_a_virtual_address_of_the_own_network_and_ipv4_first() {
    type Case<'a> = (&'a [(&'a str, &'a str)], Option<&'a str>);
    let cases: [Case<'_>; 4] = [
        (
            &[("far", "10.1.0.1"), ("net", "fd00::1"), ("net", "10.2.0.1")],
            Some("10.2.0.1:80"),
        ),
        (
            &[("far", "10.1.0.1"), ("net", "fd00::1")],
            Some("[fd00::1]:80"),
        ),
        (
            &[("far", "fd00::2"), ("far", "10.1.0.1")],
            Some("10.1.0.1:80"),
        ),
        (&[], None),
    ];
    for (vips, expected) in cases {
        let service = with(web(None), |service| {
            service.addresses = vips.iter().map(|(network, ip)| at(network, ip)).collect();
        });
        let tunnel = wire::application_tunnel::Protocol::Proxy;
        let world = World::new([service], [sandwiched(tunnel, 15088)]);
        match (ask(&world, WAY, &format!("{}:80", host("web"))), expected) {
            (Ok(route), Some(address)) => {
                let named = target(address, Some("web"));
                assert_eq!(route.proxy_target, Some(named), "by host name");
                let route = ask(&world, WAY, address).unwrap();
                let here = !address.starts_with("10.1.");
                let named = target(address, here.then_some("web"));
                assert_eq!(route.proxy_target, Some(named), "by address");
            }
            (Err(refusal), None) => assert_eq!(refusal.status(), StatusCode::SERVICE_UNAVAILABLE),
            (answer, expected) => panic!("{answer:?} instead of {expected:?}"),
        }
    }
}

#[test]
fn guesses_the_service_by_name_then_by_port() {
    let services = [
        service("one", "10.96.0.1", &[(80, 8080)]),
        service("two", "10.96.0.2", &[(80, 0)]),
        service("three", "10.96.0.3", &[(80, 7000)]),
    ];
    let local = of(of(pod("web", "10.0.0.2"), "one", &[]), "two", &[(80, 9000)]);
    let world = World::new(services, [local]);
    let guess = |host: Option<&str>, port| {
        let local = world.workload("web");
        let state = world.mesh.read();
        guess_service(&state, &local, host, port).map(|service| service.name().to_string())
    };
    assert_eq!(guess(None, 8080).as_deref(), Some("one"));
    assert_eq!(guess(None, 9000).as_deref(), Some("two"));
    assert_eq!(guess(Some(&host("two")), 8080).as_deref(), Some("two"));
    assert_eq!(guess(Some(&host("three")), 8080).as_deref(), Some("one"));
    assert_eq!(guess(None, 7000), None);
}

#[test]
fn what_might_let_a_connect_in_is_named() {
    let missing = |world: &World, authority: &str| {
        let refusal = ask(world, WAY, authority).unwrap_err();
        refusal.missing().map(ToString::to_string)
    };
    let way = of(pod("way", "10.0.0.9"), "way", &[]);
    let key = format!("default/{}", host("way"));
    let world = World::new([web(Some(by_name("way")))], [way, pod("web", "10.0.0.2")]);
    let at_way = format!("{}:80", host("way"));
    for (authority, expected) in [
        ("10.7.7.7:80", Some("net/10.7.7.7")),
        ("10.96.0.1:80", Some(&*key)),
        (&*at_way, Some(&*key)),
        ("10.0.0.2:80", None),
        ("elsewhere.example:80", None),
    ] {
        assert_eq!(
            missing(&world, authority).as_deref(),
            expected,
            "{authority}"
        );
    }
    world.add([service("way", "10.96.1.9", &[(80, 8080)])], []);
    assert!(ask(&world, WAY, "10.96.0.1:80").is_ok());
    assert!(ask(&world, WAY, &at_way).is_ok());
}
