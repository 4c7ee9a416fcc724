//! Bounds the TLS handshakes that are under way in one pod.
//!
//! A peer that connects and stays silent costs a slot until its deadline. When all slots are
//! taken, the oldest handshake gives way to the newest: a flood ends its own connections first,
//! and an honest handshake, which takes milliseconds, goes through. One address can take only a part of them.

use std::{collections::VecDeque, net::IpAddr, sync::Arc};

use parking_lot::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    config,
    telemetry::{Limit, Limits},
};

/// Handshakes under way, oldest first.
#[derive(Debug)]
pub(super) struct Handshakes {
    under_way: Mutex<VecDeque<Handshake>>,
    per_pod: usize,
    per_peer: usize,
    limits: Limits,
}

#[derive(Debug)]
struct Handshake {
    peer: IpAddr,
    /// Cancelled when it has ended, too.
    given_way: CancellationToken,
}

impl Handshakes {
    pub(super) fn new(config: &config::Limits, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            under_way: Mutex::default(),
            per_pod: config.handshakes_per_pod,
            per_peer: config.handshakes_per_peer,
            limits,
        })
    }

    /// Takes a slot for `peer`: from the oldest of its own if it has its part, from the oldest of all if none is free. The
    /// handshake has to give up when `given_way` fires, and gives its slot back by dropping what is returned.
    pub(super) fn begin(&self, peer: IpAddr) -> Slot {
        let given_way = CancellationToken::new();
        let crowded = self.enter(Handshake {
            peer,
            given_way: given_way.clone(),
        });
        if let Some(limit) = crowded {
            self.limits.hit(limit, &peer);
        }
        Slot {
            given_way: given_way.clone(),
            _done: given_way.drop_guard(),
        }
    }

    /// Tells which limit made another one give way.
    fn enter(&self, new: Handshake) -> Option<Limit> {
        let mut under_way = self.under_way.lock();
        under_way.retain(|one| !one.given_way.is_cancelled());
        let mut of_peer = under_way.iter().enumerate();
        let mut of_peer = of_peer.by_ref().filter(|(_, one)| one.peer == new.peer);
        let oldest = of_peer.next().map(|(index, _)| index);
        let crowded = match oldest {
            Some(index) if 1 + of_peer.count() >= self.per_peer => {
                Some((index, Limit::HandshakesPerPeer))
            }
            _ if under_way.len() >= self.per_pod => Some((0, Limit::HandshakesPerPod)),
            _ => None,
        };
        if let Some((index, _)) = crowded
            && let Some(oldest) = under_way.remove(index)
        {
            oldest.given_way.cancel();
        }
        under_way.push_back(new);
        crowded.map(|(_, limit)| limit)
    }
}

/// A place among the handshakes under way.
#[derive(Debug)]
pub(super) struct Slot {
    /// Fires when the handshake must end to make room.
    pub(super) given_way: CancellationToken,
    _done: DropGuard,
}

#[cfg(test)]
mod tests {
    use super::*;

    const PER_POD: usize = 16;
    const PER_PEER: usize = 4;

    fn handshakes() -> Arc<Handshakes> {
        let config = config::Limits {
            handshakes_per_pod: PER_POD,
            handshakes_per_peer: PER_PEER,
            ..Default::default()
        };
        Handshakes::new(&config, Limits::default())
    }

    fn peer(last: usize) -> IpAddr {
        IpAddr::from([10, 0, 0, u8::try_from(last).unwrap()])
    }

    fn waiting(slots: &[Slot]) -> Vec<bool> {
        let waits = |slot: &Slot| !slot.given_way.is_cancelled();
        slots.iter().map(waits).collect()
    }

    #[test]
    fn the_oldest_gives_way_when_all_slots_are_taken() {
        let handshakes = handshakes();
        let held: Vec<_> = (0..PER_POD).map(|n| handshakes.begin(peer(n))).collect();
        assert_eq!(waiting(&held), [true; PER_POD]);
        let newest = handshakes.begin(peer(99));
        assert!(held[0].given_way.is_cancelled());
        assert!(!held[1].given_way.is_cancelled() && !newest.given_way.is_cancelled());
        assert_eq!(handshakes.limits.hits(Limit::HandshakesPerPod), 1);
    }

    #[test]
    fn one_address_takes_its_part_and_no_more() {
        let handshakes = handshakes();
        let honest = handshakes.begin(peer(1));
        let flood: Vec<_> = (0..PER_PEER + 2)
            .map(|_| handshakes.begin(peer(2)))
            .collect();
        assert_eq!(waiting(&flood), [false, false, true, true, true, true]);
        assert!(!honest.given_way.is_cancelled());
        assert_eq!(handshakes.limits.hits(Limit::HandshakesPerPeer), 2);
    }

    #[test]
    fn finished_handshakes_take_no_slot() {
        let handshakes = handshakes();
        for _ in 0..3 * PER_POD {
            drop(handshakes.begin(peer(1)));
        }
        assert!(handshakes.under_way.lock().len() <= 1);
        let unfinished = handshakes.begin(peer(1));
        assert!(!unfinished.given_way.is_cancelled());
    }
}
