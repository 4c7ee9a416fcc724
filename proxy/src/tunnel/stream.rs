//! One HTTP/2 stream as a byte stream.

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::pool::Lease;
use crate::relay::{Appetite, Buffers, Endpoint, Fault, Payload};

/// A byte stream inside a tunnel. Dropped unfinished, it is reset (`CANCEL`; `NO_ERROR` by a
/// server that has sent its end). Holds no buffer; the peer's credit grows only as
/// [`Endpoint::release`] is called, so a stalled reader stops its sender.
pub struct Stream {
    send: SendStream<Payload>,
    recv: RecvStream,
    /// Keeps the pooled connection; frees its slot after the stream is gone.
    _lease: Option<Lease>,
}

/// The stream broke; see §8 of RFC 9113 for the codes.
#[derive(Debug, thiserror::Error)]
#[error("h2 failed")]
struct StreamError(#[source] h2::Error);

impl Stream {
    pub(super) const fn new(
        send: SendStream<Payload>,
        recv: RecvStream,
        lease: Option<Lease>,
    ) -> Self {
        Self {
            send,
            recv,
            _lease: lease,
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
                Some(Err(_)) | None => return Poll::Ready(Err(Fault::Reset)),
            }
        }
    }

    fn poll_put(
        &mut self,
        _: &mut Context<'_>,
        payload: &mut Payload,
    ) -> Poll<Result<usize, Fault>> {
        let payload = std::mem::take(payload);
        let bytes = payload.remaining();
        let sent = self.send.send_data(payload, false);
        // The direction from the stream tells why it broke.
        Poll::Ready(sent.map(|()| bytes).map_err(|_| Fault::Reset))
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        let sent = self.send.send_data(Payload::empty(), true);
        Poll::Ready(sent.map_err(|_| Fault::Reset))
    }

    fn release(&mut self, bytes: usize) {
        // Fails only for more than was received, which cannot be.
        let _ = self.recv.flow_control().release_capacity(bytes);
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.send.poll_reset(cx).map(|_| ())
    }
}

/// `NO_ERROR` and `CANCEL` are graceful ends, `STREAM_CLOSED` a broken pipe; all else is an error.
fn fault(error: h2::Error) -> Fault {
    let graceful = [Reason::NO_ERROR, Reason::CANCEL, Reason::STREAM_CLOSED];
    if error.is_reset() && error.reason().is_some_and(|why| graceful.contains(&why)) {
        Fault::Reset
    } else {
        Fault::Failed(Box::new(StreamError(error)))
    }
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
                    Fault::Reset => return Poll::Ready(Ok(())),
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
        let sent = this.stream.send.send_data(Payload::Pooled(buffer), false);
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
