//! Buffers that flows share: taken when a socket is readable, back when the bytes have left.

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes};
use parking_lot::Mutex;
use tokio::io::AsyncRead;

use super::pipe::Pipes;
use crate::budget::{Pressure, Stir, TAKING, pressure};

/// Sizes of buffers, smallest first, in bytes.
const SIZES: [usize; 4] = [4 << 10, 16 << 10, 64 << 10, 256 << 10];

/// How many idle buffers of each size are kept; more go back to the allocator. 3.75 MiB at most.
const KEEP: [usize; 4] = [64, 32, 16, 8];

/// A pool that nobody uses is trimmed twice after its last use, and then again this much later.
const LONGEST_REST: Duration = Duration::from_hours(1);

/// A pool of read buffers, and of pipes for what need not be read. Cheap to clone; all clones are one pool.
#[derive(Clone, Default)]
pub struct Buffers(Arc<Store>);

#[derive(Default)]
struct Store {
    shelves: [Shelf; SIZES.len()],
    pipes: Mutex<Pipes>,
    spliced: AtomicU64,
    /// For who trims the pool.
    stir: Stir,
}

/// Idle buffers of one size.
#[derive(Default)]
struct Shelf(Mutex<Stock>);

#[derive(Default)]
struct Stock {
    idle: Vec<Vec<u8>>,
    /// Buffers now with their takers.
    taken: usize,
    /// The fewest idle buffers since the last [`Buffers::trim`]: nobody needed these.
    spare: usize,
}

impl Buffers {
    /// An empty pool.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer of the size that `appetite` asks for, or a smaller one while memory is short.
    #[must_use]
    pub fn take(&self, appetite: Appetite) -> Buffer {
        TAKING.note();
        self.0.stir.note();
        let level = usize::from(appetite.level).min(largest(pressure()));
        let bytes = self.shelf(level).and_then(|shelf| {
            let mut stock = shelf.0.lock();
            stock.taken += 1;
            let bytes = stock.idle.pop();
            stock.spare = stock.spare.min(stock.idle.len());
            bytes
        });
        Buffer {
            bytes: bytes.unwrap_or_else(|| Vec::with_capacity(size(level))),
            start: 0,
            home: self.clone(),
        }
    }

    /// Buffers now in use.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.0
            .shelves
            .iter()
            .map(|shelf| shelf.0.lock().taken)
            .sum()
    }

    /// Bytes of the buffers now in use.
    #[must_use]
    pub fn taken_bytes(&self) -> usize {
        let shelves = self.0.shelves.iter().zip(SIZES);
        shelves
            .map(|(shelf, size)| shelf.0.lock().taken * size)
            .sum()
    }

    /// Bytes of idle buffers kept for the next taker.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        let shelves = self.0.shelves.iter().zip(SIZES);
        shelves
            .map(|(shelf, size)| shelf.0.lock().idle.len() * size)
            .sum()
    }

    /// Pipes now in use.
    #[must_use]
    pub fn pipes_taken(&self) -> usize {
        self.0.pipes.lock().taken()
    }

    /// Bytes that went through pipes, from socket to socket, since the start.
    #[must_use]
    pub fn spliced_bytes(&self) -> u64 {
        self.0.spliced.load(Relaxed)
    }

    /// Frees the idle buffers and pipes that nobody needed since the last call, so that memory of a burst goes back to the system.
    pub fn trim(&self) {
        for shelf in self.0.shelves.iter() {
            let mut stock = shelf.0.lock();
            let keep = stock.idle.len() - stock.spare.min(stock.idle.len());
            let freed = stock.idle.split_off(keep);
            stock.spare = stock.idle.len();
            drop(stock);
            drop(freed);
        }
        let unneeded = self.0.pipes.lock().trim();
        drop(unneeded);
    }

    /// Calls [`Self::trim`] once per `interval` while the pool is in use, for ever.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn tend(&self, interval: Duration) {
        loop {
            self.0.stir.rest(interval, LONGEST_REST).await;
            self.trim();
        }
    }

    /// For who takes a pipe or gives one back.
    pub(super) fn pipes(&self) -> &Mutex<Pipes> {
        self.0.stir.note();
        &self.0.pipes
    }

    pub(super) fn note_spliced(&self, bytes: u64) {
        self.0.spliced.fetch_add(bytes, Relaxed);
    }

    fn shelf(&self, level: usize) -> Option<&Shelf> {
        self.0.shelves.get(level)
    }

    fn put_back(&self, mut bytes: Vec<u8>) {
        let Some(level) = SIZES.iter().position(|size| *size == bytes.capacity()) else {
            return;
        };
        let (Some(shelf), Some(keep)) = (self.shelf(level), KEEP.get(level)) else {
            return;
        };
        bytes.clear();
        let mut stock = shelf.0.lock();
        stock.taken = stock.taken.saturating_sub(1);
        if stock.idle.len() < *keep && pressure() == Pressure::Calm {
            stock.idle.push(bytes);
            self.0.stir.note();
        }
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffers")
            .field("taken", &self.taken())
            .field("kept_bytes", &self.kept_bytes())
            .field("pipes_taken", &self.pipes_taken())
            .finish()
    }
}

/// The level of the largest buffers that are given out.
const fn largest(pressure: Pressure) -> usize {
    match pressure {
        Pressure::Calm => SIZES.len() - 1,
        Pressure::Tight => 2,
        Pressure::Critical => 1,
    }
}

fn size(level: usize) -> usize {
    SIZES.get(level).copied().unwrap_or(4 << 10)
}

/// How large the next read of a direction should be: grows fourfold when a read filled its
/// buffer, shrinks after two reads in turn that used less than a quarter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Appetite {
    level: u8,
    lean: u8,
}

impl Appetite {
    /// The smallest read that is at least `bytes` long, at most the largest size of the pool.
    #[must_use]
    pub fn at_least(bytes: usize) -> Self {
        let below = SIZES.iter().take(SIZES.len() - 1);
        let level = below.filter(|size| **size < bytes).count();
        Self {
            level: u8::try_from(level).unwrap_or(0),
            lean: 0,
        }
    }

    /// Bytes of the next read.
    #[must_use]
    pub fn bytes(self) -> usize {
        size(usize::from(self.level))
    }

    /// Learns from a read of `got` bytes; never grows beyond `limit` bytes.
    pub fn learn(&mut self, got: usize, limit: usize) {
        let asked = self.bytes();
        if got >= asked {
            self.lean = 0;
            if asked < limit && usize::from(self.level) + 1 < SIZES.len() {
                self.level += 1;
            }
        } else if got < asked / 4 {
            self.lean += 1;
            if self.lean >= 2 {
                self.lean = 0;
                self.level = self.level.saturating_sub(1);
            }
        } else {
            self.lean = 0;
        }
    }
}

/// A pooled buffer with unread bytes; goes back to its pool when dropped.
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    home: Buffers,
}

impl Buffer {
    /// Reads once from `io` into the free room, without growing.
    ///
    /// # Errors
    /// Those of the read.
    pub fn poll_read<T: AsyncRead + Unpin>(
        &mut self,
        io: &mut T,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let room = self.bytes.capacity() - self.bytes.len();
        let mut room = (&mut self.bytes).limit(room);
        tokio_util::io::poll_read_buf(Pin::new(io), cx, &mut room)
    }

    /// Copies as much of `from` as fits, and tells how much.
    pub fn fill(&mut self, from: &[u8]) -> usize {
        let room = self.bytes.capacity() - self.bytes.len();
        let part = from.get(..room).unwrap_or(from);
        self.bytes.extend_from_slice(part);
        part.len()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.home.put_back(std::mem::take(&mut self.bytes));
    }
}

impl Buf for Buffer {
    fn remaining(&self) -> usize {
        self.bytes.len() - self.start
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    fn advance(&mut self, count: usize) {
        self.start = self.start.saturating_add(count).min(self.bytes.len());
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.remaining())
    }
}

/// Bytes on their way: read by us into a pooled buffer, or shared with the HTTP/2 layer.
#[derive(Debug)]
#[non_exhaustive]
pub enum Payload {
    /// From a socket.
    Pooled(Buffer),
    /// From a DATA frame.
    Shared(Bytes),
}

impl Payload {
    /// No bytes.
    #[must_use]
    pub const fn empty() -> Self {
        Self::Shared(Bytes::new())
    }
}

impl Default for Payload {
    fn default() -> Self {
        Self::empty()
    }
}

impl Buf for Payload {
    fn remaining(&self) -> usize {
        match self {
            Self::Pooled(buffer) => buffer.remaining(),
            Self::Shared(bytes) => bytes.remaining(),
        }
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::Pooled(buffer) => buffer.chunk(),
            Self::Shared(bytes) => bytes.chunk(),
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::Pooled(buffer) => buffer.advance(count),
            Self::Shared(bytes) => bytes.advance(count.min(bytes.len())),
        }
    }
}
