//! Bytes on their way between a TLS stream and its socket.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A byte queue over one allocation, which is given back whenever the queue runs empty.
///
/// Bytes between `start` and `end` are queued. The allocation is zeroed once and then written
/// over, so a busy stream pays for no clearing.
#[derive(Debug, Default)]
pub(super) struct Wire {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Wire {
    pub(super) fn queued(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    pub(super) fn queued_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.end).unwrap_or_default()
    }

    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Takes `n` bytes from the front.
    pub(super) fn consume(&mut self, n: usize) {
        self.start = self.end.min(self.start + n);
    }

    /// At least `room` free bytes behind the queue; moves or grows it where needed.
    pub(super) fn spare(&mut self, room: usize) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.bytes.len() - self.end < room && self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.bytes.len() - self.end < room {
            self.bytes.resize(self.end + room, 0);
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// Says that `n` bytes of [`Self::spare`] were written.
    pub(super) fn commit(&mut self, n: usize) {
        self.end = self.bytes.len().min(self.end + n);
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Gives the allocation back if nothing is queued.
    pub(super) fn release(&mut self) {
        if self.is_empty() && !self.bytes.is_empty() {
            *self = Self::default();
        }
    }

    /// Reads once from `io`, with `room` bytes at hand. Returns the number of bytes, 0 at its end.
    pub(super) fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        io: &mut S,
        cx: &mut Context<'_>,
        room: usize,
    ) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(self.spare(room));
        ready!(Pin::new(io).poll_read(cx, &mut buf))?;
        let n = buf.filled().len();
        self.commit(n);
        Poll::Ready(Ok(n))
    }

    /// Writes the queue to `io` until it is empty, then gives the allocation back.
    pub(super) fn poll_drain<S: AsyncWrite + Unpin>(
        &mut self,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let n = ready!(Pin::new(&mut *io).poll_write(cx, self.queued()))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.consume(n);
        }
        Poll::Ready(Ok(()))
    }
}
