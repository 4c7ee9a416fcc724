//! The map of connections.

use std::{sync::Arc, time::Duration};

use hashbrown::HashMap;
use parking_lot::Mutex;

use super::{
    Key,
    lease::{Lease, Load, Tunnel},
};

/// Connections kept; beyond, the one that was idle longest is let go.
const CAPACITY: usize = 500;

/// Connections of a key that are opened because those with room carry bulk: beyond, streams share with it.
const SPREAD: usize = 4;

/// All connections of a pool. An entry exists only while it holds a connection.
pub(super) struct Shelf {
    held: Mutex<Held>,
    capacity: usize,
}

#[derive(Default)]
struct Held {
    tunnels: HashMap<Key, Vec<Arc<Tunnel>>, foldhash::fast::RandomState>,
    count: usize,
}

impl Shelf {
    pub(super) fn new() -> Self {
        Self::with_capacity(CAPACITY)
    }

    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self {
            held: Mutex::default(),
            capacity,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.held.lock().count
    }

    /// A slot on the oldest connection of `key` that has one, so that the newer ones can empty, but on none that
    /// carries bulk, behind which small messages would wait; else on the one that `open` starts.
    pub(super) fn lease(&self, key: &Key, open: impl Fn() -> Arc<Tunnel>) -> Lease {
        let mut held = self.held.lock();
        loop {
            if let Some(lease) = held.tunnels.get(key).and_then(|list| choose(list)) {
                return lease;
            }
            if held.count >= self.capacity {
                held.evict();
            }
            held.count += 1;
            held.tunnels.entry(key.clone()).or_default().push(open());
        }
    }

    /// Gives `tunnel` no more streams.
    pub(super) fn forget(&self, key: &Key, tunnel: &Tunnel) {
        tunnel.load.close();
        self.remove(key, &tunnel.load);
    }

    /// Takes a connection off; without effect if it is off already.
    pub(super) fn remove(&self, key: &Key, load: &Arc<Load>) {
        self.held.lock().remove(key, load);
    }

    /// Takes a connection off that was idle for `release`, or for `spare` while another one of its
    /// key has room; tells whether it did.
    pub(super) fn retire(
        &self,
        key: &Key,
        load: &Arc<Load>,
        release: Duration,
        spare: Duration,
    ) -> bool {
        let mut held = self.held.lock();
        let others = held.tunnels.get(key).into_iter().flatten();
        let others = others.filter(|tunnel| !Arc::ptr_eq(&tunnel.load, load));
        let limit = if others
            .map(|other| &other.load)
            .any(|other| other.has_room())
        {
            spare
        } else {
            release
        };
        let retired = load.streams() == 0 && load.idle_since().elapsed() >= limit;
        if retired {
            held.remove(key, load);
        }
        retired
    }

    pub(super) fn clear(&self) {
        let held = std::mem::take(&mut *self.held.lock());
        for tunnel in held.tunnels.values().flatten() {
            tunnel.load.close();
        }
    }
}

fn choose(list: &[Arc<Tunnel>]) -> Option<Lease> {
    let with_room = || list.iter().filter(|tunnel| tunnel.load.has_room());
    let quiet = with_room().find(|tunnel| !tunnel.load.carries_bulk());
    let any = || with_room().min_by_key(|tunnel| tunnel.load.streams());
    let shared = || (list.len() >= SPREAD).then(any).flatten();
    quiet.or_else(shared).and_then(Lease::take)
}

impl Held {
    fn remove(&mut self, key: &Key, load: &Arc<Load>) {
        let Some(list) = self.tunnels.get_mut(key) else {
            return;
        };
        let before = list.len();
        list.retain(|tunnel| !Arc::ptr_eq(&tunnel.load, load));
        self.count -= before - list.len();
        if list.is_empty() {
            self.tunnels.remove(key);
        }
    }

    /// Lets go of the connection that was idle longest, if any is idle.
    fn evict(&mut self) {
        let each = self.tunnels.iter().flat_map(|(key, list)| {
            let idle = list.iter().filter(|tunnel| tunnel.load.streams() == 0);
            idle.map(move |tunnel| (key, &tunnel.load))
        });
        let oldest = each.min_by_key(|(_, load)| load.idle_since());
        if let Some((key, load)) = oldest.map(|(key, load)| (key.clone(), Arc::clone(load))) {
            self.remove(&key, &load);
        }
    }
}
