//! Properties of the port allocator.

use std::collections::{BTreeSet, HashMap};

use proptest::prelude::*;

use super::*;

fn app() -> SocketAddr {
    "10.0.0.9:80".parse().unwrap()
}

fn client() -> IpAddr {
    "10.0.0.1".parse().unwrap()
}

fn preferred(port: u16) -> bool {
    (PREFERRED_FIRST..=PREFERRED_LAST).contains(&port)
}

#[test]
fn serves_every_port_once_and_then_none() {
    let ports = SourcePorts::new();
    let total = usize::from(PREFERRED_LAST - EXTENSION_FIRST) + 1;
    let leases: Vec<_> = (0..total)
        .map(|_| ports.take(client(), app(), Range::Preferred).unwrap())
        .collect();
    let distinct: BTreeSet<u16> = leases.iter().map(PortLease::port).collect();
    assert_eq!(distinct.len(), total);
    assert!(ports.take(client(), app(), Range::Preferred).is_none());
    assert!(ports.take(client(), app(), Range::Extension).is_none());
    // Another destination, another client: all free.
    let other = SocketAddr::new(app().ip(), 81);
    assert!(ports.take(client(), other, Range::Preferred).is_some());
    let neighbour = "10.0.0.2".parse().unwrap();
    assert!(ports.take(neighbour, app(), Range::Preferred).is_some());
}

#[test]
fn stays_in_the_preferred_range_while_it_can() {
    let ports = SourcePorts::new();
    let count = usize::from(PREFERRED_LAST - PREFERRED_FIRST) + 1;
    let leases: Vec<_> = (0..count)
        .map(|_| ports.take(client(), app(), Range::Preferred).unwrap())
        .collect();
    assert!(leases.iter().all(|lease| preferred(lease.port())));
    let next = ports.take(client(), app(), Range::Preferred).unwrap();
    assert!(!preferred(next.port()));
}

#[test]
fn passes_over_a_live_captured_port_until_it_closes() {
    let ports = SourcePorts::new();
    let captured = SocketAddr::new(client(), 20_000);
    let live = ports.register(captured, app()).unwrap();
    let take_all = || -> Vec<_> {
        std::iter::from_fn(|| ports.take(client(), app(), Range::Preferred)).collect()
    };
    assert!(take_all().iter().all(|lease| lease.port() != 20_000));
    drop(live);
    assert!(take_all().iter().any(|lease| lease.port() == 20_000));
}

#[test]
fn a_captured_port_outside_of_the_range_costs_nothing() {
    let ports = SourcePorts::new();
    for port in [1023, 32_768, 65_535] {
        let captured = SocketAddr::new(client(), port);
        assert!(ports.register(captured, app()).is_none());
    }
    assert!(ports.0.lock().taken.is_empty());
}

#[test]
fn a_freed_port_comes_back_last() {
    let ports = SourcePorts::new();
    let first = ports
        .take(client(), app(), Range::Preferred)
        .unwrap()
        .port();
    for _ in PREFERRED_FIRST..PREFERRED_LAST {
        let next = ports.take(client(), app(), Range::Preferred).unwrap();
        assert_ne!(next.port(), first);
    }
    let again = ports.take(client(), app(), Range::Preferred).unwrap();
    assert_eq!(again.port(), first);
}

#[test]
fn memory_of_a_burst_is_given_back() {
    let ports = SourcePorts::new();
    let burst: Vec<_> = (0..20_000)
        .map(|_| ports.take(client(), app(), Range::Preferred))
        .collect();
    assert!(ports.0.lock().taken.capacity() >= 20_000);
    drop(burst);
    assert!(ports.0.lock().taken.capacity() <= SMALL);
}

proptest! {
    /// Whatever comes and goes, no tuple is held twice, and everything held is accounted for.
    #[test]
    fn no_tuple_is_held_twice(steps in proptest::collection::vec((0..4_u8, 0..3_u8, any::<u16>()), 1..400)) {
        let ports = SourcePorts::new();
        let mut held: HashMap<(IpAddr, u16), PortLease> = HashMap::new();
        for (what, who, port) in steps {
            let client = IpAddr::from([10, 0, 1, who]);
            let lease = match what {
                0 => ports.register(SocketAddr::new(client, port), app()),
                1 => ports.take(client, app(), Range::Preferred),
                2 => ports.take(client, app(), Range::Extension),
                _ => {
                    let some = held.keys().nth(usize::from(port) % held.len().max(1)).copied();
                    some.and_then(|key| held.remove(&key));
                    None
                }
            };
            if let Some(lease) = lease {
                let key = (client, lease.port());
                prop_assert!(held.insert(key, lease).is_none(), "{key:?} was given out twice");
            }
            prop_assert_eq!(ports.0.lock().taken.len(), held.len());
        }
        drop(held);
        prop_assert!(ports.0.lock().taken.is_empty());
    }
}
