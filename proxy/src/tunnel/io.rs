//! A reader that fetches more than it was asked for.
//!
//! rustls reads at most 4 KiB at a time between records, which would cost a system call for each
//! quarter of a record. This layer below it reads up to [`LARGEST_READ`] at once, into a pooled
//! buffer that is given back as soon as it runs dry.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Buf;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::relay::{Appetite, Buffer, Buffers};

/// The largest read.
const LARGEST_READ: usize = 256 << 10;

/// `T` with reads ahead.
#[derive(Debug)]
pub(super) struct ReadAhead<T> {
    io: T,
    held: Option<Buffer>,
    appetite: Appetite,
    buffers: Buffers,
}

impl<T> ReadAhead<T> {
    pub(super) fn new(io: T, buffers: Buffers) -> Self {
        Self {
            io,
            held: None,
            appetite: Appetite::default(),
            buffers,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for ReadAhead<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut held = match this.held.take() {
            Some(held) => held,
            None => {
                let mut fresh = this.buffers.take(this.appetite);
                let got = ready!(fresh.poll_read(&mut this.io, cx))?;
                this.appetite.learn(got, LARGEST_READ);
                fresh
            }
        };
        let chunk = held.chunk();
        let part = chunk.get(..buf.remaining()).unwrap_or(chunk);
        buf.put_slice(part);
        let count = part.len();
        held.advance(count);
        if held.has_remaining() {
            this.held = Some(held);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for ReadAhead<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
