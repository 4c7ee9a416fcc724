//! What is accepted, what is refused, and by which name.

use xds_client::{local::NamedPolicy, proto::security as sec};

use super::*;

fn convert(address: impl Into<pb::Address>) -> Result<Record, String> {
    let mut pool = Pool::default();
    let mut converter = Converter { pool: &mut pool };
    let converted = converter.address(&address.into());
    converted.map_err(|rejection| rejection.to_string())
}

fn workload(edit: impl FnOnce(&mut pb::Workload)) -> Result<Arc<super::super::Workload>, String> {
    let mut given = pb::Workload {
        uid: "u".into(),
        ..pb::Workload::default()
    };
    edit(&mut given);
    convert(given).map(|record| match record {
        Record::Workload(workload) => workload,
        other @ (Record::Service(_) | Record::Policy(_)) => panic!("{other:?}"),
    })
}

fn service(edit: impl FnOnce(&mut pb::Service)) -> Result<Arc<super::super::Service>, String> {
    let mut given = pb::Service {
        namespace: "n".into(),
        hostname: "h".into(),
        ..pb::Service::default()
    };
    edit(&mut given);
    convert(given).map(|record| match record {
        Record::Service(service) => service,
        other @ (Record::Workload(_) | Record::Policy(_)) => panic!("{other:?}"),
    })
}

fn policy(edit: impl FnOnce(&mut sec::Match)) -> Result<Arc<super::super::Policy>, String> {
    let mut one = sec::Match::default();
    edit(&mut one);
    let clause = sec::Clause { matches: vec![one] };
    let rule = sec::Rule {
        clauses: vec![clause],
    };
    authorization(|given| given.rules = vec![rule])
}

fn authorization(
    edit: impl FnOnce(&mut sec::Authorization),
) -> Result<Arc<super::super::Policy>, String> {
    let mut given = NamedPolicy {
        name: "n/p".into(),
        policy: sec::Authorization::default(),
    };
    edit(&mut given.policy);
    let mut pool = Pool::default();
    let converted = Converter { pool: &mut pool }.policy(&given.name, &given.policy);
    let record = converted.map_err(|rejection| rejection.to_string())?;
    match record {
        Record::Policy(policy) => Ok(policy),
        other @ (Record::Workload(_) | Record::Service(_)) => panic!("{other:?}"),
    }
}

fn refused<T>(result: Result<T, String>) -> String {
    result.err().expect("it was accepted")
}

fn gateway(bytes: Option<&[u8]>, port: u32) -> pb::GatewayAddress {
    pb::GatewayAddress {
        destination: bytes
            .map(|bytes| pb::gateway_address::Destination::Address(network_address(bytes, None))),
        hbone_mtls_port: port,
    }
}

fn network_address(bytes: &[u8], length: Option<u32>) -> pb::NetworkAddress {
    pb::NetworkAddress {
        network: String::new(),
        address: bytes.into(),
        length,
    }
}

fn ports(pairs: &[(u32, u32)]) -> Vec<pb::Port> {
    let port = |(service_port, target_port): &(u32, u32)| pb::Port {
        service_port: *service_port,
        target_port: *target_port,
        app_protocol: 9,
    };
    pairs.iter().map(port).collect()
}

#[test]
fn refuses_workloads_by_field() {
    type Edit = fn(&mut pb::Workload);
    fn link(workload: &mut pb::Workload, key: &str, pair: (u32, u32)) {
        let ports = ports(&[pair]);
        workload.services.insert(key.into(), pb::PortList { ports });
    }
    let cases: [(Edit, &str); 9] = [
        (|w| w.uid.clear(), "uid is empty"),
        (
            |w| w.addresses = vec![vec![1; 5]],
            "addresses: an address of 5 bytes",
        ),
        (
            |w| w.waypoint = Some(gateway(None, 1)),
            "waypoint has no destination",
        ),
        (
            |w| w.waypoint = Some(gateway(Some(&[]), 1)),
            "waypoint: an address of 0 bytes",
        ),
        (
            |w| w.waypoint = Some(gateway(Some(&[1; 4]), 70_000)),
            "waypoint: 70000 is not a port",
        ),
        (
            |w| w.network_gateway = Some(gateway(None, 1)),
            "network_gateway has no destination",
        ),
        (
            |w| link(w, "h", (1, 1)),
            "services: `h` is not namespace/hostname",
        ),
        (
            |w| link(w, "n/h", (65_536, 1)),
            "service_port: 65536 is not a port",
        ),
        (
            |w| link(w, "n/h", (1, 65_536)),
            "target_port: 65536 is not a port",
        ),
    ];
    for (edit, expected) in cases {
        assert_eq!(refused(workload(edit)), expected);
    }
    let nothing = pb::Address { r#type: None };
    assert_eq!(
        refused(convert(nothing)),
        "neither a workload nor a service"
    );
}

#[test]
fn refuses_workloads_of_unknown_kinds() {
    type Edit = fn(&mut pb::Workload);
    let tunnel = |protocol| pb::ApplicationTunnel { protocol, port: 0 };
    let cases: [(Edit, &str); 4] = [
        (|w| w.tunnel_protocol = 2, "tunnel_protocol: value 2"),
        (|w| w.tunnel_protocol = 9, "tunnel_protocol: value 9"),
        (|w| w.network_mode = 2, "network_mode: value 2"),
        (|w| w.status = 2, "status: value 2"),
    ];
    for (edit, expected) in cases {
        assert_eq!(
            refused(workload(edit)),
            format!("{expected} is not supported")
        );
    }
    let reason = refused(workload(|w| w.application_tunnel = Some(tunnel(2))));
    assert_eq!(reason, "application_tunnel: value 2 is not supported");
}

#[test]
fn refuses_services_by_field() {
    type Edit = fn(&mut pb::Service);
    let cases: [(Edit, &str); 8] = [
        (
            |s| s.namespace = "a/b".into(),
            "namespace: `a/b` contains a slash",
        ),
        (
            |s| s.addresses = vec![network_address(&[1; 3], None)],
            "addresses: an address of 3 bytes",
        ),
        (
            |s| s.addresses = vec![network_address(&[1; 4], Some(33))],
            "addresses: prefix length 33 is longer than the address",
        ),
        (
            |s| s.addresses = vec![network_address(&[1; 16], Some(300))],
            "addresses: prefix length 300 is longer than the address",
        ),
        (
            |s| s.ports = ports(&[(80, 65_616)]),
            "target_port: 65616 is not a port",
        ),
        (
            |s| s.ip_families = 4,
            "ip_families: value 4 is not supported",
        ),
        (
            |s| s.waypoint = Some(gateway(None, 1)),
            "waypoint has no destination",
        ),
        (
            |s| s.weighted_waypoints = vec![pb::WeightedWaypoint::default()],
            "weighted_waypoints has no destination",
        ),
    ];
    for (edit, expected) in cases {
        assert_eq!(refused(service(edit)), expected);
    }
}

#[test]
fn refuses_unknown_ways_of_load_balancing() {
    let cases = [
        ((0, 0, 0), "routing_preference: value 0"),
        ((7, 0, 0), "routing_preference: value 7"),
        ((1, 4, 0), "mode: value 4"),
        ((1, 1, 2), "health_policy: value 2"),
    ];
    for ((scope, mode, health_policy), expected) in cases {
        let balancing = pb::LoadBalancing {
            routing_preference: vec![scope],
            mode,
            health_policy,
        };
        let reason = refused(service(|s| s.load_balancing = Some(balancing)));
        assert_eq!(
            reason,
            format!("load_balancing.{expected} is not supported")
        );
    }
}

#[test]
fn refuses_policies_by_field() {
    type Edit = fn(&mut sec::Match);
    fn address(bytes: &[u8], length: u32) -> Vec<sec::Address> {
        vec![sec::Address {
            address: bytes.into(),
            length,
        }]
    }
    let cases: [(Edit, &str); 6] = [
        (
            |m| m.source_ips = address(&[1; 5], 8),
            "source_ips: an address of 5 bytes",
        ),
        (
            |m| m.not_source_ips = address(&[], 0),
            "not_source_ips: an address of 0 bytes",
        ),
        (
            |m| m.destination_ips = address(&[1; 4], 33),
            "destination_ips: prefix length 33 is longer than the address",
        ),
        (
            |m| m.not_destination_ports = vec![80, 65_536],
            "not_destination_ports: 65536 is not a port",
        ),
        (
            |m| m.principals = vec![sec::StringMatch::default()],
            "principals: a string match without a known kind",
        ),
        (
            |m| m.not_namespaces = vec![sec::StringMatch::default()],
            "not_namespaces: a string match without a known kind",
        ),
    ];
    for (edit, expected) in cases {
        assert_eq!(refused(policy(edit)), expected);
    }
    assert_eq!(
        refused(authorization(|p| p.scope = 3)),
        "scope: value 3 is not supported"
    );
    assert_eq!(
        refused(authorization(|p| p.action = 2)),
        "action: value 2 is not supported"
    );
}

#[test]
fn accepts_what_the_api_leaves_open() {
    use super::super::{Visibility, WorkloadType};
    let kind = workload(|w| w.workload_type = 9).unwrap().workload_type();
    assert_eq!(kind, WorkloadType::Deployment);
    let visibility = service(|s| s.visibility = 7).unwrap().visibility();
    assert_eq!(visibility, Visibility::Public);
    let bare = workload(|_| {}).unwrap();
    assert_eq!(
        (bare.name(), &**bare.namespace(), bare.capacity()),
        ("", "", 1)
    );
    assert_eq!(
        bare.identity(),
        None,
        "without a namespace there is no identity"
    );
    assert_eq!(workload(|w| w.capacity = Some(0)).unwrap().capacity(), 0);
    let both = workload(|w| {
        w.hostname = "db".into();
        w.addresses = vec![vec![10, 0, 0, 1]];
    });
    assert_eq!(both.unwrap().addresses().len(), 1);
}

#[test]
fn keeps_uid_and_name_whether_one_holds_the_other_or_not() {
    for (uid, name) in [
        ("c//Pod/n/w", "w"),
        ("u", "other"),
        ("u", ""),
        ("same", "same"),
        ("ü/é", "é"),
        ("a", "aa"),
    ] {
        let record = workload(|w| (w.uid, w.name) = (uid.into(), name.into())).unwrap();
        assert_eq!((record.uid(), record.name()), (uid, name));
    }
}

#[test]
fn the_last_mapping_of_a_port_holds() {
    let record = service(|s| s.ports = ports(&[(80, 1), (90, 0), (80, 2)])).unwrap();
    assert_eq!(record.ports().pairs(), [(80, 2), (90, 0)]);
    use super::super::TargetPort;
    let targets = [80, 90, 100].map(|port| record.target_port(port));
    assert_eq!(
        targets,
        [Some(TargetPort::Number(2)), Some(TargetPort::Named), None]
    );
}

#[test]
fn sorts_addresses_into_hosts_and_ranges() {
    let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3];
    let record = service(|s| {
        s.addresses = vec![
            network_address(&[10, 0, 0, 1], None),
            network_address(&[10, 0, 0, 2], Some(32)),
            network_address(&mapped, None),
            network_address(&mapped, Some(128)),
            network_address(&[10, 1, 2, 3], Some(8)),
            network_address(&mapped, Some(112)),
            network_address(&[0xfd; 16], Some(8)),
            network_address(&mapped, Some(8)),
        ];
    });
    let record = record.unwrap();
    let vips: Vec<_> = record.vips().iter().map(|vip| vip.ip.to_string()).collect();
    assert_eq!(vips, ["10.0.0.1", "10.0.0.2", "10.1.2.3", "10.1.2.3"]);
    let cidrs: Vec<_> = record
        .cidrs()
        .iter()
        .map(|cidr| cidr.range.to_string())
        .collect();
    assert_eq!(cidrs, ["10.0.0.0/8", "10.1.0.0/16", "fd00::/8", "::/8"]);
}

#[test]
fn parses_the_names_that_are_identities() {
    let record = service(|s| {
        s.subject_alt_names = vec!["spiffe://td/ns/n/sa/s".into(), "db.example".into()];
    });
    let record = record.unwrap();
    assert_eq!(record.subject_alt_names().len(), 2);
    assert_eq!(record.identities().len(), 1);
}

#[test]
fn pods_of_a_deployment_share_their_profile() {
    let mut pool = Pool::default();
    let mut converter = Converter { pool: &mut pool };
    let mut pod = |number: u8| {
        let given = pb::Workload {
            uid: format!("c//Pod/shop/cart-{number}"),
            name: format!("cart-{number}"),
            namespace: "shop".into(),
            addresses: vec![vec![10, 0, 0, number]],
            services: [
                ("shop/a".to_owned(), pb::PortList::default()),
                ("shop/b".to_owned(), pb::PortList::default()),
            ]
            .into(),
            ..pb::Workload::default()
        };
        converter.workload(&given).unwrap()
    };
    let (one, two) = (pod(1), pod(2));
    assert!(Arc::ptr_eq(&one.profile, &two.profile));
    assert!(Arc::ptr_eq(&one.place, &two.place));
    assert!(size_of::<super::super::Workload>() <= 80);
}
