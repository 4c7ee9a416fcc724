//! One HTTP/2 stream as a byte stream.

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    pool::Lease,
    queue::{Queue, Queued},
};
use crate::relay::{Appetite, Buffers, Endpoint, Fault, Leave, Payload};

/// A byte stream inside a tunnel. Dropped unfinished, it is reset (`CANCEL`; `NO_ERROR` by a
/// server that has sent its end), which its peer takes for an end; a flow that broke resets it with
/// `CONNECT_ERROR`. Holds no buffer; the peer's credit grows only as
/// [`Endpoint::release`] is called, so a stalled reader stops its sender.
pub struct Stream {
    send: SendStream<Queued>,
    recv: RecvStream,
    /// What the library still holds.
    queue: Queue,
    /// Keeps the pooled connection; frees its slot after the stream is gone.
    _lease: Option<Lease>,
}

/// The stream broke; see §8 of RFC 9113 for the codes.
#[derive(Debug, thiserror::Error)]
#[error("h2 failed")]
struct StreamError(#[source] h2::Error);

impl Stream {
    pub(super) fn new(send: SendStream<Queued>, recv: RecvStream, lease: Option<Lease>) -> Self {
        Self {
            send,
            recv,
            queue: Queue::default(),
            _lease: lease,
        }
    }

    /// Why nothing can be put here any more.
    fn fault(&mut self, cx: &mut Context<'_>) -> Fault {
        match self.send.poll_reset(cx) {
            Poll::Ready(Ok(reason)) => fault_of(Some(reason), reason.into()),
            Poll::Ready(Err(error)) => fault(error),
            Poll::Pending => Fault::Gone,
        }
    }

    /// The stream as reader and writer, for protocols that run inside (TLS of an inner tunnel).
    #[must_use]
    pub const fn buffered(self, buffers: Buffers) -> Buffered {
        Buffered {
            stream: self,
            unread: Bytes::new(),
            buffers,
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stream")
            .field(&self.recv.stream_id())
            .finish()
    }
}

impl Endpoint for Stream {
    fn poll_readable(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        _: &mut Appetite,
        _: &Buffers,
    ) -> Poll<Result<Option<Payload>, Fault>> {
        loop {
            return Poll::Ready(match ready!(self.recv.poll_data(cx)) {
                // An empty DATA frame is not an end.
                Some(Ok(bytes)) if bytes.is_empty() => continue,
                Some(Ok(bytes)) => Ok(Some(Payload::Shared(bytes))),
                Some(Err(error)) => Err(fault(error)),
                None => Ok(None),
            });
        }
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        if self.send.capacity() > 0 {
            return Poll::Ready(Ok(()));
        }
        // One byte is enough to go on: what is sent asks for its own room, and at most one chunk
        // waits. An idle stream that held more would take connection window from its neighbours.
        self.send.reserve_capacity(1);
        loop {
            if self.send.capacity() > 0 {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(Err(self.fault(cx))),
            }
        }
    }

    fn poll_put(
        &mut self,
        cx: &mut Context<'_>,
        payload: &mut Payload,
    ) -> Poll<Result<usize, Fault>> {
        let payload = std::mem::take(payload);
        let bytes = payload.remaining();
        let sent = self.send.send_data(self.queue.enter(payload), false);
        Poll::Ready(sent.map(|()| bytes).map_err(|_| self.fault(cx)))
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        let end = self.queue.enter(Payload::empty());
        let sent = self.send.send_data(end, true);
        Poll::Ready(sent.map_err(|_| self.fault(cx)))
    }

    fn release(&mut self, bytes: usize) {
        // Fails only for more than was received, which cannot be.
        let _ = self.recv.flow_control().release_capacity(bytes);
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        Poll::Ready(match ready!(self.send.poll_reset(cx)) {
            Ok(reason) => fault_of(Some(reason), reason.into()),
            Err(error) => fault(error),
        })
    }

    fn poll_leave(
        &mut self,
        cx: &mut Context<'_>,
        leave: Leave,
        _: &Buffers,
        late: bool,
    ) -> Poll<()> {
        if leave == Leave::Ended {
            return Poll::Ready(());
        }
        // A reset throws away what the library still holds, and a stream that is dropped unfinished is reset.
        let sent = self.queue.poll_empty(cx);
        if !late {
            ready!(sent);
        }
        if leave == Leave::Reset || sent.is_pending() {
            self.send.send_reset(Reason::CONNECT_ERROR);
        }
        Poll::Ready(())
    }
}

/// `NO_ERROR` and `CANCEL` are graceful ends, `STREAM_CLOSED` is a broken pipe, and `CONNECT_ERROR` the reset of the
/// connection at the far end; all else is an error.
fn fault_of(code: Option<Reason>, error: h2::Error) -> Fault {
    match code {
        Some(Reason::NO_ERROR | Reason::CANCEL | Reason::STREAM_CLOSED) => Fault::Gone,
        Some(Reason::CONNECT_ERROR) => Fault::Reset,
        _ => Fault::Failed(Box::new(StreamError(error))),
    }
}

/// What an error of a stream means. That of a connection is no end of its streams, whatever its code.
fn fault(error: h2::Error) -> Fault {
    let code = error.reason().filter(|_| error.is_reset());
    fault_of(code, error)
}

/// A [`Stream`] behind `AsyncRead` and `AsyncWrite`. Holds the unread rest of one DATA frame.
#[derive(Debug)]
pub struct Buffered {
    stream: Stream,
    unread: Bytes,
    buffers: Buffers,
}

impl AsyncRead for Buffered {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.unread.is_empty() {
            match ready!(this.stream.recv.poll_data(cx)) {
                Some(Ok(bytes)) => this.unread = bytes,
                Some(Err(error)) => match fault(error) {
                    Fault::Gone => return Poll::Ready(Ok(())),
                    Fault::Reset => {
                        return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                    }
                    Fault::Failed(error) => return Poll::Ready(Err(io::Error::other(error))),
                },
                None => return Poll::Ready(Ok(())),
            }
        }
        let part = this.unread.split_to(buf.remaining().min(this.unread.len()));
        buf.put_slice(&part);
        this.stream.release(part.len());
        if this.unread.is_empty() {
            // Lets go of the frame's memory.
            this.unread = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Buffered {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(this.stream.poll_room(cx)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        let mut buffer = this.buffers.take(Appetite::at_least(buf.len()));
        let count = buffer.fill(buf);
        let queued = this.stream.queue.enter(Payload::Pooled(buffer));
        let sent = this.stream.send.send_data(queued, false);
        Poll::Ready(sent.map(|()| count).map_err(io::Error::other))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A second end, or one after a reset, has nothing left to say.
        let _ = ready!(self.get_mut().stream.poll_finish(cx));
        Poll::Ready(Ok(()))
    }
}
