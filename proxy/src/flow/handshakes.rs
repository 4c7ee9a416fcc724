//! Bounds the TLS handshakes that are under way in one pod.
//!
//! A peer that connects and stays silent costs a slot until its deadline. When all slots are
//! taken, the oldest handshake gives way to the newest: a flood ends its own connections first,
//! and an honest handshake, which takes milliseconds, goes through.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Handshakes under way, oldest first.
#[derive(Debug, Default)]
pub(super) struct Handshakes(Mutex<VecDeque<CancellationToken>>);

impl Handshakes {
    /// Takes a slot, from the oldest handshake if none is free. The handshake has to give up when
    /// `given_way` fires, and gives its slot back by dropping what is returned.
    pub(super) fn begin(self: &Arc<Self>) -> Slot {
        let token = CancellationToken::new();
        let mut slots = self.0.lock();
        // A cancelled token is a finished handshake.
        while slots.front().is_some_and(CancellationToken::is_cancelled) {
            slots.pop_front();
        }
        if slots.len() >= LIMIT
            && let Some(oldest) = slots.pop_front()
        {
            oldest.cancel();
        }
        slots.push_back(token.clone());
        Slot {
            given_way: token.clone(),
            _done: token.drop_guard(),
        }
    }
}

/// A place among the handshakes under way.
#[derive(Debug)]
pub(super) struct Slot {
    /// Fires when the handshake must end to make room.
    pub(super) given_way: CancellationToken,
    _done: DropGuard,
}

/// Handshakes that one pod may have under way. Each holds a socket and about 40 KiB.
const LIMIT: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_gives_way_when_all_slots_are_taken() {
        let handshakes = Arc::new(Handshakes::default());
        let held: Vec<_> = (0..LIMIT).map(|_| handshakes.begin()).collect();
        assert!(held.iter().all(|slot| !slot.given_way.is_cancelled()));
        let newest = handshakes.begin();
        assert!(held[0].given_way.is_cancelled());
        assert!(!held[1].given_way.is_cancelled() && !newest.given_way.is_cancelled());
    }

    #[test]
    fn finished_handshakes_take_no_slot() {
        let handshakes = Arc::new(Handshakes::default());
        for _ in 0..3 * LIMIT {
            drop(handshakes.begin());
        }
        assert!(handshakes.0.lock().len() <= 1);
        let unfinished = handshakes.begin();
        assert!(!unfinished.given_way.is_cancelled());
    }
}
