//! The bytes of a TLS 1.3 connection after its handshake (RFC 8446).
//!
//! A [`TlsStream`] copies nothing beside the cipher's own pass: it seals from the writer's buffer
//! into the wire buffer and opens from the wire buffer into the reader's. Both wire buffers exist
//! only while bytes are in them, so an idle connection holds keys and a few counters.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustls::{
    client::ClientConnectionData, kernel::KernelConnection, pki_types::CertificateDer,
    server::ServerConnectionData,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    record::{
        Content, HEADER, MAX_PLAINTEXT, OVERHEAD, Protection, RecordError, body_len, inner_len,
    },
    wire::Wire,
};

/// rustls's side of an open connection: it answers key updates.
pub(super) enum Kernel {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

/// A TLS 1.3 connection over `S` after its handshake. Idle memory: about 1 KiB of keys.
pub(super) struct TlsStream<S> {
    pub(super) io: S,
    rx: Protection,
    tx: Protection,
    kernel: Kernel,
    peer: Box<[CertificateDer<'static>]>,
    /// Ciphertext as it came.
    pub(super) incoming: Wire,
    /// Opened bytes that the reader had no room for: the first `ready` bytes behind the record header of `incoming`.
    ready: Opened,
    /// What is wrong with the record behind the bytes that were read last.
    failed: Option<io::Error>,
    /// The beginning of a post-handshake message, the rest of which comes in records to follow.
    begun: Vec<u8>,
    /// Records as they go.
    pub(super) outgoing: Wire,
    /// Bytes to have at hand for the next read: grows while reads fill it, falls back when they do not.
    appetite: usize,
    state: ReadState,
    closing: bool,
}

/// Part of the record at the front of `incoming` that is open and not yet read.
#[derive(Debug, Default, Clone, Copy)]
struct Opened {
    start: usize,
    end: usize,
    /// Whole length of the record that holds the bytes.
    record: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReadState {
    Open,
    /// The peer said close_notify.
    Closed,
}

impl<S> TlsStream<S> {
    pub(super) fn new(
        io: S,
        rx: Protection,
        tx: Protection,
        kernel: Kernel,
        peer: Box<[CertificateDer<'static>]>,
    ) -> Self {
        Self {
            io,
            rx,
            tx,
            kernel,
            peer,
            incoming: Wire::default(),
            ready: Opened::default(),
            failed: None,
            begun: Vec::new(),
            outgoing: Wire::default(),
            appetite: MIN_READ,
            state: ReadState::Open,
            closing: false,
        }
    }

    pub(super) fn with_received(mut self, incoming: Wire) -> Self {
        self.incoming = incoming;
        self
    }

    /// The peer's certificate chain, leaf first, as it was verified.
    pub(super) fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        &self.peer
    }

    /// Opens complete records into `buf` for as long as there is room. Says whether bytes came or the end was reached.
    fn open_records(&mut self, buf: &mut ReadBuf<'_>) -> io::Result<bool> {
        let before = buf.filled().len();
        while buf.remaining() > 0 && self.state == ReadState::Open {
            if self.ready.start < self.ready.end {
                self.serve_opened(buf);
                continue;
            }
            let Some(length) = body_len(self.incoming.queued()).map_err(invalid)? else {
                break;
            };
            let Some(body) = self.incoming.queued_mut().get_mut(HEADER..HEADER + length) else {
                break;
            };
            let inner = inner_len(length);
            let (content, n) = if inner <= buf.remaining() {
                let out = buf.initialize_unfilled_to(inner);
                self.rx.open_into(body, out).map_err(invalid)?
            } else {
                let (content, n) = self.rx.open_within(body).map_err(invalid)?;
                if content == Content::Data {
                    self.expect_data()?;
                    self.ready = Opened {
                        start: HEADER,
                        end: HEADER + n,
                        record: HEADER + length,
                    };
                    continue;
                }
                (content, n)
            };
            if content == Content::Data {
                self.expect_data()?;
                buf.advance(n);
            } else {
                let message = control_message(buf, body, inner, n)?;
                self.control(content, message)?;
            }
            self.incoming.consume(HEADER + length);
        }
        Ok(buf.filled().len() > before || self.state == ReadState::Closed)
    }

    /// Copies opened bytes that an earlier read had no room for.
    fn serve_opened(&mut self, buf: &mut ReadBuf<'_>) {
        let Opened { start, end, record } = self.ready;
        let n = buf.remaining().min(end - start);
        if let Some(bytes) = self.incoming.queued().get(start..start + n) {
            buf.put_slice(bytes);
        }
        self.ready.start += n;
        if self.ready.start == end {
            self.incoming.consume(record);
            self.ready = Opened::default();
        }
    }

    /// Fails within a handshake message, which nothing else may interrupt (RFC 8446 §5.1).
    fn expect_data(&self) -> io::Result<()> {
        if self.begun.is_empty() {
            Ok(())
        } else {
            Err(invalid(RecordError::Peer("data within a message")))
        }
    }

    /// Obeys an alert or a piece of post-handshake messages (RFC 8446 §4.6, §6).
    fn control(&mut self, content: Content, message: Vec<u8>) -> io::Result<()> {
        match (content, &*message) {
            (Content::Alert, [_, CLOSE_NOTIFY]) => {
                self.state = ReadState::Closed;
                Ok(())
            }
            // It announces a close_notify (RFC 8446 section 6.1).
            (Content::Alert, [_, USER_CANCELED]) => Ok(()),
            (Content::Alert, [_, alert]) => Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                format!("peer sent TLS alert {alert}"),
            )),
            (Content::Handshake, _) => self.post_handshake(message),
            (Content::Alert | Content::Data, _) => {
                Err(invalid(RecordError::Peer("malformed alert")))
            }
        }
    }

    /// Obeys the messages that are whole, and keeps what is begun, [`MAX_CONTROL`] bytes at most.
    fn post_handshake(&mut self, piece: Vec<u8>) -> io::Result<()> {
        let mut messages = std::mem::take(&mut self.begun);
        if messages.is_empty() {
            messages = piece;
        } else {
            messages.extend_from_slice(&piece);
        }
        let mut rest = &*messages;
        while let Some((&[kind, a, b, c], after)) = rest.split_first_chunk() {
            let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX);
            if length > MAX_CONTROL {
                return Err(invalid(RecordError::Peer("control message too long")));
            }
            let Some((body, after)) = after.split_at_checked(length) else {
                break;
            };
            self.obey(kind, body, after.is_empty())?;
            rest = after;
        }
        self.begun = rest.to_vec();
        Ok(())
    }

    /// Obeys one post-handshake message. A key does not change between two messages of a record (RFC 8446 §5.1).
    fn obey(&mut self, kind: u8, body: &[u8], is_last: bool) -> io::Result<()> {
        match (kind, body) {
            // Tickets are never used: every connection shakes hands in full.
            (NEW_SESSION_TICKET, _) => Ok(()),
            (KEY_UPDATE, &[asked]) if is_last => {
                let (sequence, secrets) = match &mut self.kernel {
                    Kernel::Client(kernel) => kernel.update_rx_secret(),
                    Kernel::Server(kernel) => kernel.update_rx_secret(),
                }
                .map_err(io::Error::other)?;
                self.rx = Protection::new(sequence, &secrets).map_err(invalid)?;
                if asked == 1 { self.update_tx() } else { Ok(()) }
            }
            _ => Err(invalid(RecordError::Peer("unexpected handshake message"))),
        }
    }

    /// Announces a new sending key and takes it (RFC 8446 §4.6.3). The peer pays for each with a
    /// message of its own, so the queue is bounded by what it makes us send.
    pub(super) fn update_tx(&mut self) -> io::Result<()> {
        if self.outgoing.len() > MAX_QUEUED {
            return Err(invalid(RecordError::Peer("flood of key updates")));
        }
        self.seal(Content::Handshake, &[KEY_UPDATE, 0, 0, 1, 0])?;
        let (sequence, secrets) = match &mut self.kernel {
            Kernel::Client(kernel) => kernel.update_tx_secret(),
            Kernel::Server(kernel) => kernel.update_tx_secret(),
        }
        .map_err(io::Error::other)?;
        self.tx = Protection::new(sequence, &secrets).map_err(invalid)?;
        Ok(())
    }

    pub(super) fn seal(&mut self, content: Content, plaintext: &[u8]) -> io::Result<()> {
        let n = self
            .tx
            .seal(
                content,
                plaintext,
                self.outgoing.spare(plaintext.len() + OVERHEAD),
            )
            .map_err(invalid)?;
        self.outgoing.commit(n);
        Ok(())
    }

    /// Seals a text that says itself what it is.
    #[cfg(any(test, fuzzing))]
    pub(super) fn seal_inner(&mut self, inner: &[u8]) -> io::Result<()> {
        let room = self.outgoing.spare(inner.len() + OVERHEAD);
        let n = self.tx.seal_inner(inner, room).map_err(invalid)?;
        self.outgoing.commit(n);
        Ok(())
    }

    /// Seals what `slices` hold, about [`MAX_QUEUED`] bytes at most. Small neighbours share one record; large slices
    /// are sealed from where they lie.
    fn seal_slices(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.tx.is_worn() {
            self.update_tx()?;
        }
        let (mut taken, mut gathered) = (0, 0);
        for slice in slices {
            let mut rest: &[u8] = slice;
            while !rest.is_empty() && taken < MAX_QUEUED {
                let now = if gathered == 0 && (rest.len() >= GATHER || slices.len() == 1) {
                    let now = rest.len().min(MAX_PLAINTEXT);
                    self.seal(Content::Data, rest.get(..now).unwrap_or_default())?;
                    now
                } else {
                    let now = self.gather(gathered, rest);
                    gathered += now;
                    if gathered == GATHER {
                        self.seal_gathered(gathered)?;
                        gathered = 0;
                    }
                    now
                };
                taken += now;
                rest = rest.get(now..).unwrap_or_default();
            }
        }
        self.seal_gathered(gathered)?;
        Ok(taken)
    }

    /// Copies from `rest` behind `gathered` bytes that wait for their record, up to [`GATHER`] of them.
    fn gather(&mut self, gathered: usize, rest: &[u8]) -> usize {
        let room = self.outgoing.spare(GATHER + OVERHEAD);
        let free = room
            .get_mut(HEADER + gathered..HEADER + GATHER)
            .unwrap_or_default();
        let n = free.len().min(rest.len());
        if let (Some(to), Some(from)) = (free.get_mut(..n), rest.get(..n)) {
            to.copy_from_slice(from);
        }
        n
    }

    fn seal_gathered(&mut self, gathered: usize) -> io::Result<()> {
        if gathered > 0 {
            let n = self
                .tx
                .seal_within(
                    Content::Data,
                    gathered,
                    self.outgoing.spare(GATHER + OVERHEAD),
                )
                .map_err(invalid)?;
            self.outgoing.commit(n);
        }
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream<S> {
    fn poll_read_inner(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        let before = buf.filled().len();
        loop {
            match self.open_records(buf) {
                Ok(false) if buf.remaining() > 0 => {}
                Ok(_) => return Poll::Ready(Ok(())),
                Err(error) if buf.filled().len() > before => {
                    self.failed = Some(error);
                    return Poll::Ready(Ok(()));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
            let n = match self.incoming.poll_fill(&mut self.io, cx, self.appetite) {
                Poll::Ready(n) => n?,
                Poll::Pending => {
                    self.appetite = MIN_READ;
                    self.incoming.release();
                    return Poll::Pending;
                }
            };
            match n {
                0 if self.incoming.is_empty() => return Poll::Ready(Ok(())),
                0 => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                _ if n >= self.appetite => self.appetite = (self.appetite * 4).min(MAX_READ),
                _ => {}
            }
        }
    }

    fn poll_write_inner(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.outgoing.len() >= MAX_QUEUED {
            ready!(self.outgoing.poll_drain(&mut self.io, cx))?;
        }
        Poll::Ready(self.seal_slices(slices))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.get_mut().poll_read_inner(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_inner(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_inner(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.outgoing.poll_drain(&mut this.io, cx))?;
        this.outgoing.release();
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closing {
            this.closing = true;
            this.seal(Content::Alert, &[WARNING, CLOSE_NOTIFY])?;
        }
        ready!(this.outgoing.poll_drain(&mut this.io, cx))?;
        this.outgoing.release();
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

impl<S> std::fmt::Debug for TlsStream<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsStream")
            .field("rx", &self.rx)
            .field("tx", &self.tx)
            .finish_non_exhaustive()
    }
}

/// The bytes of a control record, from wherever it was opened to.
fn control_message(
    buf: &mut ReadBuf<'_>,
    body: &[u8],
    inner: usize,
    n: usize,
) -> io::Result<Vec<u8>> {
    let opened = if inner <= buf.remaining() {
        &*buf.initialize_unfilled_to(n)
    } else {
        body
    };
    let message = opened
        .get(..n)
        .filter(|message| message.len() <= MAX_CONTROL);
    message
        .map(<[u8]>::to_vec)
        .ok_or_else(|| invalid(RecordError::Peer("control message too long")))
}

fn invalid(error: RecordError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
const WARNING: u8 = 1;
const CLOSE_NOTIFY: u8 = 0;
const USER_CANCELED: u8 = 90;
/// Bytes at hand for the first read after a pause.
const MIN_READ: usize = 16 * 1024;
/// Bytes at hand for a read of a busy connection: 16 records.
const MAX_READ: usize = 256 * 1024;
/// Ciphertext that may wait for the socket before a writer has to.
const MAX_QUEUED: usize = 256 * 1024;
/// Slices shorter than this share a record; longer ones are sealed where they lie.
const GATHER: usize = 4096;
/// Longest post-handshake message: tickets are a few hundred bytes.
const MAX_CONTROL: usize = 16_384;
