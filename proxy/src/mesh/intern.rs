//! One allocation for what many records have in common.

use std::{
    hash::{BuildHasher, Hash},
    sync::Arc,
};

use foldhash::fast::RandomState;
use hashbrown::{Equivalent, HashTable};

use super::{
    port::PortMap,
    workload::{Account, Place, Profile},
};

/// A set of shared values. An entry lives as long as somebody else holds it, and until the next
/// [`sweep`](Self::sweep) after that.
pub(super) struct Interner<T: ?Sized> {
    table: HashTable<Arc<T>>,
    hasher: RandomState,
}

impl<T: ?Sized + Hash + Eq> Interner<T> {
    /// The shared form of `value`.
    pub(super) fn intern<V>(&mut self, value: V) -> Arc<T>
    where
        V: std::borrow::Borrow<T> + Into<Arc<T>>,
    {
        let hash = self.hasher.hash_one(value.borrow());
        if let Some(held) = self.table.find(hash, |held| **held == *value.borrow()) {
            return Arc::clone(held);
        }
        self.insert(hash, value.into())
    }

    /// The shared value that `key` stands for, made by `make` if there is none. `key` hashes as the value does.
    pub(super) fn intern_by<Q>(&mut self, key: &Q, make: impl FnOnce() -> Arc<T>) -> Arc<T>
    where
        Q: Hash + Equivalent<T> + ?Sized,
    {
        let hash = self.hasher.hash_one(key);
        if let Some(held) = self.table.find(hash, |held| key.equivalent(held)) {
            return Arc::clone(held);
        }
        self.insert(hash, make())
    }

    fn insert(&mut self, hash: u64, value: Arc<T>) -> Arc<T> {
        let Self { table, hasher } = self;
        table.insert_unique(hash, Arc::clone(&value), |held| hasher.hash_one(&**held));
        value
    }

    /// Forgets what nobody else holds, and gives memory back when little is left.
    fn sweep(&mut self) {
        let Self { table, hasher } = self;
        table.retain(|held| Arc::strong_count(held) > 1);
        if table.capacity() > 4 * table.len() {
            table.shrink_to(table.len(), |held| hasher.hash_one(&**held));
        }
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }
}

impl<T: ?Sized> std::fmt::Debug for Interner<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Interner({})", self.table.len())
    }
}

impl<T: ?Sized> Default for Interner<T> {
    fn default() -> Self {
        Self {
            table: HashTable::new(),
            hasher: RandomState::default(),
        }
    }
}

/// Everything that records share. Only the writer touches it.
#[derive(Debug, Default)]
pub(super) struct Pool {
    pub(super) strings: Interner<str>,
    pub(super) ports: Interner<[(u16, u16)]>,
    pub(super) accounts: Interner<Account>,
    pub(super) places: Interner<Place>,
    pub(super) profiles: Interner<Profile>,
    released: usize,
}

impl Pool {
    pub(super) fn string(&mut self, text: &str) -> Arc<str> {
        self.strings.intern(text)
    }

    pub(super) fn port_map(&mut self, pairs: Vec<(u16, u16)>) -> PortMap {
        PortMap::new(self.ports.intern(pairs.into_boxed_slice()))
    }

    /// Notes that `records` records were let go of. Sweeps once these are a good part of what is held, so that
    /// the cost of sweeping stays in proportion to the changes, and the garbage in proportion to the content.
    pub(super) fn release(&mut self, records: usize) {
        self.released += records;
        if self.released > 32 + self.profiles.len() / 4 {
            self.sweep();
        }
    }

    /// Profiles hold the other values, so they go first.
    pub(super) fn sweep(&mut self) {
        self.profiles.sweep();
        self.places.sweep();
        self.accounts.sweep();
        self.ports.sweep();
        self.strings.sweep();
        self.released = 0;
    }
}

#[cfg(test)]
impl Pool {
    /// How much somebody still holds.
    pub(super) fn held_after_sweep(&mut self) -> usize {
        self.sweep();
        self.strings.len()
            + self.ports.len()
            + self.accounts.len()
            + self.places.len()
            + self.profiles.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_share_one_allocation() {
        let mut pool = Pool::default();
        let (one, two) = (pool.string("shop"), pool.string("shop"));
        assert!(Arc::ptr_eq(&one, &two));
        assert_eq!(pool.strings.len(), 1);
    }

    #[test]
    fn a_sweep_frees_what_nobody_holds() {
        let mut pool = Pool::default();
        let kept = pool.string("kept");
        for number in 0..1000 {
            pool.string(&format!("gone-{number}"));
        }
        pool.sweep();
        assert_eq!(pool.strings.len(), 1);
        assert!(pool.strings.table.capacity() < 100);
        assert!(Arc::ptr_eq(&kept, &pool.string("kept")));
    }
}
