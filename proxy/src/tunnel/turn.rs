//! One write per turn of a connection, instead of one per frame.
//!
//! The HTTP/2 library flushes after every DATA frame of some size, which would make each small
//! message of each stream a TLS record and a system call of its own. Here, a connection first lets
//! its streams run ([`Turn::poll_begin`]), then encodes all their frames into one buffer, and
//! writes that when its turn is over ([`Turn::poll_end`]).

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::timeout,
};

use super::{
    flood::{Flood, Watch},
    frames::Refusals,
};
use crate::telemetry::Limit;

/// Writes of this size and more are passed on at once: they fill records by themselves.
const LARGE: usize = 16 << 10;

/// How long the end of a connection waits for its peer's.
const LONGEST_LINGER: Duration = Duration::from_secs(2);

/// Room that stays allocated between turns.
const KEPT: usize = 8 << 10;

/// The transport as the HTTP/2 library sees it.
pub(super) struct Turnwise<T>(Arc<Mutex<Writer<T>>>);

/// The transport as the task of the connection sees it.
pub(super) struct Turn<T> {
    writer: Arc<Mutex<Writer<T>>>,
    begun: bool,
    /// As of the end of the last turn.
    moved: Moved,
}

struct Writer<T> {
    io: T,
    /// Encoded, not yet written.
    pending: Vec<u8>,
    written: usize,
    /// Bytes that were read and encoded so far.
    moved: Moved,
    /// Looks at what is read.
    watch: Watch,
    /// Looks at what is written, if that is of interest.
    refusals: Option<Refusals>,
    /// Whether a flush waits for the end of the turn.
    lazy: bool,
}

/// Bytes that a connection has moved.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Moved {
    pub(super) received: u64,
    pub(super) sent: u64,
}

impl Moved {
    pub(super) const fn both(self) -> u64 {
        self.received + self.sent
    }
}

/// Splits `io`, on which `watch` looks at what the peer sends, and `refusals` at what it is sent. Flushes are passed on until
/// [`Turn::defer`].
pub(super) fn turnwise<T>(
    io: T,
    watch: Watch,
    refusals: Option<Refusals>,
) -> (Turnwise<T>, Turn<T>) {
    let writer = Arc::new(Mutex::new(Writer {
        io,
        pending: Vec::new(),
        written: 0,
        moved: Moved::default(),
        watch,
        refusals,
        lazy: false,
    }));
    let turn = Turn {
        writer: Arc::clone(&writer),
        begun: false,
        moved: Moved::default(),
    };
    (Turnwise(writer), turn)
}

impl<T: AsyncWrite + Unpin> Turn<T> {
    /// From now on, what is flushed is written at the end of a turn.
    pub(super) fn defer(&self) {
        self.writer.lock().lazy = true;
    }

    /// Ready every second time: a woken connection lets everything else that is ready run first, so
    /// that its streams add their frames to the same write. One of no more than one of `streams` has
    /// nobody to wait for.
    pub(super) fn poll_begin(&mut self, cx: &mut Context<'_>, streams: usize) -> Poll<()> {
        self.begun = !self.begun && streams > 1;
        if self.begun {
            give_way(cx);
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    /// What was moved until the end of the last turn.
    pub(super) const fn moved(&self) -> Moved {
        self.moved
    }

    /// What the peer does too much of, if it does: then nothing more is read from it.
    pub(super) fn flood(&self) -> Option<Flood> {
        self.writer.lock().watch.found()
    }

    /// The limits that the library has turned the peer away by since this was last asked.
    pub(super) fn refusals(&self) -> Vec<Limit> {
        let mut writer = self.writer.lock();
        let refusals = writer.refusals.as_mut();
        refusals.map_or_else(Vec::new, Refusals::found)
    }

    /// Writes what the turn has encoded, and tells what was moved so far. While the transport takes no
    /// more, its task is woken when it does; an error is met again by the library's next read or write.
    pub(super) fn poll_end(&mut self, cx: &mut Context<'_>) -> Moved {
        let mut writer = self.writer.lock();
        if writer.poll_write_out(cx).is_ready() {
            let _ = Pin::new(&mut writer.io).poll_flush(cx);
        }
        self.moved = writer.moved;
        self.moved
    }
}

impl<T: AsyncRead + Unpin> Turn<T> {
    /// After an orderly end: reads until the peer has closed, too, two seconds at most, and throws that away. A socket that is closed
    /// with something unread, or gets it later, takes back what it has not delivered yet; and a stream that carries the connection
    /// is reset when it is dropped.
    pub(super) async fn linger(&self) {
        let mut room = [0; 1024];
        let closed = poll_fn(|cx| {
            let mut writer = self.writer.lock();
            loop {
                let mut room = ReadBuf::new(&mut room);
                let read = ready!(Pin::new(&mut writer.io).poll_read(cx, &mut room));
                if read.is_err() || room.filled().is_empty() {
                    return Poll::Ready(());
                }
            }
        });
        // Whoever does not close in time loses nothing by it that it would have read.
        let _ = timeout(LONGEST_LINGER, closed).await;
    }
}

/// Wakes the current task again after the others that are ready. To wake it at once instead would also wake an idle
/// worker of the runtime, which then takes the task to another processor.
fn give_way(cx: &mut Context<'_>) {
    let _ = pin!(tokio::task::yield_now()).poll(cx);
}

impl<T: AsyncWrite + Unpin> Writer<T> {
    /// Writes all that is pending.
    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest) = self.pending.get(self.written..)
            && !rest.is_empty()
        {
            let count = ready!(Pin::new(&mut self.io).poll_write(cx, rest))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count;
        }
        self.written = 0;
        self.pending.clear();
        self.pending.shrink_to(KEPT);
        Poll::Ready(Ok(()))
    }

    fn poll_take(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let bytes: usize = bufs.iter().map(|buf| buf.len()).sum();
        if bytes >= LARGE || self.pending.len() + bytes > 2 * LARGE {
            ready!(self.poll_write_out(cx))?;
        }
        let taken = if bytes >= LARGE {
            ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?
        } else {
            for buf in bufs {
                self.pending.extend_from_slice(buf);
            }
            bytes
        };
        self.moved.sent += u64::try_from(taken).unwrap_or(0);
        if let Some(refusals) = &mut self.refusals {
            let mut rest = taken;
            for buf in bufs {
                let sent = buf.get(..rest).unwrap_or(buf);
                refusals.follow(sent);
                rest -= sent.len();
            }
        }
        Poll::Ready(Ok(taken))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Turnwise<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut writer = self.0.lock();
        let writer = &mut *writer;
        if writer.watch.found().is_some() {
            return Poll::Pending; // the connection is about to be closed
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut writer.io).poll_read(cx, buf))?;
        let read = buf.filled().get(before..).unwrap_or_default();
        writer.watch.follow(read, writer.moved.sent);
        writer.moved.received += u64::try_from(read.len()).unwrap_or(0);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Turnwise<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().poll_take(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().poll_take(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut writer = self.0.lock();
        if writer.lazy {
            return Poll::Ready(Ok(()));
        }
        ready!(writer.poll_write_out(cx))?;
        Pin::new(&mut writer.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut writer = self.0.lock();
        ready!(writer.poll_write_out(cx))?;
        Pin::new(&mut writer.io).poll_shutdown(cx)
    }
}
