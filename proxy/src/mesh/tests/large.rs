//! Updates that take many turns.

use xds_client::Extent;

use super::fixture::*;

#[test]
fn readers_come_in_between_the_parts_of_a_large_update() {
    // Where the machine is busy, readers may sleep through an update, but not through all.
    let mut updates = (0..50).map(|_| parts_seen_of_an_update());
    assert!(updates.any(|parts| parts > 10));
}

fn parts_seen_of_an_update() -> usize {
    let (mesh, most) = (mesh(), 5_000);
    let pods = (0..most).map(|n| pod(&format!("c//Pod/a/w{n}"), "").into());
    let update = Update {
        addresses: pods.collect(),
        ..Update::default()
    };
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| apply(&mesh, Extent::Changes, update));
        let mut seen = Vec::new();
        while !writer.is_finished() {
            seen.push(mesh.read().counts().workloads);
        }
        assert!(seen.is_sorted());
        assert_eq!(writer.join().unwrap().workloads, most);
        seen.retain(|count| (1..most).contains(count));
        seen.dedup();
        seen.len()
    })
}
