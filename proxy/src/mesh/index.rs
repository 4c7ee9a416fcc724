//! The two building blocks of the state: records under small ids, and hash indexes that hold ids.

use std::hash::{BuildHasher, Hash, Hasher};

use foldhash::fast::RandomState;
use hashbrown::HashTable;

/// Records under ids that stay the same for as long as the record is there, however often it is replaced.
#[derive(Debug)]
pub(super) struct Slab<T> {
    slots: Vec<Option<(T, u64)>>,
    free: Vec<u32>,
    inserted: u64,
}

impl<T> Slab<T> {
    pub(super) fn insert(&mut self, value: T) -> u32 {
        self.inserted += 1;
        let slot = Some((value, self.inserted));
        if let Some(id) = self.free.pop()
            && let Some(place) = self.slots.get_mut(id as usize)
        {
            *place = slot;
            return id;
        }
        // Four billion records do not fit into memory; were it so, the last id would be shared and its record replaced.
        let id = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        self.slots.push(slot);
        id
    }

    /// Makes room for `more` records without the slack of doubling.
    pub(super) fn reserve(&mut self, more: usize) {
        let more = more.saturating_sub(self.free.len());
        if more > self.slots.len() / 2 {
            self.slots.reserve_exact(more);
        }
    }

    pub(super) fn get(&self, id: u32) -> Option<&T> {
        self.slot(id).map(|(value, _)| value)
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        let slot = self.slots.get_mut(id as usize)?.as_mut();
        slot.map(|(value, _)| value)
    }

    /// When the record was first seen: later ones have greater numbers; replacing changes nothing.
    pub(super) fn since(&self, id: u32) -> u64 {
        self.slot(id).map_or(0, |(_, since)| *since)
    }

    pub(super) fn remove(&mut self, id: u32) -> Option<T> {
        let (value, _) = self.slots.get_mut(id as usize)?.take()?;
        self.free.push(id);
        if self.is_empty() {
            self.slots = Vec::new();
            self.free = Vec::new();
        }
        Some(value)
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().flatten().map(|(value, _)| value)
    }

    /// Up to `most` places from the one at `from`; `None` beyond the last one.
    pub(super) fn page(&self, from: usize, most: usize) -> Option<impl Iterator<Item = &T>> {
        let rest = self.slots.get(from..).filter(|rest| !rest.is_empty())?;
        let page = rest.iter().take(most).flatten();
        Some(page.map(|(value, _)| value))
    }

    fn slot(&self, id: u32) -> Option<&(T, u64)> {
        self.slots.get(id as usize)?.as_ref()
    }
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            inserted: 0,
        }
    }
}

/// Finds ids by a key that the records themselves hold: an entry is the id and half a hash, nine bytes with its
/// control byte. A key may have many ids. Growing does not touch the records.
#[derive(Default)]
pub(super) struct Index {
    table: HashTable<Entry>,
    hasher: RandomState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    hash: u32,
    id: u32,
}

impl Entry {
    /// The table takes its position from the low and its tag from the high bits.
    fn spread(&self) -> u64 {
        u64::from(self.hash).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }
}

impl Index {
    /// The ids under `key`, and rarely others: the caller compares the keys of the records.
    pub(super) fn find(&self, key: impl Hash) -> impl Iterator<Item = u32> {
        let wanted = self.entry(key, 0);
        self.table
            .iter_hash(wanted.spread())
            .filter(move |held| held.hash == wanted.hash)
            .map(|held| held.id)
    }

    pub(super) fn insert(&mut self, key: impl Hash, id: u32) {
        let entry = self.entry(key, id);
        self.table
            .insert_unique(entry.spread(), entry, Entry::spread);
    }

    pub(super) fn remove(&mut self, key: impl Hash, id: u32) {
        let entry = self.entry(key, id);
        if let Ok(held) = self.table.find_entry(entry.spread(), |held| *held == entry) {
            held.remove();
        }
        if self.table.capacity() > 64 && self.table.capacity() / 8 > self.table.len() {
            self.table.shrink_to(2 * self.table.len(), Entry::spread);
        }
    }

    pub(super) fn reserve(&mut self, more: usize) {
        self.table.reserve(more, Entry::spread);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    fn entry(&self, key: impl Hash, id: u32) -> Entry {
        let hash = self.hasher.hash_one(key) >> 32;
        Entry {
            hash: u32::try_from(hash).unwrap_or_default(),
            id,
        }
    }
}

/// A host name as a key: one for all spellings, as the letters of DNS have no case.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostKey<'a>(pub(super) &'a str);

impl Hash for HostKey<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let mut room = [0; 32];
        for part in self.0.as_bytes().chunks(room.len()) {
            if let Some(lower) = room.get_mut(..part.len()) {
                lower.copy_from_slice(part);
                lower.make_ascii_lowercase();
                state.write(lower);
            }
        }
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Index({})", self.table.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_reused_and_age_is_not() {
        let mut slab = Slab::default();
        let (a, b) = (slab.insert("a"), slab.insert("b"));
        assert!(slab.since(a) < slab.since(b));
        assert_eq!(slab.remove(a), Some("a"));
        assert_eq!(slab.remove(a), None);
        let c = slab.insert("c");
        assert_eq!((c, slab.len()), (a, 2));
        assert!(slab.since(b) < slab.since(c));
        assert_eq!(slab.iter().copied().collect::<Vec<_>>(), ["c", "b"]);
    }

    #[test]
    fn a_key_may_have_many_ids() {
        let mut index = Index::default();
        for id in 0..10_000 {
            index.insert(("net", id / 4), id);
        }
        let mut found: Vec<_> = index.find(("net", 7)).filter(|id| id / 4 == 7).collect();
        found.sort_unstable();
        assert_eq!(found, [28, 29, 30, 31]);
        for id in 0..10_000 {
            index.remove(("net", id / 4), id);
        }
        assert_eq!(index.len(), 0);
        assert!(index.table.capacity() <= 64);
    }
}
