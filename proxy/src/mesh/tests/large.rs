//! Updates that take many turns.

use super::{super::*, fixture::*};

#[test]
fn readers_come_in_between_the_parts_of_a_large_update() {
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
        seen.retain(|count| (1..most).contains(count));
        seen.dedup();
        assert!(seen.len() > 10, "{seen:?}");
        assert_eq!(writer.join().unwrap().workloads, most);
    });
}
