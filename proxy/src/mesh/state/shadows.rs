//! What one source tells under names that are in force as the other tells them.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use crate::mesh::record::{Name, Told};

/// For each name that both sources tell of, the record that is not in force: it comes back when the source in force removes its
/// own. Empty, and without memory, where a single source tells of the mesh.
#[derive(Debug, Default)]
pub(super) struct Shadows {
    table: HashTable<Told>,
    hasher: RandomState,
}

impl Shadows {
    pub(super) fn get(&self, name: Name<'_>) -> Option<&Told> {
        let hash = self.hasher.hash_one(name);
        self.table.find(hash, |held| held.record.name() == name)
    }

    /// Keeps what is told; returns what was kept under its name.
    pub(super) fn put(&mut self, told: Told) -> Option<Told> {
        let old = self.take(told.record.name());
        let Self { table, hasher } = self;
        let hash_of = |told: &Told| hasher.hash_one(told.record.name());
        table.insert_unique(hash_of(&told), told, hash_of);
        old
    }

    pub(super) fn take(&mut self, name: Name<'_>) -> Option<Told> {
        let hash = self.hasher.hash_one(name);
        let found = self
            .table
            .find_entry(hash, |held| held.record.name() == name);
        let (taken, _) = found.ok()?.remove();
        if self.table.is_empty() {
            self.table = HashTable::new();
        }
        Some(taken)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Told> {
        self.table.iter()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }
}
