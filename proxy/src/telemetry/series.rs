//! A bounded table of series: looked up by their labels, forgotten when nothing happens to them.
//!
//! The table is cut into shards, each behind a lock of its own that is held for one look-up or for a walk over that shard,
//! so that neither a scrape nor an eviction makes a flow wait for long.

use std::{
    hash::BuildHasher,
    hash::Hash,
    sync::{
        Arc,
        atomic::{
            AtomicU8, AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::Duration,
};

use foldhash::quality::RandomState;
use hashbrown::HashTable;
use parking_lot::RwLock;
use tokio::{
    task::yield_now,
    time::{MissedTickBehavior, interval},
};

/// What is counted under one set of labels.
pub(super) trait Counted {
    /// Whether something is still open that will be counted here. Asked while nobody else can look the series up.
    fn in_use(&self) -> bool;
}

/// Labels by which a series is found, and made if there is none. Equal ones have equal hashes.
pub(super) trait Key: Hash {
    /// What is found.
    type Series: Counted;

    /// Whether `series` is the one of these labels.
    fn names(&self, series: &Self::Series) -> bool;

    /// The series of these labels, at zero.
    fn make(&self) -> Self::Series;
}

/// All series of some families.
#[derive(Debug)]
pub(super) struct Table<S> {
    hasher: RandomState,
    first: Shard<S>,
    rest: Box<[Shard<S>]>,
    len: AtomicUsize,
    evicted: AtomicU64,
}

type Shard<S> = RwLock<HashTable<Arc<Entry<S>>>>;

/// A series in its table.
#[derive(Debug)]
pub(super) struct Entry<S> {
    hash: u64,
    /// Sweeps since it was last looked up or in use.
    unused: AtomicU8,
    pub(super) series: S,
}

impl<S: Counted> Table<S> {
    /// The series of `key`, with `touch` done to it before anybody can evict it. If there is none, one is made,
    /// provided that there are fewer than `limit` now.
    pub(super) fn touch<K: Key<Series = S>>(
        &self,
        key: &K,
        limit: usize,
        touch: impl Fn(&S),
    ) -> Option<Arc<Entry<S>>> {
        let hash = self.hasher.hash_one(key);
        self.find(hash, key, &touch).or_else(|| {
            let room = |len| (len < limit).then_some(len + 1);
            self.len.fetch_update(AcqRel, Acquire, room).ok()?;
            Some(self.insert(hash, key, touch))
        })
    }

    /// As [`Self::touch`], whatever the number of series.
    pub(super) fn touch_always<K: Key<Series = S>>(
        &self,
        key: &K,
        touch: impl Fn(&S),
    ) -> Arc<Entry<S>> {
        let hash = self.hasher.hash_one(key);
        self.find(hash, key, &touch).unwrap_or_else(|| {
            self.len.fetch_add(1, AcqRel);
            self.insert(hash, key, touch)
        })
    }

    fn find<K: Key<Series = S>>(
        &self,
        hash: u64,
        key: &K,
        touch: impl Fn(&S),
    ) -> Option<Arc<Entry<S>>> {
        let table = self.shard(hash).read();
        let entry = table.find(hash, |entry| entry.is(hash, key))?;
        Some(entry.touched(touch))
    }

    /// Makes the series of `key`, for which room was reserved, unless somebody else did meanwhile.
    fn insert<K: Key<Series = S>>(&self, hash: u64, key: &K, touch: impl Fn(&S)) -> Arc<Entry<S>> {
        let mut table = self.shard(hash).write();
        if let Some(entry) = table.find(hash, |entry| entry.is(hash, key)) {
            self.len.fetch_sub(1, AcqRel);
            return entry.touched(touch);
        }
        let entry = Arc::new(Entry {
            hash,
            unused: AtomicU8::new(0),
            series: key.make(),
        });
        let entry = table.insert_unique(hash, entry, |entry| entry.hash);
        entry.get().touched(touch)
    }

    /// Number of series.
    pub(super) fn len(&self) -> usize {
        self.len.load(Acquire)
    }

    /// Number of series that were evicted so far.
    pub(super) fn evicted(&self) -> u64 {
        self.evicted.load(Relaxed)
    }

    /// All series, in no order.
    pub(super) fn all(&self) -> Vec<Arc<Entry<S>>> {
        let mut all = Vec::with_capacity(self.len());
        for shard in self.shards() {
            all.extend(shard.read().iter().map(Arc::clone));
        }
        all
    }

    /// Evicts what was neither looked up nor in use for `idle`, and up to an eighth of that longer; `cleared` is called
    /// after each sweep that evicted something. Never ends.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn evict_idle(&self, idle: Duration, cleared: impl Fn()) {
        let mut sweeps = interval((idle / u32::from(SWEEPS)).max(SHORTEST_SWEEP));
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            sweeps.tick().await;
            let before = self.evicted();
            for shard in self.shards() {
                self.sweep(shard);
                yield_now().await;
            }
            if self.evicted() != before {
                cleared();
            }
        }
    }

    /// Evicts at once what is not in use and, unless `all`, was not since the last sweep. Tells how much.
    pub(super) fn shed(&self, all: bool) -> u64 {
        let before = self.evicted();
        for shard in self.shards() {
            self.retain(shard, |entry| {
                entry.series.in_use() || !all && entry.unused.load(Relaxed) == 0
            });
        }
        self.evicted() - before
    }

    fn sweep(&self, shard: &Shard<S>) {
        self.retain(shard, |entry| {
            if entry.series.in_use() {
                entry.unused.store(0, Relaxed);
                return true;
            }
            entry.unused.fetch_add(1, Relaxed) < SWEEPS
        });
    }

    fn retain(&self, shard: &Shard<S>, keep: impl Fn(&Entry<S>) -> bool) {
        let mut table = shard.write();
        let before = table.len();
        table.retain(|entry| keep(entry));
        let gone = before - table.len();
        if table.capacity() > 4 * table.len() {
            let len = table.len();
            table.shrink_to(len, |entry| entry.hash);
        }
        drop(table);
        self.len.fetch_sub(gone, AcqRel);
        self.evicted
            .fetch_add(gone.try_into().unwrap_or(u64::MAX), Relaxed);
    }

    fn shards(&self) -> impl Iterator<Item = &Shard<S>> {
        std::iter::once(&self.first).chain(&self.rest)
    }

    /// Bits that the table of a shard makes little use of choose the shard.
    fn shard(&self, hash: u64) -> &Shard<S> {
        let index = usize::try_from((hash >> 40) & 0xff).unwrap_or(0) % SHARDS;
        self.rest.get(index).unwrap_or(&self.first)
    }
}

impl<S> Default for Table<S> {
    fn default() -> Self {
        Self {
            hasher: RandomState::default(),
            first: RwLock::default(),
            rest: (1..SHARDS).map(|_| RwLock::default()).collect(),
            len: AtomicUsize::new(0),
            evicted: AtomicU64::new(0),
        }
    }
}

impl<S: Counted> Entry<S> {
    fn is<K: Key<Series = S>>(&self, hash: u64, key: &K) -> bool {
        self.hash == hash && key.names(&self.series)
    }

    fn touched(self: &Arc<Self>, touch: impl Fn(&S)) -> Arc<Self> {
        touch(&self.series);
        self.unused.store(0, Relaxed);
        Arc::clone(self)
    }
}

/// A walk over one of so many shards of 50,000 series takes some 50 µs.
const SHARDS: usize = 64;
/// Sweeps that an unused series survives.
const SWEEPS: u8 = 8;
/// Pause between sweeps, however short the idle time.
const SHORTEST_SWEEP: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests;
