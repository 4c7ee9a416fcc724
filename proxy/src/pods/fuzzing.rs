//! What the CNI agent may send, for the fuzzer, and for the test that replays its seeds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "not a part of the proxy: a panic is a failed test"
)]

use std::{fs::File, os::fd::OwnedFd};

use super::zds::{answer, decode};

/// A packet of the agent. The first byte says how many descriptors come with it, up to two, none of which is a namespace.
///
/// # Panics
/// When a descriptor that is no namespace is taken for one, or an answer is longer than the agent reads.
pub fn packet(bytes: &[u8]) {
    let Some((&count, packet)) = bytes.split_first() else {
        return;
    };
    let open = |_| File::open("/dev/null").expect("it is always there").into();
    let descriptors: Vec<OwnedFd> = (0..count % 3).map(open).collect();
    let has_descriptors = !descriptors.is_empty();
    match decode(packet, descriptors) {
        Ok(request) => assert!(!has_descriptors, "{request:?}"),
        Err(refusal) => {
            let _ = refusal.keeps_connection();
            assert!(answer(Err(&refusal.to_string())).len() <= 1024);
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_are_harmless() {
        testkit::seeds::replay("proxy/fuzz/seeds/zds", super::packet);
    }
}
